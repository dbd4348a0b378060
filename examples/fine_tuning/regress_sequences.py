"""Fine-tune a model to predict a number from a sequence, such as the activity of an enhancer.

    python regress_sequences.py --model MODEL --train train.tsv --test test.tsv --target_column activity \
        --output_dir OUTPUT

Files are CSV, TSV or Parquet (also compressed), with a column of sequences and one of numbers. Without
`--validation`, a tenth of the training rows is held out; the epoch with the smallest loss on these rows is kept. Any
model of the Hub works whose tokenizer reads DNA, and everything that `transformers.TrainingArguments` knows is an
option (`--learning_rate`, `--bf16`, `--num_train_epochs`, ...).

The model learns targets of mean 0 and standard deviation 1; the mean and deviation of the training rows are in its
configuration: prediction = logit * config.target_deviation + config.target_mean.

Gengram's head reads the last token, which alone sees the whole sequence in a causal model, or with `--pooling` the
`mean` or `max` of all tokens, or the `centre` of sequences that are aligned to a site. `--bidirectional` lets every
base see both sides, which a model that was trained causally has to learn from the targets.

Left in the output folder: the model, `metrics.json` and `predictions.parquet` of the test rows.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import gengram  # noqa: F401  (the Auto classes then know Gengram)
from gengram.evaluation.metrics import Estimate


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "folder or Hub id of a model"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that the model carries"})
    bidirectional: bool = field(default=False, metadata={"help": "bases see both sides (is_causal=False)"})
    pooling: str | None = field(default=None, metadata={"help": "of Gengram's head: last, mean, max or centre"})


@dataclass
class DataArguments:
    train: str = field(metadata={"help": "table to train on"})
    test: str = field(metadata={"help": "table for the metrics"})
    validation: str | None = field(default=None, metadata={"help": "table to choose the epoch by"})
    sequence_column: str = field(default="sequence", metadata={"help": "name of the column of sequences"})
    target_column: str = field(default="target", metadata={"help": "name of the column of numbers"})


def read_table(path: str, arguments: DataArguments) -> pd.DataFrame:
    """Columns `sequence` (upper case) and `target` (finite numbers) of a table.

    Raises:
        ValueError: if a column is missing, or a cell is empty or no number.
    """
    suffixes = Path(path).suffixes
    if ".parquet" in suffixes:
        table = pd.read_parquet(path)
    else:
        table = pd.read_csv(path, sep="\t" if ".tsv" in suffixes or ".txt" in suffixes else ",")
    wanted = [arguments.sequence_column, arguments.target_column]
    if not set(wanted) <= set(table.columns):
        raise ValueError(f"{path}: expected the columns {wanted}, got {list(table.columns)}.")
    sequences = table[wanted[0]]
    targets = pd.to_numeric(table[wanted[1]], errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~np.isfinite(targets) | sequences.isna().to_numpy())
    if len(wrong) or table.empty:
        shown = table[wanted].iloc[wrong[:3]].values.tolist()
        raise ValueError(f"{path}: expected a sequence and a number in each row, got {len(wrong)} others: {shown}.")
    return pd.DataFrame({"sequence": sequences.astype(str).str.strip().str.upper(), "target": targets})


def read_tables(arguments: DataArguments, seed: int) -> dict[str, pd.DataFrame]:
    """Rows to train on, to choose by, and to test on."""
    train, test = read_table(arguments.train, arguments), read_table(arguments.test, arguments)
    if arguments.validation is not None:
        validation = read_table(arguments.validation, arguments)
    else:
        validation = train.sample(max(1, len(train) // 10), random_state=seed)
        train = train.drop(validation.index)
    if train["target"].nunique() < 2:
        raise ValueError(f"{arguments.train}: expected targets that differ, got {train['target'].unique().tolist()}.")
    return {"train": train, "validation": validation, "test": test}


def load_model(
    arguments: ModelArguments, mean: float, deviation: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head of one output, and its tokenizer."""
    loading = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(arguments.model, num_labels=1, problem_type="regression", **loading)
    config.target_mean, config.target_deviation = mean, deviation
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **loading)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if arguments.bidirectional:
        if not hasattr(config, "is_causal"):
            raise ValueError(f"--bidirectional sets is_causal, which a {config.model_type} model does not have.")
        config.is_causal = False
    if arguments.pooling is not None:
        if config.model_type != "gengram":
            raise ValueError(f"--pooling is for Gengram's head, which a {config.model_type} model does not have.")
        config.classifier_pooling = arguments.pooling
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, config=config, dtype="float32", **loading
    )
    return model, tokenizer


def r_squared(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Coefficient of determination: 1 is perfect, 0 is as good as the mean of the targets, less is worse."""
    return float(1 - ((targets - predictions) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


METRICS = {
    "pearson": lambda targets, predictions: float(pearsonr(targets, predictions).statistic),
    "spearman": lambda targets, predictions: float(spearmanr(targets, predictions).statistic),
    "r2": r_squared,
}


def evaluate(targets: np.ndarray, predictions: np.ndarray, samples: int = 1000) -> dict[str, Estimate]:
    """Metrics of (rows,) predictions, with 95 % percentile intervals over bootstrap samples of the rows."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(targets), size=len(targets)) for _ in range(samples)]
    found = {}
    with np.errstate(invalid="ignore", divide="ignore"):  # a sample of few rows may be constant
        for name, metric in METRICS.items():
            values = [metric(targets[rows], predictions[rows]) for rows in drawn]
            low, high = np.nanpercentile(values, [2.5, 97.5])
            found[name] = Estimate(metric(targets, predictions), float(low), float(high))
    return found


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        report_to="none",
    )
    model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    tables = read_tables(data_arguments, arguments.seed)
    mean, deviation = float(tables["train"]["target"].mean()), float(tables["train"]["target"].std(ddof=0))
    model, tokenizer = load_model(model_arguments, mean, deviation)
    context = min(getattr(model.config, "max_position_embeddings", 10**9), tokenizer.model_max_length)

    def tokenized(rows: pd.DataFrame) -> Dataset:
        encoded = tokenizer(rows["sequence"].tolist(), truncation=True, max_length=context)
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
        return Dataset.from_dict({**columns, "labels": ((rows["target"] - mean) / deviation).tolist()})

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenized(tables["train"]),
        eval_dataset=tokenized(tables["validation"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()

    targets = tables["test"]["target"].to_numpy()
    logits = trainer.predict(tokenized(tables["test"])).predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models return more than logits
    predictions = logits[:, 0].astype(np.float64) * deviation + mean  # (rows,)
    if trainer.is_world_process_zero():
        report = {
            "metrics": {name: asdict(value) for name, value in evaluate(targets, predictions).items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "longest_sequence": int(max(table["sequence"].str.len().max() for table in tables.values())),
            "context": context,
            "model": vars(model_arguments),
            "data": vars(data_arguments),
        }
        output = Path(arguments.output_dir)
        table = pd.DataFrame({"target": targets, "predicted": predictions})
        table.to_parquet(output / "predictions.parquet", index=False)
        (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report["metrics"], indent=1))


if __name__ == "__main__":
    main()
