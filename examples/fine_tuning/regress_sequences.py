"""Fine-tune a model to predict a number from a sequence, such as the activity of an enhancer.

    python regress_sequences.py --model MODEL --train train.tsv --test test.tsv --target_column activity \
        --output_dir OUTPUT

Files are CSV, TSV or Parquet (also compressed), with a column of sequences and one of numbers. Without
`--validation`, a tenth of the training rows is held out, repeats of a sequence together; the epoch with the smallest
loss on these rows is kept. Any model of the Hub works whose tokenizer reads DNA, and everything that
`transformers.TrainingArguments` knows is an option (`--learning_rate`, `--bf16`, `--num_train_epochs`, ...).

The model learns targets of mean 0 and standard deviation 1; the mean and deviation of the training rows are in its
configuration: prediction = logit * config.target_deviation + config.target_mean.

Gengram's head reads the last token, which alone sees the whole sequence in a causal model, or with `--pooling` the
`mean` or `max` of all tokens, or the `centre` of sequences that are aligned to a site. `--bidirectional` lets every
base see both sides, which a model that was trained causally has to learn from the targets.

Left in the output folder: the model, `metrics.json` and `predictions.parquet` of the test rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from fine_tuning_setup import (
    SequenceHeadArguments,
    TableArguments,
    load_with_new_head,
    logits_of,
    parse_arguments,
    run_as_script,
    tokenized,
    write_results,
)
from scipy.stats import pearsonr, spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from gengram.evaluation.labelled_data import near_rows, of_either_strand, sequences_of
from gengram.evaluation.tables import is_number, place
from gengram.evaluation.tables import read_table as read_text
from gengram.inference.loaded_model import context_length
from gengram.support.bootstrap import Estimate, estimate

ModelArguments = SequenceHeadArguments


@dataclass
class DataArguments(TableArguments):
    target_column: str = field(default="target", metadata={"help": "name of the column of numbers"})


def read_table(path: str, arguments: DataArguments) -> pd.DataFrame:
    """Columns `sequence` (upper case) and `target` (finite numbers) of a table.

    Raises:
        ValueError: if it is no table, a column is missing, there are no rows, a sequence is not DNA, or a target is no
            finite number; the message names the file and the row.
        OSError: if there is no such file.
    """
    table = read_text(Path(path), [arguments.sequence_column, arguments.target_column])
    if table.empty:
        raise ValueError(f"{path}: expected rows with a sequence and a number each, got none.")
    cells = table[arguments.target_column]
    targets = np.array([float(cell) if is_number(cell) else np.nan for cell in cells])
    wrong = np.flatnonzero(~np.isfinite(targets))
    if len(wrong):
        more = f" (and {len(wrong) - 1:,} more such rows)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{path}, {place(table, wrong[0])}: expected a finite number in the column "
            f"{arguments.target_column!r}, got {cells.iloc[wrong[0]]!r}{more}."
        )
    return pd.DataFrame({"sequence": sequences_of(table, arguments.sequence_column, path), "target": targets})


def read_tables(arguments: DataArguments, seed: int) -> dict[str, pd.DataFrame]:
    """Rows to train on, to choose by, and to test on.

    Raises:
        ValueError: as `read_table`; or if targets to train on do not differ, or cannot be scaled.
    """
    train, test = read_table(arguments.train, arguments), read_table(arguments.test, arguments)
    if arguments.validation is not None:
        validation = read_table(arguments.validation, arguments)
    else:
        held_out = rows_held_out(train["sequence"].tolist(), seed)
        train, validation = train[~held_out], train[held_out]
    with np.errstate(over="ignore"):
        deviation = train["target"].std(ddof=0) if len(train) else 0.0
    if not 0 < deviation < np.inf:
        raise ValueError(
            f"{arguments.train}: expected two or more targets that differ, of ordinary size, got {len(train)} rows to "
            f"train on with a standard deviation of {deviation}."
        )
    return {"train": train, "validation": validation, "test": test}


def rows_held_out(sequences: list[str], seed: int) -> np.ndarray:
    """(rows,) bool: a tenth of the rows, or a few more; what repeats, on either strand, is held out together."""
    names = list(map(of_either_strand, sequences))
    counts = pd.Series(names).value_counts(sort=False).sample(frac=1, random_state=seed)
    chosen = counts.index[counts.cumsum().shift(fill_value=0) < max(1, len(names) // 10)]
    return pd.Series(names).isin(chosen).to_numpy()


def load_model(
    arguments: ModelArguments, mean: float, deviation: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head of one output, and its tokenizer."""
    model, tokenizer = load_with_new_head(
        AutoModelForSequenceClassification, arguments, num_labels=1, problem_type="regression"
    )
    model.config.target_mean, model.config.target_deviation = mean, deviation
    return model, tokenizer


def r_squared(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Coefficient of determination: 1 is perfect, 0 is as good as the mean of the targets, less is worse."""
    return float(1 - ((targets - predictions) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


def _where_both_differ(metric: Callable[..., float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """A metric that is nan where targets or predictions are all the same."""

    def of(targets: np.ndarray, predictions: np.ndarray) -> float:
        return metric(targets, predictions) if np.ptp(targets) > 0 and np.ptp(predictions) > 0 else float("nan")

    return of


METRICS = {
    "pearson": _where_both_differ(lambda targets, predictions: float(pearsonr(targets, predictions).statistic)),
    "spearman": _where_both_differ(lambda targets, predictions: float(spearmanr(targets, predictions).statistic)),
    "r2": lambda targets, predictions: r_squared(targets, predictions) if np.ptp(targets) > 0 else float("nan"),
}


def evaluate(targets: np.ndarray, predictions: np.ndarray, samples: int = 1000) -> dict[str, Estimate]:
    """Metrics of (rows,) predictions, with 95 % percentile intervals over bootstrap samples of the rows.

    Raises:
        ValueError: if a prediction is not finite.
    """
    wrong = int((~np.isfinite(predictions)).sum())
    if wrong:
        raise ValueError(
            f"expected finite predictions, got others for {wrong} of {len(predictions)} rows; has training diverged?"
        )
    with warnings.catch_warnings():  # a sample of few rows may be constant
        warnings.simplefilter("ignore")
        return {
            name: estimate(lambda rows, metric=metric: metric(targets[rows], predictions[rows]), len(targets), samples)
            for name, metric in METRICS.items()
        }


def main() -> None:
    model_arguments, data_arguments, arguments = parse_arguments(ModelArguments, DataArguments, __doc__)
    tables = read_tables(data_arguments, arguments.seed)
    mean, deviation = float(tables["train"]["target"].mean()), float(tables["train"]["target"].std(ddof=0))
    model, tokenizer = load_model(model_arguments, mean, deviation)
    context = context_length(model.config, tokenizer)

    def data_of(rows: pd.DataFrame) -> Dataset:
        targets = (rows["target"] - mean) / deviation
        return tokenized(rows["sequence"].tolist(), targets.tolist(), tokenizer, context)

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data_of(tables["train"]),
        eval_dataset=data_of(tables["validation"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()

    targets = tables["test"]["target"].to_numpy()
    logits = logits_of(trainer.predict(data_of(tables["test"])).predictions)
    predictions = logits[:, 0].astype(np.float64) * deviation + mean  # (rows,)
    if trainer.is_world_process_zero():
        known = [*tables["train"]["sequence"], *tables["validation"]["sequence"]]
        is_known = tables["test"]["sequence"].map(of_either_strand).isin(map(of_either_strand, known)).to_numpy()
        report = {
            "metrics": {name: value.numbers() for name, value in evaluate(targets, predictions).items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "test_rows_in_train": int(is_known.sum()),
            "test_rows_near_train": int((is_known | near_rows(known, tables["test"]["sequence"].tolist())).sum()),
            "longest_sequence": int(max(table["sequence"].str.len().max() for table in tables.values())),
            "context": context,
            "model": vars(model_arguments),
            "data": vars(data_arguments),
        }
        table = pd.DataFrame({"target": targets, "predicted": predictions})
        write_results(arguments.output_dir, report, table)


if __name__ == "__main__":
    run_as_script(main)
