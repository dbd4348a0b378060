"""Train a Gengram model from scratch, or go on with one, on a data set that `gengram prepare` wrote.

    python pretrain.py --config gengram-mini.json --dataset DATASET --output_dir OUTPUT --max_steps 1000

Everything that `transformers.TrainingArguments` knows is an option here (`--learning_rate`, `--bf16`, `--save_steps`,
`--torch_compile`, ...), and so many GPUs, FSDP or DeepSpeed are a matter of the launcher: `torchrun --nproc-per-node
8 pretrain.py ...` or `accelerate launch --config_file fsdp.yaml pretrain.py ...`. A run that was cut off goes on from
its last checkpoint when it is started again with the same command.

Left in the output folder: the model, `log.jsonl` (a line per log or evaluation), `training.json` (what was run, on
what, for how long; written at the start, and again at the end with the results).
"""

import json
import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from memory_kinds import new_model
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gengram import GengramConfig, GengramForCausalLM, GengramForMaskedLM, GengramTokenizer
from gengram.data_preparation import DataCollatorForGenomeModeling
from gengram.inference.likelihood import IGNORED, next_token_log_probabilities, token_log_probabilities
from gengram.support.machine import describe_machine
from gengram.support.whole_output import write_whole


@dataclass
class ModelArguments:
    config: str | None = field(default=None, metadata={"help": "JSON file of GengramConfig's fields, to start anew"})
    overrides: str = field(default="{}", metadata={"help": "JSON object of fields that differ from the file's"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a model to go on with"})
    objective: str = field(default="causal", metadata={"help": "causal or masked"})
    mask_probability: float = field(default=0.15, metadata={"help": "share of hidden bases (masked)"})


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "folder that `gengram prepare` wrote, or Hub id"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split to evaluate on"})
    streaming: bool = field(default=False, metadata={"help": "read as it goes; needs --max_steps"})
    validation_examples: int | None = field(
        default=None, metadata={"help": "evaluate on so many only, drawn once (streaming: the first)"}
    )


def build_model(arguments: ModelArguments) -> Any:
    """A new model of a configuration file, or a trained one."""
    model_classes = {"causal": GengramForCausalLM, "masked": GengramForMaskedLM}
    if arguments.objective not in model_classes:
        raise ValueError(f"--objective must be causal or masked, got {arguments.objective!r}.")
    if (arguments.config is None) == (arguments.model is None):
        raise ValueError("give exactly one of --config (start anew) and --model (go on).")
    overrides = json.loads(arguments.overrides)
    if arguments.model is not None:
        return model_classes[arguments.objective].from_pretrained(arguments.model, dtype=torch.float32, **overrides)
    fields = {**json.loads(Path(arguments.config).read_text()), **overrides}
    if fields.keys() & {"host", "memory_kind"}:  # of the comparison
        if arguments.objective != "causal":
            raise ValueError("host and memory_kind are for --objective causal only.")
        return new_model(fields)
    config = GengramConfig(**fields)
    if config.num_local_experts > 1:
        config.output_router_logits = True  # adds the router's losses, and shows what the router does
    return model_classes[arguments.objective](config)


class PretrainingTrainer(Trainer):
    """Evaluates with a collator of its own, and also logs what the router does.

    That is its losses, each expert's share of the tokens, and the entropy of its choice.
    """

    def __init__(self, *args: Any, evaluation_collator: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._evaluation_collator = evaluation_collator  # hides the same bases in every evaluation
        self._router: dict[str, torch.Tensor] = {}
        self._router_steps = 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        of_training, self.data_collator = self.data_collator, self._evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = of_training

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and outputs.get("router_logits"):
            for name, value in router_statistics(outputs, self.model.config).items():
                self._router[name] = self._router.get(name, 0) + value
            self._router_steps += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._router_steps:
            logs |= {name: (value / self._router_steps).tolist() for name, value in self._router.items()}
            self._router, self._router_steps = {}, 0
        super().log(logs, *args, **kwargs)


@torch.no_grad()
def router_statistics(outputs: Any, config: GengramConfig) -> dict[str, torch.Tensor]:
    """Load-balancing loss, share of the tokens per expert (layers, experts), mean entropy in bits; z-loss if any."""
    logits = torch.stack([layer.float() for layer in outputs["router_logits"]])  # (layers, tokens, experts)
    chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
    shares = torch.nn.functional.one_hot(chosen, logits.shape[-1]).float().mean((1, 2))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean() / math.log(2)
    losses = {"router_load_balancing_loss": outputs["aux_loss"], "router_z_loss": outputs.get("z_loss")}
    return {
        **{name: loss.detach() for name, loss in losses.items() if loss is not None},
        "router_entropy_bits": entropy,
        "router_tokens_per_expert": shares,
    }


class JsonLog(TrainerCallback):
    """Appends every log to `log.jsonl`; the plots are drawn from it."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 1), **logs}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


class Epochs(TrainerCallback):
    """Tells the collator of each epoch, so that other bases are hidden in it; also after a run was cut off."""

    def __init__(self, collator: DataCollatorForGenomeModeling):
        self.collator = collator
        self.epoch: int | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0) if self.epoch is None else self.epoch + 1
        self.collator.set_epoch(self.epoch)


def last_whole_checkpoint(output: Path) -> str | None:
    """The newest checkpoint, but none that was cut off while it was written."""
    whole = [folder for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[-1]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # what is written last
    except (OSError, ValueError):
        return False
    return True


class LanguageModelingLoss:
    """Mean cross-entropy of an evaluation, without the router's losses that the model's own loss may hold."""

    def __init__(self, is_causal: bool):
        self.is_causal = is_causal
        self.total, self.count = 0.0, 0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        losses, labels = prediction.predictions, prediction.label_ids
        self.total += float(losses.double().sum())
        self.count += int((labels[:, 1:] if self.is_causal else labels).ne(IGNORED).sum())
        if not compute_result:
            return {}
        mean = self.total / max(self.count, 1)
        self.total, self.count = 0.0, 0
        return {"bits_per_base": mean / math.log(2)}

    def token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each token, 0 where there is none; what an evaluation gathers instead of logits."""
        if isinstance(outputs, tuple):  # a mixture of experts gives its router's losses before the logits
            logits = next(output for output in outputs if torch.is_tensor(output) and output.dim() == 3)
        else:
            logits = outputs
        found = next_token_log_probabilities if self.is_causal else token_log_probabilities
        return -found(logits, labels)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    model = build_model(model_arguments)
    if getattr(model.config, "num_local_experts", 0) > 1:
        print(f"{model.num_parameters():,} parameters, {model.config.num_local_experts} experts")
    data = load_dataset(data_arguments.dataset, streaming=data_arguments.streaming)
    validation = data.get(data_arguments.validation_split)
    if validation is not None and data_arguments.validation_examples is not None:
        if not data_arguments.streaming:
            validation = validation.shuffle(seed=0)
        validation = validation.take(data_arguments.validation_examples)
    elif validation is None and arguments.eval_strategy != "no":
        raise ValueError(f"no split {data_arguments.validation_split!r} in {data_arguments.dataset}: {list(data)}.")

    is_causal = model_arguments.objective == "causal"
    tokenizer = GengramTokenizer(model_max_length=model.config.max_position_embeddings)
    metric = LanguageModelingLoss(is_causal)
    arguments.batch_eval_metrics = True
    arguments.include_num_input_tokens_seen = "all"
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    share = None if is_causal else model_arguments.mask_probability
    collator, evaluation_collator = (DataCollatorForGenomeModeling(tokenizer, share, seed) for _ in range(2))
    trainer = PretrainingTrainer(
        model=model,
        args=arguments,
        train_dataset=data[data_arguments.train_split].with_format("numpy"),
        eval_dataset=None if validation is None else validation.with_format("numpy"),
        processing_class=tokenizer,
        data_collator=collator,
        evaluation_collator=evaluation_collator,
        compute_metrics=metric,
        preprocess_logits_for_metrics=metric.token_losses,
        callbacks=[JsonLog(output / "log.jsonl"), Epochs(collator)],
    )
    checkpoint = arguments.resume_from_checkpoint or last_whole_checkpoint(output)
    defaults = {option.name: option.default for option in fields(TrainingArguments)}
    record = {
        "model": vars(model_arguments),
        "data": vars(data_arguments),
        "training": {name: value for name, value in arguments.to_dict().items() if value != defaults.get(name)},
        "parameters": model.num_parameters(),
        "resumed_from": checkpoint,
        "machine": describe_machine(),
    }
    if trainer.is_world_process_zero():
        write_whole(output / "training.json", json.dumps(record, indent=1) + "\n")
    start = time.monotonic()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - start
    evaluated = trainer.evaluate() if validation is not None else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        record |= {
            "trained_tokens": trainer.state.num_input_tokens_seen,
            "seconds_of_this_run": seconds,
            "final": {**result.metrics, **evaluated},
        }
        write_whole(output / "training.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
