"""Variants with a label, ranked without training: which rows count, what scores them, areas under the curve."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..inference.variant_effects import Variant, score_variants
from ..sequences.alphabet import IUPAC
from ..sequences.fasta import read_fasta
from ..support.errors import InputError, shortened
from ..support.input_file import shown_name
from .evaluated_model import EvaluatedModel
from .metrics import evaluate
from .suite import AREAS, VariantTask
from .tables import class_name, counted, is_missing, place, read_table

_MOST_MISMATCHES = 0.1  # share of reference alleles; with another assembly three in four differ


@dataclass(frozen=True)
class LabelledVariants:
    """Variants of one sequence that can be scored, and what was left out.

    Args:
        sequence: the reference, in upper case.
        variants: of it, with 0-based positions.
        labels: (variants,) 1 for the positive class, 0 for what it is compared with.
        compared_with: how many variants have each of the labels that are not the positive one.
        strata: (variants,) what kind each is, if there are kinds.
        left_out: how many rows of the table were left out, by the reason.
    """

    sequence: str
    variants: list[Variant]
    labels: np.ndarray
    compared_with: dict[str, int]
    strata: np.ndarray | None
    left_out: dict[str, int]


def read_variants(task: VariantTask, data: Path, protocols: Sequence[str] = ()) -> LabelledVariants:
    """The rows of a task that have a label and can be scored; the others are counted, by the reason.

    Raises:
        InputError: if a file cannot be used, a position is no whole number, most reference alleles are not what the
            sequence holds, or no row is positive or none is negative.
        OSError: if a file cannot be read.
    """
    where, genome = shown_name(data / task.variants), shown_name(data / task.fasta)
    columns = [task.position, task.reference, task.alternative, task.label]
    table = read_table(data / task.variants, columns + ([task.stratum] if task.stratum is not None else []))
    sequence = next(read_fasta(data / task.fasta))[1].upper()
    names = table[task.label].map(class_name)
    is_unlabelled = is_missing(names)
    left_out: Counter[str] = Counter()
    rows, variants = [], []
    for row, name in enumerate(names):
        if is_unlabelled[row]:
            left_out["no label"] += 1
        elif task.negative is not None and name not in (task.positive, task.negative):
            left_out[f"a label other than {shortened(task.positive)} and {shortened(task.negative)}"] += 1
        else:
            variant = _variant(table, row, task, where)
            reason = unscored(sequence, variant)
            if reason is None:
                rows.append(row)
                variants.append(variant)
            else:
                left_out[reason] += 1
    mismatches = left_out[OTHER_REFERENCE]
    if mismatches > _MOST_MISMATCHES * (mismatches + len(rows)):
        raise InputError(
            f"{where}: expected the reference alleles that {genome} holds, {mismatches:,} of "
            f"{mismatches + len(rows):,} differ: is it another assembly, or is first_base ({task.first_base}) not the "
            "position of its first base?"
        )
    kept = names.iloc[rows]
    labels = (kept == task.positive).to_numpy(dtype=np.int64)
    if not 0 < labels.sum() < len(labels):
        raise InputError(
            f"{where}: expected rows that can be scored with {task.label} = {task.positive!r} and others without, got "
            f"{int(labels.sum())} and {int((1 - labels).sum())}; the column has {counted(names) or 'no rows'}."
        )
    return LabelledVariants(
        sequence=sequence,
        variants=variants,
        labels=labels,
        compared_with=dict(Counter(kept[labels == 0])),
        strata=None if task.stratum is None else table[task.stratum].str.strip().iloc[rows].to_numpy(dtype=str),
        left_out=dict(left_out),
    )


def _variant(table: pd.DataFrame, row: int, task: VariantTask, where: str) -> Variant:
    cells = table.iloc[row]
    position = class_name(cells[task.position])
    if not re.fullmatch("[0-9]{1,18}", position):
        raise InputError(
            f"{where}, {place(table, row)}: expected a whole number in the column {task.position!r}, got "
            f"{shortened(cells[task.position])}."
        )
    reference, alternative = (cells[name].strip().upper() for name in (task.reference, task.alternative))
    return Variant(int(position) - task.first_base, reference, alternative)


OTHER_REFERENCE = "the reference allele is not what the sequence holds"


def unscored(sequence: str, variant: Variant) -> str | None:
    """Why a variant has no score; None if it has one."""
    for name, allele in (("reference", variant.reference), ("alternative", variant.alternative)):
        if not re.fullmatch("[ACGTN]+", allele):
            return f"the {name} allele is not of A, C, G, T and N"
    if variant.reference == variant.alternative:
        return "the alleles are equal"
    end = variant.position + len(variant.reference)
    if variant.position < 0 or end > len(sequence):
        return "outside of the sequence"
    return None if sequence[variant.position : end] == variant.reference else OTHER_REFERENCE


def zero_shot(model: EvaluatedModel, task: VariantTask, rows: LabelledVariants, progress: bool) -> np.ndarray:
    """How unlikely an alternative allele is: the reference's log-likelihood minus its own, mean of both strands."""
    causal, bar = model.causal, model.name if progress else None
    return -score_variants(causal.model, causal.tokenizer, rows.sequence, rows.variants, task.flank, bar).llr


def transversion(model: None, task: VariantTask, rows: LabelledVariants, progress: bool) -> np.ndarray:
    """1 for a transversion (purine to pyrimidine or back), 0 for anything else."""
    purines = set(IUPAC["R"])
    return np.array(
        [
            len(v.reference) == len(v.alternative) == 1 and (v.reference in purines) != (v.alternative in purines)
            for v in rows.variants
        ],
        dtype=float,
    )


VARIANTS: dict[str, Callable[..., np.ndarray]] = {"zero-shot": zero_shot, "baseline-transversion": transversion}


def run_variants(
    protocol: str,
    model: EvaluatedModel | None,
    task: VariantTask,
    rows: LabelledVariants,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Rank variants by one protocol; areas under the curve are those of the positive class."""
    scores, labels = VARIANTS[protocol](model, task, rows, progress=progress), rows.labels

    def areas(chosen: np.ndarray) -> dict[str, Any]:
        found = evaluate(labels[chosen], np.stack([-scores[chosen], scores[chosen]], axis=1), AREAS)
        return {name: asdict(estimate) for name, estimate in found.items()}

    details: dict[str, Any] = {
        "flank": task.flank,
        "positive_share": float(labels.mean()),
        "compared_with": rows.compared_with,
    }
    if rows.strata is not None:
        details["strata"] = {}
        for kind in np.unique(rows.strata):
            chosen = np.flatnonzero(rows.strata == kind)
            positives = int(labels[chosen].sum())
            stratum = {"rows": len(chosen), "positives": positives, "mean_score": float(scores[chosen].mean())}
            details["strata"][str(kind)] = stratum | (areas(chosen) if 0 < positives < len(chosen) else {})
    return {
        "metrics": areas(np.arange(len(labels))),
        "details": details,
        "train_rows": 0,
        "test_rows": len(labels),
        "left_out": rows.left_out,
    }
