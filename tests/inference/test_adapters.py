"""Folders of low-rank adapters: the numbers are PEFT's own, and nothing of them is left out."""

import copy
import json
import shutil
import sys

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tolerances import SAME_MODEL_FP32
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gengram import (
    GengramConfig,
    GengramForCausalLM,
    GengramForSequenceClassification,
    GengramModel,
    GengramQuantizationConfig,
    GengramTokenizer,
    MotifMemoryConfig,
    attach_memory,
)
from gengram.cli import main
from gengram.evaluation.evaluated_model import EvaluatedModel
from gengram.evaluation.run_files import _content_of
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.jobs.job import ModelOptions
from gengram.inference.jobs.record import _model_record
from gengram.inference.kmer_shares import _weights
from gengram.inference.loaded_model import load_config, load_model, load_tokenizer, load_whole
from gengram.inference.model_folder import model_files
from gengram.inference.soft_letters import soft_letters
from gengram.inference.table_structure import value_norms
from gengram.motif_memory.ways.kept_fold import memories_of
from gengram.support.errors import InputError

TEXT = "ACGTTGCATAAGCNNACGTTTAGC"
MERGED = dict(rtol=0, atol=SAME_MODEL_FP32)


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
    torch.testing.assert_close(last_states(loaded.model), last_states(truth), **MERGED)
    assert (last_states(loaded.model) - last_states(load_model(str(base), head, device="cpu").model)).abs().max() > 0.1
    assert not any("lora" in name for name, _ in loaded.model.named_modules())
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
    torch.testing.assert_close(last_states(loaded), last_states(truth), **MERGED)


def test_files_of_the_model_count_too(folders):
    base, adapters, _ = folders
    assert {"adapter_config.json", "adapter_model.safetensors"} < {*model_files(adapters)}
    assert model_files(adapters)["base: model.safetensors"] == base / "model.safetensors"
    shutil.copytree(adapters, base / "adapter")  # not of the model around it
    assert not any(name.startswith("adapter") for name in model_files(base))


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
    assert "model.files.base: model.safetensors" in capsys.readouterr().err


WORDS = "expected adapters of GengramForCausalLM"


@pytest.mark.parametrize(
    "change, words",
    [("a name", WORDS), ("a weight less", WORDS), ("another size", WORDS), ("half", "its weights are damaged")],
)
def test_adapters_that_do_not_fit_are_refused(change, words, folders):
    _, adapters, _ = folders
    weights = load_file(adapters / "adapter_model.safetensors")
    name = next(each for each in weights if "q_proj.lora_A" in each)
    if change == "a name":
        weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    elif change == "a weight less":
        del weights[name]
    else:
        weights[name] = weights[name][:1].clone()
    place = adapters / "adapter_model.safetensors"
    save_file(weights, place, {"format": "pt"})
    if change == "half":
        place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
    with pytest.raises(InputError, match=words):
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


@pytest.mark.parametrize(
    "kind",
    [
        LoraConfig(r=2, target_modules=["q_proj", "key_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.2"]),
        IA3Config(target_modules=["v_proj", "value_proj"], feedforward_modules=[]),
    ],
)
@pytest.mark.parametrize("head", ["causal", None])
def test_other_kinds(kind, head, folders, tmp_path):
    truth = drawn(get_peft_model(GengramForCausalLM.from_pretrained(folders[0]), copy.deepcopy(kind)))
    truth.save_pretrained(tmp_path / "other")
    loaded = load_model(str(tmp_path / "other"), head, device="cpu").model
    torch.testing.assert_close(last_states(loaded), last_states(truth), **MERGED)
    if head:
        ids = ids_of(loaded)
        torch.testing.assert_close(loaded(ids).logits, truth(input_ids=ids).logits, **MERGED)


def test_the_old_format_of_weights(folders):
    _, adapters, truth = folders
    place = adapters / "adapter_model.safetensors"
    torch.save(load_file(place), adapters / "adapter_model.bin")
    place.unlink()
    loaded = load_model(str(adapters), "causal", device="cpu").model
    torch.testing.assert_close(last_states(loaded), last_states(truth), **MERGED)
    (adapters / "adapter_model.bin").write_bytes(b"half")
    with pytest.raises(InputError, match="its weights are damaged"):
        load_model(str(adapters), "causal", device="cpu")
    (adapters / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"expected the weights of adapters in .*, got neither"):
        load_model(str(adapters), "causal", device="cpu")


@pytest.mark.parametrize("fields", [{"peft_type": "NEWTYPE"}, {"r": "x"}, {"lora_alpha": None}, {"peft_type": None}])
def test_odd_configurations_are_named(fields, folders):
    _, adapters, _ = folders
    place = adapters / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))
    with pytest.raises(InputError, match=r"adapters (that peft .* knows|of GengramForCausalLM)"):
        load_model(str(adapters), "causal", device="cpu")


def test_adapters_of_the_body_alone(folders, tmp_path):
    body = GengramModel.from_pretrained(folders[0])
    truth = drawn(get_peft_model(body, LoraConfig(r=2, target_modules=["q_proj"])))
    truth.save_pretrained(tmp_path / "body")
    for head in (None, "causal"):
        loaded = load_model(str(tmp_path / "body"), head, device="cpu").model
        torch.testing.assert_close(last_states(loaded), last_states(truth), **MERGED)


def test_adapters_beside_quantised_weights(folders, tmp_path):
    base, *_ = folders
    whole = GengramForCausalLM.from_pretrained(base, quantization_config=GengramQuantizationConfig("int8"))
    whole.save_pretrained(tmp_path / "int8")
    GengramTokenizer().save_pretrained(tmp_path / "int8")
    model = GengramForCausalLM.from_pretrained(tmp_path / "int8")
    truth = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    truth.save_pretrained(tmp_path / "other")
    loaded = load_model(str(tmp_path / "other"), "causal", device="cpu").model
    assert torch.equal(last_states(loaded), last_states(truth))


def test_classifiers(folders, tmp_path):
    base, adapters, truth = folders
    with pytest.raises(InputError, match=r"names of its classes are not known.*merge_and_unload\(\)"):
        load_model(str(adapters), "classes", device="cpu")
    model = load_whole(AutoModelForSequenceClassification, str(adapters), has_new_head=True, num_labels=3)  # to train
    torch.testing.assert_close(last_states(model), last_states(truth), **MERGED)
    assert model.score.weight.shape[0] == 3 and all(weight.requires_grad for weight in model.parameters())

    model = GengramForSequenceClassification.from_pretrained(base)
    truth = drawn(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])))
    truth.save_pretrained(tmp_path / "classifier")
    states = load_model(str(tmp_path / "classifier"), None, device="cpu").model  # what it learned is in its body
    torch.testing.assert_close(last_states(states), last_states(truth), **MERGED)
    with pytest.raises(InputError, match="got those of a classifier"):
        load_model(str(tmp_path / "classifier"), "causal", device="cpu")


@pytest.mark.parametrize("trains_head", [True, False])
def test_adapters_of_a_saved_classifier(trains_head, tiny_folder, tmp_path):
    names = {0: "promoter", 1: "enhancer", 2: "none"}
    model = GengramForSequenceClassification.from_pretrained(tiny_folder, num_labels=3, id2label=names)
    drawn(model).save_pretrained(tmp_path / "base")
    GengramTokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS" if trains_head else None, r=2, target_modules=["q_proj"])
    base = GengramForSequenceClassification.from_pretrained(tmp_path / "base")
    truth = drawn(get_peft_model(base, config))
    truth.save_pretrained(tmp_path / "adapters")
    model = load_model(str(tmp_path / "adapters"), "classes", device="cpu").model
    assert model.config.id2label == names
    with torch.no_grad():
        torch.testing.assert_close(model(ids_of(model)).logits, truth(ids_of(truth)).logits, **MERGED)
    body = load_model(str(tmp_path / "adapters"), None, device="cpu").model
    torch.testing.assert_close(last_states(body), last_states(truth), **MERGED)


def test_classes_are_those_that_the_adapters_were_trained_with(tiny_folder, tmp_path, capsys):
    def names(*of_classes):
        return dict(id2label=dict(enumerate(of_classes)), label2id={name: i for i, name in enumerate(of_classes)})

    base, adapters, whole = (tmp_path / name for name in ("base", "adapters", "whole"))
    model = GengramForSequenceClassification.from_pretrained(tiny_folder, num_labels=2, **names("open", "closed"))
    drawn(model).save_pretrained(base)
    GengramTokenizer().save_pretrained(base)
    model = GengramForSequenceClassification.from_pretrained(base, **names("closed", "open"))
    truth = drawn(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])))
    truth.save_pretrained(adapters)
    assert load_config(str(adapters)).id2label == {0: "closed", 1: "open"}
    load_model(str(adapters), "classes", device="cpu").model.save_pretrained(whole)
    GengramTokenizer().save_pretrained(whole)
    fasta = tmp_path / "some.fa"
    fasta.write_text(f">a\n{TEXT}\n")
    found = []
    for folder in (adapters, whole):
        output = tmp_path / f"{folder.name}.tsv"
        command = f"mutate a:3-5 --fasta {fasta} --model {folder} --class open --output {output} --quiet"
        assert main(command.split()) in (None, 0), capsys.readouterr().err
        found.append(output.read_text())
    assert found[0] == found[1]
    trained = load_whole(AutoModelForSequenceClassification, str(adapters), has_new_head=True, num_labels=5)
    assert trained.score.weight.shape[0] == 5
    torch.testing.assert_close(last_states(trained), last_states(truth), **MERGED)


def test_a_model_beside_which_adapters_are_kept(folders, tmp_path, monkeypatch):
    """Relative places count from the working directory, else from the folder; names of adapters make folders."""
    _, adapters, truth = folders
    place = adapters / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "base_model_name_or_path": "../base"}))
    monkeypatch.chdir("/")
    loaded = load_model(str(adapters), "causal", device="cpu").model
    torch.testing.assert_close(last_states(loaded), last_states(truth), **MERGED)
    (tmp_path / "outer").mkdir()
    adapters.rename(tmp_path / "outer" / "mine")
    with pytest.raises(InputError, match=r"holds no model, expected a folder of adapters: '.*/outer/mine'"):
        load_config(str(tmp_path / "outer"))


def test_a_model_on_the_hub_is_read_and_recorded_at_its_revision(folders, tmp_path, monkeypatch):
    base, adapters, _ = folders
    asked = []

    def from_pretrained(name, **loading):
        asked.append((name, loading.get("revision")))
        config = GengramConfig.from_pretrained(base)
        config._commit_hash = {"v1": "a" * 40, "v2": "b" * 40}[loading["revision"]]
        return config

    monkeypatch.setattr("gengram.inference.loaded_model.AutoConfig.from_pretrained", from_pretrained)
    place = adapters / "adapter_config.json"
    fields = {"base_model_name_or_path": "org/base", "revision": "v1"}
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))
    commits = {}
    for revision in (None, "v2"):
        options = ModelOptions(str(adapters), revision=revision)
        commits[revision] = _model_record(options, None)["base_commit"]
    assert commits == {None: "a" * 40, "v2": "b" * 40}
    assert set(asked) == {("org/base", "v1"), ("org/base", "v2")}
    model = EvaluatedModel(str(adapters))
    assert ["a" * 40] in _content_of(model)


def test_adapters_on_the_hub_are_to_be_fetched_first(folders, tmp_path):
    cached = tmp_path / "cache/models--me--adapters"
    shutil.copytree(folders[1], cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    with pytest.raises(InputError, match="hf download me/adapters --local-dir FOLDER"):
        load_config("me/adapters", cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="me/others: there is no such folder here"):
        load_config("me/others", cache_dir=tmp_path / "cache")


def test_without_peft(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="holds adapters, which need peft: pip install peft"):
        load_model(str(folders[1]), "causal", device="cpu")


def test_info_names_the_model(folders, capsys):
    _, adapters, _ = folders
    assert main(["info", str(adapters)]) == 1
    assert "ask about the model, which its adapter_config.json names" in capsys.readouterr().err


def test_what_reads_the_weights_past_adapters_refuses_them(folders):
    base, _, _ = folders
    model = get_peft_model(GengramForCausalLM.from_pretrained(base), LNTuningConfig(target_modules=["norm_k"]))
    with pytest.raises(ValueError, match=r"expected a memory of plain MemoryRMSNorm modules"):
        _weights(memories_of(model)[0])
    for target in ("value_proj", "embeddings.0"):
        model = get_peft_model(GengramForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=[target]))
        (memory, *_), tokens = memories_of(model), BaseTokens.of(GengramTokenizer())
        with pytest.raises(ValueError, match=r"got a peft\.tuners\.lora\.layer\.\w+: merge adapters"):
            value_norms(memory, 1)
        if target == "embeddings.0":
            with pytest.raises(ValueError, match="merge adapters"), soft_letters(model, torch.ones(1, 4, 5), tokens):
                raise AssertionError("it should not be read")


@pytest.mark.parametrize("kept", ["motif_memory", "layers.2"])
def test_of_a_trained_memory_the_copy_in_use_counts(kept, folders):
    base, _, _ = folders
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[kept])
    model = get_peft_model(GengramForCausalLM.from_pretrained(base), config)
    model.add_adapter("second", config)
    inner = model.base_model.model

    def row():
        assert len(memories_of(model)) == len(inner.config.memory_layers) == len(inner.memory)
        assert [*inner.memory.values()] == memories_of(model)
        return inner.memory[2]["CA"]

    with torch.no_grad():
        original, first = row(), row() + 1
        inner.memory[2]["CA"] = first
        assert torch.equal(row(), first)
        model.set_adapter("second")
        assert torch.equal(row(), original)
        inner.memory[2]["CA"] = first + 1
        model.set_adapter("default")
        assert torch.equal(row(), first)
        with model.disable_adapter():
            assert torch.equal(row(), original)


@pytest.mark.parametrize(
    "kind",
    [
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}),
    ],
)
@pytest.mark.parametrize("head", ["causal", None])
def test_adapters_of_one_of_two_tied_weights(kind, head, tmp_path):
    model = tiny_model(GengramForCausalLM, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    GengramTokenizer().save_pretrained(tmp_path / "tied")
    model = GengramForCausalLM.from_pretrained(tmp_path / "tied")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    truth = drawn(get_peft_model(model, copy.deepcopy(kind)))
    truth.save_pretrained(tmp_path / "adapters")
    ids = ids_of(model)
    again = GengramForCausalLM.from_pretrained(tmp_path / "tied")
    expected = PeftModel.from_pretrained(again, tmp_path / "adapters").eval()(input_ids=ids, output_hidden_states=True)
    loaded = load_model(str(tmp_path / "adapters"), head, device="cpu").model
    torch.testing.assert_close(last_states(loaded), expected.hidden_states[-1], **MERGED)
    if head:
        torch.testing.assert_close(loaded(ids).logits, expected.logits, **MERGED)
