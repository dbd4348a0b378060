"""How early a model knows its prediction: by the logit lens, the divergence of each layer's from the last one's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..sequences.alphabet import BASES
from ..sequences.fasta import read_fasta
from ..support.bootstrap import bootstrap
from ..support.errors import InputError
from ..support.progress import progress_bar
from .base_tokens import BaseTokens
from .likelihood import next_token_log_probabilities
from .loaded_model import LoadedModel
from .logit_lens import last_norm

SHORTEST = 16  # bases of a piece


class Readiness(NamedTuple):
    """Of each text, what its layers predict.

    Args:
        divergence: (texts, layers): KL(final, layer) in nats, mean over bases; column n is after n layers, 0 of the
            embedding.
        surprisal: (texts,): bits per base, of a causal model, without a first base that nothing stands before; nan of
            others.
    """

    divergence: np.ndarray
    surprisal: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means over texts with their bootstrap intervals; no bits of a model that does not predict the next base."""
        return {"divergence": _means(self.divergence), **_bits(self.surprisal)}

    def less(self, other: "Readiness") -> dict[str, Any]:
        """Means, over the same texts, of this less another's; divergences only where both have as many layers."""
        result = _bits(self.surprisal - other.surprisal)
        if self.divergence.shape == other.divergence.shape:
            result["divergence"] = _means(self.divergence - other.divergence)
        return result


@torch.inference_mode()
def readiness(loaded: LoadedModel, texts: Sequence[str], progress: str | None = None) -> Readiness:
    """What the layers of a model predict of texts, by its own last norm and head.

    Args:
        loaded: a causal or masked language model.
        texts: of bases, at least two in each.
        progress: name of a progress bar, none by default.

    Raises:
        ValueError: if the model predicts no tokens, has no last norm that is known, or reads no single bases.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    norm, head = last_norm(model), model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} predicts no tokens, so its layers have no readiness.")
    is_causal = bool(getattr(model.config, "is_causal", True)) and "MaskedLM" not in type(model).__name__
    tokens = BaseTokens.of(tokenizer)
    start = len(tokens.before)
    rows, surprisal = [], []
    for text in progress_bar(progress, "text", over=texts):
        whole = [*tokens.before, *tokens.encode(text).tolist(), *tokens.after]
        ids, letters = torch.tensor([whole], device=loaded.device), slice(start, start + len(text))
        outputs = model(input_ids=ids, output_hidden_states=True)
        final = outputs.logits[:, letters].double().log_softmax(-1)
        row = []
        for states in outputs.hidden_states[:-1]:
            layer = head(norm(states[:, letters])).double().log_softmax(-1)
            row.append(float((final.exp() * (final - layer)).sum(-1).mean()))
        rows.append(row)
        own = next_token_log_probabilities(outputs.logits, ids)[0, max(start - 1, 0) : letters.stop - 1]
        surprisal.append(-float(own.double().mean()) / np.log(2) if is_causal else np.nan)
    return Readiness(np.array(rows), np.array(surprisal))


def random_pieces(fasta: str | Path, count: int, length: int) -> list[str]:
    """Pieces of sequences that hold only A, C, G and T, drawn at random without overlap; the same every time.

    Args:
        fasta: the sequences; of records shorter than `length`, the whole.
        count: how many at most.
        length: bases of each.

    Raises:
        InputError: if there are not two of at least 16 bases.
    """
    kept: list[str] = []
    seen, generator = 0, np.random.default_rng(0)
    for _, text in read_fasta(fasta):
        for start in range(0, max(1, len(text) - length + 1), length):
            piece = text[start : start + length].upper()
            if len(piece) < SHORTEST or set(piece) - set(BASES):
                continue
            seen += 1
            if len(kept) < count:
                kept.append(piece)
            elif (place := int(generator.integers(seen))) < count:  # reservoir sampling (Vitter 1985)
                kept[place] = piece
    if len(kept) < 2:
        raise InputError(
            f"{fasta}: expected DNA: two pieces or more of at least {SHORTEST} bases of A, C, G and T on end, of "
            f"which means and their intervals are made; got {len(kept) or 'none'}."
        )
    return kept


def _bits(surprisal: np.ndarray) -> dict[str, Any]:
    return {} if np.isnan(surprisal).any() else {"bits_per_base": _means(surprisal)}


def _means(values: np.ndarray) -> list[Any]:
    """Mean over rows and its interval, of each column (columns, 3), or of the one (3,)."""
    found = bootstrap(lambda rows: values[rows].mean(0), len(values))
    return found.round(4).T.tolist()
