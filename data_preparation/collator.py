"""Batches of tokenized DNA for pretraining."""

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
        seed: of the masks. Data-loader workers draw differently, as PyTorch seeds each anew; without workers a run is
            reproduced by the seed.

    Returns, when called: `input_ids`, `labels` (both (batch, length), int64), and `attention_mask` if rows differ in
    length.
    """

    tokenizer: GengramTokenizer = field(default_factory=GengramTokenizer)
    mask_probability: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.mask_probability is not None and not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must lie in (0, 1], got {self.mask_probability}.")
        self._generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self._letters = torch.tensor(self.tokenizer.nucleotide_ids[:4])

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
            self._hide(batch, self.mask_probability)
        return batch

    def _hide(self, batch: dict[str, torch.Tensor], share: float) -> None:
        labels = batch["labels"]
        shape = labels.shape
        is_hidden = (labels != IGNORED) & (torch.rand(shape, generator=self._generator) < share)
        fate = torch.rand(shape, generator=self._generator)
        others = self._letters[torch.randint(4, shape, generator=self._generator)]
        input_ids = torch.where(is_hidden & (fate < 0.9), others, batch["input_ids"])
        batch["input_ids"] = input_ids.masked_fill(is_hidden & (fate < 0.8), int(self.tokenizer.mask_token_id))
        batch["labels"] = labels.masked_fill(~is_hidden, IGNORED)
