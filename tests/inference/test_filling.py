"""Probabilities at gaps beside a brute force: whole windows of all fillings, one by one, in float64."""

import copy
import itertools
import math

import foreign_models
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import POSTERIOR, PROBABILITIES_SUM_TO_ONE

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramTokenizer
from gengram.inference.filling import GapFiller, gap_windows, with_bases
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.gaps import Gap, find_gaps

BASES = "ACGT"
CAUSAL = {
    "gengram": lambda: (tiny_model(GengramForCausalLM, num_local_experts=0), GengramTokenizer()),
    "llama": foreign_models.llama,
    "gpt2": foreign_models.gpt2,
}
MASKED = {"gengram": lambda: (tiny_model(GengramForMaskedLM), GengramTokenizer()), "bert": foreign_models.bert}
TEXTS = ["ACGTTGCNAATTGACCAGTRTC", "NCGTTGCAnATTGACCAGTC", "N?GnA", "ACGTTGCAA[MASK]", "N"]


def log_likelihood(model, tokenizer, text: str) -> float:
    """Sum of log P(base | letters before it) over the bases but the first, float64."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    first = ids.shape[1] - len(text)
    with torch.no_grad():
        logs = model(input_ids=ids).logits.log_softmax(-1)
    places = [first + place for place, letter in enumerate(text) if letter in BASES and place > 0]
    return sum(logs[0, place - 1, ids[0, place]].item() for place in places)


def brute_force(model, tokenizer, letters, gaps, strands) -> np.ndarray:
    """(gaps, 4) by the definition."""
    chances = np.zeros((len(gaps), 4))
    for bases in itertools.product(*(gap.bases for gap in gaps)):
        text = list(letters.upper())
        for gap, base in zip(gaps, bases, strict=True):
            text[gap.place] = base
        text = "".join(letter if letter in BASES else "N" for letter in text)
        readings = {"forward": [text], "reverse": [reverse_complement(text)]}
        readings["both"] = readings["forward"] + readings["reverse"]
        mean = np.mean([log_likelihood(model, tokenizer, reading) for reading in readings[strands]])
        for row, base in zip(chances, bases, strict=True):
            row[BASES.index(base)] += math.exp(mean)
    return chances / chances.sum(1, keepdims=True)


@pytest.mark.parametrize("strands", ["both", "forward", "reverse"])
@pytest.mark.parametrize("name", CAUSAL)
def test_posteriors_against_brute_force(name, strands):
    model, tokenizer = CAUSAL[name]()
    exact = copy.deepcopy(model).double()
    windows, expected = [], []
    for text in TEXTS:
        found = find_gaps(text)
        ((_, window),) = gap_windows(found.letters, found.gaps, 64, 4)
        windows.append(window)
        expected.append(brute_force(exact, tokenizer, found.letters, found.gaps, strands))
    for tokens in (None, 40):
        found = GapFiller(model, tokenizer, strands, tokens_per_pass=tokens).probabilities(windows)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=POSTERIOR)
            np.testing.assert_allclose(ours.sum(1), 1, rtol=PROBABILITIES_SUM_TO_ONE)
    assert np.ptp(np.concatenate(expected)) > 0.3  # else this tests little


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("strands", ["both", "forward", "reverse"])
def test_a_masked_model_is_asked_directly(name, strands):
    model, tokenizer = MASKED[name]()
    exact = copy.deepcopy(model).double()
    before = len(tokenizer("A")["input_ids"]) // 2
    bases = tokenizer.convert_tokens_to_ids(list(BASES))
    windows, expected = [], []
    for text in TEXTS:
        found = find_gaps(text)
        ((_, window),) = gap_windows(found.letters, found.gaps, 62, None)
        windows.append(window)
        logs = []
        for is_reverse in {"forward": [False], "reverse": [True], "both": [False, True]}[strands]:
            letters = reverse_complement(found.letters) if is_reverse else found.letters
            ids = torch.tensor([tokenizer("".join(x if x in BASES else "N" for x in letters.upper()))["input_ids"]])
            places = [len(letters) - 1 - gap.place if is_reverse else gap.place for gap in found.gaps]
            ids[0, [before + place for place in places]] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = exact(input_ids=ids).logits[0, [before + place for place in places]]
            strand = logits[:, bases].log_softmax(-1).numpy()
            logs.append(strand[:, ::-1] if is_reverse else strand)
        chances = np.exp(np.mean(logs, axis=0))
        expected.append(chances / chances.sum(1, keepdims=True))
    found = GapFiller(model, tokenizer, strands, tokens_per_pass=50).probabilities(windows)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=POSTERIOR)


@pytest.mark.parametrize("models", [CAUSAL, MASKED])
def test_codes_allow_only_their_bases(models):
    model, tokenizer = models["gengram"]()
    found = find_gaps("ACRTTNGCYY", with_codes=True)
    ((_, window),) = gap_windows(found.letters, found.gaps, 64, 6)
    (chances,) = GapFiller(model, tokenizer).probabilities([window])
    assert (chances > 0).tolist() == [[base in gap.bases for base in BASES] for gap in found.gaps]
    if models is CAUSAL:
        expected = brute_force(model.double(), tokenizer, found.letters, found.gaps, "both")
        np.testing.assert_allclose(chances, expected, rtol=0, atol=POSTERIOR)


def windows_by_definition(letters, gaps, context, joint):
    """For each gap its window, the gaps that are filled with it, and whether these are all of the window."""
    size = min(context, len(letters))
    for gap in gaps:
        start = min(max(gap.place - size // 2, 0), len(letters) - size)
        inside = [other for other in gaps if start <= other.place < start + size]
        nearest = sorted(inside, key=lambda other: (abs(other.place - gap.place), other.place))[:joint]
        chosen = sorted(other.place - start for other in nearest)
        yield letters[start : start + size], chosen, gap.place - start, len(inside) <= joint


@pytest.mark.parametrize("context", [1, 2, 7, 10, 40, 100])
@pytest.mark.parametrize("joint", [1, 2, 3, 6])
def test_windows_of_gaps(context, joint):
    generator = np.random.default_rng(context)
    letters = "".join(generator.choice(list("ACGTN"), p=[0.22, 0.22, 0.22, 0.22, 0.12], size=90))
    gaps = find_gaps(letters).gaps
    found = [
        (window.text, [gap.place for gap in window.gaps], window.gaps[number].place, window.is_exact)
        for _, window in gap_windows(letters, gaps, context, joint)
        for number in window.asked
    ]
    assert found == list(windows_by_definition(letters, gaps, context, joint))


def test_gaps_that_are_filled_together_share_a_window():
    found = find_gaps("ACNTTNGNC")
    ((_, window),) = gap_windows(found.letters, found.gaps, 100, 3)
    assert window.asked == (0, 1, 2) and window.is_exact and window.gaps == (Gap(2), Gap(5), Gap(7))
    assert len(list(gap_windows(found.letters, found.gaps, 100, 2))) > 1
    assert len(list(gap_windows(found.letters, found.gaps, 100, None))) == 1
    assert list(gap_windows("ACGT", [], 100, 3)) == []


def test_windows_that_the_model_cannot_read_are_refused():
    filler = GapFiller(*foreign_models.gpt2())
    found = find_gaps("A" * 63 + "N")
    ((_, window),) = gap_windows(found.letters, found.gaps, 64, 1)
    assert filler.longest == 63
    with pytest.raises(ValueError, match="expected at most 63 bases, which the model can read, got 64"):
        filler.probabilities([window])


@pytest.mark.parametrize("text", ["N", "NNN", "RN"])
@pytest.mark.parametrize("make", [CAUSAL["gengram"], MASKED["bert"]])
def test_a_gap_around_which_no_base_is_known_stays(make, text):
    model, tokenizer = make()
    filler = GapFiller(model, tokenizer)
    found = find_gaps(text, with_codes=True)
    windows = list(gap_windows(found.letters, found.gaps, 16, None if filler.is_masked else 4))
    gaps = [gap for own in filler.fill(windows) for gap in own]
    assert [gap.status for gap in gaps] == ["unsure"] * len(text)
    assert with_bases(found.letters, ((gap.place, gap.base, gap.status) for gap in gaps)) == text
