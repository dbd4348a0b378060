"""What the fine-tuning scripts share: options of the model, how it is loaded with a new head, and what is left."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:  # before the script that imports this file imports them itself
    import scipy  # noqa: F401
    import sklearn  # noqa: F401

    import gengram  # noqa: F401  (the Auto classes then know Gengram)
except ImportError as error:
    sys.exit(f"{sys.argv[0]} needs {error.name}: pip install -e '.[evaluation]' in the root of the repository")

import pandas as pd
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from gengram.evaluation.run_files import json_text, without_nan

DEFAULTS = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "report_to": "none",
}  # of TrainingArguments


@dataclass
class BackboneArguments:
    model: str = field(metadata={"help": "folder or Hub id of a model"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that the model carries"})
    bidirectional: bool = field(default=False, metadata={"help": "bases see both sides (is_causal=False)"})


@dataclass
class SequenceHeadArguments(BackboneArguments):
    pooling: str | None = field(default=None, metadata={"help": "of Gengram's head: last, mean, max or centre"})


@dataclass
class TableArguments:
    train: str = field(metadata={"help": "table to train on"})
    test: str = field(metadata={"help": "table for the metrics"})
    validation: str | None = field(default=None, metadata={"help": "table to choose the epoch by"})
    sequence_column: str = field(default="sequence", metadata={"help": "name of the column of sequences"})


def run_as_script(main: Callable[[], None]) -> None:
    """Call `main`; what the user can mend is one line on stderr and exit code 1, as in the command `gengram`."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def parse_arguments(model_class: type, data_class: type, description: str | None) -> tuple[Any, Any, Any]:
    """The script's options: of the model, of the data, and `TrainingArguments`, whose seed is set."""
    parser = HfArgumentParser((model_class, data_class, TrainingArguments), description=description)
    parser.set_defaults(**DEFAULTS)
    model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    return model_arguments, data_arguments, arguments


def named_classes(classes: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Fields of a configuration that name the outputs of a head."""
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def load_with_new_head(
    auto_class: Any, arguments: BackboneArguments, dtype: str = "float32", **fields: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head, and its tokenizer.

    Args:
        auto_class: `AutoModelForSequenceClassification` or its like.
        arguments: which model, and what is changed about it.
        dtype: of the weights.
        fields: of its configuration.

    Raises:
        ValueError: if the model does not have what the arguments ask for.
    """
    loading = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(arguments.model, **fields, **loading)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **loading)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if arguments.bidirectional:
        if not hasattr(config, "is_causal"):
            raise ValueError(f"--bidirectional sets is_causal, which a {config.model_type} model does not have.")
        config.is_causal = False
    if isinstance(arguments, SequenceHeadArguments) and arguments.pooling is not None:
        if config.model_type != "gengram":
            raise ValueError(f"--pooling is for Gengram's head, which a {config.model_type} model does not have.")
        config.classifier_pooling = arguments.pooling
    return auto_class.from_pretrained(arguments.model, config=config, dtype=dtype, **loading), tokenizer


def tokenized(sequences: list[str], labels: list[Any], tokenizer: PreTrainedTokenizerBase, context: int) -> Dataset:
    """Sequences, cut at `context` tokens, and their labels."""
    encoded = tokenizer(sequences, truncation=True, max_length=context)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    return Dataset.from_dict({**columns, "labels": labels})


def logits_of(predictions: Any) -> Any:
    """What the head says; some models return more than logits."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def write_results(output: str, report: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Leave `metrics.json` and `predictions.parquet` in the output folder, and print the metrics.

    A metric that is not defined, as the correlation with targets that are all the same, is null.
    """
    predictions.to_parquet(Path(output) / "predictions.parquet", index=False)
    report = without_nan(report)
    (Path(output) / "metrics.json").write_text(json_text(report), encoding="utf-8")
    print(json_text(report["metrics"]), end="")
