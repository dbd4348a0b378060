"""One class per sequence: what is fitted on the training rows, and what it says of the test rows."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.pooling import POOLINGS
from ..support.errors import InputError, quoted, shortened
from .classifiers import choose, class_probabilities, score_of_features
from .differences import drawn_of
from .evaluated_model import EvaluatedModel
from .fine_tuning import fine_tune
from .labelled_data import LabelledSequences, check_classes, overlap, read_labelled, source_name
from .metrics import evaluate
from .sequence_baselines import FEATURES, check_one_length
from .suite import ClassificationTask, FineTuningOptions

_ROWS_FOR_CHOICE = 2000
_OF_TRAINING_ROWS = ("duplicates_in_train", "conflicts_in_train")  # see `Overlap.counts`
_OF_TEST_ROWS = ("test_rows_in_train", "conflicting_labels", "test_rows_near_train")


@dataclass(frozen=True)
class TrainAndTest:
    """Rows to fit on and rows to test on."""

    train: LabelledSequences
    test: LabelledSequences


@dataclass(frozen=True)
class Trial:
    """Rows of a classification task to fit on, rows to predict the classes of, and a seed."""

    task: ClassificationTask
    train: LabelledSequences
    test: LabelledSequences
    seed: int
    progress: bool


Predictions = tuple[np.ndarray, dict[str, Any]]  # class probabilities (rows, classes), and what was chosen


def frozen(model: EvaluatedModel, trial: Trial) -> Predictions:
    """The paper's protocol: layer, pooling and classifier chosen on the training rows, then fitted on all of them."""
    rows = trial.train.sample(_ROWS_FOR_CHOICE, trial.seed)
    choices = [(layer, pooling) for layer in range(model.encoder.layers) for pooling in POOLINGS]
    found = model.embed(rows.sequences, choices, trial.task.both_strands, trial.progress)
    scores = {
        choice: score_of_features(vectors, rows.labels, trial.seed, rows.groups, trial.task.metric)
        for choice, vectors in found.items()
    }
    best = max(scores, key=lambda choice: scores[choice])
    return _on_embeddings(model, trial, best, trial.task.classifiers)


def linear_probe(model: EvaluatedModel, trial: Trial) -> Predictions:
    """Logistic regression on the mean of the last hidden states."""
    return _on_embeddings(model, trial, (model.encoder.layers - 1, "mean"), ("logistic",))


def _on_embeddings(
    model: EvaluatedModel, trial: Trial, choice: tuple[int, str], classifiers: Sequence[str]
) -> Predictions:
    sequences = trial.train.sequences + trial.test.sequences
    vectors = model.embed(sequences, [choice], trial.task.both_strands, trial.progress)[choice]
    probabilities, details = _chosen(classifiers, vectors, trial)
    return probabilities, {"layer": choice[0], "pooling": choice[1], **details}


def _chosen(classifiers: Sequence[str], vectors: Any, trial: Trial) -> Predictions:
    """What the best classifier says of the test rows; `vectors` are of the training rows, then of the test rows."""
    train, metric = trial.train, trial.task.metric
    classifier, name, score = choose(
        classifiers, vectors[: len(train)], train.labels, trial.seed, train.groups, metric
    )
    probabilities = class_probabilities(classifier, vectors[len(train) :], len(train.classes))
    return probabilities, {"classifier": name, f"held_out_{metric}": score}


def full_fine_tuning(model: EvaluatedModel, trial: Trial, with_lora: bool = False) -> Predictions:
    """All weights, or low-rank adapters of all linear layers, through `Trainer`."""
    options = FineTuningOptions(**trial.task.fine_tuning)
    probabilities, details = fine_tune(
        model.name,
        trial.train,
        trial.test,
        options,
        trial.seed,
        with_lora=with_lora,
        progress=trial.progress,
        **model.loading,
    )
    return probabilities, {**asdict(options), **details}  # details know better which pooling was used


def sequence_baseline(model: None, trial: Trial, features: str, classifier: str) -> Predictions:
    """A classifier on `sequence_baselines.FEATURES`."""
    vectors = FEATURES[features](trial.train.sequences + trial.test.sequences)
    probabilities, details = _chosen([classifier], vectors, trial)
    return probabilities, {"features": features, **details}


CLASSIFICATION: dict[str, Callable[..., Predictions]] = {
    "frozen": frozen,
    "linear": linear_probe,
    "fine-tuned": full_fine_tuning,
    "lora": functools.partial(full_fine_tuning, with_lora=True),
    "baseline-kmer": functools.partial(sequence_baseline, features="kmer", classifier="logistic"),
    "baseline-kmer-xgboost": functools.partial(sequence_baseline, features="kmer4", classifier="xgboost"),
    "baseline-positional": functools.partial(sequence_baseline, features="positional", classifier="logistic"),
}
FINE_TUNING = ("fine-tuned", "lora")


def read_classification(task: ClassificationTask, data: Path, protocols: Sequence[str]) -> list[TrainAndTest]:
    """The rows of a task: one split, or one for each fold.

    Raises:
        InputError: if a file cannot be used (see `read_labelled`), a class has too few training rows to fit on and to
            choose by, or sequences differ in length and a protocol needs one length.
        OSError: if a file cannot be read.
    """
    columns = {"sequence_column": task.sequence, "label_column": task.label}
    where = source_name(task.train, data)
    train = read_labelled(task.train, data, group_column=task.fold, positive=task.positive, **columns)
    check_classes(train, where)
    if task.fold is None:
        splits = [TrainAndTest(train, read_labelled(task.test, data, classes=train.classes, **columns))]
    else:
        splits = _folds(train, f"{where}, column {task.fold!r}")
    if "baseline-positional" in protocols:
        try:
            check_one_length(train.sequences + splits[0].test.sequences)
        except InputError as error:
            raise InputError(f"{error} Leave baseline-positional out of the protocols.") from None
    return splits


def _folds(rows: LabelledSequences, where: str) -> list[TrainAndTest]:
    """Each fold once as the test rows of all others; one of the others has to be held out to choose by."""
    assert rows.groups is not None
    for index, name in enumerate(rows.classes):
        folds = np.unique(rows.groups[rows.labels == index])
        if len(folds) < 3:
            raise InputError(
                f"{where}: expected each class in three folds or more (one to test, one to choose by, one to fit on), "
                f"got {shortened(name)} in {quoted(folds.tolist())} only."
            )
    return [
        TrainAndTest(rows.take(rows.groups != fold), rows.take(rows.groups == fold)) for fold in np.unique(rows.groups)
    ]


def run_classification(
    protocol: str,
    model: EvaluatedModel | None,
    task: ClassificationTask,
    splits: Sequence[TrainAndTest],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Fit and test one protocol on one task; with folds, the probabilities of all folds are put together."""
    labels, probabilities, details, overlaps = [], [], [], []
    for split in splits:
        train = split.train.sample(task.most_train, seed)
        check_classes(train, f"the {len(train)} rows drawn (most_train)")
        overlaps.append(overlap(train, split.test))
        of_test, chosen = CLASSIFICATION[protocol](model, Trial(task, train, split.test, seed, progress))
        labels.append(split.test.labels)
        probabilities.append(of_test)
        details.append(chosen)
    if model is not None:
        model.forget()
    rows = np.concatenate(labels)
    predicted = np.concatenate(probabilities)
    found = evaluate(rows, predicted)
    is_far = ~np.concatenate([each.is_near_train for each in overlaps])
    far = evaluate(rows[is_far], predicted[is_far]) if is_far.any() and not is_far.all() else {}
    counts_of_overlap = [each.counts() for each in overlaps]
    classes = splits[0].train.classes
    counts = np.bincount(rows, minlength=len(classes))
    return {
        "metrics": {name: estimate.numbers() for name, estimate in found.items()},
        **drawn_of(found, rows),
        "details": details[0] if len(details) == 1 else details,
        "train_rows": min(len(splits[0].train), task.most_train or len(splits[0].train)),
        "test_rows": sum(map(len, labels)),
        "test_rows_of_classes": dict(zip(classes, counts.tolist(), strict=True)),
        **{name: max(each[name] for each in counts_of_overlap) for name in _OF_TRAINING_ROWS},
        **{name: sum(each[name] for each in counts_of_overlap) for name in _OF_TEST_ROWS},
        "metrics_far_from_train": {name: estimate.numbers() for name, estimate in far.items()},
    }
