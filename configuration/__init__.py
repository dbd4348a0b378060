"""What a Gengram model is: one typed, validated configuration."""

from .configuration_gengram import GengramConfig

__all__ = ["GengramConfig"]
