"""Suites: what to evaluate, on which data, by which metric; declared in a YAML file."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..inference.pooling import POOLINGS

METRICS = ("auc", "auprc", "mcc", "accuracy")
BUILT_IN = Path(__file__).parent / "suites"


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
                hint = " (YAML reads 3e-4 as a word, 3.0e-4 as a number)" if isinstance(value, str) else ""
                raise ValueError(f"fine-tuning: {option.name} must be of type {kind.__name__}, got {value!r}{hint}.")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"fine-tuning: expected a pooling of {POOLINGS}, got {self.pooling!r}.")


@dataclass(frozen=True)
class ClassificationTask:
    """One class per sequence.

    Args:
        name: of the task.
        train, test: sources of `labelled_data.read_labelled`. Without `test`, `fold` names a column of `train`, and
            each of its values is tested once by a classifier of all the others.
        sequence, label: columns.
        metric: the one that tables and plots show; all are reported.
        protocols: names of `protocols.CLASSIFICATION`.
        classifiers: what the protocol `frozen` chooses among: logistic, mlp, xgboost.
        both_strands: embed the reverse complement too.
        fine_tuning: fields of `FineTuningOptions` that differ from its defaults.
        most_train: fit on so many rows only, drawn by the seed.
    """

    name: str
    train: Any
    test: Any = None
    fold: str | None = None
    sequence: str = "sequence"
    label: str = "label"
    metric: str = "mcc"
    protocols: tuple[str, ...] = ("frozen", "baseline-kmer", "baseline-kmer-xgboost", "baseline-positional")
    classifiers: tuple[str, ...] = ("logistic", "mlp")
    both_strands: bool = True
    fine_tuning: dict[str, Any] = field(default_factory=dict)
    most_train: int | None = None

    def __post_init__(self):
        if (self.test is None) == (self.fold is None):
            raise ValueError(f"task {self.name!r}: expected exactly one of test and fold.")
        if self.metric not in METRICS:
            raise ValueError(f"task {self.name!r}: expected a metric of {METRICS}, got {self.metric!r}.")
        known = [option.name for option in fields(FineTuningOptions)]
        unknown = sorted(set(self.fine_tuning) - set(known))
        if unknown:
            raise ValueError(f"task {self.name!r}: unknown options of fine-tuning {unknown}; known are {known}.")
        try:
            FineTuningOptions(**self.fine_tuning)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from None


@dataclass(frozen=True)
class VariantTask:
    """Substitutions with a label, scored without training.

    Args:
        name: of the task.
        variants: CSV, TSV or Parquet file.
        fasta: the reference; its first record.
        first_base: position that the table gives to the first base of the FASTA: 1 if positions are 1-based and the
            FASTA starts the chromosome.
        position, reference, alternative, label: columns.
        positive: the value of `label` that a low likelihood should mean.
        negative: the value it is compared with; by default all others.
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


Task = ClassificationTask | VariantTask | LikelihoodTask
_KINDS: dict[str, type] = {
    "classification": ClassificationTask,
    "variants": VariantTask,
    "likelihood": LikelihoodTask,
}


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    description: str
    tasks: tuple[Task, ...]


def read_suite(name: str | Path) -> Suite:
    """A suite of this package by its name, or one of a YAML file.

    Raises:
        ValueError: if a field is unknown, missing or of the wrong kind; the message names the task.
        FileNotFoundError: if there is no such file and no suite of that name.
    """
    path = Path(name)
    if not path.suffix:
        path = BUILT_IN / f"{name}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in BUILT_IN.glob("*.yaml"))
        raise FileNotFoundError(f"no suite {str(name)!r}: give a YAML file, or one of {', '.join(known)}.")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, Mapping) or set(content) - {"name", "description", "tasks"} or not content.get("tasks"):
        raise ValueError(f"{path}: expected name, description and a list of tasks.")
    tasks = tuple(_task(task, path) for task in content["tasks"])
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: two tasks have the same name: {repeated}.")
    return Suite(str(content.get("name", path.stem)), str(content.get("description", "")), tasks)


def _task(content: Any, path: Path) -> Task:
    if not isinstance(content, Mapping) or content.get("kind", "classification") not in _KINDS:
        raise ValueError(f"{path}: expected a task with a kind of {list(_KINDS)}, got {content!r}.")
    given = dict(content)
    kind = _KINDS[given.pop("kind", "classification")]
    known = {found.name: found for found in fields(kind)}
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{path}: task {given.get('name')!r} has an unknown field {name!r}{hint}")
    required = [
        name
        for name, found in known.items()
        if found.default is MISSING and found.default_factory is MISSING and name not in given
    ]
    if required:
        raise ValueError(f"{path}: task {given.get('name')!r} lacks {', '.join(required)}.")
    for name in ("protocols", "classifiers"):
        if name in given:
            given[name] = tuple(given[name])
    for name in ("positive", "negative"):
        if given.get(name) is not None:
            given[name] = str(given[name])
    task: Task = kind(**given)
    return task


def with_fine_tuning(suite: Suite, options: Mapping[str, Any]) -> Suite:
    """The suite with some options of fine-tuning instead of its tasks' own.

    Raises:
        ValueError: if there is no such option.
    """
    tasks = [
        replace(task, fine_tuning={**task.fine_tuning, **options}) if isinstance(task, ClassificationTask) else task
        for task in suite.tasks
    ]
    return replace(suite, tasks=tuple(tasks))
