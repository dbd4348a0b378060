"""Fixed embeddings of sequences, by any model of Transformers."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..sequences.alphabet import reverse_complement
from ..support.progress import progress_bar
from .loaded_model import load_model
from .pooling import POOLINGS, pool

_TOKENS_PER_BATCH = 16384


class SequenceEncoder:
    """A model and its tokenizer, as a function of sequences.

    Args:
        model: name or folder of any model that `AutoModel` loads.
        revision, trust_remote_code: as for `from_pretrained`.
        dtype: of the weights and activations.
        device: where to run; the first GPU if there is one, by default.

    A sequence that is longer than the model's context is read in pieces of that length, and the embeddings of its
    pieces are averaged.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ):
        loaded = load_model(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device, self.context = loaded.device, loaded.context
        self.layers = self.model.config.num_hidden_layers + 1  # the embedding is layer 0

    def embed(
        self,
        sequences: Sequence[str],
        choices: Sequence[tuple[int, str]],
        both_strands: bool = True,
        progress: str | None = None,
    ) -> dict[tuple[int, str], np.ndarray]:
        """Embeddings by (layer, pooling), each (sequences, hidden), float32.

        Args:
            sequences: DNA.
            choices: layers (0 is the embedding, -1 not allowed) and poolings over the tokens of a sequence: their
                `mean` or `max`, the `last` token, or the one in the `centre`.
            both_strands: embed the reverse complement too and put it behind: (sequences, 2 * hidden). A causal model
                sees only what is before a base; so it sees both sides.
            progress: what a bar is named; no bar by default.

        Raises:
            ValueError: if a layer or pooling does not exist.
        """
        for layer, pooling in choices:
            if not 0 <= layer < self.layers or pooling not in POOLINGS:
                raise ValueError(
                    f"expected a layer in 0..{self.layers - 1} and a pooling of {POOLINGS}, got {layer}, {pooling!r}."
                )
        texts = list(sequences) + ([reverse_complement(text) for text in sequences] if both_strands else [])
        width = self.model.config.hidden_size
        sums = {choice: np.zeros((len(texts), width), dtype=np.float32) for choice in choices}
        pieces = np.zeros(len(texts), dtype=np.int64)
        with progress_bar(progress, "seq", total=len(texts)) as bar:
            for rows, batch in self._batches(texts):
                for choice, pooled in self._pooled(batch, choices).items():
                    np.add.at(sums[choice], rows, pooled)
                np.add.at(pieces, rows, 1)
                bar.update(len(set(rows.tolist())))
        result = {}
        for choice, total in sums.items():
            means = total / pieces[:, None]
            result[choice] = np.concatenate(np.split(means, 2), axis=1) if both_strands else means
        return result

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Batches of pieces of similar length, and the text that each is from."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for chosen in _by_total_length(order, texts, self.context):
            encoded = self.tokenizer(
                [texts[row] for row in chosen],
                padding=True,
                truncation=True,
                max_length=self.context,
                return_overflowing_tokens=True,
                return_tensors="pt",
            )
            owners = encoded.pop("overflow_to_sample_mapping")
            rows = np.array(chosen)[owners.numpy()]
            limit = max(1, _TOKENS_PER_BATCH // encoded["input_ids"].shape[1])
            for start in range(0, len(rows), limit):
                part = slice(start, start + limit)
                inputs = {
                    name: encoded[name][part].to(self.device)
                    for name in ("input_ids", "attention_mask")
                    if name in encoded
                }
                yield rows[part], inputs

    @torch.inference_mode()
    def _pooled(
        self, batch: dict[str, torch.Tensor], choices: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], np.ndarray]:
        outputs = self.model(**batch, output_hidden_states=True)
        found = {}
        for layer, pooling in choices:
            hidden = outputs.hidden_states[layer].float()  # (batch, length, hidden)
            found[layer, pooling] = pool(hidden, batch["attention_mask"], pooling).cpu().numpy()
        return found


def _by_total_length(order: Iterable[int], texts: Sequence[str], context: int) -> Iterator[list[int]]:
    """Runs of `order` whose texts, padded to the longest, stay within a batch."""
    chosen: list[int] = []
    for row in order:
        longest = min(len(texts[row]), context) or 1
        if chosen and longest * (len(chosen) + 1) > _TOKENS_PER_BATCH:
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen
