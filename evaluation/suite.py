"""Suites: what to evaluate, on which data, by which metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..inference.pooling import POOLINGS
from ..support.errors import InputError, quoted, shortened
from .tables import class_name

METRICS = ("auc", "auprc", "mcc", "accuracy")
AREAS = ("auc", "auprc")  # what scores without a threshold have
CLASSIFIERS = ("logistic", "mlp", "xgboost")
Source = str | dict[str, str]  # see `labelled_data.read_labelled`


@dataclass(frozen=True)
class FineTuningOptions:
    """How a model is fine-tuned; the epoch with the smallest loss on held-out training rows is kept.

    Args:
        epochs: passes over the training rows.
        patience: stop after so many epochs without a smaller loss on held-out rows.
        learning_rate: the highest one, after 5 % of the steps; then it falls to 0 along a cosine.
        batch_size: sequences of a step.
        weight_decay: of AdamW.
        lora_rank: of the adapters, for LoRA.
        label_smoothing: share of the probability that is spread over all classes, in training and on held-out rows.
        both_strands: train on every sequence and its reverse complement, and average the predictions of both.
        pooling: what a Gengram model's head reads, see `GengramConfig.classifier_pooling`; by default what the model's
            configuration says. Heads of other models stay as they are.
        bidirectional: let the bases of a causal Gengram model see both sides (`is_causal=False`), which it has to
            learn from the training rows.
        bf16: compute in bfloat16 where that is safe.
    """

    epochs: float = 3.0
    patience: int = 2
    learning_rate: float = 3e-4
    batch_size: int = 32
    weight_decay: float = 0.01
    lora_rank: int = 8
    bf16: bool = False
    label_smoothing: float = 0.0
    both_strands: bool = True
    pooling: str | None = None
    bidirectional: bool = False

    def __post_init__(self):
        for option in fields(self):
            value, default = getattr(self, option.name), option.default
            if default is None:
                continue
            kind = type(default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InputError(
                    f"fine_tuning: {option.name} must be of type {kind.__name__}, got {shortened(value)}."
                )
        for name, (is_allowed, expected) in _FINE_TUNING_BOUNDS.items():
            value = getattr(self, name)
            if not (is_allowed(value) and value < 1e9):
                raise InputError(f"fine_tuning: {name} must be {expected}, got {shortened(value)}.")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InputError(f"fine_tuning: expected a pooling of {POOLINGS}, got {shortened(self.pooling)}.")


_FINE_TUNING_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "epochs": (lambda value: value > 0, "above 0"),
    "patience": (lambda value: value >= 1, "1 or more"),
    "learning_rate": (lambda value: value > 0, "above 0"),
    "batch_size": (lambda value: value >= 1, "1 or more"),
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "lora_rank": (lambda value: value >= 1, "1 or more"),
    "label_smoothing": (lambda value: 0 <= value < 1, "0 or more and below 1"),
}


@dataclass(frozen=True)
class ClassificationTask:
    """One class per sequence.

    Args:
        name: of the task.
        train, test: sources of `labelled_data.read_labelled`. Without `test`, `fold` names a column of `train`, and
            each of its three or more values is tested once by a classifier of all the others.
        sequence, label: columns.
        positive: of two classes, the one whose AUPRC is computed; by default the larger number, or the second by its
            letters.
        metric: the one that tables and plots show, and by which classifiers are chosen; all are reported.
        protocols: names of `protocols.CLASSIFICATION`.
        classifiers: what the protocol `frozen` chooses among: logistic, mlp, xgboost.
        both_strands: embed the reverse complement too.
        fine_tuning: fields of `FineTuningOptions` that differ from its defaults.
        most_train: fit on so many rows only, drawn by the seed; see `LabelledSequences.sample`.
    """

    name: str
    train: Source
    test: Source | None = None
    fold: str | None = None
    sequence: str = "sequence"
    label: str = "label"
    positive: str | None = None
    metric: str = "mcc"
    protocols: tuple[str, ...] = ("frozen", "baseline-kmer", "baseline-kmer-xgboost", "baseline-positional")
    classifiers: tuple[str, ...] = ("logistic", "mlp")
    both_strands: bool = True
    fine_tuning: dict[str, Any] = field(default_factory=dict)
    most_train: int | None = None

    def __post_init__(self):
        if (self.test is None) == (self.fold is None):
            raise InputError(f"task {self.name!r}: expected exactly one of test and fold.")
        _check_metric(self, METRICS)
        _check_least(self, "most_train", 2)
        if self.sequence == self.label:
            raise InputError(f"task {self.name!r}: expected two columns, got {self.label!r} as sequence and label.")
        unknown = [name for name in self.classifiers if name not in CLASSIFIERS]
        if unknown:
            raise InputError(f"task {self.name!r}: expected classifiers of {CLASSIFIERS}, got {quoted(unknown)}.")
        known = [option.name for option in fields(FineTuningOptions)]
        unknown = [name for name in self.fine_tuning if name not in known]
        if unknown:
            raise InputError(
                f"task {self.name!r}: unknown options of fine_tuning: {quoted(unknown, known)}; known are "
                f"{', '.join(known)}."
            )
        try:
            FineTuningOptions(**self.fine_tuning)
        except ValueError as error:
            raise InputError(f"task {self.name!r}: {error}") from None


@dataclass(frozen=True)
class VariantTask:
    """Substitutions with a label, scored without training.

    Args:
        name: of the task.
        variants: CSV, TSV or Parquet file, also compressed.
        fasta: the reference, of one record.
        first_base: position that the table gives to the first base of the FASTA: 1 if positions are 1-based and the
            FASTA starts the chromosome.
        position, reference, alternative, label: columns.
        positive: the value of `label` that a low likelihood should mean. Whole numbers may be written as `1` or `1.0`.
        negative: the value it is compared with; by default all others, but for empty cells.
        stratum: column of what kind of variant each is; areas under the curve are reported within each kind too,
            because a score may tell the kinds apart rather than the variants.
        flank: bases of context on either side.
        metric, protocols: as for `ClassificationTask`; protocols of `protocols.VARIANTS`.
    """

    name: str
    variants: str
    fasta: str
    first_base: int = 1
    position: str = "pos"
    reference: str = "ref"
    alternative: str = "alt"
    label: str = "label"
    positive: str = "1"
    negative: str | None = None
    stratum: str | None = None
    flank: int = 256
    metric: str = "auc"
    protocols: tuple[str, ...] = ("zero-shot", "baseline-transversion")

    def __post_init__(self):
        _check_metric(self, AREAS)
        _check_least(self, "flank", 1)
        object.__setattr__(self, "positive", class_name(self.positive))
        if self.negative is not None:
            object.__setattr__(self, "negative", class_name(self.negative))
        if self.positive == self.negative:
            raise InputError(f"task {self.name!r}: expected positive and negative to differ, got {self.positive!r}.")


@dataclass(frozen=True)
class LikelihoodTask:
    """Bits per base of held-out sequence.

    Args:
        name: of the task.
        dataset: folder that `gengram prepare` wrote.
        test: split to measure on.
        train, validation: splits that Markov models count, and choose their smoothing on.
        examples: measure on so many examples only, drawn once.
        metric: always bits per base.
        protocols: names of `protocols.LIKELIHOOD`.
    """

    name: str
    dataset: str
    test: str = "test"
    train: str = "train"
    validation: str = "validation"
    examples: int | None = None
    metric: str = "bits_per_base"
    protocols: tuple[str, ...] = ("likelihood", "baseline-markov-5", "baseline-markov-11")

    def __post_init__(self):
        _check_metric(self, ("bits_per_base",))
        _check_least(self, "examples", 1)


Task = ClassificationTask | VariantTask | LikelihoodTask


def _check_metric(task: Any, known: tuple[str, ...]) -> None:
    if task.metric not in known:
        raise InputError(f"task {task.name!r}: expected a metric of {known}, got {shortened(task.metric)}.")


def _check_least(task: Any, name: str, least: int) -> None:
    value = getattr(task, name)
    if value is not None and value < least:
        raise InputError(f"task {task.name!r}: {name} must be {least} or more, got {value}.")


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    description: str
    tasks: tuple[Task, ...]


def with_fine_tuning(suite: Suite, options: Mapping[str, Any]) -> Suite:
    """The suite with some options of fine-tuning instead of its tasks' own.

    Raises:
        InputError: if there is no such option.
    """
    tasks = [
        replace(task, fine_tuning={**task.fine_tuning, **options}) if isinstance(task, ClassificationTask) else task
        for task in suite.tasks
    ]
    return replace(suite, tasks=tuple(tasks))
