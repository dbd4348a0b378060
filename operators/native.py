"""The native kernels of the memory, if they are built: finds and loads their library, or says why not.

`csrc/README.md` tells how to build it. Nothing else in the package needs a compiler.
"""

from pathlib import Path
from typing import NamedTuple

import torch

_SLAB_WIDTHS = (256, 128, 64, 32, 16)


class NativeStatus(NamedTuple):
    """Whether the native kernels can be used, and why not."""

    available: bool
    reason: str
    path: Path | None = None
    capability: str = ""
    has_cuda: bool = False


def _load() -> NativeStatus:
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return NativeStatus(False, "the native kernels are not built (csrc/README.md)")
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return NativeStatus(False, f"{found[0]} cannot be loaded: {error}", found[0])
    return NativeStatus(True, "", found[0])


_STATUS = _load()


def status() -> NativeStatus:
    """The state of the library, which is loaded once, with this module."""
    return _STATUS


def slab_width(hidden: int) -> int:
    """Columns of folded tables that lie together in memory: what the CPU's kernels handle at a time."""
    return next(width for width in _SLAB_WIDTHS if hidden % width == 0)
