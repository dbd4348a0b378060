import json
import shutil

import pytest
import torch
from foreign_models import bert
from tiny_models import tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from gengram import (
    DEMO_DATA,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramModel,
    GengramQuantizationConfig,
    GengramTokenizer,
    MotifMemoryConfig,
    attach_memory,
    attached_memories,
)
from gengram.cli import main
from gengram.inference.loaded_model import (
    any_head_of,
    context_length,
    head_of,
    load_config,
    load_model,
    load_tokenizer,
    load_whole,
)
from gengram.support.errors import InputError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize(
    "head, expected", [(None, GengramModel), ("causal", GengramForCausalLM), ("masked", GengramForMaskedLM)]
)
def test_a_model_is_ready_with_its_tokenizer(head, expected, tiny_folder):
    loaded = load_model(str(tiny_folder), head, torch.bfloat16, "cpu")
    assert type(loaded.model) is expected and not loaded.model.training and loaded.model.dtype == torch.bfloat16
    assert type(loaded.tokenizer) is GengramTokenizer
    assert (loaded.device, loaded.context) == (torch.device("cpu"), 48)


def test_a_model_of_another_kind(tmp_path):
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    GengramTokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "masked", device="cpu")
    assert type(loaded.model) is BertForMaskedLM and loaded.context == 512


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cpu:x"])
def test_a_device_that_does_not_exist_is_an_error(device, tiny_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"device: expected one that is here .cpu.*got '{device}'"):
        load_model(str(tiny_folder), "causal", device=device)
    words = ["generate", "--model", str(tiny_folder), "--output", str(tmp_path / "out.fa"), "--length", "4"]
    assert main([*words, "--device", device, "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: device: expected")


def test_a_head_that_does_not_exist_is_an_error(tiny_folder):
    with pytest.raises(ValueError, match="expected a head of"):
        load_model(str(tiny_folder), "causl")


def test_a_model_that_does_not_say_how_much_it_reads():
    config = PreTrainedConfig()
    assert context_length(config, GengramTokenizer()) == 10**9
    assert context_length(config, GengramTokenizer(model_max_length=7)) == 7


def test_the_head_that_a_configuration_is_of():
    assert head_of(PreTrainedConfig()) is None and head_of(PreTrainedConfig(architectures=["GengramModel"])) is None
    for name, head in (("GengramForCausalLM", "causal"), ("GPT2LMHeadModel", "causal"), ("BertForMaskedLM", "masked")):
        assert head_of(PreTrainedConfig(architectures=[name])) == head
    own = {"AutoModelForCausalLM": "code.Own", "AutoModelForMaskedLM": "code.Other"}
    for name, head in (("Own", "causal"), ("Other", "masked"), ("Base", None)):
        assert head_of(PreTrainedConfig(architectures=[name], auto_map=own)) == head


def test_any_head_that_a_configuration_is_of():
    heads = {"BertForMaskedLM": "masked", "GengramModel": None}
    heads |= {"GengramForSequenceClassification": "classes", "BertForTokenClassification": "labels"}
    for name, head in heads.items():
        assert any_head_of(PreTrainedConfig(architectures=[name])) == head
    with pytest.raises(InputError, match=r"expected a language model, a classifier or .* got 'BertForPreTraining'"):
        any_head_of(PreTrainedConfig(architectures=["BertForPreTraining"]))


@pytest.fixture
def own_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize("model_class", [GengramModel, GengramForSequenceClassification])
def test_weights_that_a_head_needs_and_a_folder_lacks_are_never_made_up(model_class, tmp_path):
    tiny_model(model_class, max_position_embeddings=48).save_pretrained(tmp_path)
    GengramTokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"got none of 'lm_head\.weight', which would be random"):
        load_model(str(tmp_path), "causal", device="cpu")
    assert load_model(str(tmp_path), None, device="cpu").model  # hidden states need no head


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_hidden_layers=5), r"got none of '(model\.)?layers\.4\."),
        (dict(num_hidden_layers=3), r"got 'model\.layers\.3\..* of layers that it does not have"),
        (dict(hidden_size=16), r"got none of .*embed_tokens\.weight'.*, which would be random"),
    ],
)
@pytest.mark.parametrize("head", [None, "causal"])
def test_a_configuration_of_another_model_is_refused(fields, words, head, own_folder):
    place = own_folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))
    with pytest.raises(InputError, match=words):
        load_model(str(own_folder), head, device="cpu")


def test_a_quantised_folder_whose_configuration_lost_the_quantisation_is_refused(own_folder, tmp_path):
    quantization = GengramQuantizationConfig("int8")
    GengramForCausalLM.from_pretrained(own_folder, quantization_config=quantization).save_pretrained(tmp_path / "q")
    place = tmp_path / "q" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "quantization_config": None}))
    with pytest.raises(InputError, match=r"down_proj_scale.* or that are quantised there"):
        load_model(str(tmp_path / "q"), "causal", device="cpu")


def test_only_the_new_head_of_a_model_to_be_trained_may_be_missing(own_folder):
    model = load_whole(AutoModelForSequenceClassification, str(own_folder), has_new_head=True, num_labels=3)
    assert model.score.weight.shape[0] == 3
    place = own_folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "num_hidden_layers": 5}))
    with pytest.raises(InputError, match=r"got none of 'model\.layers\.4\."):
        load_whole(AutoModelForSequenceClassification, str(own_folder), has_new_head=True)


def test_a_masked_model_is_no_causal_one(tmp_path):
    for part in bert():  # whose causal class loads these weights, and sees what is to be predicted
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="predicts masked bases from both sides"):
        load_model(str(tmp_path), "causal", device="cpu")
    assert load_model(str(tmp_path), "masked", device="cpu").model and load_model(str(tmp_path), device="cpu").model


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_in_a_models_folder_is_named(name, own_folder):
    (own_folder / name).write_text(POINTER)
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(InputError, match=rf"model/{name}: this is a Git LFS pointer"):
            load(str(own_folder))


WITHOUT_UNKNOWN = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"A": 0}, "unk_token": "[UNK]"}}
).encode()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b"", r"model/config\.json is empty, expected a JSON file"),
        ("config.json", b"[]", r"model/config\.json: expected a JSON object, got \[\]"),
        (
            "tokenizer.json",
            b"{}",
            r"model: its tokenizer cannot be used \(KeyError: 'added_tokens'\)",
        ),
        ("tokenizer.json", WITHOUT_UNKNOWN, r"model: its tokenizer cannot be used .* Missing \[UNK\] token"),
        ("tokenizer.json", b"[]", r"model/tokenizer\.json: expected a JSON object"),
        ("tokenizer_config.json", b'{"a": ', r"model/tokenizer_config\.json: expected JSON, got something else"),
        ("config.json", b"[" * 100_000, r"model/config\.json: expected JSON, got something else"),
        ("model.safetensors", b"\x40", r"model: its weights are damaged"),
    ],
)
def test_damaged_files_of_a_model_are_named(name, content, words, own_folder):
    (own_folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_model(str(own_folder), "causal", device="cpu")


@pytest.mark.parametrize("folder", ["", "iter_0024000"])
def test_a_checkpoint_of_megatron_is_to_be_converted(folder):
    checkpoint = DEMO_DATA / "tiny_checkpoint" / folder
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(InputError, match=r"a checkpoint of Megatron, .*: gengram convert to-hf .*tiny_checkpoint"):
            load(str(checkpoint))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_model(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, expected the folder of a model"):
        load_config(str(tmp_path / "file"))


@pytest.mark.parametrize("head", [None, "causal"])
def test_a_memory_that_was_attached_is_there_again(head, tmp_path):
    torch.manual_seed(0)
    tokenizer = GengramTokenizer()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    attach_memory(model, MotifMemoryConfig(embedding_dim=8), layers=[1], tokenizer=tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "motif_memory" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("ACGTTGCATAAGC", return_tensors="pt").input_ids
    loaded = load_model(str(tmp_path), head, device="cpu").model
    ours, theirs = (each(ids, output_hidden_states=True).hidden_states[-1] for each in (loaded, model))
    assert torch.equal(ours, theirs)
    assert [*attached_memories(loaded)] == ["layers.1"]
