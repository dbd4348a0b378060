import numpy as np
import pytest
import torch
from tolerances import SAME_HIDDEN_STATES_FP32

from gengram import GengramModel, GengramTokenizer
from gengram.inference.embeddings import SequenceEncoder
from gengram.inference.pooling import POOLINGS
from gengram.sequences.alphabet import reverse_complement

SEQUENCES = ["ACGTTGCA", "A", "TTGACAGGCTATTTACGACGATTACG", "ACGT" * 30, "GGN"]


def one_by_one(folder, sequence: str, layer: int, pooling: str) -> np.ndarray:
    model = GengramModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = GengramTokenizer()
    pieces = []
    for start in range(0, len(sequence), 48):
        batch = tokenizer(sequence[start : start + 48], return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states[layer][0]
        place = {"last": len(hidden) - 1, "centre": (len(hidden) - 1) // 2}.get(pooling)
        pooled = {"mean": hidden.mean(0), "max": hidden.max(0).values}.get(pooling)
        pieces.append(pooled if place is None else hidden[place])
    return torch.stack(pieces).mean(0).numpy()


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_batches_equal_one_by_one_on_both_strands(tiny_folder, layer):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    assert (encoder.layers, encoder.context) == (5, 48)
    found = encoder.embed(SEQUENCES, [(layer, pooling) for pooling in POOLINGS])
    for pooling in POOLINGS:
        expected = [
            np.concatenate(
                [one_by_one(tiny_folder, s, layer, pooling) for s in (sequence, reverse_complement(sequence))]
            )
            for sequence in SEQUENCES
        ]
        np.testing.assert_allclose(found[layer, pooling], expected, atol=SAME_HIDDEN_STATES_FP32)
    forward = encoder.embed(SEQUENCES, [(layer, "mean")], both_strands=False)[layer, "mean"]
    np.testing.assert_allclose(forward, found[layer, "mean"][:, :32], atol=SAME_HIDDEN_STATES_FP32)


def test_a_layer_or_pooling_that_does_not_exist_is_an_error(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    with pytest.raises(ValueError, match=r"layer in 0\.\.4 and a pooling"):
        encoder.embed(["A"], [(5, "mean")])
    with pytest.raises(ValueError, match="pooling"):
        encoder.embed(["A"], [(0, "median")])
