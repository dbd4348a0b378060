"""Fine-tune a model to tell classes of sequences apart; tables of sequences and labels in, a model and metrics out.

    python classify_sequences.py --model MODEL --train train.csv --test test.csv --output_dir OUTPUT

Files are CSV, TSV or Parquet (also compressed), with a column of sequences and one of labels (`--sequence_column`,
`--label_column`). Without `--validation`, a tenth of the training rows is held out; the epoch with the smallest loss
on these rows is kept. Any model of the Hub works whose tokenizer reads DNA, and everything that
`transformers.TrainingArguments` knows is an option (`--learning_rate`, `--bf16`, `--num_train_epochs`, ...).

`--lora` trains low-rank adapters of all linear layers and the new head instead of all weights; with `--lora_memory`
Gengram's memory is trained whole beside them, with `--lora_experts` its experts get adapters too.

Gengram's head reads the last token, which alone sees the whole sequence in a causal model, or with `--pooling` the
`mean` or `max` of all tokens, or the `centre` of sequences that are aligned to a site. `--bidirectional` lets every
base see both sides, which a model that was trained causally has to learn from the labels.

Left in the output folder: the model (adapters merged into it, and by themselves in `adapter/`), `metrics.json` and
`predictions.parquet` of the test rows.
"""

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
    named_classes,
    parse_arguments,
    run_as_script,
    tokenized,
    write_results,
)
from scipy.special import softmax
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from gengram.evaluation.classifiers import held_out
from gengram.evaluation.labelled_data import LabelledSequences, check_classes, overlap, read_labelled
from gengram.evaluation.metrics import evaluate
from gengram.inference.loaded_model import context_length
from gengram.support.errors import MissingExtraError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class ModelArguments(SequenceHeadArguments):
    dtype: str = field(default="float32", metadata={"help": "of the weights; bfloat16 for LoRA of large models"})
    lora: bool = field(default=False, metadata={"help": "train low-rank adapters and the head only; needs peft"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_memory: bool = field(default=False, metadata={"help": "with --lora: train Gengram's memory whole"})
    lora_experts: bool = field(default=False, metadata={"help": "with --lora: adapters for Gengram's experts too"})


@dataclass
class DataArguments(TableArguments):
    label_column: str = field(default="label", metadata={"help": "name of the column of labels"})
    positive: str | None = field(default=None, metadata={"help": "of two labels, the one whose AUPRC is computed"})
    group_column: str | None = field(default=None, metadata={"help": "rows of a group are held out together"})


def load_model(arguments: ModelArguments, classes: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head for these classes, and its tokenizer."""
    return load_with_new_head(AutoModelForSequenceClassification, arguments, arguments.dtype, **named_classes(classes))


def with_adapters(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """The model with LoRA adapters, of which only these, the head, and on request the memory are trained."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise MissingExtraError("--lora needs peft: pip install -e '.[evaluation]'") from None
    adapters = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules="all-linear",
        target_parameters=EXPERTS if arguments.lora_experts else None,
        modules_to_save=["motif_memory"] if arguments.lora_memory else None,
    )
    return get_peft_model(model, adapters)


def read_tables(arguments: DataArguments, seed: int) -> dict[str, LabelledSequences]:
    """Rows to train on, to choose by, and to test on, with the classes of the training rows.

    Raises:
        ValueError: if a table cannot be read, or has too few rows of a class to train on and to choose by.
        OSError: if there is no such file.
    """
    columns = {"sequence_column": arguments.sequence_column, "label_column": arguments.label_column}
    options = {"group_column": arguments.group_column, "positive": arguments.positive}
    train = read_labelled(arguments.train, Path(), **columns, **options)
    check_classes(train, arguments.train, least=1 if arguments.validation is not None else 2)
    test = read_labelled(arguments.test, Path(), **columns, classes=train.classes)
    if arguments.validation is not None:
        validation = read_labelled(arguments.validation, Path(), **columns, classes=train.classes)
        return {"train": train, "validation": validation, "test": test}
    try:
        fit_rows, choose_rows = held_out(train.labels, train.groups, seed, share=0.1)
    except ValueError as error:
        raise ValueError(f"{arguments.train}: {error}") from None
    return {"train": train.take(fit_rows), "validation": train.take(choose_rows), "test": test}


def main() -> None:
    model_arguments, data_arguments, arguments = parse_arguments(ModelArguments, DataArguments, __doc__)
    if not model_arguments.lora and (model_arguments.lora_memory or model_arguments.lora_experts):
        raise ValueError("--lora_memory and --lora_experts are for --lora; without it, all weights are trained.")
    tables = read_tables(data_arguments, arguments.seed)
    classes = tables["train"].classes
    model, tokenizer = load_model(model_arguments, classes)
    if model_arguments.lora:
        model = with_adapters(model, model_arguments)
    trained_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    context = context_length(model.config, tokenizer)

    def data_of(rows: LabelledSequences) -> Dataset:
        return tokenized(rows.sequences, rows.labels.tolist(), tokenizer, context)

    settings = {
        "args": arguments,
        "eval_dataset": data_of(tables["validation"]),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }
    trainer = Trainer(model, train_dataset=data_of(tables["train"]), **settings)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if model_arguments.lora:
        trainer.save_model(str(Path(arguments.output_dir) / "adapter"))
        trainer = Trainer(model.merge_and_unload(), **settings)
    trainer.save_model()

    test = tables["test"]
    logits = logits_of(trainer.predict(data_of(test)).predictions)
    probabilities = softmax(logits.astype(np.float64), axis=1)  # (rows, classes)
    if trainer.is_world_process_zero():
        longest = max(len(sequence) for table in tables.values() for sequence in table.sequences)
        report = {
            "metrics": {name: value.numbers() for name, value in evaluate(test.labels, probabilities).items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "rows_of_classes": {name: table.class_rows() for name, table in tables.items()},
            "classes": classes,
            "overlap": overlap(tables["train"].joined(tables["validation"]), test).counts(),
            "trained_parameters": trained_parameters,
            "longest_sequence": longest,
            "context": context,
            "model": vars(model_arguments),
            "data": vars(data_arguments),
        }
        columns = {f"probability_{name}": probabilities[:, index] for index, name in enumerate(classes)}
        names = np.array(classes)
        predictions = pd.DataFrame(
            {"label": names[test.labels], "predicted": names[probabilities.argmax(1)], **columns}
        )
        write_results(arguments.output_dir, report, predictions)


if __name__ == "__main__":
    run_as_script(main)
