"""Variants with a label, ranked without training: which rows count, what scores them, areas under the curve."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..inference.variant_effects import effects_of_checked
from ..inference.window_effects import WindowEffects
from ..sequences.alphabet import IUPAC
from ..sequences.fasta import read_fasta
from ..sequences.genome import Genome, genome_of
from ..sequences.text_lines import whole_number
from ..sequences.variants import REASONS, ReferenceCheck, Variant
from ..support.bootstrap import Estimate
from ..support.errors import InputError, shortened
from ..support.input_file import shown_name
from ..support.progress import progress_bar
from .differences import drawn_of
from .evaluated_model import EvaluatedModel
from .metrics import evaluate
from .suite import AREAS, VariantTask
from .tables import class_name, counted, is_missing, place, read_table


@dataclass(frozen=True)
class LabelledVariants:
    """Variants that can be scored, and what was left out.

    Args:
        genome: the reference, of one sequence.
        variants: of it.
        labels: (variants,) 1 for the positive class, 0 for what it is compared with.
        compared_with: how many variants have each of the labels that are not the positive one.
        strata: (variants,) what kind each is, if there are kinds.
        left_out: how many rows of the table were left out, by the reason.
    """

    genome: Genome
    variants: list[Variant]
    labels: np.ndarray
    compared_with: dict[str, int]
    strata: np.ndarray | None
    left_out: dict[str, int]


def read_labelled_variants(task: VariantTask, data: Path, protocols: Sequence[str] = ()) -> LabelledVariants:
    """The rows of a task that have a label and can be scored; the others are counted, by the reason.

    Raises:
        InputError: if a file cannot be used, FASTA has several records, a position is no whole number, most reference
            alleles are not what the sequence holds, or no row is positive or none is negative.
        OSError: if a file cannot be read.
    """
    where = shown_name(data / task.variants)
    columns = [task.position, task.reference, task.alternative, task.label]
    table = read_table(data / task.variants, columns + ([task.stratum] if task.stratum is not None else []))
    records = read_fasta(data / task.fasta)
    contig, sequence = next(records)
    if next(records, None) is not None:
        raise InputError(
            f"{shown_name(data / task.fasta)}: expected one record, since positions of a task name none, got more; "
            "write the one that the variants are of into a file of its own."
        )
    genome = genome_of({contig: sequence}, shown_name(data / task.fasta))
    names = table[task.label].map(class_name)
    left_out: Counter[str] = Counter()
    labelled = []
    for row, (name, is_unlabelled) in enumerate(zip(names, is_missing(names), strict=True)):
        if is_unlabelled:
            left_out["the row has no label"] += 1
        elif task.negative is not None and name not in (task.positive, task.negative):
            left_out[f"a label other than {shortened(task.positive)} and {shortened(task.negative)}"] += 1
        else:
            labelled.append(row)
    variants = [_variant(contig, table, row, task, where) for row in labelled]
    check = ReferenceCheck(genome)
    try:
        statuses = [check.status(variant) for variant in variants]
        check.finish()
    except InputError as error:
        raise InputError(f"{where}: {error} (The task's first_base is {task.first_base}.)") from None
    left_out.update(REASONS[status] for status in statuses if status)
    rows = [row for row, status in zip(labelled, statuses, strict=True) if not status]
    kept = names.iloc[rows]
    labels = (kept == task.positive).to_numpy(dtype=np.int64)
    if not 0 < labels.sum() < len(labels):
        raise InputError(
            f"{where}: expected rows that can be scored with {task.label} = {task.positive!r} and others without, got "
            f"{int(labels.sum())} and {int((1 - labels).sum())}; the column has {counted(names) or 'no rows'}."
        )
    return LabelledVariants(
        genome=genome,
        variants=[variant for variant, status in zip(variants, statuses, strict=True) if not status],
        labels=labels,
        compared_with=dict(Counter(kept[labels == 0])),
        strata=None if task.stratum is None else table[task.stratum].str.strip().iloc[rows].to_numpy(dtype=str),
        left_out=dict(left_out),
    )


def _variant(contig: str, table: pd.DataFrame, row: int, task: VariantTask, where: str) -> Variant:
    cells = table.iloc[row]
    position = whole_number(class_name(cells[task.position]))
    if position is None:
        raise InputError(
            f"{where}, {place(table, row)}: expected a whole number in the column {task.position!r}, got "
            f"{shortened(cells[task.position])}."
        )
    reference, alternative = (cells[name].strip().upper() for name in (task.reference, task.alternative))
    return Variant(contig, position - task.first_base, reference, alternative)


Scores = tuple[np.ndarray, dict[str, int]]  # (variants,), nan for those that were left out; and how many, by reason


def zero_shot(model: EvaluatedModel, task: VariantTask, rows: LabelledVariants, progress: bool) -> Scores:
    """How unlikely an alternative allele is: the reference's log-likelihood minus its own, mean of both strands."""
    loaded = model.language_model
    effects = WindowEffects(loaded.model, loaded.tokenizer, is_masked=model.is_masked)
    found = effects_of_checked(effects, rows.genome, ((variant, "") for variant in rows.variants), 2 * task.flank + 1)
    scores, left_out = np.full(len(rows.variants), np.nan), Counter[str]()
    bar = progress_bar(model.name if progress else None, "variant", len(scores), found)
    for number, (_, status, effect) in enumerate(bar):
        if effect is None:
            left_out[REASONS[status]] += 1
        else:
            scores[number] = -effect.mean("llr")
    return scores, dict(left_out)


def transversion(model: None, task: VariantTask, rows: LabelledVariants, progress: bool) -> Scores:
    """1 for a transversion (purine to pyrimidine or back), 0 for anything else."""
    purines = set(IUPAC["R"])
    scores = np.array(
        [
            len(v.reference) == len(v.alternative) == 1 and (v.reference in purines) != (v.alternative in purines)
            for v in rows.variants
        ],
        dtype=float,
    )
    return scores, {}


VARIANTS: dict[str, Callable[..., Scores]] = {"zero-shot": zero_shot, "baseline-transversion": transversion}


def run_variants(
    protocol: str,
    model: EvaluatedModel | None,
    task: VariantTask,
    rows: LabelledVariants,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Rank variants by one protocol; areas under the curve are those of the positive class."""
    scores, left_out = VARIANTS[protocol](model, task, rows, progress=progress)
    is_scored = ~np.isnan(scores)
    scores, labels = scores[is_scored], rows.labels[is_scored]
    if not 0 < labels.sum() < len(labels):
        raise InputError(f"expected scores of positives and of others, got {labels.sum()} and {(1 - labels).sum()}.")

    def areas(chosen: np.ndarray) -> dict[str, Estimate]:
        return evaluate(labels[chosen], np.stack([-scores[chosen], scores[chosen]], axis=1), AREAS)

    def numbers(found: dict[str, Estimate]) -> dict[str, dict[str, float]]:
        return {name: estimate.numbers() for name, estimate in found.items()}

    details: dict[str, Any] = {
        "flank": task.flank,
        "positive_share": float(labels.mean()),
        "compared_with": rows.compared_with,
    }
    if rows.strata is not None:
        details["strata"] = {}
        strata = rows.strata[is_scored]
        for kind in np.unique(strata):
            chosen = np.flatnonzero(strata == kind)
            positives = int(labels[chosen].sum())
            stratum = {"rows": len(chosen), "positives": positives, "mean_score": float(scores[chosen].mean())}
            details["strata"][str(kind)] = stratum | (numbers(areas(chosen)) if 0 < positives < len(chosen) else {})
    found = areas(np.arange(len(labels)))
    return {
        "metrics": numbers(found),
        **drawn_of(found, np.flatnonzero(is_scored), labels),
        "details": details,
        "train_rows": 0,
        "test_rows": len(labels),
        "left_out": dict(Counter(rows.left_out) + Counter(left_out)),
    }
