"""The native operators of Gengram's memory; `gengram` itself loads the library that `setup.py` builds."""

from ._ops import ops

__all__ = ["ops"]
