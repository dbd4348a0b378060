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

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.special import softmax
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
from gengram.evaluation.classifiers import held_out
from gengram.evaluation.labelled_data import LabelledSequences, overlap, read_labelled
from gengram.evaluation.metrics import evaluate

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "folder or Hub id of a model"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that the model carries"})
    dtype: str = field(default="float32", metadata={"help": "of the weights; bfloat16 for LoRA of large models"})
    bidirectional: bool = field(default=False, metadata={"help": "bases see both sides (is_causal=False)"})
    pooling: str | None = field(default=None, metadata={"help": "of Gengram's head: last, mean, max or centre"})
    lora: bool = field(default=False, metadata={"help": "train low-rank adapters and the head only; needs peft"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_memory: bool = field(default=False, metadata={"help": "with --lora: train Gengram's memory whole"})
    lora_experts: bool = field(default=False, metadata={"help": "with --lora: adapters for Gengram's experts too"})


@dataclass
class DataArguments:
    train: str = field(metadata={"help": "table to train on"})
    test: str = field(metadata={"help": "table for the metrics"})
    validation: str | None = field(default=None, metadata={"help": "table to choose the epoch by"})
    sequence_column: str = field(default="sequence", metadata={"help": "name of the column of sequences"})
    label_column: str = field(default="label", metadata={"help": "name of the column of labels"})
    group_column: str | None = field(default=None, metadata={"help": "rows of a group are held out together"})


def load_model(arguments: ModelArguments, classes: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new head for these classes, and its tokenizer."""
    loading = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    names = dict(enumerate(classes))
    config = AutoConfig.from_pretrained(
        arguments.model, id2label=names, label2id={name: index for index, name in names.items()}, **loading
    )
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
        arguments.model, config=config, dtype=arguments.dtype, **loading
    )
    return model, tokenizer


def with_adapters(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """The model with LoRA adapters, of which only these, the head, and on request the memory are trained."""
    from peft import LoraConfig, TaskType, get_peft_model

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
    """Rows to train on, to choose by, and to test on, with the classes of the training rows."""
    columns = {"sequence_column": arguments.sequence_column, "label_column": arguments.label_column}
    train = read_labelled(arguments.train, Path(), **columns, group_column=arguments.group_column)
    if len(train.classes) < 2:
        raise ValueError(f"{arguments.train}: expected two or more classes, got {train.classes}.")
    test = read_labelled(arguments.test, Path(), **columns, classes=train.classes)
    if arguments.validation is not None:
        validation = read_labelled(arguments.validation, Path(), **columns, classes=train.classes)
        return {"train": train, "validation": validation, "test": test}
    fit_rows, choose_rows = held_out(train.labels, train.groups, seed, share=0.1)
    return {"train": train.take(fit_rows), "validation": train.take(choose_rows), "test": test}


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
    if not model_arguments.lora and (model_arguments.lora_memory or model_arguments.lora_experts):
        raise ValueError("--lora_memory and --lora_experts are for --lora; without it, all weights are trained.")
    set_seed(arguments.seed)
    tables = read_tables(data_arguments, arguments.seed)
    classes = tables["train"].classes
    model, tokenizer = load_model(model_arguments, classes)
    if model_arguments.lora:
        model = with_adapters(model, model_arguments)
    trained_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    context = min(getattr(model.config, "max_position_embeddings", 10**9), tokenizer.model_max_length)

    def tokenized(rows: LabelledSequences) -> Dataset:
        encoded = tokenizer(rows.sequences, truncation=True, max_length=context)
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
        return Dataset.from_dict({**columns, "labels": rows.labels.tolist()})

    settings = {
        "args": arguments,
        "eval_dataset": tokenized(tables["validation"]),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }
    trainer = Trainer(model, train_dataset=tokenized(tables["train"]), **settings)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if model_arguments.lora:
        trainer.save_model(str(Path(arguments.output_dir) / "adapter"))
        trainer = Trainer(model.merge_and_unload(), **settings)
    trainer.save_model()

    test = tables["test"]
    logits = trainer.predict(tokenized(test)).predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models return more than logits
    probabilities = softmax(logits.astype(np.float64), axis=1)  # (rows, classes)
    if trainer.is_world_process_zero():
        longest = max(len(sequence) for table in tables.values() for sequence in table.sequences)
        report = {
            "metrics": {name: asdict(value) for name, value in evaluate(test.labels, probabilities).items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "classes": classes,
            "overlap": asdict(overlap(tables["train"], test)),
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
        output = Path(arguments.output_dir)
        predictions.to_parquet(output / "predictions.parquet", index=False)
        (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report["metrics"], indent=1))


if __name__ == "__main__":
    main()
