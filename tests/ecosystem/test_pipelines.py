"""`transformers.pipeline` on a saved folder: one token per base, and the numbers of a direct call of the model."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import SAME_FP32
from transformers import pipeline

from gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramTokenizer,
)

HEADS = {
    "feature-extraction": GengramModel,
    "fill-mask": GengramForMaskedLM,
    "text-classification": GengramForSequenceClassification,
    "text-generation": GengramForCausalLM,
    "token-classification": GengramForTokenClassification,
}
SEQUENCES = ["ACGTNacgtTTGACC", "GGA", "TTTACGCATGNNACGTACGTTAAA"]
# Padding and the order of sums in batches move float32 by this much; see test_modeling_gengram.py.
FP32 = dict(rtol=0, atol=SAME_FP32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for task, head in HEADS.items():
        labels = {"num_labels": 3} if "classification" in task else {}
        tiny_model(head, **labels).save_pretrained(root / task)
        GengramTokenizer().save_pretrained(root / task)
    return root


def make(task, folders, **options):
    pipe = pipeline(task, model=str(folders / task), **options)
    assert type(pipe.model) is HEADS[task] and type(pipe.tokenizer) is GengramTokenizer
    return pipe


@torch.no_grad()
def direct(pipe, text: str) -> torch.Tensor:
    """First output of the model for one sequence, without a batch axis."""
    return pipe.model(**pipe.tokenizer(text, return_tensors="pt"))[0][0]


def test_feature_extraction(folders):
    pipe = make("feature-extraction", folders)
    for text, features in zip(SEQUENCES, pipe(SEQUENCES), strict=True):
        assert np.shape(features) == (1, len(text), 32)
        torch.testing.assert_close(torch.tensor(features[0]), direct(pipe, text), **FP32)


def test_feature_extraction_of_a_padded_batch(folders):
    pipe = make("feature-extraction", folders, tokenize_kwargs={"padding": True}, batch_size=3)
    for text, features in zip(SEQUENCES, pipe(SEQUENCES), strict=True):
        assert len(features[0]) == max(map(len, SEQUENCES))  # the pipeline returns the padding too
        torch.testing.assert_close(torch.tensor(features[0][: len(text)]), direct(pipe, text), **FP32)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_classification(folders, batch_size):
    pipe = make("text-classification", folders, batch_size=batch_size, top_k=None)
    for text, scores in zip(SEQUENCES, pipe(SEQUENCES), strict=True):
        expected = direct(pipe, text).softmax(-1)
        ours = torch.tensor([{s["label"]: s["score"] for s in scores}[f"LABEL_{i}"] for i in range(3)])
        torch.testing.assert_close(ours, expected, **FP32)
    assert pipe("ACGTT") == pipe("acgtt") == pipe("ACGUU")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_token_classification_has_one_entity_per_base(folders, batch_size):
    pipe = make("token-classification", folders, batch_size=batch_size, ignore_labels=[])
    for text, entities in zip(SEQUENCES, pipe(SEQUENCES), strict=True):
        expected = direct(pipe, text).softmax(-1)
        assert [(e["start"], e["end"]) for e in entities] == [(i, i + 1) for i in range(len(text))]
        assert [e["index"] for e in entities] == list(range(len(text)))
        assert "".join(e["word"] for e in entities) == text.upper()
        assert [e["entity"] for e in entities] == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
        scores = torch.tensor([float(e["score"]) for e in entities])
        torch.testing.assert_close(scores, expected.max(-1).values, **FP32)


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_token_classification_aggregates_runs_of_one_label(folders, strategy):
    """Each base is a word of its own, so every strategy must find the runs of equal predictions and their places."""
    pipe = make("token-classification", folders, aggregation_strategy=strategy, ignore_labels=[])
    for text in SEQUENCES:
        expected = direct(pipe, text).softmax(-1)
        labels = expected.argmax(-1).tolist()
        starts = [i for i in range(len(text)) if i == 0 or labels[i] != labels[i - 1]]
        assert len(text) < 4 or 1 < len(starts) < len(text)  # else this tests nothing
        runs = list(zip(starts, [*starts[1:], len(text)], strict=True))
        groups = pipe(text)
        assert [(g["start"], g["end"]) for g in groups] == runs
        assert [g["entity_group"] for g in groups] == [f"LABEL_{labels[start]}" for start in starts]
        assert [g["word"].upper() for g in groups] == [text[start:end].upper() for start, end in runs]
        for group, (start, end) in zip(groups, runs, strict=True):
            assert group["score"] == pytest.approx(expected.max(-1).values[start:end].mean().item(), abs=SAME_FP32)


def test_fill_mask_on_bases(folders):
    pipe = make("fill-mask", folders, targets=list("ACGT"))
    filled = pipe("ACG[MASK]TTG")
    chances = direct(pipe, "ACG[MASK]TTG").softmax(-1)[3]
    assert {f["token_str"] for f in filled} == set("ACGT")
    assert [f["score"] for f in filled] == sorted((f["score"] for f in filled), reverse=True)
    for f in filled:
        assert f["sequence"] == f"ACG{f['token_str']}TTG"
        assert f["score"] == pytest.approx(chances[f["token"]].item(), abs=SAME_FP32)
    assert pipe("acg[MASK]ttg") == filled


def test_fill_mask_several_places_and_padded_batch(folders):
    pipe = make("fill-mask", folders, targets=list("ACGT"), top_k=2)
    two = pipe("ACG[MASK]TT[MASK]")
    assert [len(place) for place in two] == [2, 2]
    assert all(f["sequence"].startswith("ACG" + f["token_str"]) for f in two[0])
    texts = ["ACG[MASK]TTG", "ACGTTG[MASK]ACAAACC"]
    for alone, batched in zip(map(pipe, texts), pipe(texts, batch_size=2), strict=True):
        assert [f["sequence"] for f in batched] == [f["sequence"] for f in alone]
        assert [f["score"] for f in batched] == pytest.approx([f["score"] for f in alone], abs=SAME_FP32)


def not_bases(pipe) -> list[int]:
    bases = pipe.tokenizer.nucleotide_ids[:4]
    return [token for token in range(pipe.model.config.vocab_size) if token not in bases]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_continues_with_letters(folders, batch_size):
    pipe = make("text-generation", folders)
    options = dict(max_new_tokens=15, do_sample=False, suppress_tokens=not_bases(pipe))
    results = pipe(SEQUENCES, batch_size=batch_size, **options)
    for text, ((result,)) in zip(SEQUENCES, results, strict=True):
        generated = result["generated_text"]
        assert generated.startswith(text) and len(generated) == len(text) + 15
        assert set(generated[len(text) :]) <= set("ACGT")
        alone = pipe.model.generate(**pipe.tokenizer(text, return_tensors="pt"), **options)
        assert generated[len(text) :] == pipe.tokenizer.decode(alone[0, len(text) :])


def test_text_generation_reads_lower_case_and_returns_several(folders):
    pipe = make("text-generation", folders)
    options = dict(max_new_tokens=10, suppress_tokens=not_bases(pipe), return_full_text=False)
    upper, lower = (pipe(text, do_sample=False, **options)[0]["generated_text"] for text in ("ACGGTCA", "acggtca"))
    assert upper == lower and len(upper) == 10
    torch.manual_seed(0)
    several = pipe("ACGGTCA", do_sample=True, num_return_sequences=4, **options)
    assert len({s["generated_text"] for s in several}) > 1
    assert all(set(s["generated_text"]) <= set("ACGT") and len(s["generated_text"]) == 10 for s in several)


def test_text_generation_takes_its_settings_from_the_folder(folders, tmp_path):
    pipe = make("text-generation", folders)
    pipe.model.generation_config.suppress_tokens = not_bases(pipe)
    pipe.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert type(pipe.model) is GengramForCausalLM
    (result,) = pipe("ACGGT", max_new_tokens=30, do_sample=True)
    assert len(result["generated_text"]) == 35 and set(result["generated_text"]) <= set("ACGT")
