"""How a task is done: what is fitted on the training rows, and what it says of the test rows."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data_preparation.prepared_examples import digits_of
from ..inference.embeddings import SequenceEncoder
from ..inference.loaded_model import LoadedModel, load_model
from ..inference.pooling import POOLINGS
from ..inference.variant_effects import variant_effects
from ..inference.window_effects import WindowEffects
from ..sequences.alphabet import IUPAC
from ..sequences.fasta import read_fasta
from ..sequences.genome import genome_of
from ..sequences.variants import REASONS, Variant
from ..support.progress import progress_bar
from .classifiers import choose, score_of_features
from .fine_tuning import fine_tune
from .labelled_data import LabelledSequences, overlap, read_labelled, read_table
from .likelihood import bits_of_examples, bits_per_base
from .markov import MarkovModel
from .metrics import evaluate
from .sequence_baselines import FEATURES
from .suite import ClassificationTask, FineTuningOptions, LikelihoodTask, VariantTask

_ROWS_FOR_CHOICE = 2000


class EvaluatedModel:
    """A model under evaluation: its name, how it is loaded, and what has been computed with it.

    Args:
        name: model folder or Hub id.
        device, dtype: where and in which precision embeddings and likelihoods are computed.
        loading: further arguments of `from_pretrained`, as `revision` and `trust_remote_code`.
    """

    def __init__(self, name: str, device: str | None = None, dtype: torch.dtype = torch.float32, **loading: Any):
        self.name, self.dtype, self.loading = name, dtype, loading
        self.device = device
        self._embedded: dict[tuple[int, str, bool], dict[str, np.ndarray]] = {}

    @functools.cached_property
    def encoder(self) -> SequenceEncoder:
        """The model without a head."""
        return SequenceEncoder(self.name, dtype=self.dtype, device=self.device, **self.loading)

    @functools.cached_property
    def causal(self) -> LoadedModel:
        """The causal language model."""
        return load_model(self.name, "causal", self.dtype, self.device, **self.loading)

    def embed(
        self, sequences: Sequence[str], choices: Sequence[tuple[int, str]], both_strands: bool, progress: bool
    ) -> dict[tuple[int, str], np.ndarray]:
        """`SequenceEncoder.embed`, remembering what it has embedded until `forget`."""
        stores = {choice: self._embedded.setdefault((*choice, both_strands), {}) for choice in choices}
        missing = list(dict.fromkeys(s for s in sequences if any(s not in store for store in stores.values())))
        if missing:
            found = self.encoder.embed(missing, choices, both_strands, self.name if progress else None)
            for choice, vectors in found.items():
                stores[choice].update(zip(missing, vectors, strict=True))
        return {choice: np.stack([store[s] for s in sequences]) for choice, store in stores.items()}

    def forget(self) -> None:
        """Free the embeddings of a task."""
        self._embedded.clear()


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
        choice: score_of_features(vectors, rows.labels, trial.seed, rows.groups) for choice, vectors in found.items()
    }
    best = max(scores, key=lambda choice: scores[choice])
    return _on_embeddings(model, trial, best, trial.task.classifiers)


def linear_probe(model: EvaluatedModel, trial: Trial) -> Predictions:
    """Logistic regression on the mean of the last hidden states."""
    return _on_embeddings(model, trial, (model.encoder.layers - 1, "mean"), ("logistic",))


def _on_embeddings(
    model: EvaluatedModel, trial: Trial, choice: tuple[int, str], classifiers: Sequence[str]
) -> Predictions:
    train, sequences = trial.train, trial.train.sequences + trial.test.sequences
    vectors = model.embed(sequences, [choice], trial.task.both_strands, trial.progress)[choice]
    classifier, name, score = choose(classifiers, vectors[: len(train)], train.labels, trial.seed, train.groups)
    details = {"layer": choice[0], "pooling": choice[1], "classifier": name, "held_out_auc": score}
    return classifier.predict_proba(vectors[len(train) :]), details


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
    train = trial.train
    vectors = FEATURES[features](train.sequences + trial.test.sequences)
    fitted, name, score = choose([classifier], vectors[: len(train)], train.labels, trial.seed, train.groups)
    return fitted.predict_proba(vectors[len(train) :]), {
        "features": features,
        "classifier": name,
        "held_out_auc": score,
    }


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


def run_classification(
    protocol: str, model: EvaluatedModel | None, task: ClassificationTask, data: Path, seed: int, progress: bool
) -> dict[str, Any]:
    """Fit and test one protocol on one task; with folds, the probabilities of all folds are put together."""
    columns = {"sequence_column": task.sequence, "label_column": task.label}
    train = read_labelled(task.train, data, group_column=task.fold, **columns)
    splits: list[tuple[LabelledSequences, LabelledSequences]]
    if task.fold is None:
        splits = [(train, read_labelled(task.test, data, classes=train.classes, **columns))]
    else:
        assert train.groups is not None
        splits = [
            (train.take(train.groups != fold), train.take(train.groups == fold)) for fold in np.unique(train.groups)
        ]
    labels, probabilities, details, overlaps = [], [], [], []
    for fit, test in splits:
        overlaps.append(overlap(fit, test))
        trial = Trial(task, fit.sample(task.most_train, seed), test, seed, progress)
        predicted, chosen = CLASSIFICATION[protocol](model, trial)
        labels.append(test.labels)
        probabilities.append(predicted)
        details.append(chosen)
    if model is not None:
        model.forget()
    found = evaluate(np.concatenate(labels), np.concatenate(probabilities))
    return {
        "metrics": {name: asdict(estimate) for name, estimate in found.items()},
        "details": details[0] if len(details) == 1 else details,
        "train_rows": min(len(splits[0][0]), task.most_train or len(splits[0][0])),
        "test_rows": sum(map(len, labels)),
        "duplicates_in_train": max(found.duplicates_in_train for found in overlaps),
        "test_rows_in_train": sum(found.test_rows_in_train for found in overlaps),
        "conflicting_labels": sum(found.conflicting_labels for found in overlaps),
    }


def zero_shot(
    model: EvaluatedModel, task: VariantTask, sequence: str, variants: list[Variant], progress: bool
) -> np.ndarray:
    """How unlikely an alternative allele is: the reference's log-likelihood minus its own, mean of both strands."""
    effects = WindowEffects(model.causal.model, model.causal.tokenizer)
    found = variant_effects(effects, genome_of({"": sequence}), variants, context=2 * task.flank + 1)
    scores = []
    for effect in progress_bar(model.name if progress else None, "variant", len(variants), found):
        if effect.effects is None:
            raise ValueError(f"{task.name}: {effect.variant} cannot be scored: {REASONS[effect.status]}.")
        scores.append(-effect.effects.mean("llr"))
    return np.array(scores)


def transversion(model: None, task: VariantTask, sequence: str, variants: list[Variant], progress: bool) -> np.ndarray:
    """1 for a transversion (purine to pyrimidine or back), 0 for anything else."""
    purines = set(IUPAC["R"])
    return np.array(
        [
            len(v.reference) == len(v.alternative) == 1 and (v.reference in purines) != (v.alternative in purines)
            for v in variants
        ],
        dtype=float,
    )


VARIANTS: dict[str, Callable[..., np.ndarray]] = {"zero-shot": zero_shot, "baseline-transversion": transversion}


def run_variants(
    protocol: str, model: EvaluatedModel | None, task: VariantTask, data: Path, seed: int, progress: bool
) -> dict[str, Any]:
    """Rank variants by one protocol; areas under the curve are those of the positive class."""
    path = data / task.variants
    table = read_table(path, dtype={task.label: str})
    needed = [task.position, task.reference, task.alternative, task.label]
    needed += [task.stratum] if task.stratum is not None else []
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: expected the columns {needed}, got {list(table.columns)}.")
    if task.negative is not None:
        table = table[table[task.label].isin([task.positive, task.negative])]
    _, sequence = next(read_fasta(data / task.fasta))
    variants = [
        Variant("", int(position) - task.first_base, str(reference).upper(), str(alternative).upper())
        for position, reference, alternative in table[needed[:3]].itertuples(index=False)
    ]
    labels = (table[task.label] == task.positive).to_numpy(dtype=np.int64)
    if not 0 < labels.sum() < len(labels):
        raise ValueError(f"{path}: expected some rows with {task.label} = {task.positive!r} and some without.")
    scores = VARIANTS[protocol](model, task, sequence, variants, progress=progress)

    def areas(rows: np.ndarray) -> dict[str, Any]:
        found = evaluate(labels[rows], np.stack([-scores[rows], scores[rows]], axis=1), ("auc", "auprc"))
        return {name: asdict(estimate) for name, estimate in found.items()}

    details: dict[str, Any] = {"flank": task.flank, "positive_share": float(labels.mean())}
    if task.stratum is not None:
        details["strata"] = {}
        for kind, rows in table.groupby(table[task.stratum].astype(str)).indices.items():
            positives = int(labels[rows].sum())
            stratum = {"rows": len(rows), "positives": positives, "mean_score": float(scores[rows].mean())}
            details["strata"][kind] = stratum | (areas(rows) if 0 < positives < len(rows) else {})
    return {
        "metrics": areas(np.arange(len(labels))),
        "details": details,
        "train_rows": 0,
        "test_rows": len(labels),
    }


def causal_likelihood(
    model: EvaluatedModel, task: LikelihoodTask, splits: Any, progress: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Bits and bases of every example by a causal model."""
    bar = model.name if progress else None
    return *bits_of_examples(model.causal.model, splits["test"], progress=bar), {}


def markov_likelihood(
    model: None, task: LikelihoodTask, splits: Any, progress: bool, order: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Bits and bases of every example by a Markov model of the training split, smoothing chosen on validation."""
    markov = MarkovModel(order)
    markov.count(digits_of(splits["train"]))
    strength = markov.choose_strength(list(digits_of(splits["validation"])))
    counted = [markov.evaluate([digits], strength) for digits in digits_of(splits["test"])]
    bits, bases = np.array(counted).T
    return bits, bases, {"order": order, "strength": strength}


LIKELIHOOD: dict[str, Callable[..., tuple[np.ndarray, np.ndarray, dict[str, Any]]]] = {
    "likelihood": causal_likelihood,
    "baseline-markov-5": functools.partial(markov_likelihood, order=5),
    "baseline-markov-11": functools.partial(markov_likelihood, order=11),
}


def run_likelihood(
    protocol: str, model: EvaluatedModel | None, task: LikelihoodTask, data: Path, seed: int, progress: bool
) -> dict[str, Any]:
    """Bits per base of the test split by one protocol."""
    from datasets import load_dataset

    loaded = load_dataset(str(data / task.dataset))
    names = {"test": task.test, "train": task.train, "validation": task.validation}
    missing = [name for name in names.values() if name not in loaded]
    if missing:
        raise ValueError(f"{data / task.dataset}: expected the splits {list(names.values())}, got {list(loaded)}.")
    splits = {part: loaded[name] for part, name in names.items()}
    if task.examples is not None and task.examples < len(splits["test"]):
        splits["test"] = splits["test"].shuffle(seed=0).select(range(task.examples))
    bits, bases, details = LIKELIHOOD[protocol](model, task, splits, progress=progress)
    return {
        "metrics": {"bits_per_base": asdict(bits_per_base(bits, bases))},
        "details": details,
        "train_rows": len(splits["train"]),
        "test_rows": len(splits["test"]),
    }


RUNNERS: dict[type, tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = {
    ClassificationTask: (CLASSIFICATION, run_classification),
    VariantTask: (VARIANTS, run_variants),
    LikelihoodTask: (LIKELIHOOD, run_likelihood),
}


def needs_model(protocol: str) -> bool:
    """Whether a protocol is about a model, or is a baseline."""
    return not protocol.startswith("baseline-")
