"""Gengram nucleotide tokenizer."""

from .tokenization_gengram import GengramTokenizer

__all__ = ["GengramTokenizer"]
