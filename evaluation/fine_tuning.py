"""Fine-tuning of a whole model, or of a low-rank adapter, for one class per sequence."""

import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..inference.loaded_model import context_length, load_config, load_tokenizer, load_whole
from ..sequences.alphabet import reverse_complement
from ..support.errors import MissingExtraError
from .classifiers import HELD_OUT_SHARE, held_out
from .labelled_data import LabelledSequences
from .suite import FineTuningOptions


def fine_tune(
    model_name: str,
    train: LabelledSequences,
    test: LabelledSequences,
    options: FineTuningOptions,
    seed: int,
    with_lora: bool = False,
    progress: bool = True,
    **loading: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Class probabilities of the test rows, (rows, classes), and what was done.

    Args:
        model_name: anything that `AutoModelForSequenceClassification` loads.
        train, test: labelled sequences.
        options: see `FineTuningOptions`.
        seed: of the new head, the order of the rows and the held-out part.
        with_lora: train rank-`lora_rank` adapters of all linear layers and the new head only; needs `peft`.
        progress: show bars.
        loading: further arguments of `from_pretrained`, as `revision` and `trust_remote_code`.
    """
    set_seed(seed)
    tokenizer = load_tokenizer(model_name, **loading)
    config = load_config(model_name, num_labels=len(train.classes), **loading)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    is_gengram = config.model_type == "gengram"
    if is_gengram:
        config.classifier_pooling = options.pooling or config.classifier_pooling
        config.is_causal = config.is_causal and not options.bidirectional
    model = load_whole(
        AutoModelForSequenceClassification, model_name, True, config=config, dtype=torch.float32, **loading
    )
    if with_lora:
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError:
            raise MissingExtraError("the protocol 'lora' needs peft: pip install 'gengram[evaluation]'") from None
        adapters = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            target_modules="all-linear",
        )
        model = get_peft_model(model, adapters)
    context = context_length(config, tokenizer)
    fit_rows, choose_rows = held_out(train.labels, train.groups, seed, HELD_OUT_SHARE / 2)
    strands = 2 if options.both_strands else 1

    def tokenized(rows: LabelledSequences) -> Dataset:
        """Rows as they are, then their reverse complements."""
        sequences = rows.sequences + [reverse_complement(text) for text in rows.sequences if strands == 2]
        encoded = tokenizer(sequences, truncation=True, max_length=context)
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
        return Dataset.from_dict({**columns, "labels": rows.labels.tolist() * strands})

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                learning_rate=options.learning_rate,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=2 * options.batch_size,
                weight_decay=options.weight_decay,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                bf16=options.bf16,
                label_smoothing_factor=options.label_smoothing,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                logging_strategy="epoch",
                seed=seed,
                report_to="none",
                disable_tqdm=not progress,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=tokenized(train.take(fit_rows)),
            eval_dataset=tokenized(train.take(choose_rows)),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[EarlyStoppingCallback(options.patience)],
        )
        trainer.train()
        predicted = trainer.predict(tokenized(test)).predictions
        best = trainer.state.best_metric
    logits = torch.as_tensor(predicted[0] if isinstance(predicted, tuple) else predicted)  # some models return more
    logits = logits.double().unflatten(0, (strands, len(test))).mean(0)
    longest = max(map(len, train.sequences + test.sequences))
    details = {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "best_held_out_loss": best,
        "truncated_to": context if longest > context else None,
        "pooling": config.classifier_pooling if is_gengram else None,
        "bidirectional": not config.is_causal if is_gengram else None,
    }
    return logits.softmax(-1).numpy(), details
