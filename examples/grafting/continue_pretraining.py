"""Does a model that was trained without a memory gain from one? Go on with it, with and without, and draw the curves.

    python continue_pretraining.py --dataset DATASET --output OUTPUT                 # train what is missing
    python continue_pretraining.py --output OUTPUT --report runs.json --figure curves.svg   # write and draw it

For each seed a small mixture of experts of the kind of Mixtral (as Genos is) is trained without a memory. From there
three arms go on, with the same batches and steps: without a memory; with a memory, all weights trained; and with a
memory, the model frozen. A memory that was just attached changes nothing, so all three start at the same loss.

Every run leaves a file when it has ended; one that is there is not done again. DATASET is what `gengram prepare`
wrote. To go on with a model of your own, give `--model` (a folder or Hub id) instead of training one.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, set_seed
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from gengram import GengramTokenizer, MotifMemoryConfig, attach_memory
from gengram.data_preparation import DataCollatorForGenomeModeling
from gengram.inference.likelihood import IGNORED, next_token_log_probabilities
from gengram.support.bootstrap import interval_over_seeds
from gengram.support.figures import pyplot, write_figure
from gengram.support.machine import describe_machine
from gengram.support.whole_output import write_whole

HOST = dict(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
)
MEMORY = MotifMemoryConfig(embedding_dim=16)
MEMORY_LAYERS = (1, 2)
ARMS = {
    "no memory": dict(has_memory=False, is_frozen=False),
    "memory": dict(has_memory=True, is_frozen=False),
    "memory, model frozen": dict(has_memory=True, is_frozen=True),
}


def new_host(tokenizer: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **HOST))


def batches(data: Any, tokenizer: Any, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, in an order that only the seed decides."""
    collate = DataCollatorForGenomeModeling(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([data[row] for row in order[start : start + size]])


@torch.inference_mode()
def bits_per_base(model: Any, data: Any, tokenizer: Any, size: int) -> float:
    """Mean of -log2 P(base | bases before it) over the A, C, G and T of `data`."""
    collate = DataCollatorForGenomeModeling(tokenizer)
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data), size):
        batch = collate([data[row] for row in range(start, min(start + size, len(data)))])
        labels = batch.pop("labels").to(model.device)
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
        total -= float(next_token_log_probabilities(logits, labels).double().sum())
        count += int(labels[:, 1:].ne(IGNORED).sum())
    return total / count / math.log(2)


def train(model: Any, data: dict[str, Any], tokenizer: Any, steps: int, seed: int, arguments: Any) -> list[Any]:
    """The curve: (step, bits per base of the held-out split)."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = cosine_schedule(optimizer, min(30, steps // 10), steps)
    curve: list[tuple[int, float]] = []

    def evaluate(step: int) -> None:
        curve.append((step, bits_per_base(model, data["validation"], tokenizer, arguments.batch_size)))
        print(f"  step {step:5}: {curve[-1][1]:.4f} bits per base", flush=True)

    source = batches(data["train"], tokenizer, arguments.batch_size, seed)
    for step in range(steps):
        if step % arguments.evaluate_every == 0:
            evaluate(step)
            model.train()
        batch = {name: value.to(model.device) for name, value in next(source).items()}
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    evaluate(steps)
    return curve


def start(data: dict[str, Any], tokenizer: Any, seed: int, arguments: Any) -> Path:
    """The folder of the model without a memory from which all arms of a seed go on."""
    folder = arguments.output / f"start-{seed}"
    if not (folder / "curve.json").is_file():
        print(f"seed {seed}: a model without a memory")
        set_seed(seed)
        model = new_host(tokenizer).to(arguments.device)
        curve = train(model, data, tokenizer, arguments.start_steps, seed, arguments)
        model.save_pretrained(folder)
        write_whole(folder / "curve.json", json.dumps(curve) + "\n")
    return folder


def go_on(arm: str, data: dict[str, Any], tokenizer: Any, seed: int, arguments: Any) -> None:
    """One arm of one seed; leaves a file, or finds it there."""
    file = arguments.output / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}.json"
    if file.is_file():
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.model or start(data, tokenizer, seed, arguments))
    print(f"seed {seed}: {arm}")
    set_seed(seed)
    model = model.to(device=arguments.device, dtype=torch.float32)
    if ARMS[arm]["has_memory"]:
        attach_memory(model, MEMORY, layers=MEMORY_LAYERS, tokenizer=tokenizer)
    if ARMS[arm]["is_frozen"]:
        for name, weight in model.named_parameters():
            weight.requires_grad = "motif_memory" in name
    curve = train(model, data, tokenizer, arguments.steps, seed + 1000, arguments)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    result = dict(arm=arm, seed=seed, curve=curve, trained_parameters=trained, settings=settings)
    write_whole(file, json.dumps({**result, "machine": describe_machine()}) + "\n")


def report(runs: list[dict[str, Any]], file: Path) -> None:
    """Write all runs, and per arm the final bits per base and their difference, paired by seed, from no memory."""
    last = {(run["arm"], run["seed"]): run["curve"][-1][1] for run in runs}
    arms = {}
    for arm in ARMS:
        seeds = [seed for of_arm, seed in last if of_arm == arm]
        if not seeds:
            continue
        mean, half = interval_over_seeds([last[arm, seed] for seed in seeds])
        arms[arm] = {"seeds": seeds, "bits_per_base": mean, "half_width_95": half}
        paired = [last[arm, seed] - last["no memory", seed] for seed in seeds if ("no memory", seed) in last]
        if arm != "no memory" and paired:
            mean, half = interval_over_seeds(paired)
            arms[arm] |= {"minus_no_memory": mean, "minus_no_memory_half_width_95": half, "by_seed": paired}
        print(arm, arms[arm])
    write_whole(file, json.dumps({"arms": arms, "runs": runs}, indent=1) + "\n")


def draw(runs: list[dict[str, Any]], figure_file: Path) -> None:
    """Mean of the seeds, and each seed as a thin line."""
    figure, axis = pyplot().subplots(figsize=(6, 3.5), layout="constrained")
    for arm, colour in zip(ARMS, ("#777777", "#0072B2", "#D55E00"), strict=True):
        curves = [run["curve"] for run in runs if run["arm"] == arm]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        for curve in curves:
            axis.plot(steps, [bits for _, bits in curve], color=colour, linewidth=0.5, alpha=0.6)
        means = [
            sum(bits) / len(bits) for bits in zip(*([bits for _, bits in curve] for curve in curves), strict=True)
        ]
        axis.plot(steps, means, color=colour, label=f"{arm} ({len(curves)} seeds)")
    axis.set(xlabel="steps after the memory was attached", ylabel="bits per base, held out")
    axis.legend(frameon=False)
    write_figure(figure_file, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--dataset", help="folder that `gengram prepare` wrote, with the splits train and validation")
    parser.add_argument("--model", help="folder or Hub id of a causal model to go on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--start-steps", type=int, default=400, help="of the model without a memory")
    parser.add_argument("--steps", type=int, default=400, help="of each arm")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluate-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--validation-examples", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", type=Path, help="write all runs and their differences to this JSON file")
    parser.add_argument("--figure", type=Path, help="draw the curves: a name in .svg or .png")
    arguments = parser.parse_args()
    if arguments.dataset is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model) if arguments.model else GengramTokenizer()
        loaded = load_dataset(arguments.dataset)
        held_out = loaded["validation"].shuffle(seed=0)
        held_out = held_out.take(min(arguments.validation_examples, len(held_out)))
        data = {"train": loaded["train"].with_format("numpy"), "validation": held_out.with_format("numpy")}
        for seed in arguments.seeds:
            for arm in ARMS:
                go_on(arm, data, tokenizer, seed, arguments)
    runs = [json.loads(file.read_text()) for file in sorted(arguments.output.glob("*.json"))]
    if arguments.report is not None:
        report(runs, arguments.report)
    if arguments.figure is not None:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
