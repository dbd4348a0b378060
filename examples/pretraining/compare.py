"""The controlled comparison: the same tokens, steps, data order and seeds, with and without the memory.

    python compare.py --dataset DATASET --output OUTPUT              # runs what is missing, then reports
    python compare.py --output OUTPUT --report benchmarks/results/memory_comparison.json --figure docs/figures/...svg

A plan, such as `comparisons/architectures.json`, holds the architectures, arms, ablations, seeds and training options.
"widened baseline" has no memory, but a feed-forward so wide that it has as many parameters as the arm with memory:
more computing per token. `memory_kinds.py` has the arms that the package has no model for.

With `learning_rates` in the plan, every arm of every architecture is first trained with each of them and the
`tuning_seed`; the one with the lowest loss on the split `tuning_split` is used for all seeds of that arm.

Every run is one call of `pretrain.py`. One that is done is not done again, be its result in the output folder or in an
earlier report (`--report`, or `--done` for those of other plans); one that was cut off continues from its last
checkpoint. With `--keep-models` the trained models stay in `OUTPUT/models`.
"""

import argparse
import functools
import hashlib
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from memory_kinds import new_model, parameters_per_token

from gengram.support.bootstrap import interval_over_seeds
from gengram.support.figures import pyplot, write_figure
from gengram.support.whole_output import write_whole

HERE = Path(__file__).parent
AS_MEMORY = "as many parameters as memory"


def parameters(fields: dict[str, Any]) -> tuple[int, int]:
    """All parameters of a model, and those that a token uses: chosen experts, and of the tables the window's rows."""
    with torch.device("meta"):
        model = new_model(fields)
    config = model.config
    experts = getattr(config, "num_local_experts", 0)
    share = config.num_experts_per_tok / experts if experts > 1 else 1.0
    return model.num_parameters(), parameters_per_token(model, fields.get("memory_window", 21), share)


def as_wide_as(fields: dict[str, Any], wanted: int) -> int:
    """The feed-forward width, a multiple of 8, with which a model's parameters are nearest to `wanted`."""
    one, two = (parameters({**fields, "intermediate_size": width})[0] for width in (8, 16))
    return 8 * max(1, round(1 + (wanted - one) / (two - one)))


def planned_runs(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of the plan, seed by seed, the ablations last: its names and its model's fields."""
    runs = []
    for seed in plan["seeds"]:
        for architecture, changes in plan["architectures"].items():
            with_memory = {**plan["base"], **changes}
            for arm, arm_changes in plan["arms"].items():
                fields = {**with_memory, **arm_changes}
                if fields["intermediate_size"] == AS_MEMORY:
                    fields["intermediate_size"] = as_wide_as(fields, parameters(with_memory)[0])
                run = {"architecture": architecture, "arm": arm, "seed": seed, "fields": fields}
                runs.append({**run, "training": plan["training"]})
    ablations = plan.get("ablations")
    if ablations is None:
        return runs
    with_memory = {**plan["base"], **plan["architectures"][ablations["architecture"]]}
    for seed in ablations["seeds"]:
        for variant, changes in ablations["variants"].items():
            run = {"architecture": ablations["architecture"], "arm": f"memory, {variant}", "seed": seed}
            runs.append({**run, "fields": {**with_memory, **changes}, "training": plan["training"]})
    return runs


def tuning_runs(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A run per architecture, arm and learning rate; none if the plan has no grid."""
    return [
        {**run, "seed": plan["tuning_seed"], "learning_rate": rate, "split": plan["tuning_split"]}
        for run in planned_runs({**plan, "seeds": plan["seeds"][:1]})
        for rate in plan.get("learning_rates", [])
    ]


def with_best_rates(plan: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """The planned runs, each with the best learning rate of its arm; those whose rates are not all tried are left."""
    runs = planned_runs(plan)
    if "learning_rates" not in plan:
        return runs
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results_of(tuning_runs(plan), output):
        tried.setdefault((result["architecture"], result["arm"]), []).append(result)
    found = []
    for run in runs:
        results = tried.get((run["architecture"], run["arm"]), [])
        if len(results) == len(plan["learning_rates"]):
            best = min(results, key=lambda result: result["bits_per_base"])
            found.append({**run, "learning_rate": best["learning_rate"]})
    return found


def run_name(run: dict[str, Any]) -> str:
    tuned = f"--lr{run['learning_rate']:g}-{run['split']}" if "split" in run else ""
    return f"{run['architecture']}--{run['arm']}--{run['seed']}{tuned}".replace(", ", "-").replace(" ", "_")


def is_done(run: dict[str, Any], output: Path) -> bool:
    """Whether the run has left a result of the same model, training and learning rate (a larger grid has others)."""
    path = output / f"{run_name(run)}.json"
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    return all(result.get(name) == run.get(name) for name in ("fields", "training", "learning_rate"))


def results_of(runs: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """The results of those of the runs that are done."""
    return [json.loads((output / f"{run_name(run)}.json").read_text()) for run in runs if is_done(run, output)]


def unpack(path: Path, output: Path) -> None:
    """Put the runs of a report into `output`, but for those that have a result there."""
    found = json.loads(path.read_text())
    output.mkdir(parents=True, exist_ok=True)
    for result in [*found["runs"], *found.get("tuning", [])]:
        name = output / f"{run_name(result)}.json"
        if not name.exists():
            write_whole(name, json.dumps({**result, "training": found["plan"]["training"]}) + "\n")


def identity_of(dataset: str) -> str:
    """What tells a data set's folder from others: the hash of its files; of a data set on the Hub its name."""
    files = sorted(Path(dataset).glob("data/*.parquet"))
    if not files:
        return dataset
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def check_dataset(dataset: str | None, reports: list[Path], output: Path) -> str | None:
    """Note which data set the results in `output` are of; returns what tells it from others, if that is known.

    Raises:
        ValueError: if earlier results are of another one. Those of before this was noted are taken as they are.
    """
    noted = output / "dataset.json"
    known = {path: json.loads(path.read_text()).get("dataset") for path in [noted, *reports] if path.exists()}
    known = {path: identity for path, identity in known.items() if identity is not None}
    identity = identity_of(dataset) if dataset else next(iter(known.values()), None)
    for path, other in known.items():
        if other != identity:
            raise ValueError(
                f"{path}: its runs are of another data set than {dataset or noted}; give another --output, and no "
                "report of others."
            )
    if identity is not None:
        write_whole(noted, json.dumps({"dataset": identity}) + "\n")
    return identity


def model_of(run: dict[str, Any], output: Path) -> Path:
    """The folder of a run's trained model, if models are kept."""
    return output / "models" / run_name(run)


def train(run: dict[str, Any], dataset: str, output: Path, keeps_model: bool = False) -> dict[str, Any]:
    """One call of `pretrain.py`; leaves `RUN.json` when it has ended well, and returns what is in it.

    Raises:
        RuntimeError: if it has not.
    """
    folder = output / "work" / run_name(run)
    begun = folder / "run.json"
    if folder.exists() and not (begun.exists() and json.loads(begun.read_text()) == run):  # by another plan
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(run))
    (folder / "config.in.json").write_text(json.dumps(run["fields"]))
    options = {
        "save_steps": 50,
        "save_total_limit": 1,
        **run["training"],
        "seed": run["seed"],
        "data_seed": run["seed"],
    }
    if "learning_rate" in run:
        options["learning_rate"] = run["learning_rate"]
    if "split" in run:
        options["validation_split"] = run["split"]
    command = [sys.executable, str(HERE / "pretrain.py"), "--config", str(folder / "config.in.json")]
    command += ["--dataset", dataset, "--output_dir", str(folder), "--report_to", "none"]
    command += ["--disable_tqdm", "true"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with open(folder / "output.txt", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{run_name(run)} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = list({line["step"]: line for line in lines if "loss" in line}.values())  # some twice if it was cut off
    summary = json.loads((folder / "training.json").read_text())
    kept = ("step", "loss", "router_load_balancing_loss", "router_z_loss", "router_entropy_bits")
    total, used = parameters(run["fields"])
    result = {
        **run,
        "parameters": total,
        "parameters_used_per_token": used,
        "bits_per_base": summary["final"]["eval_bits_per_base"],
        "trained_tokens": summary["trained_tokens"],
        "seconds": summary["seconds_of_this_run"],
        "log": [{name: line[name] for name in kept if name in line} for line in lines],
        "machine": summary["machine"],
    }
    if keeps_model:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        kept_model = model_of(run, output)
        shutil.rmtree(kept_model, ignore_errors=True)
        kept_model.parent.mkdir(exist_ok=True)
        folder.rename(kept_model)
    write_whole(output / f"{run_name(run)}.json", json.dumps(result) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    return result


def report(plan: dict[str, Any], output: Path) -> dict[str, Any]:
    """A row per architecture and arm, with the paired difference from the arm with memory of the same seeds.

    `pooled` has that difference over all architectures; its interval is over the seeds, each the mean of its
    architectures, since these share the seed's tokens and order.
    """
    results = results_of(sorted(with_best_rates(plan, output), key=run_name), output)
    tried = results_of(tuning_runs(plan), output)
    for result in [*results, *tried]:
        del result["training"]  # it stands in the plan
    by_key = {(r["architecture"], r["arm"], r["seed"]): r for r in results}

    def minus_memory(runs: list[dict[str, Any]]) -> list[float]:
        pairs = [(run, by_key.get((run["architecture"], "memory", run["seed"]))) for run in runs]
        return [run["bits_per_base"] - other["bits_per_base"] for run, other in pairs if other is not None]

    rows = []
    for architecture, arm in dict.fromkeys((run["architecture"], run["arm"]) for run in planned_runs(plan)):
        found = [by_key[architecture, arm, seed] for seed in plan["seeds"] if (architecture, arm, seed) in by_key]
        if not found:
            continue
        mean, half = interval_over_seeds([run["bits_per_base"] for run in found])
        paired = minus_memory(found)
        difference, difference_half = interval_over_seeds(paired) if paired else (math.nan, math.nan)
        row = {
            "architecture": architecture,
            "arm": arm,
            "seeds": [run["seed"] for run in found],
            "bits_per_base": mean,
            "half_width_95": half,
            "minus_memory": difference,
            "minus_memory_half_width_95": difference_half,
            "parameters": found[0]["parameters"],
            "parameters_used_per_token": found[0]["parameters_used_per_token"],
            "trained_tokens": found[0]["trained_tokens"],
        }
        if "learning_rate" in found[0]:
            row["learning_rate"] = found[0]["learning_rate"]
        balance = [[line.get("router_load_balancing_loss") for line in run["log"]] for run in found]
        if all(None not in losses for losses in balance):
            for name, values in {
                "last": [losses[-1] for losses in balance],
                "mean": [sum(losses) / len(losses) for losses in balance],
            }.items():
                row[f"{name}_load_balancing_loss"], half = interval_over_seeds(values)
                row[f"{name}_load_balancing_loss_half_width_95"] = half
        rows.append(row)
    pooled = {}
    for arm in plan["arms"]:
        of_arm = [run for run in results if run["arm"] == arm]
        by_seed = [minus_memory([run for run in of_arm if run["seed"] == seed]) for seed in plan["seeds"]]
        paired = [difference for differences in by_seed for difference in differences]
        if paired and arm != "memory":
            mean, half = interval_over_seeds([sum(found) / len(found) for found in by_seed if found])
            above = sum(difference > 0 for difference in paired)
            pooled[arm] = {"pairs": len(paired), "above_memory": above, "minus_memory": mean, "half_width_95": half}
    return {"plan": plan, "rows": rows, "pooled": pooled, "runs": results} | ({"tuning": tried} if tried else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The report as Markdown."""
    lines = ["| architecture | arm | seeds | bits per base | difference from memory | parameters | used per token |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['architecture']} | {row['arm']} | {len(row['seeds'])} | {row['bits_per_base']:.4f} ± "
            f"{row['half_width_95']:.4f} | {row['minus_memory']:+.4f} ± {row['minus_memory_half_width_95']:.4f} | "
            f"{row['parameters']:,} | {row['parameters_used_per_token']:,} |"
        )
    return "\n".join(lines).replace("± nan", "")


def draw(found: dict[str, Any], path: Path) -> None:
    """Every run beside its means; ablations, or differences from the arm with memory; losses of routers, if any.

    With `curves` in the plan, arms are points of these: name of the axis -> arm -> number.
    """
    arms = list(found["plan"]["arms"])
    colours = {arm: f"C{place}" for place, arm in enumerate(arms)}
    second = _draw_ablations if "ablations" in found["plan"] else _draw_differences
    has_routers = any("router_load_balancing_loss" in line for run in found["runs"] for line in run["log"])
    curves = [functools.partial(_draw_curve, name=name) for name in found["plan"].get("curves", {})]
    panels = [*(curves or [_draw_runs, second]), *([_draw_routers] if has_routers else [])]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, found, colours)
    write_figure(path, figure)


def _draw_runs(axis: Any, found: dict[str, Any], colours: dict[str, str]) -> None:
    architectures, arms = list(found["plan"]["architectures"]), list(colours)
    for arm, colour in colours.items():
        shift = 0.8 / len(arms) * (arms.index(arm) - (len(arms) - 1) / 2)
        runs = [run for run in found["runs"] if run["arm"] == arm]
        places = [architectures.index(run["architecture"]) + shift for run in runs]
        axis.plot(places, [run["bits_per_base"] for run in runs], ".", color=colour, alpha=0.6)
        rows = [row for row in found["rows"] if row["arm"] == arm]
        axis.errorbar(
            [architectures.index(row["architecture"]) + shift + 0.2 / len(arms) for row in rows],
            [row["bits_per_base"] for row in rows],
            [0.0 if math.isnan(row["half_width_95"]) else row["half_width_95"] for row in rows],
            fmt="_",
            capsize=4,
            color=colour,
            label=arm,
        )
    lines = [architecture.replace(", ", ",\n").replace(" (", "\n(") for architecture in architectures]
    axis.set_xticks(range(len(architectures)), lines, fontsize=8)
    axis.set_ylabel("held-out bits per base")
    axis.set_title("every seed, and the mean with its 95 % interval over seeds", fontsize=10)
    axis.legend(fontsize=8)


def _draw_curve(axis: Any, found: dict[str, Any], colours: dict[str, str], name: str) -> None:
    """Arms that differ in one number, and the arm without memory as a band."""
    places = found["plan"]["curves"][name]
    rows = [row for row in found["rows"] if row["arm"] in places]
    rows.sort(key=lambda row: places[row["arm"]])
    for run in found["runs"]:
        if run["arm"] in places:
            axis.plot(places[run["arm"]], run["bits_per_base"], ".", color="C0", alpha=0.6)
    halves = [0.0 if math.isnan(row["half_width_95"]) else row["half_width_95"] for row in rows]
    numbers = [places[row["arm"]] for row in rows]
    axis.errorbar(numbers, [row["bits_per_base"] for row in rows], halves, capsize=4, color="C0", label="memory")
    for row in found["rows"]:
        if row["arm"] == "baseline":
            low, high = (row["bits_per_base"] + side * row["half_width_95"] for side in (-1, 1))
            axis.axhspan(low, high, color="C1", alpha=0.2)
            axis.axhline(row["bits_per_base"], color="C1", label="baseline")
    axis.set_xticks(sorted(set(numbers)))
    axis.set_xlabel(name)
    axis.set_ylabel("held-out bits per base")
    axis.set_title("every seed, and the mean with its 95 % interval over seeds", fontsize=10)
    axis.legend(fontsize=8)


def _draw_ablations(axis: Any, found: dict[str, Any], colours: dict[str, str]) -> None:
    chosen = found["plan"]["ablations"]
    shown = [
        run
        for run in found["runs"]
        if run["architecture"] == chosen["architecture"] and run["seed"] in chosen["seeds"]
    ]
    shown.sort(key=lambda run: (run["arm"] not in colours, run["arm"]))
    names = list(dict.fromkeys(run["arm"] for run in shown))
    places = [names.index(run["arm"]) for run in shown]
    axis.plot([run["bits_per_base"] for run in shown], places, "o", color="tab:gray")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("held-out bits per base")
    axis.set_title(f"{chosen['architecture']}, seed {', '.join(map(str, chosen['seeds']))}", fontsize=10)


def _draw_differences(axis: Any, found: dict[str, Any], colours: dict[str, str]) -> None:
    rows = [row for row in found["rows"] if row["arm"] != "memory"]
    by_key = {(run["architecture"], run["arm"], run["seed"]): run["bits_per_base"] for run in found["runs"]}
    for place, row in enumerate(rows):
        architecture, colour = row["architecture"], colours[row["arm"]]
        pairs = [(by_key[architecture, row["arm"], seed], (architecture, "memory", seed)) for seed in row["seeds"]]
        each = [bits - by_key[other] for bits, other in pairs if other in by_key]
        axis.plot(each, [place - 0.15] * len(each), ".", color=colour, alpha=0.6)
        half = row["minus_memory_half_width_95"]
        axis.errorbar(
            row["minus_memory"], place, xerr=0.0 if math.isnan(half) else half, fmt="|", capsize=4, color=colour
        )
    axis.axvline(0, color="black", linewidth=0.5, linestyle=":")
    has_many = len(found["plan"]["architectures"]) > 1
    axis.set_yticks(
        range(len(rows)), [f"{row['architecture']}: {row['arm']}" if has_many else row["arm"] for row in rows]
    )
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("bits per base more than with memory")
    axis.set_title("paired by seed, with 95 % intervals", fontsize=10)


def _draw_routers(axis: Any, found: dict[str, Any], colours: dict[str, str]) -> None:
    for arm, colour in colours.items():
        curves = [
            [(line["step"], line["router_load_balancing_loss"]) for line in run["log"]]
            for run in found["runs"]
            if run["arm"] == arm and all("router_load_balancing_loss" in line for line in run["log"])
        ]
        for curve in curves:
            axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, linewidth=0.8)
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [sum(loss for _, loss in point) / len(point) for point in zip(*curves, strict=True)]
            axis.plot(steps, means, color=colour, linewidth=2, label=arm)
            axis.legend(fontsize=8)
    axis.set_xlabel("step")
    axis.set_ylabel("load-balancing loss")
    axis.set_title("routers of the MoE runs, and their means", fontsize=10)


def train_missing(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Do those of the runs that have left no result."""
    keeps = arguments.keep_models
    missing = [
        run
        for run in runs
        if not is_done(run, arguments.output) or (keeps and not model_of(run, arguments.output).exists())
    ]
    if not arguments.dataset:
        if missing:
            print(f"{len(missing)} of {len(runs)} runs are missing; give --dataset to do them")
        return
    with ThreadPoolExecutor(arguments.processes) as pool:
        done = [pool.submit(train, run, arguments.dataset, arguments.output, keeps) for run in missing]
        try:
            for number, (run, result) in enumerate(zip(missing, done, strict=True), start=1):
                bits = result.result()["bits_per_base"]
                print(f"{number} of {len(missing)}: {run_name(run)}, {bits:.4f} bits per base", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "comparisons/architectures.json", help="what to compare")
    parser.add_argument("--dataset", help="data set of `gengram prepare`; without it nothing is trained")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    parser.add_argument("--processes", type=int, default=1, help="runs at once; set OMP_NUM_THREADS accordingly")
    parser.add_argument("--report", type=Path, help="JSON file of all results; what it has is not done again")
    parser.add_argument("--done", type=Path, nargs="+", default=[], help="reports of other plans, to do no run twice")
    parser.add_argument("--figure", type=Path, help="draw this SVG or PNG")
    parser.add_argument("--keep-models", action="store_true", help="leave the trained models in OUTPUT/models")
    arguments = parser.parse_args()
    plan = json.loads(arguments.plan.read_text())
    arguments.output.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in (arguments.report, *arguments.done) if path and path.exists()]
    identity = check_dataset(arguments.dataset, earlier, arguments.output)
    for path in earlier:
        unpack(path, arguments.output)
    train_missing(tuning_runs(plan), arguments)
    train_missing(with_best_rates(plan, arguments.output), arguments)
    found = report(plan, arguments.output)
    print(table(found["rows"]))
    for arm, pooled in found["pooled"].items():
        print(
            f"{arm} minus memory, all architectures: {pooled['minus_memory']:+.4f} ± {pooled['half_width_95']:.4f}, "
            f"above in {pooled['above_memory']} of {pooled['pairs']} pairs"
        )
    if arguments.report:
        write_whole(arguments.report, json.dumps(found | ({"dataset": identity} if identity else {})) + "\n")
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
