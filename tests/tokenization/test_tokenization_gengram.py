"""GengramTokenizer: ids, coordinates, case, the byte table against the Rust backend, saving, and its uses."""

import copy
import doctest
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    pipeline,
)

from gengram.configuration import GengramConfig
from gengram.tokenization import GengramTokenizer

SHARED = Path(os.environ.get("GENGRAM_SHARED", Path(__file__).parents[2].parent / "shared"))
SENTENCEPIECE_MODEL = SHARED / "fixtures" / "one_hot.bpe.model"

# Written apart from the code: what each single character is read as.
IDS = {"C": 5, "G": 6, "T": 7, "A": 8, "N": 9, "U": 7, **dict.fromkeys("RYSWKMBDHV", 9)}
IDS |= {letter.lower(): index for letter, index in IDS.items()}
SPECIAL_IDS = {
    "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4,
    "<CLS>": 10, "<SEP>": 11, "<EOD>": 12, "<MASK>": 13, "<BOS>": 14, "<EOS>": 15,
}  # fmt: skip

TABLE_EXAMPLES = 60
quick = settings(max_examples=150, deadline=None)
pieces = st.one_of(
    st.sampled_from(sorted(IDS)),
    st.sampled_from("ACGTNacgtn"),
    st.sampled_from([*SPECIAL_IDS, "[mask]", "<eod>", "[MAS", "<EOD", "]", "[["]),
    st.sampled_from(
        ["X", "-", "*", " ", "\n", "\t", "\0", "\x7f", "é", "ǆ", "ß", "\u0301", "中", "😀", "x", "foo", "Foo"]
    ),
)
sequences = st.lists(pieces, max_size=14).map("".join)


@pytest.fixture
def tokenizer():
    return GengramTokenizer()


def through_backend(tokenizer):
    """A copy of `tokenizer` that answers everything from Rust."""
    copied = copy.deepcopy(tokenizer)
    copied.use_lookup = False
    return copied


def outcome(call):
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a stride that is not below the length makes the backend panic
        return type(error).__name__, str(error)


def nested_lists(array):
    """Of an array, a tensor, or an array of arrays, which is what NumPy makes of rows of different lengths."""
    return [nested_lists(row) if getattr(row, "ndim", 0) else row.item() for row in array]


def assert_same(ours, reference):
    if isinstance(reference, tuple):
        assert ours == reference
        return
    assert set(ours) == set(reference)
    for name, expected in reference.items():
        value = ours[name]
        assert type(value) is type(expected), name
        if isinstance(expected, (np.ndarray, torch.Tensor)):
            assert value.dtype == expected.dtype and value.shape == expected.shape, name
            value, expected = map(nested_lists, (value, expected))
        assert value == expected, name
    assert len(ours.encodings) == len(reference.encodings)
    for made, expected in zip(ours.encodings, reference.encodings, strict=True):
        for field in ("ids", "tokens", "offsets", "word_ids", "sequence_ids", "attention_mask", "special_tokens_mask"):
            assert getattr(made, field) == getattr(expected, field), field


# Ids and coordinates


def test_vocabulary_is_the_authors(tokenizer):
    assert tokenizer.get_vocab() == {**SPECIAL_IDS, "C": 5, "G": 6, "T": 7, "A": 8, "N": 9}
    assert tokenizer("ACGT")["input_ids"] == [8, 5, 6, 7]
    assert len(tokenizer) == 16
    named = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    }
    assert named == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": None, "eos": None}
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15]
    assert tokenizer.num_special_tokens_to_add(False) == tokenizer.num_special_tokens_to_add(True) == 0
    assert tokenizer.nucleotide_ids == GengramConfig().memory_token_ids == [8, 5, 6, 7, 9]


@pytest.mark.parametrize("token", SPECIAL_IDS)
def test_special_token_inside_a_string(tokenizer, token):
    assert tokenizer(f"ac{token}T")["input_ids"] == [8, 5, SPECIAL_IDS[token], 7]
    lower_case = tokenizer(token.lower())["input_ids"]
    assert len(lower_case) == len(token) and SPECIAL_IDS[token] not in (set(lower_case) - {1})


@pytest.mark.parametrize("use_lookup", [True, False])
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="ACGTNacgtnuRyX😀\n", max_size=30)))
@quick
def test_one_token_per_character(use_lookup, text):
    if any(token in text for token in SPECIAL_IDS):
        return
    tokenizer = GengramTokenizer()
    tokenizer.use_lookup = use_lookup
    encoded = tokenizer(text)
    assert encoded["input_ids"] == [IDS.get(character, 1) for character in text]
    assert encoded.word_ids() == list(range(len(text)))
    assert [encoded.char_to_token(i) for i in range(len(text))] == list(range(len(text)))


def test_long_run_of_unknown_characters(tokenizer):
    text = "X" * 500 + "\U0001f9ec" * 300 + "A"
    for use_lookup in (True, False):
        tokenizer.use_lookup = use_lookup
        assert tokenizer(text)["input_ids"] == [1] * 800 + [8]


def test_lone_surrogate_raises_as_the_backend_does(tokenizer):
    assert outcome(lambda: tokenizer("A\ud800")) == outcome(lambda: through_backend(tokenizer)("A\ud800"))
    with pytest.raises(TypeError):
        tokenizer("A\ud800")


@pytest.fixture(scope="module")
def authors_model():
    sentencepiece = pytest.importorskip("sentencepiece")
    if not SENTENCEPIECE_MODEL.exists():
        pytest.skip(f"{SENTENCEPIECE_MODEL} is not here; set GENGRAM_SHARED to the folder that holds fixtures/")
    return sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))


def test_every_piece_of_the_authors_model_has_its_id(authors_model, tokenizer):
    pieces = [authors_model.id_to_piece(index) for index in range(authors_model.get_piece_size())]
    assert tokenizer.convert_tokens_to_ids(pieces) == list(range(10))


# SentencePiece never reads [PAD] (a control symbol) and [UNK] from a text.
@given(text=st.lists(st.sampled_from([*"ACGTN", "[CLS]", "[SEP]", "[MASK]"]), max_size=40).map("".join))
@quick
def test_ids_equal_the_authors_model(authors_model, text):
    assert GengramTokenizer()(text)["input_ids"] == authors_model.encode(text)


# The byte table and the Rust backend


def tokenizer_variants():
    framed = GengramTokenizer(add_bos_token=True, add_eos_token=True)
    bert_like = GengramTokenizer()
    bert_like.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    doubled = GengramTokenizer()
    doubled.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] $A", pair="$A $B", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with_tokens = GengramTokenizer(padding_side="left", truncation_side="left", pad_token="<EOS>")
    with_tokens.add_tokens([AddedToken(token, normalized=False) for token in ("é", "AC", "ACC", "x", "<x>")])
    loosely_added = {}
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        loosely_added[flag] = GengramTokenizer()
        tokens = [AddedToken(token, **{"normalized": False, flag: True}) for token in ("<x>", "cat", "foo")]
        loosely_added[flag].add_tokens(tokens)
    split = GengramTokenizer(split_special_tokens=True)
    other_normalizer = GengramTokenizer()
    other_normalizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    no_normalizer = GengramTokenizer()
    no_normalizer.backend_tokenizer.normalizer = None
    other_words = GengramTokenizer()
    other_words.backend_tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=2)
    typed = GengramTokenizer(model_input_names=["input_ids", "token_type_ids"])
    return {
        "default": GengramTokenizer(),
        "bos and eos": framed,
        "cls and sep": bert_like,
        "text used twice": doubled,
        "added tokens": with_tokens,
        **loosely_added,
        "special tokens split": split,
        "other normalizer": other_normalizer,
        "no normalizer": no_normalizer,
        "other words": other_words,
        "token types": typed,
    }


VARIANTS = tokenizer_variants()
requests = st.fixed_dictionaries(
    {
        "padding": st.sampled_from([False, True, "max_length"]),
        "truncation": st.sampled_from([None, False, True, "only_first", "only_second"]),
        "max_length": st.one_of(st.none(), st.integers(0, 16)),
        "verbose": st.just(False),
    },
    optional={
        "stride": st.integers(0, 6),
        "padding_side": st.sampled_from(["left", "right"]),
        "pad_to_multiple_of": st.sampled_from([0, 1, 4]),
        "add_special_tokens": st.booleans(),
        "return_tensors": st.sampled_from(["np", "pt"]),
        "return_attention_mask": st.booleans(),
        "return_special_tokens_mask": st.booleans(),
        "return_overflowing_tokens": st.booleans(),
        "return_length": st.booleans(),
        "return_soft_mask": st.booleans(),
        "split_special_tokens": st.booleans(),
        "return_token_type_ids": st.booleans(),
        "return_offsets_mapping": st.booleans(),
    },
)


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.filterwarnings("ignore:Creating an ndarray")
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    text=st.one_of(sequences, st.lists(sequences, min_size=1, max_size=4)),
    request=requests,
    truncation_side=st.sampled_from(["left", "right"]),
)
@example(text="", request={"return_tensors": "pt"}, truncation_side="right")
@example(text=["", "A"], request={"padding": True, "return_tensors": "np"}, truncation_side="right")
@example(text=["", "A"], request={"return_tensors": "np"}, truncation_side="right")
@example(text=["", "A"], request={"return_tensors": "pt"}, truncation_side="right")
@example(
    text="",
    request={"truncation": True, "max_length": 2, "stride": 1, "add_special_tokens": False},
    truncation_side="left",
)
@settings(max_examples=TABLE_EXAMPLES, deadline=None)
def test_table_equals_backend(variant, text, request, truncation_side):
    tokenizer = VARIANTS[variant]
    tokenizer.truncation_side = truncation_side
    reference = through_backend(tokenizer)
    assert_same(outcome(lambda: tokenizer(text, **request)), outcome(lambda: reference(text, **request)))


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    ids=st.lists(st.one_of(st.integers(0, 20), st.sampled_from([8, 5, 6, 7, 9, 127, 255, 256, 1000])), max_size=20),
    skip_special_tokens=st.booleans(),
    clean_up_tokenization_spaces=st.sampled_from([None, True, False]),
    container=st.sampled_from([list, np.array, lambda ids: torch.tensor(ids, dtype=torch.int64), lambda ids: [ids]]),
)
@settings(max_examples=TABLE_EXAMPLES, deadline=None)
def test_table_decodes_as_the_backend(variant, ids, container, **options):
    tokenizer = VARIANTS[variant]
    assert tokenizer.decode(container(ids), **options) == through_backend(tokenizer).decode(container(ids), **options)


@pytest.mark.parametrize(
    "request_, covered",
    [
        ({}, True),
        ({"padding": "max_length", "truncation": True, "max_length": 8, "return_overflowing_tokens": True}, True),
        ({"return_special_tokens_mask": True, "return_tensors": "np"}, True),
        ({"return_offsets_mapping": True}, False),
        ({"return_token_type_ids": True}, False),
        ({"text_pair": ["A", "C"]}, False),
        ({"is_split_into_words": True}, False),
        ({"split_special_tokens": True}, False),
    ],
)
def test_which_requests_the_table_answers(tokenizer, monkeypatch, request_, covered):
    calls = []
    backend_path = GengramTokenizer.__mro__[1]._encode_plus
    monkeypatch.setattr(
        GengramTokenizer.__mro__[1],
        "_encode_plus",
        lambda *args, **kw: (calls.append(1), backend_path(*args, **kw))[1],
    )
    tokenizer(["ACgt[MASK]éX", "A"], **request_)
    assert bool(calls) is not covered


def test_neither_path_leaves_state_that_the_other_sees(tokenizer):
    state = tokenizer.backend_tokenizer.to_str()
    tokenizer(["ACGT", "A"], padding="max_length", truncation=True, max_length=3, padding_side="left")
    assert tokenizer.backend_tokenizer.to_str() == state
    tokenizer("ACGT", "AC", padding="max_length", truncation=True, max_length=12, padding_side="left")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 12
    assert tokenizer("ACGTACGTACGTACGT")["input_ids"] == [8, 5, 6, 7] * 4
    assert tokenizer("ACGTACGTACGTACGT").encodings[0].ids == [8, 5, 6, 7] * 4


def test_lazy_encodings_belong_to_the_call_that_made_them(tokenizer):
    encoded = tokenizer("ACGTfoo", max_length=5, truncation=True)
    tokenizer.add_tokens(["ACGT"])
    tokenizer.truncation_side = "left"
    assert encoded.tokens() == ["A", "C", "G", "T", "[UNK]"]
    assert encoded.is_fast and encoded.n_sequences == 1


def test_tables_follow_the_added_tokens(tokenizer):
    assert tokenizer("ACfooG")["input_ids"] == [8, 5, 1, 1, 1, 6]
    tokenizer.add_tokens(["foo"])
    assert tokenizer("ACfooG")["input_ids"] == [8, 5, 16, 6]
    assert tokenizer.decode([16, 8]) == "fooA"
    assert tokenizer.decode([16, 8], skip_special_tokens=True) == "fooA"
    size = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["foo"]})  # same token, same count, now special
    assert len(tokenizer) == size
    assert tokenizer("ACfooG")["input_ids"] == [8, 5, 16, 6]
    assert tokenizer.decode([16, 8], skip_special_tokens=True) == "A"


def test_tables_follow_the_post_processor(tokenizer):
    assert tokenizer("AC")["input_ids"] == [8, 5]
    tokenizer.add_bos_token = True
    assert tokenizer("AC")["input_ids"] == [14, 8, 5]
    tokenizer.add_eos_token = True
    encoded = tokenizer("AC", return_special_tokens_mask=True)
    assert encoded["input_ids"] == [14, 8, 5, 12]
    assert encoded["special_tokens_mask"] == [1, 0, 0, 1]


@pytest.mark.parametrize("variant", ["added tokens", "lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("text", ["A <x> C", "A<x>C", "Cat", "CAT", "cat", "A cat C", "ACC", "ACACC", "xfooX"])
def test_added_tokens_are_found_as_the_backend_finds_them(variant, text):
    tokenizer = VARIANTS[variant]
    assert_same(tokenizer(text), through_backend(tokenizer)(text))


def test_many_added_tokens(tokenizer):
    tokenizer.add_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(400)])
    assert tokenizer("A<0>C<399>")["input_ids"] == [8, 16, 5, 415]
    assert tokenizer.decode([8, 415, 16]) == "A<399><0>"
    assert tokenizer.decode([8, 415, 5], soft_mask=[1, 1, 0]) == "a<399>C"


def test_threads_share_a_tokenizer(tokenizer):
    texts = ["ACGT" * n + "acgt" + "[MASK]" for n in range(40)]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(lambda text: tokenizer(text)["input_ids"], texts)) == expected


# Padding, truncation, pairs


def test_batch_padding_and_truncation(tokenizer):
    right = tokenizer(["ACGT", "A"], padding=True, return_tensors="pt")
    assert right["input_ids"].tolist() == [[8, 5, 6, 7], [8, 0, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    left = tokenizer(["ACGT", "A"], padding=True, padding_side="left", return_tensors="np")
    assert left["input_ids"].tolist() == [[8, 5, 6, 7], [0, 0, 0, 8]]
    tokenizer.truncation_side = "left"
    assert tokenizer("ACGT", truncation=True, max_length=2)["input_ids"] == [6, 7]
    windows = tokenizer("ACGTN", truncation=True, max_length=3, stride=1, return_overflowing_tokens=True)
    assert windows["input_ids"] == [[6, 7, 9], [8, 5, 6]]
    assert windows["overflow_to_sample_mapping"] == [0, 0]
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["ACGT", "A"], return_tensors="pt")


def test_pairs_and_offsets(tokenizer):
    encoded = tokenizer("AC[MASK]", "gT", return_offsets_mapping=True, return_token_type_ids=True)
    assert encoded["input_ids"] == [8, 5, 4, 6, 7]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
    assert encoded["offset_mapping"] == [(0, 1), (1, 2), (2, 8), (0, 1), (1, 2)]
    words = tokenizer(["ACG", "T"], is_split_into_words=True)
    assert words["input_ids"] == [8, 5, 6, 7]
    assert words.word_ids() == [0, 0, 0, 1]


@pytest.mark.parametrize("use_lookup", [True, False])
def test_long_input_is_warned_about_once_and_truly(tokenizer, use_lookup, caplog):
    """Positions are rotary: there is nothing to index, so no indexing errors."""
    tokenizer.use_lookup, tokenizer.model_max_length = use_lookup, 3
    tokenizer("ACG")
    tokenizer("ACGT", truncation=True, max_length=4)
    assert not caplog.messages
    tokenizer("ACGT")
    tokenizer("ACGT")
    (message,) = caplog.messages
    assert "4 tokens is longer than the 3" in message and "rotary" in message and "indexing" not in message


def test_start_and_end_are_named_only_if_they_are_added(tokenizer):
    """`Trainer` writes what a tokenizer names into the model's configuration."""
    assert tokenizer.bos_token is None and tokenizer.eos_token is None
    assert tokenizer.get_special_tokens_mask([14, 8, 12], already_has_special_tokens=True) == [1, 0, 1]
    assert tokenizer.decode([14, 8, 12], skip_special_tokens=True) == "A"
    framed = GengramTokenizer(add_bos_token=True, add_eos_token=True)
    assert (framed.bos_token_id, framed.eos_token_id) == (14, 12) and framed("A")["input_ids"] == [14, 8, 12]
    tokenizer.add_eos_token = True
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 12) and tokenizer("A")["input_ids"] == [8, 12]
    assert GengramTokenizer(eos_token="<EOS>", add_eos_token=True)("A")["input_ids"] == [8, 15]


# Decoding


def test_decode(tokenizer):
    text = "ACGTN[MASK]<EOD>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ACGTN"
    assert tokenizer.batch_decode([ids, ids[:2]]) == [text, "AC"]
    assert tokenizer.batch_decode(torch.tensor([[8, 5], [6, 0]]), skip_special_tokens=True) == ["AC", "G"]
    assert tokenizer.decode([8, 100, 5]) == "AC"  # a padding row of the embedding is no token
    assert tokenizer.decode(8) == "A"
    assert tokenizer.decode({"input_ids": [8]}) == "A"
    assert tokenizer.decode([]) == ""
    assert tokenizer.convert_tokens_to_string(["A", "C", "[MASK]"]) == "AC[MASK]"
    assert tokenizer.tokenize("aC[MASK]") == ["A", "C", "[MASK]"]
    with pytest.raises(OverflowError):
        tokenizer.decode([-1])


# Case


@pytest.mark.parametrize("use_lookup", [True, False])
@given(text=sequences)
@quick
def test_soft_mask_restores_the_case(use_lookup, text):
    tokenizer = GengramTokenizer()
    tokenizer.use_lookup = use_lookup
    encoded = tokenizer(text, return_soft_mask=True)
    spans = [encoded.token_to_chars(i) for i in range(len(encoded["input_ids"]))]
    source = [text[start:stop] for start, stop in spans]
    assert encoded["soft_mask"] == [int(len(part) == 1 and part.islower()) for part in source]
    expected = []
    for part, index in zip(source, encoded["input_ids"], strict=True):
        token = tokenizer.convert_ids_to_tokens(index)
        expected.append(token.lower() if len(part) == 1 and part.islower() and len(token) == 1 else token)
    assert tokenizer.decode(encoded["input_ids"], soft_mask=encoded["soft_mask"]) == "".join(expected)


@pytest.mark.parametrize("use_lookup", [True, False])
def test_soft_mask_is_aligned_with_the_ids(tokenizer, use_lookup):
    tokenizer.use_lookup = use_lookup
    tokenizer.add_bos_token = True
    options = {"padding": True, "padding_side": "left", "truncation": True, "max_length": 4, "return_soft_mask": True}
    encoded = tokenizer(["aCgTa", "c"], return_overflowing_tokens=True, stride=1, return_tensors="pt", **options)
    assert encoded["input_ids"].tolist() == [[14, 8, 5, 6], [14, 6, 7, 8], [0, 0, 14, 5]]
    assert encoded["soft_mask"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert encoded["soft_mask"].dtype == encoded["input_ids"].dtype
    assert tokenizer("aC", return_soft_mask=True)["soft_mask"] == [0, 1, 0]
    assert "soft_mask" not in tokenizer("aC")


def test_soft_mask_of_pairs_and_words(tokenizer):
    assert tokenizer("aC", "gTn", return_soft_mask=True)["soft_mask"] == [1, 0, 1, 0, 1]
    pairs = tokenizer([("aC", "g"), ("A", "t")], padding=True, return_soft_mask=True, return_tensors="np")
    assert pairs["soft_mask"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert tokenizer(["aC", "Tg"], is_split_into_words=True, return_soft_mask=True)["soft_mask"] == [1, 0, 0, 1]
    batch = tokenizer([["aC"], ["T", "g"]], is_split_into_words=True, return_soft_mask=True)
    assert batch["soft_mask"] == [[1, 0], [0, 1]]


def test_soft_mask_in_pad_and_decode(tokenizer):
    features = [dict(tokenizer(text, return_soft_mask=True)) for text in ("acGT", "Ac")]
    padded = tokenizer.pad(features, return_tensors="pt")
    assert padded["soft_mask"].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    left = tokenizer.pad(features, padding_side="left", pad_to_multiple_of=3)
    assert left["soft_mask"] == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    texts = tokenizer.batch_decode(padded["input_ids"], skip_special_tokens=True, soft_mask=padded["soft_mask"])
    assert texts == ["acGT", "Ac"]
    assert tokenizer.decode(torch.tensor([8, 5]), soft_mask=np.array([True, False])) == "aC"
    with pytest.raises(ValueError, match="as long as token_ids"):
        tokenizer.decode([8, 5], soft_mask=[1])
    with pytest.raises(ValueError, match="2 rows"):
        tokenizer.decode([[8], [5]], soft_mask=[[1]])


# Unknown characters


def test_unknown_characters_raise_on_request(tokenizer):
    tokenizer.unknown_characters = "error"
    for text in ("", "ACGTNacgtnuURYSWKMBDHVrykmswbdhv", "[MASK]ACG<EOD>[UNK]", "<CLS>a[PAD]"):
        tokenizer(text)
        tokenizer(text, return_offsets_mapping=True)
    with pytest.raises(
        ValueError, match=r"sequence 1 .*counted from 0.*'X' at position 2, '\\n' at position 4\. Remove"
    ):
        tokenizer(["ACGT", "ACXA\n"])
    with pytest.raises(ValueError, match=r"'é' at position 7"):
        tokenizer("A[MASK]éC")
    with pytest.raises(ValueError, match=r"'é' at position 1"):
        tokenizer("Aé")
    with pytest.raises(ValueError, match=r"holds 30 .*'-' at position 9 and 20 more"):
        tokenizer("-" * 30)
    with pytest.raises(ValueError, match=r"sequence 0, second text .*'J' at position 1"):
        tokenizer("AC", "AJ")
    with pytest.raises(ValueError, match=r"sequence 1, word 2 .*'Z' at position 0"):
        tokenizer([["A"], ["A", "C", "Z"]], is_split_into_words=True)
    with pytest.raises(ValueError, match=r"position 5"):
        tokenizer("ACGTAQ", truncation=True, max_length=2)
    with pytest.raises(ValueError, match=r"'\[' at position 0, 'E'"):
        tokenizer("[EA", split_special_tokens=True)
    with pytest.raises(ValueError, match=r"'\[' at position 1, '\]' at position 6"):
        tokenizer("A[MASK]", split_special_tokens=True)
    tokenizer.add_tokens(["Foo"])
    assert tokenizer("AFooC")["input_ids"] == [8, 16, 5]
    with pytest.raises(ValueError, match=r"'o' at position 2, 'o' at position 3"):
        tokenizer("AooC".replace("A", "AA"))
    tokenizer.unknown_characters = "unk"
    assert tokenizer("J")["input_ids"] == [1]


@pytest.mark.parametrize("use_lookup", [True, False])
def test_unknown_characters_can_be_refused_in_one_call(tokenizer, use_lookup):
    tokenizer.use_lookup = use_lookup
    for call in (tokenizer, tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(ValueError, match="'X' at position 2"):
            call("ACXG", unknown_characters="error")
    with pytest.raises(ValueError, match=r"sequence 1 .*'!' at position 0"):
        tokenizer(["ACG", "!"], unknown_characters="error", padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"must be one of \('unk', 'error'\), got 'raise'"):
        tokenizer("ACXG", unknown_characters="raise")
    assert tokenizer("ACXG")["input_ids"] == [8, 5, 1, 6]  # nothing is left of it
    assert tokenizer([], unknown_characters="error")["input_ids"] == []
    tokenizer.unknown_characters = "error"
    assert tokenizer("ACXG", unknown_characters="unk")["input_ids"] == [8, 5, 1, 6]


def test_a_saved_tokenizer_that_refuses_does_so_without_the_package(tokenizer, tmp_path):
    tokenizer.unknown_characters = "error"
    tokenizer.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert plain("acgtRU[UNK]")["input_ids"] == [8, 5, 6, 7, 9, 7, 1]
    with pytest.raises(Exception, match=r"Missing .* token from the vocabulary"):
        plain("ACX")
    for again in (tokenizer, GengramTokenizer.from_pretrained(tmp_path, unknown_characters="unk")):
        assert again("ACX", unknown_characters="unk")["input_ids"] == [8, 5, 1]
        again.unknown_characters = "unk"
        again.save_pretrained(tmp_path / "again")
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")("ACX")["input_ids"] == [8, 5, 1]


def test_unknown_characters_option_is_checked_and_saved(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        GengramTokenizer(unknown_characters="ignore")
    with pytest.raises(ValueError, match="must be one of"):
        tokenizer.unknown_characters = "raise"
    tokenizer.unknown_characters = "error"
    tokenizer.save_pretrained(tmp_path)
    loaded = GengramTokenizer.from_pretrained(tmp_path)
    assert loaded.unknown_characters == "error"
    with pytest.raises(ValueError, match="sequence 0"):
        loaded("AX")
    assert GengramTokenizer.from_pretrained(tmp_path, unknown_characters="unk")("AX")["input_ids"] == [8, 1]


# Saving and loading

PROBE = "ACGTNacgtnuRy[MASK]X😀\n<EOD>[mask]"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.add_tokens([AddedToken("<human>", special=True)])
    tokenizer.add_eos_token = True
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    tokenizer("AC", "GT", padding="max_length", truncation=True, max_length=9, padding_side="right")
    tokenizer.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    loaded = GengramTokenizer.from_pretrained(tmp_path)
    assert loaded(PROBE + "<human>")["input_ids"] == tokenizer(PROBE + "<human>")["input_ids"]
    assert loaded("A")["input_ids"] == [8, 12]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert loaded.model_max_length == 8192
    assert (loaded.padding_side, loaded.truncation_side) == ("left", "right")
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    first, second = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (tmp_path, again))
    assert first.items() <= second.items()  # Transformers adds where it was loaded from


@pytest.mark.parametrize("with_config", [False, True])
def test_auto_tokenizer(tokenizer, tmp_path, with_config):
    AutoTokenizer.register(GengramConfig, tokenizer_class=GengramTokenizer, exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    if with_config:
        GengramConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is GengramTokenizer
    assert loaded(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]


def test_saved_folder_loads_without_this_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    GengramConfig().save_pretrained(tmp_path)
    texts = [PROBE, "ACGT", "[UNK]X", ""]
    script = (
        "import sys, json; sys.modules['gengram'] = None\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "texts = json.loads(sys.argv[2])\n"
        "encoded = tokenizer(texts, padding=True)\n"
        "decoded = tokenizer.batch_decode(encoded['input_ids'], skip_special_tokens=True)\n"
        "print(json.dumps([type(tokenizer).__name__, dict(encoded), decoded, tokenizer.special_tokens_map]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(texts)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    class_name, encoded, decoded, special_tokens = json.loads(output.splitlines()[-1])
    assert class_name == "TokenizersBackend"
    expected = tokenizer(texts, padding=True)
    assert encoded == dict(expected)
    assert decoded == tokenizer.batch_decode(expected["input_ids"], skip_special_tokens=True)
    assert special_tokens == tokenizer.special_tokens_map


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(tokenizer, duplicate):
    tokenizer.unknown_characters = "error"
    tokenizer.add_tokens(["x"])
    copied = duplicate(tokenizer)
    assert copied("Ax")["input_ids"] == [8, 16]
    assert copied.unknown_characters == "error"
    encoded = duplicate(tokenizer("Ax"))
    assert encoded["input_ids"] == [8, 16]
    assert encoded.tokens() == ["A", "x"]


def test_vocabulary_of_ones_own():
    tokenizer = GengramTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "A": 5, "C": 6})
    assert tokenizer("acG[MASK]")["input_ids"] == [5, 6, 1, 4]


# Uses


def test_masked_language_modelling_collator(tokenizer):
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=1.0, mask_replace_prob=1, random_replace_prob=0
    )
    features = [
        tokenizer("acgt[MASK]", return_special_tokens_mask=True),
        tokenizer("GX", return_special_tokens_mask=True),
    ]
    batch = collator(features)
    assert batch["input_ids"].shape == (2, 5)
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("acgt[MASK]", "GX")]
    batch = collator(features)
    assert batch["input_ids"].tolist() == [[4] * 5, [4, 1, 0, 0, 0]]  # neither [UNK] nor padding is hidden
    assert batch["labels"].tolist() == [[8, 5, 6, 7, -100], [6] + [-100] * 4]


def test_causal_language_modelling_collator(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([tokenizer("ACGT"), tokenizer("G")])
    assert batch["labels"].tolist() == [[8, 5, 6, 7], [6, -100, -100, -100]]


def tiny_bert():
    return BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2
    )


@pytest.mark.parametrize("aggregation_strategy", ["none", "first", "simple"])
def test_token_classification_pipeline_sees_a_word_per_nucleotide(tokenizer, aggregation_strategy):
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_bert()).eval()
    classify = pipeline(
        "token-classification", model, tokenizer=tokenizer, aggregation_strategy=aggregation_strategy, device="cpu"
    )
    classify.ignore_labels = []
    entities = classify("ACgTnacG")
    covered = [i for entity in entities for i in range(entity["start"], entity["end"])]
    assert covered == list(range(8))
    if aggregation_strategy == "none":
        assert [entity["word"] for entity in entities] == list("ACGTNACG")
    else:
        assert "".join(entity["word"] for entity in entities) == "ACGTNACG"


def test_fill_mask_pipeline(tokenizer):
    model = BertForMaskedLM(tiny_bert()).eval()
    fill = pipeline("fill-mask", model, tokenizer=tokenizer, device="cpu")
    guesses = fill("ACG[MASK]T", targets=["A", "C"])
    assert sorted(guess["sequence"] for guess in guesses) == ["ACGAT", "ACGCT"]


def test_docstring_example():
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(GengramTokenizer, "GengramTokenizer", globs={})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("use_lookup", [True, False])
def test_a_batch_of_nothing(tokenizer, monkeypatch, use_lookup):
    monkeypatch.setattr(GengramTokenizer, "use_lookup", use_lookup)
    assert tokenizer([]) == {"input_ids": [], "attention_mask": []}
    options = dict(return_offsets_mapping=True, return_soft_mask=True, return_length=True)
    fields = ("input_ids", "attention_mask", "offset_mapping", "soft_mask", "length")
    assert tokenizer([], **options) == {field: [] for field in fields}
    tensors = tokenizer([], padding=True, return_tensors="pt")
    assert tensors["input_ids"].shape == (0, 0) and tensors["input_ids"].dtype == torch.int64
