"""Folders of low-rank adapters: the numbers are PEFT's own, and nothing of them is left out."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gengram import GengramForCausalLM, GengramTokenizer, MotifMemoryConfig, attach_memory
from gengram.cli import main
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.loaded_model import load_config, load_model, load_tokenizer, load_whole
from gengram.inference.model_folder import model_files
from gengram.inference.soft_letters import soft_letters
from gengram.inference.table_structure import value_norms
from gengram.motif_memory.ways.kept_fold import memories_of
from gengram.support.errors import InputError

TEXT = "ACGTTGCATAAGCNNACGTTTAGC"


def drawn(model):
    """The model with random numbers in every weight that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def folders(tiny_folder, tmp_path):
    """A model, adapters of it, and the model with these as PEFT has it."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        target_parameters=["mlp.experts.gate_up_proj"],
        modules_to_save=["motif_memory"],
    )
    truth = drawn(get_peft_model(GengramForCausalLM.from_pretrained(base), config))
    truth.save_pretrained(tmp_path / "adapters")
    return base, tmp_path / "adapters", truth


def ids_of(model):
    return GengramTokenizer()(TEXT, return_tensors="pt").input_ids.to(model.device)


@torch.no_grad()
def last_states(model):
    return model(ids_of(model), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("head", ["causal", None])
def test_numbers_are_those_of_peft(head, folders):
    base, adapters, truth = folders
    loaded = load_model(str(adapters), head, device="cpu")
    assert torch.equal(last_states(loaded.model), last_states(truth))
    assert not torch.equal(last_states(loaded.model), last_states(load_model(str(base), head, device="cpu").model))
    assert type(loaded.tokenizer) is GengramTokenizer and not loaded.model.training


def test_adapters_of_a_model_with_an_attached_memory(tmp_path):
    torch.manual_seed(0)
    tokenizer = GengramTokenizer()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    attach_memory(model, MotifMemoryConfig(embedding_dim=8), layers=[1], tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    truth = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["motif_memory"])))
    truth.save_pretrained(tmp_path / "adapters")
    loaded = load_model(str(tmp_path / "adapters"), "causal", device="cpu").model
    assert torch.equal(last_states(loaded), last_states(truth))


def test_files_of_the_model_count_too(folders):
    base, adapters, _ = folders
    assert {"adapter_config.json", "adapter_model.safetensors"} < {*model_files(adapters)}
    assert model_files(adapters)["base/model.safetensors"] == base / "model.safetensors"


def test_a_job_does_not_go_on_with_another_model(folders, tmp_path, monkeypatch, capsys):
    base, adapters, _ = folders
    fasta, output = tmp_path / "a.fa", tmp_path / "out.parquet"
    fasta.write_text(f">a\n{TEXT}\n")
    words = ["embed", str(fasta), "--model", str(adapters), "--output", str(output), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("gengram.inference.jobs.embed.EmbedJob.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(words)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert main(words) != 0
    assert "model.files.base/model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["a name", "a weight less", "another size"])
def test_adapters_that_do_not_fit_are_refused(change, folders):
    _, adapters, _ = folders
    weights = load_file(adapters / "adapter_model.safetensors")
    name = next(each for each in weights if "q_proj.lora_A" in each)
    if change == "a name":
        weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    elif change == "a weight less":
        del weights[name]
    else:
        weights[name] = weights[name][:1].clone()
    save_file(weights, adapters / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"expected adapters of GengramForCausalLM"):
        load_model(str(adapters), "causal", device="cpu")


def test_weights_that_the_model_lacks_are_not_hidden_by_its_adapters(folders):
    base, adapters, _ = folders
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"got none of 'model\.norm\.weight', which would be random"):
        load_model(str(adapters), "causal", device="cpu")


@pytest.mark.parametrize(
    "base, words",
    [
        (None, "expected the model that the adapters belong to as base_model_name_or_path, got None"),
        ("./gone", r"holds adapters of \./gone, and there is no such folder here; write where it is into"),
        ("adapters", "which are adapters, too"),
    ],
)
def test_a_model_that_is_not_there_is_named(base, words, folders):
    _, adapters, _ = folders
    place = adapters / "adapter_config.json"
    base = str(adapters) if base == "adapters" else base
    place.write_text(json.dumps({**json.loads(place.read_text()), "base_model_name_or_path": base}))
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(InputError, match=words):
            load(str(adapters))


def test_a_model_beside_its_adapters_is_refused(folders):
    _, adapters, truth = folders
    truth.merge_and_unload().save_pretrained(adapters)
    with pytest.raises(InputError, match=r"If they are merged into it already, delete adapter_config\.json"):
        load_model(str(adapters), "causal", device="cpu")
    (adapters / "adapter_config.json").unlink()
    merged = load_model(str(adapters), "causal", device="cpu").model
    assert torch.isfinite(last_states(merged)).all()


def test_a_classifier_is_to_be_merged_first(folders, tmp_path):
    base, adapters, _ = folders
    with pytest.raises(InputError, match=r"merge them: PeftModel\.from_pretrained"):
        load_model(str(adapters), "classes", device="cpu")
    with pytest.raises(InputError, match=r"merge them"):
        load_whole(AutoModelForSequenceClassification, str(adapters), has_new_head=True)
    model = GengramForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, adapters).merge_and_unload().save_pretrained(tmp_path / "merged")  # as it says
    assert load_whole(AutoModelForSequenceClassification, str(tmp_path / "merged"), has_new_head=True)


def test_without_peft(folders, monkeypatch):
    def load_adapter(self, *_, **__):
        raise ImportError("PEFT is not available.")

    monkeypatch.setattr(GengramForCausalLM, "load_adapter", load_adapter)
    with pytest.raises(ImportError, match="holds adapters, which need peft: pip install peft"):
        load_model(str(folders[1]), "causal", device="cpu")


def test_what_reads_the_weights_past_adapters_refuses_them(folders):
    base, _, _ = folders
    for target in ("value_proj", "embeddings.0"):
        model = get_peft_model(GengramForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=[target]))
        (memory, *_), tokens = memories_of(model), BaseTokens.of(GengramTokenizer())
        with pytest.raises(ValueError, match=r"got a peft\.tuners\.lora\.layer\.\w+: merge adapters"):
            value_norms(memory, 1)
        if target == "embeddings.0":
            with pytest.raises(ValueError, match="merge adapters"), soft_letters(model, torch.ones(1, 4, 5), tokens):
                raise AssertionError("it should not be read")


def test_of_a_trained_memory_the_copy_in_use_counts(folders):
    _, adapters, truth = folders
    loaded = load_model(str(adapters), "causal", device="cpu").model
    memories = memories_of(loaded)
    assert len(memories) == len(loaded.config.memory_layers) == len(loaded.memory)
    assert [*loaded.memory.values()] == memories
    assert torch.equal(memories[0]["CA"], memories_of(truth)[0]["CA"])
    with truth.disable_adapter():
        assert not torch.equal(memories_of(truth)[0]["CA"], memories[0]["CA"])
