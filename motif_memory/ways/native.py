"""The native kernels of the memory, if they are built: finds and loads their library, or says why not.

`csrc/README.md` tells how to build it. Nothing else in the package needs a compiler.
"""

import mmap
import re
from pathlib import Path
from typing import NamedTuple

import torch

_SLAB_WIDTHS = (256, 128, 64, 32, 16)


class NativeStatus(NamedTuple):
    """Whether the native kernels can be used, and why not."""

    available: bool
    reason: str
    path: Path | None = None
    capability: str = ""  # the CPU's instruction set that they use
    has_cuda: bool = False
    cuda_reason: str = "the native kernels are not there"  # why there are none for GPUs; empty if there are


def _torch_version_of(path: Path) -> str:
    """The version of PyTorch that a library was built with; "unknown" if it does not say."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"gengram native kernels, built with torch ([^;]+);", content)
        return found[1].decode() if found else "unknown"


def _load() -> NativeStatus:
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return NativeStatus(False, "the native kernels are not built (csrc/README.md tells how)")
    path = found[0]
    version = _torch_version_of(path)
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        reason = f"they were built with PyTorch {version}, but this is {torch.__version__}; build them again"
        return NativeStatus(False, reason, path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return NativeStatus(False, f"{path} cannot be loaded: {error}", path)
    operators = torch.ops.gengram_native
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("gengram_native::folded_memory", "CUDA")
    return NativeStatus(True, "", path, operators.capability(), has_cuda, "" if has_cuda else _why_no_cuda())


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return "the native kernels were built without CUDA: PyTorch's had none then, or there was no nvcc"


_STATUS = _load()


def status() -> NativeStatus:
    """The state of the library, which is loaded once, with this module."""
    return _STATUS


def slab_width(hidden: int, device_type: str = "cpu") -> int:
    """Columns of folded tables that lie together in memory: what the CPU's kernels handle at a time, or whole rows."""
    if device_type != "cpu":
        return hidden
    return next(width for width in _SLAB_WIDTHS if hidden % width == 0)
