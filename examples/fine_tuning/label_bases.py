"""Fine-tune a model to label every base: exons, or splice donors and acceptors, learned from FASTA and GTF.

    python label_bases.py --model MODEL --fasta genome.fa.gz --gtf genes.gtf.gz --splits splits.tsv --labels splice \
        --output_dir OUTPUT

The table of splits says which regions are `train`, `validation` and `test` (as for `gengram prepare`):

    pattern     split       start   end
    *:chr9      test        0       5000000
    *:chr8      validation  .       .
    *:*         train       .       .

Labels are of one strand: on the forward strand genes of that strand, on the reverse complement genes of the other.
`exon` is what is an exon in any transcript. `donor` is the first base of an intron (the G of GT), `acceptor` the last
(the G of AG). Any model of the Hub works whose tokenizer has one token per base, and everything that
`transformers.TrainingArguments` knows is an option.

A causal model labels a base by what is before it: it does not see the T of a donor's GT, or the exon behind an
acceptor. So use `--bidirectional` with Gengram, which lets every base see both sides; the model learns what to do
with the other side from the labels.

Rare labels get more weight in the loss: `--class_weights sqrt` by the square root of how rare they are, `inverse` by
how rare they are, `none` does not. Where windows overlap (`--stride`), a base's probabilities are averaged.

Left in the output folder: the model, `metrics.json` and `predictions.parquet`, a row for every base and strand of the
test regions.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fine_tuning_setup import (
    BackboneArguments,
    load_with_new_head,
    logits_of,
    named_classes,
    parse_arguments,
    run_as_script,
    write_results,
)
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.data import Dataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from gengram.data_preparation.split_rules import SplitRule, parts_of_record, read_split_rules
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.annotation import LABELS, Transcript, base_labels, read_transcripts
from gengram.sequences.fasta import read_fasta
from gengram.sequences.windows import runs_between_gaps, window_bounds

SPLITS = ("train", "validation", "test")
WEIGHT_POWERS = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}


@dataclass
class ModelArguments(BackboneArguments):
    class_weights: str = field(default="sqrt", metadata={"help": "none, sqrt or inverse: weight of rare labels"})


@dataclass
class DataArguments:
    fasta: list[str] = field(metadata={"help": "FASTA files, plain or compressed"})
    gtf: str = field(metadata={"help": "genes of these sequences, plain or compressed"})
    splits: str = field(metadata={"help": "table of which region is train, validation, test"})
    labels: str = field(default="exon", metadata={"help": "exon or splice"})
    window: int = field(default=1024, metadata={"help": "bases that the model sees at once"})
    stride: int | None = field(default=None, metadata={"help": "distance of two windows, --window by default"})
    both_strands: bool = field(default=True, metadata={"help": "read both strands, each with its own genes"})
    longest_gap: int = field(default=10, metadata={"help": "runs of more N are left out"})


@dataclass(frozen=True)
class Window:
    """Bases `start` to `end` (0-based, half-open, forward strand) of a record, read on one strand."""

    record: str
    start: int
    end: int
    strand: str


class LabelledWindows(Dataset):
    """Tokens and labels of windows, each in the direction in which its strand is read.

    Args:
        windows: where they are.
        sequences: each record's bases.
        labels: (length,) class of each base of a record and strand, in the order of the forward strand.
        tokenizer: with one token per base.
    """

    def __init__(
        self,
        windows: list[Window],
        sequences: dict[str, str],
        labels: dict[tuple[str, str], np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.windows, self.sequences, self.labels, self.tokenizer = windows, sequences, labels, tokenizer

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        window = self.windows[index]
        text = self.sequences[window.record][window.start : window.end]
        if window.strand == "-":
            text = reverse_complement(text)
        input_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(input_ids) != len(text):
            raise ValueError(
                f"expected a tokenizer with one token per base, got {len(input_ids)} tokens for {len(text)} bases."
            )
        return {"input_ids": input_ids, "labels": self.labels_of(window).tolist()}

    def labels_of(self, window: Window) -> np.ndarray:
        """(bases,) classes in the direction of reading."""
        labels = self.labels[window.record, window.strand][window.start : window.end]
        return labels if window.strand == "+" else labels[::-1]

    def positions_of(self, window: Window) -> np.ndarray:
        """(bases,) 0-based positions on the forward strand, in the direction of reading."""
        positions = np.arange(window.start, window.end)
        return positions if window.strand == "+" else positions[::-1]

    def class_counts(self, classes: int) -> np.ndarray:
        """(classes,) bases of each class."""
        counts = [np.bincount(self.labels_of(window), minlength=classes) for window in self.windows]
        return np.sum(counts, axis=0)


def build_windows(
    arguments: DataArguments, rules: list[SplitRule], transcripts: list[Transcript], tokenizer: PreTrainedTokenizerBase
) -> dict[str, LabelledWindows]:
    """Windows of each split.

    Raises:
        ValueError: if records repeat, no transcript lies on any of them, or a split is empty.
    """
    sequences: dict[str, str] = {}
    labels: dict[tuple[str, str], np.ndarray] = {}
    windows: dict[str, list[Window]] = {name: [] for name in SPLITS}
    strands = "+-" if arguments.both_strands else "+"
    by_record: dict[str, list[Transcript]] = {}
    for transcript in transcripts:
        by_record.setdefault(transcript.record, []).append(transcript)
    for path in map(Path, arguments.fasta):
        for record, sequence in read_fasta(path):
            if record in sequences:
                raise ValueError(f"{path}: expected records of different names, got {record!r} twice.")
            sequences[record] = sequence
            for strand in strands:
                labels[record, strand] = base_labels(
                    by_record.get(record, []), strand, len(sequence), arguments.labels
                )
            for part in parts_of_record(rules, path.name, record, len(sequence)):
                if part.split not in windows:
                    raise ValueError(f"{arguments.splits}: expected splits of {SPLITS} or '-', got {part.split!r}.")
                if part.keep < 1:
                    raise ValueError(f"{arguments.splits}: 'keep' is for pretraining; leave it empty here.")
                for left, right in runs_between_gaps(sequence[part.start : part.end], arguments.longest_gap):
                    bounds = window_bounds(
                        part.start + left,
                        part.start + right,
                        arguments.window,
                        arguments.stride or arguments.window,
                        1,
                    )
                    windows[part.split] += [
                        Window(record, start, end, strand) for start, end in bounds for strand in strands
                    ]
    if not set(by_record) & set(sequences):
        raise ValueError(
            f"expected the same names in FASTA and GTF, got {list(sequences)[:5]} and {list(by_record)[:5]}; rename "
            "one of them (Ensembl's '9' is UCSC's 'chr9')."
        )
    empty = [name for name in SPLITS if not windows[name]]
    if empty:
        raise ValueError(f"{arguments.splits}: expected regions of each of {SPLITS}, got none of {empty}.")
    return {name: LabelledWindows(found, sequences, labels, tokenizer) for name, found in windows.items()}


class WeightedLoss:
    """Cross-entropy in which a class counts by how rare it is; the mean weight of a training base is 1.

    Args:
        counts: (classes,) training bases of each class.
        power: weights go with count^-power.
    """

    def __init__(self, counts: np.ndarray, power: float):
        weights = counts.astype(np.float64) ** -power
        self.weights = torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)

    def __call__(
        self, outputs: dict[str, torch.Tensor], labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = outputs["logits"].float().transpose(1, 2)  # (batch, classes, length)
        weights = self.weights.to(logits.device)
        total = torch.nn.functional.cross_entropy(logits, labels, weights, ignore_index=-100, reduction="sum")
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def table_of_bases(data: LabelledWindows, probabilities: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """A row per base and strand: record, strand, position (0-based), label, and the probability of each class.

    Args:
        data: the windows.
        probabilities: (windows, longest window, classes); what is behind a window's end is ignored.
    """
    tables = []
    for window, found in zip(data.windows, probabilities, strict=True):
        bases = found[: window.end - window.start]
        columns = {f"probability_{name}": bases[:, index] for index, name in enumerate(classes)}
        place = {"record": window.record, "strand": window.strand, "position": data.positions_of(window)}
        tables.append(pd.DataFrame({**place, "label": data.labels_of(window), **columns}))
    keys = ["record", "strand", "position"]
    table = pd.concat(tables, ignore_index=True).astype({"record": "category", "strand": "category"})
    return table.groupby(keys, observed=True, as_index=False).mean().astype({"label": "int8"})


def evaluate(table: pd.DataFrame, classes: tuple[str, ...]) -> dict[str, dict[str, float | int | None]]:
    """Metrics of each class but the first (`other`) against the rest; `None` where the test regions have none of it.

    `auprc` of a random score is `share`. `top_k` is the share of true sites among the k highest, k being their number.
    """
    found: dict[str, dict[str, float | int | None]] = {}
    for index, name in enumerate(classes[1:], start=1):
        truth = (table["label"] == index).to_numpy()
        score = table[f"probability_{name}"].to_numpy()
        count = int(truth.sum())
        found[name] = {"bases": count, "share": count / len(truth), "auprc": None, "auc": None, "top_k": None}
        if 0 < count < len(truth):
            found[name] |= {
                "auprc": float(average_precision_score(truth, score)),
                "auc": float(roc_auc_score(truth, score)),
                "top_k": float(truth[np.argsort(-score, kind="stable")[:count]].mean()),
            }
    return found


def load_model(arguments: ModelArguments, classes: tuple[str, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head on every token, and its tokenizer."""
    model, tokenizer = load_with_new_head(AutoModelForTokenClassification, arguments, **named_classes(classes))
    tokenizer.padding_side = "right"  # a window's bases come first, see `table_of_bases`
    return model, tokenizer


def probabilities_of(outputs: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """(batch, length, classes); what a prediction gathers instead of logits."""
    return logits_of(outputs).float().softmax(-1)


def main() -> None:
    model_arguments, data_arguments, arguments = parse_arguments(ModelArguments, DataArguments, __doc__)
    if data_arguments.labels not in LABELS or model_arguments.class_weights not in WEIGHT_POWERS:
        raise ValueError(
            f"--labels must be one of {list(LABELS)} and --class_weights one of {list(WEIGHT_POWERS)}, got "
            f"{data_arguments.labels!r} and {model_arguments.class_weights!r}."
        )
    classes = LABELS[data_arguments.labels]
    model, tokenizer = load_model(model_arguments, classes)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and data_arguments.window > context:
        raise ValueError(f"--window must be at most the model's context, {context}, got {data_arguments.window}.")
    data = build_windows(
        data_arguments, read_split_rules(data_arguments.splits), read_transcripts(data_arguments.gtf), tokenizer
    )
    counts = {name: found.class_counts(len(classes)) for name, found in data.items()}
    if (counts["train"] == 0).any():
        raise ValueError(f"expected all of {classes} in the training regions, got {counts['train']} bases of each.")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=WeightedLoss(counts["train"], WEIGHT_POWERS[model_arguments.class_weights]),
        preprocess_logits_for_metrics=probabilities_of,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()

    table = table_of_bases(data["test"], trainer.predict(data["test"]).predictions, classes)
    if trainer.is_world_process_zero():
        report = {
            "metrics": evaluate(table, classes),
            "bases": {name: dict(zip(classes, found.tolist(), strict=True)) for name, found in counts.items()},
            "windows": {name: len(found) for name, found in data.items()},
            "model": vars(model_arguments),
            "data": vars(data_arguments),
        }
        write_results(arguments.output_dir, report, table)


if __name__ == "__main__":
    run_as_script(main)
