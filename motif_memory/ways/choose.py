"""Which way the memory is computed: decided here, and nowhere else.

Algorithms: `token_major` projects the features of every token, as the definition does; `table_major` projects the
table rows in use, once per step; `folded` reads tables projected in advance; `as_trained` repeats the original's order
of operations. Kernels: `torch` or `native`. All but the last give the same numbers up to rounding.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .native import slab_width, status

logger = logging.getLogger(__name__)

ALGORITHMS = ("auto", "token_major", "table_major", "folded")
KERNELS = ("auto", "torch", "native")

# Table-major from this many tokens per table row on: the crossover measured by `benchmarks/memory_training.py`. On a
# GPU products cost less beside the rest; in PyTorch's operations token-major was faster at any length there.
TABLE_MAJOR_TOKENS_PER_ROW = 0.15
TABLE_MAJOR_TOKENS_PER_ROW_ON_A_GPU = {"native": 1.5, "torch": math.inf}


_HISTORY_HAS_GRADIENTS = "only the definition has gradients through the history that a pass continues"


class Way(NamedTuple):
    """How a pass is computed, and why."""

    algorithm: str
    kernels: str
    reason: str  # why not another one
    fold: Any = None  # the tables of the algorithm "folded"


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


def choose_kernels(device: torch.device, dtypes: Sequence[torch.dtype], width: int) -> tuple[str, str]:
    """`"native"` or `"torch"` for tensors of these dtypes and this width, and why not natively.

    Raises:
        ValueError: if native kernels are asked for and have none for these.
    """
    wanted = forced_path().kernels
    if wanted == "torch":
        return "torch", "PyTorch's operations are asked for"
    reason = _why_not_native(device.type, dtypes, width)
    if reason is None:
        return "native", ""
    if wanted == "native":
        raise ValueError(f"native kernels are asked for but {reason}.")
    return "torch", reason


def _why_not_native(device_type: str, dtypes: Sequence[torch.dtype], width: int) -> str | None:
    library = status()
    if not library.available:
        return library.reason
    if device_type == "cuda" and not library.has_cuda:
        return library.cuda_reason
    if device_type not in ("cpu", "cuda"):
        return f"the library has no kernels for {device_type}"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"they have no {dtype}"
    if width % 16:
        return f"they need a hidden size that is a multiple of 16, got {width}"
    return None


def packed_layout(device: torch.device, dtype: torch.dtype, hidden: int) -> int | None:
    """The slab width (see `project_tables`) of tables for what computes on this device; None is one slab."""
    is_native = choose_kernels(device, (dtype,), hidden)[0] == "native"
    return slab_width(hidden, device.type) if is_native else None


def choose_way(
    hidden_states: torch.Tensor,
    *,
    is_as_trained: bool,
    can_project: str | None,
    continues: bool,
    table_rows: int,
    find_fold: Callable[[bool], tuple[Any, str]],
) -> Way:
    """The way of one pass.

    Args:
        hidden_states: (batch, length, hidden) of the pass; they and PyTorch's state say whether gradients are wanted.
        is_as_trained: whether the original's order of operations is asked for by the configuration.
        can_project: why the projections cannot be taken of table rows, or None if they can.
        continues: whether the pass goes on from a history, through which only the definition has gradients.
        table_rows: rows that a step would have to project.
        find_fold: called with whether folding is forced; finds or makes folded tables, and says why it has none.

    Raises:
        ValueError: if an algorithm or kernels are asked for that cannot be used here.
    """
    tokens = hidden_states.shape[0] * hidden_states.shape[1]
    needs_grad, is_compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    wanted = forced_path().algorithm
    if wanted == "folded" and needs_grad:
        raise ValueError("folded tables are asked for but this pass needs gradients; use torch.no_grad() and eval().")
    if wanted in ("folded", "table_major") and can_project is not None:
        raise ValueError(f"the algorithm {wanted} is asked for but {can_project}.")
    by_definition = needs_grad and continues
    if by_definition and (wanted == "table_major" or forced_path().kernels == "native"):
        asked = "native kernels are" if wanted != "table_major" else f"the algorithm {wanted} is"
        raise ValueError(f"{asked} asked for but {_HISTORY_HAS_GRADIENTS}; use torch.no_grad() to decode.")
    only_torch = can_project is not None or by_definition
    kernels, no_kernels = ("torch", "") if only_torch else _kernels_of(hidden_states)
    fold = None
    if can_project is not None:
        algorithm, reason = "as_trained" if is_as_trained else "token_major", can_project
    elif by_definition:
        algorithm, reason = "token_major", _HISTORY_HAS_GRADIENTS
    elif wanted not in ("auto", "folded"):
        algorithm, reason = wanted, f"{wanted} is asked for"
    elif needs_grad and not torch.compiler.is_exporting():  # whose graph serves any number of tokens
        on_cpu = hidden_states.device.type == "cpu"
        least = TABLE_MAJOR_TOKENS_PER_ROW if on_cpu else TABLE_MAJOR_TOKENS_PER_ROW_ON_A_GPU[kernels]
        pays = tokens >= least * table_rows
        algorithm = "table_major" if pays else "token_major"
        reason = f"{'at least' if pays else 'fewer than'} {least} tokens per table row"
    elif is_compiling:
        algorithm, reason = "token_major", "a compiled graph reads the weights themselves"
    else:
        fold, reason = find_fold(wanted == "folded")
        algorithm = "token_major" if fold is None else "folded"
    if not is_compiling:
        _log(algorithm, hidden_states, reason, no_kernels)
    return Way(algorithm, kernels, reason, fold)


def _kernels_of(hidden_states: torch.Tensor) -> tuple[str, str]:
    return choose_kernels(hidden_states.device, (hidden_states.dtype,), hidden_states.shape[-1])


_logged: set[tuple[Any, ...]] = set()


def _log(algorithm: str, hidden_states: torch.Tensor, reason: str, no_kernels: str) -> None:
    """Log a way and its reason at level INFO, once for each combination."""
    device, dtype, hidden = hidden_states.device.type, hidden_states.dtype, hidden_states.shape[-1]
    words = reason.split(":")[0]  # without numbers that change with every pass
    if (algorithm, device, dtype, hidden, words) in _logged:
        return
    _logged.add((algorithm, device, dtype, hidden, words))
    kernels = f"PyTorch's operations ({no_kernels})" if no_kernels else "native kernels"
    logger.info(
        "the memory on %s in %s, hidden size %d: %s (%s), %s", device, dtype, hidden, algorithm, reason, kernels
    )
