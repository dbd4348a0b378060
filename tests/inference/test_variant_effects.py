import numpy as np
import pytest
import torch
from tolerances import LOG_LIKELIHOOD_FP32

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.inference.variant_effects import Variant, score_variants, variant_windows
from gengram.sequences.alphabet import reverse_complement

SEQUENCE = "ACGTTGCAAATTGACAGGCTATTTACGACGATTACGGGACATTA"
VARIANTS = [
    Variant(5, "G", "A"),
    Variant(5, "G", "T"),
    Variant(0, "A", "C"),
    Variant(43, "A", "G"),
    Variant(8, "AAT", "A"),
]


def brute_force(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(probabilities[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))


def test_scores_equal_a_loop_over_sequences_one_by_one(tiny_folder):
    model = GengramForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = GengramTokenizer()
    found = score_variants(model, tokenizer, SEQUENCE, VARIANTS, flank=9)
    for i, variant in enumerate(VARIANTS):
        end = variant.position + len(variant.reference)
        left, right = SEQUENCE[max(0, variant.position - 9) : variant.position], SEQUENCE[end : end + 9]
        reference, alternative = left + variant.reference + right, left + variant.alternative + right
        forward = brute_force(model, tokenizer, alternative) - brute_force(model, tokenizer, reference)
        reverse = brute_force(model, tokenizer, reverse_complement(alternative))
        reverse -= brute_force(model, tokenizer, reverse_complement(reference))
        np.testing.assert_allclose([found.forward[i], found.reverse[i]], [forward, reverse], atol=LOG_LIKELIHOOD_FP32)
        assert found.llr[i] == pytest.approx((forward + reverse) / 2, abs=LOG_LIKELIHOOD_FP32)


@pytest.mark.parametrize("position, allele", [(5, "A"), (-1, "A"), (44, "A"), (43, "AC")])
def test_a_reference_allele_that_is_not_there_is_an_error(position, allele):
    with pytest.raises(ValueError, match="are the positions 1-based"):
        variant_windows(SEQUENCE, Variant(position, allele, "T"), 4)
