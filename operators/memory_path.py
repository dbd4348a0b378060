"""Which way the memory is computed: decided here, and nowhere else.

Algorithms: `token_major` projects the features of every token; `table_major` projects the table rows in use, once per
step; `folded` reads tables projected in advance. Kernels: `torch` or `native`. All give the same numbers up
to rounding.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .native import slab_width, status

logger = logging.getLogger(__name__)

ALGORITHMS = ("auto", "token_major", "table_major", "folded")
KERNELS = ("auto", "torch", "native")

# Table-major from this many tokens per table row on: the crossover measured by `benchmarks/memory_training.py`.
TABLE_MAJOR_TOKENS_PER_ROW = 0.15
# Above this share of windows that are not full of letters, folded tables read more than they save.
LARGEST_IRREGULAR_SHARE = 0.25


class MemoryPath(NamedTuple):
    """An algorithm and its kernels; "auto" where nothing is forced."""

    algorithm: str = "auto"
    kernels: str = "auto"


def _checked(algorithm: str, kernels: str, names: tuple[str, str]) -> MemoryPath:
    for value, allowed, name in zip((algorithm, kernels), (ALGORITHMS, KERNELS), names, strict=True):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
    if kernels == "native" and not status().available:
        raise ValueError(f"the native kernels are asked for by {names[1]} but cannot be used: {status().reason}")
    return MemoryPath(algorithm, kernels)


_ENVIRONMENT = ("GENGRAM_MEMORY_ALGORITHM", "GENGRAM_MEMORY_KERNELS")
_forced = MemoryPath()
_is_read = False


def forced_path() -> MemoryPath:
    """What the environment or `memory_path` asks for."""
    global _forced, _is_read
    if not _is_read:
        algorithm, kernels = (os.environ.get(name) or "auto" for name in _ENVIRONMENT)
        _forced = _checked(algorithm, kernels, _ENVIRONMENT)
        _is_read = True
    return _forced


@contextlib.contextmanager
def memory_path(algorithm: str | None = None, kernels: str | None = None) -> Iterator[None]:
    """Force how the memories of this process compute, inside a `with` block.

    Args:
        algorithm: "token_major", "table_major", "folded" or "auto"; None leaves it as it is.
        kernels: "torch", "native" or "auto"; None leaves it as it is.

    Raises:
        ValueError: for other names, or native kernels that cannot be used. A model raises one too if it is asked for
            an algorithm that cannot be used there, such as folded tables where gradients are needed.
    """
    global _forced
    before = forced_path()
    _forced = _checked(algorithm or before.algorithm, kernels or before.kernels, ("algorithm", "kernels"))
    try:
        yield
    finally:
        _forced = before


def uses_native(device: torch.device, dtype: torch.dtype, hidden: int) -> bool:
    """Whether native kernels compute on this device, in this dtype, for this hidden size."""
    kernels = forced_path().kernels
    if kernels == "torch":
        return False
    reason = _why_not_native(device.type, dtype, hidden)
    if reason is not None and kernels == "native":
        raise ValueError(f"native kernels are asked for but {reason}.")
    return reason is None


def _why_not_native(device_type: str, dtype: torch.dtype, hidden: int) -> str | None:
    library = status()
    if not library.available:
        return library.reason
    if device_type == "cuda" and not library.has_cuda:
        return library.cuda_reason
    if device_type not in ("cpu", "cuda"):
        return f"the library has no kernels for {device_type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they have no {dtype}"
    if hidden % 16:
        return f"they need a hidden size that is a multiple of 16, got {hidden}"
    return None


_logged: set[tuple[str, str, torch.dtype, int]] = set()


def log_path(algorithm: str, device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    """Log, once for each combination, which way is taken and why native kernels are not; at level INFO."""
    key = (algorithm, device.type, dtype, hidden)
    if key in _logged:
        return
    _logged.add(key)
    kernels = "native kernels"
    if not uses_native(device, dtype, hidden):
        reason = _why_not_native(device.type, dtype, hidden) or "torch kernels are asked for"
        kernels = f"PyTorch's operations ({reason})"
    logger.info("the memory on %s in %s, hidden size %d: %s, %s", device.type, dtype, hidden, algorithm, kernels)


def folded_layout(device: torch.device, dtype: torch.dtype, hidden: int) -> int | None:
    """The slab width (see `fold_tables`) of tables for what computes on this device; None is one slab."""
    return slab_width(hidden, device.type) if uses_native(device, dtype, hidden) else None


def choose_algorithm(*, can_project: str | None, needs_grad: bool, is_folded: bool, tokens: int, rows: int) -> str:
    """The algorithm for one forward pass.

    Args:
        can_project: why the projections cannot be taken of table rows, or None if they can.
        needs_grad: whether gradients are wanted.
        is_folded: whether folded tables are there, or may be made.
        tokens: tokens of this pass.
        rows: rows that would have to be projected.
    """
    wanted = forced_path().algorithm
    if wanted == "folded" and needs_grad:
        raise ValueError("folded tables are asked for but this pass needs gradients; use torch.no_grad() and eval().")
    if wanted in ("folded", "table_major") and can_project is not None:
        raise ValueError(f"the algorithm {wanted} is asked for but {can_project}.")
    if wanted != "auto":
        return wanted
    if can_project is not None:
        return "token_major"
    if not needs_grad:
        return "folded" if is_folded else "token_major"
    return "table_major" if tokens >= TABLE_MAJOR_TOKENS_PER_ROW * rows else "token_major"
