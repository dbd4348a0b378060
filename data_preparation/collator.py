"""Batches of tokenized DNA for pretraining."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..tokenization.tokenization_gengram import GengramTokenizer

IGNORED = -100


@dataclass
class DataCollatorForGenomeModeling:
    """Makes batches for causal or masked language modelling of examples with `input_ids`.

    Only A, C, G and T carry a loss: N stands for something unknown, and `<EOD>` for where a file was cut. So a loss
    in nats divided by ln 2 is bits per base, the same number that a Markov model of bases has.

    Args:
        tokenizer: gives the ids of letters, padding and `[MASK]`; by default the one of `gengram prepare`.
        mask_probability: `None` for causal modelling; else the share of letters that are hidden, of which 80 % become
            `[MASK]`, 10 % a random letter, and 10 % stay (Devlin et al. 2018, section 3.1).
        seed: 0 or more. With it, what is hidden of an example depends on the example, the seed and the epoch that
            `set_epoch` told, and on nothing else: not on workers, processes, batches, or where a run was cut off. By
            default masks are drawn from PyTorch's generator, anew for each worker and epoch of a data loader.

    Returns, when called: `input_ids`, `labels` (both (batch, length), int64), and `attention_mask` if rows differ in
    length.
    """

    tokenizer: GengramTokenizer = field(default_factory=GengramTokenizer)
    mask_probability: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.mask_probability is not None and not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must lie in (0, 1], got {self.mask_probability}.")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")
        self._epoch = torch.zeros((), dtype=torch.int64)
        if self.mask_probability is not None and self.seed is not None:
            self._epoch.share_memory_()  # with workers that outlive an epoch
        self._letters = torch.tensor(self.tokenizer.nucleotide_ids[:4])

    def set_epoch(self, epoch: int) -> None:
        """Hide other bases than in epochs of other numbers. It has no effect without a seed."""
        self._epoch.fill_(epoch)

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        longest = max(map(len, rows))
        padding = int(self.tokenizer.pad_token_id)
        input_ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.from_numpy(row)
        labels = input_ids.masked_fill(~torch.isin(input_ids, self._letters), IGNORED)
        batch = {"input_ids": input_ids, "labels": labels}
        if any(len(row) < longest for row in rows):
            lengths = torch.tensor([len(row) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        if self.mask_probability is not None:
            self._hide(batch, self._drawn(rows, longest), self.mask_probability)
        return batch

    def _drawn(self, rows: Sequence[np.ndarray], longest: int) -> torch.Tensor:
        """Three numbers from 0 up to 1 for each token: (3, rows, longest), float64."""
        if self.seed is None:
            return torch.rand(3, len(rows), longest, dtype=torch.float64)
        drawn = np.ones((3, len(rows), longest))
        for index, row in enumerate(rows):
            content = int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), "big")
            generator = np.random.default_rng((self.seed, int(self._epoch), content))
            drawn[:, index, : len(row)] = generator.random((3, len(row)))
        return torch.from_numpy(drawn)

    def _hide(self, batch: dict[str, torch.Tensor], drawn: torch.Tensor, share: float) -> None:
        labels = batch["labels"]
        chance, fate, which = drawn
        is_hidden = (labels != IGNORED) & (chance < share)
        others = self._letters[(4 * which).long().clamp(max=3)]
        input_ids = torch.where(is_hidden & (fate < 0.9), others, batch["input_ids"])
        batch["input_ids"] = input_ids.masked_fill(is_hidden & (fate < 0.8), int(self.tokenizer.mask_token_id))
        batch["labels"] = labels.masked_fill(~is_hidden, IGNORED)
