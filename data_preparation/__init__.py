"""Sequence files to tokenized data sets for pretraining: windows, both strands, splits by region, shared k-mers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sequences.fasta import read_fasta
    from .collator import DataCollatorForGenomeModeling
    from .genome_dataset import prepare_genome_dataset, stream_genome_dataset
    from .split_rules import SplitRule, read_split_rules
    from .window_options import WindowOptions

__all__ = [
    "DataCollatorForGenomeModeling",
    "SplitRule",
    "WindowOptions",
    "prepare_genome_dataset",
    "read_fasta",
    "read_split_rules",
    "stream_genome_dataset",
]

_HOMES = {
    "DataCollatorForGenomeModeling": ".collator",
    "SplitRule": ".split_rules",
    "WindowOptions": ".window_options",
    "prepare_genome_dataset": ".genome_dataset",
    "read_fasta": "..sequences.fasta",
    "read_split_rules": ".split_rules",
    "stream_genome_dataset": ".genome_dataset",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: the collator needs torch, which the rest does not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
