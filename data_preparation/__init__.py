"""Sequence files to tokenized datasets: windows, both strands, splits by region, checks for leakage."""

from .collator import DataCollatorForGenomeModeling
from .fasta import read_fasta
from .genome_dataset import WindowOptions, prepare_genome_dataset, stream_genome_dataset
from .split_rules import SplitRule, read_split_rules

__all__ = [
    "DataCollatorForGenomeModeling",
    "SplitRule",
    "WindowOptions",
    "prepare_genome_dataset",
    "read_fasta",
    "read_split_rules",
    "stream_genome_dataset",
]
