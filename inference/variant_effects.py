"""Zero-shot effects of variants of a genome: how much less a model expects the alternative allele, and the like."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..sequences.genome import Genome
from ..sequences.variants import SCORED, ReferenceCheck, Variant, has_only_nucleotides, variant_windows
from .effects import Change, StrandEffects
from .window_effects import WindowEffects

SHORTEST_CONTEXT = 2  # bases: of a single one nothing is predicted


class VariantEffect(NamedTuple):
    """A variant and its effects; or None, and as the status a word of `sequences.variants.REASONS` that says why."""

    variant: Variant
    status: str
    effects: StrandEffects | None


def variant_effects(
    model: WindowEffects, genome: Genome, variants: Iterable[Variant], context: int
) -> Iterator[VariantEffect]:
    """The effect of each variant, in their order; some hundreds at a time are in memory.

    Windows are those of `variant_windows`. Variants that cannot be scored come back with the reason.

    Args:
        model: what is asked, and for which numbers.
        genome: what the variants are variants of; `genome_of` makes one of a sequence.
        variants: one alternative allele each, in any order.
        context: bases of a window, 2 or more: of a single one nothing is predicted.

    Raises:
        InputError: if so many variants do not fit the genome that it is another one.
        ValueError: if the context is less than 2 bases, or more than the model reads.

    Example:

    ```python
    >>> import torch, gengram
    >>> from gengram.sequences.genome import genome_of
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL)
    >>> model = WindowEffects(AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL), tokenizer)
    >>> genome, variants = genome_of({"chr1": "ACGTTGCAGG"}), [Variant("chr1", 5, "G", "A"), Variant("1", 7, "A", "*")]
    >>> [found.status for found in variant_effects(model, genome, variants, context=8)]
    ['scored', 'spanning_deletion']

    ```
    """
    check = ReferenceCheck(genome)
    yield from effects_of_checked(model, genome, ((each, check.status(each)) for each in variants), context)
    check.finish()


def effects_of_checked(
    model: WindowEffects, genome: Genome, variants: Iterable[tuple[Variant, str]], context: int
) -> Iterator[VariantEffect]:
    """The same for variants that were compared with the genome, each with what `ReferenceCheck.status` said."""
    if context < SHORTEST_CONTEXT:
        raise ValueError(f"expected a context of {SHORTEST_CONTEXT} bases or more, got {context}.")
    model.check_length(context)
    waiting: deque[tuple[Variant, str]] = deque()

    def changes() -> Iterator[Change | None]:
        for variant, status in variants:
            change = None
            if not status:
                status, change = _change(model, genome, variant, context)
            waiting.append((variant, status))
            yield change

    for effects in model.of(changes()):
        yield VariantEffect(*waiting.popleft(), effects)


def _change(model: WindowEffects, genome: Genome, variant: Variant, context: int) -> tuple[str, Change | None]:
    """The change of a variant's window and `scored`; or the reason why there is none."""
    _, _, reference, alternative = variant
    if model.is_masked and len(reference) != len(alternative):
        return "needs_causal_model", None
    windows = variant_windows(genome, *variant, context)
    if len(windows.reference) < SHORTEST_CONTEXT:
        return "too_short", None
    if not has_only_nucleotides(windows.reference + windows.alternative):
        return "foreign_letters", None
    return SCORED, Change(*windows, len(reference), len(alternative))
