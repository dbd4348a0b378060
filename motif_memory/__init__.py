"""The motif memory for any backbone: configuration, definition, module, decode state, and faster ways of computing it.

Needs nothing but PyTorch; `README.md` beside this file has the mathematics.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_motif_memory import MotifMemoryConfig
    from .definition import MemoryOutput, NgramPlan
    from .grafts.attach import attach_memory, attached_memories, detach_memory
    from .grafts.saved_memory import load_memory, save_memory
    from .module import MotifMemory
    from .plan import letter_codes, plan_ngrams
    from .state import MemoryState
    from .ways.choose import Way, memory_path
    from .ways.kept_fold import fold_memory, folded_inference, unfold_memory

# Where each public name is defined; a module is imported when one of its names is first used.
_HOMES = {
    "MotifMemoryConfig": "configuration_motif_memory",
    "MemoryOutput": "definition",
    "NgramPlan": "definition",
    "MotifMemory": "module",
    "letter_codes": "plan",
    "plan_ngrams": "plan",
    "MemoryState": "state",
    "Way": "ways.choose",
    "memory_path": "ways.choose",
    "fold_memory": "ways.kept_fold",
    "folded_inference": "ways.kept_fold",
    "unfold_memory": "ways.kept_fold",
    "attach_memory": "grafts.attach",
    "attached_memories": "grafts.attach",
    "detach_memory": "grafts.attach",
    "load_memory": "grafts.saved_memory",
    "save_memory": "grafts.saved_memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)


__all__ = [
    "MemoryOutput",
    "MemoryState",
    "MotifMemory",
    "MotifMemoryConfig",
    "NgramPlan",
    "Way",
    "attach_memory",
    "attached_memories",
    "detach_memory",
    "fold_memory",
    "folded_inference",
    "letter_codes",
    "load_memory",
    "memory_path",
    "plan_ngrams",
    "save_memory",
    "unfold_memory",
]
