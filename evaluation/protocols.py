"""What can be done with each kind of task: how its data are read, and its protocols and baselines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .classification import CLASSIFICATION, read_classification, run_classification
from .likelihood import LIKELIHOOD, read_splits, run_likelihood
from .suite import ClassificationTask, LikelihoodTask, VariantTask
from .variants import VARIANTS, read_labelled_variants, run_variants


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Args:
        protocols: by name.
        read: from a task, the folder of the data and the names of protocols, what `run` needs; raises for data that
            cannot be used, before any work is done.
        run: from a protocol's name, a model or `None`, a task, what was read, a seed and whether to show bars, the
            fields of a result.
    """

    protocols: Mapping[str, Any]
    read: Callable[..., Any]
    run: Callable[..., dict[str, Any]]


KINDS: dict[type, TaskKind] = {
    ClassificationTask: TaskKind(CLASSIFICATION, read_classification, run_classification),
    VariantTask: TaskKind(VARIANTS, read_labelled_variants, run_variants),
    LikelihoodTask: TaskKind(LIKELIHOOD, read_splits, run_likelihood),
}


def needs_model(protocol: str) -> bool:
    """Whether a protocol is about a model, or is a baseline."""
    return not protocol.startswith("baseline-")
