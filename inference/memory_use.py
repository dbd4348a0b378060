"""A model's motif memories, fast for long work."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ..motif_memory import MotifMemory, folded_inference
from ..motif_memory.ways.kept_fold import LARGEST_GROWTH, memories_of
from ..motif_memory.ways.packed_tables import table_sections

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def fast_memory(model: Any) -> Iterator[None]:
    """A block of inference whose memories are folded, unless their tables would be too large or cannot be folded.

    Nothing may change the model's weights before its end. A block inside another one uses its tables.
    """
    with contextlib.ExitStack() as stack:
        memories = memories_of(model)
        is_outermost = not all(memory.kept_fold.owners for memory in memories)
        if is_outermost and all(map(_stays_small, memories)):
            try:
                stack.enter_context(folded_inference(model))
            except ValueError as error:
                logger.info("The memory is computed unfolded: %s", error)
        yield


def _stays_small(memory: MotifMemory) -> bool:
    """Whether folded tables are not much larger than the memory itself; folding would be made unasked then, too."""
    folded = table_sections(max(memory.config.ngram_sizes)).rows * 2 * memory.norm_q.weight.shape[0]
    return folded <= LARGEST_GROWTH * sum(weight.numel() for weight in memory.parameters())
