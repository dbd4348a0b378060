import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedConfig

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramModel, GengramTokenizer
from gengram.inference.loaded_model import context_length, head_of, load_model


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
