import numpy as np
import pytest
from tiny_tokenizers import one_per_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gengram import GengramTokenizer
from gengram.inference.base_tokens import BaseTokens


def byte_pairs() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "A", "C", "G", "T", "N", "AC", "GT"])}
    backend = Tokenizer(models.BPE(vocabulary, [("A", "C"), ("G", "T")], unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def whole_words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "A": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_tokens_of_gengram():
    tokens = BaseTokens.of(GengramTokenizer())
    assert tokens == BaseTokens((8, 5, 6, 7), 9, mask=4, pad=0)
    text = "ACGTNacgtuRYN"
    assert tokens.encode(text).tolist() == GengramTokenizer()(text)["input_ids"]
    assert tokens.encode("").shape == (0,) and tokens.encode("A").dtype == np.int64


@pytest.mark.parametrize(
    "template, before, after",
    [(None, (), ()), ("[CLS] $A [SEP]", (1,), (2,)), ("[CLS] $A", (1,), ()), ("$A [SEP]", (), (2,))],
)
def test_tokens_around_a_sequence_are_found(template, before, after):
    tokens = BaseTokens.of(one_per_base("NTGCA", template))
    assert tokens == BaseTokens((8, 7, 6, 5), 4, before, after, mask=3)


def test_letters_that_are_no_token_are_unknown():
    assert BaseTokens.of(one_per_base("TGCA")).other == 0


@pytest.mark.parametrize("tokenizer", [byte_pairs(), whole_words(), one_per_base("ACG"), one_per_base("")])
def test_tokens_that_are_not_single_bases_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"one token per base, got .*Tokenizer.*, which reads the 24 bases"):
        BaseTokens.of(tokenizer)


def test_a_tokenizer_of_proteins_is_refused():
    with pytest.raises(ValueError, match="whose tokens are amino acids"):
        BaseTokens.of(one_per_base("LAGVSERTIDPKQNFYMHWCXBUZO"))
    assert BaseTokens.of(one_per_base(map(chr, range(33, 300)))).before == ()
