"""Results as Parquet, JSON, a Markdown table and a plot."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..support.figures import pyplot, write_figure
from ..support.whole_output import write_whole
from .suite import Suite


def results_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per run and metric."""
    rows = []
    for result in results:
        shared = {name: value for name, value in result.items() if name not in ("metrics", "metric")}
        shared |= {name: json.dumps(shared[name]) for name in ("details", "machine") if name in shared}
        for metric, estimate in result["metrics"].items():
            rows.append({**shared, "metric": metric, "is_main_metric": metric == result["metric"], **estimate})
    return pd.DataFrame(rows)


def _way(result: dict[str, Any]) -> str:
    """What a column of the report is about."""
    if result["model"] is None:
        return str(result["protocol"]).replace("baseline-", "")
    return f"{Path(result['model']).name}, {result['protocol']}"


def _main_values(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], list[Any]]]:
    """Tasks, ways, and the estimates of the main metric of each, one per seed."""
    found: dict[tuple[str, str], list[Any]] = {}
    for result in results:
        found.setdefault((result["task"], _way(result)), []).append(result["metrics"][result["metric"]])
    tasks = list(dict.fromkeys(task for task, _ in found))
    ways = sorted(dict.fromkeys(way for _, way in found), key=lambda way: ("," not in way, way))
    return tasks, ways, found


def markdown(suite: Suite, results: Sequence[dict[str, Any]]) -> str:
    """A table of the main metric with its interval, a row per task; then what is odd about the data."""
    tasks, ways, found = _main_values(results)
    metric = {result["task"]: result["metric"] for result in results}
    lines = [f"# {suite.name}", "", suite.description.strip(), ""]
    lines.append("| task | metric | " + " | ".join(ways) + " |")
    lines.append("|" + "---|" * (len(ways) + 2))
    for task in tasks:
        lower_is_better = metric[task] == "bits_per_base"
        means = {
            way: sum(estimate["value"] for estimate in found[task, way]) / len(found[task, way])
            for way in ways
            if (task, way) in found
        }
        best = (min if lower_is_better else max)(means.values())
        cells = []
        for way in ways:
            if (task, way) not in found:
                cells.append("")
                continue
            estimates = found[task, way]
            low = sum(estimate["low"] for estimate in estimates) / len(estimates)
            high = sum(estimate["high"] for estimate in estimates) / len(estimates)
            text = f"{means[way]:.3f}"
            cells.append((f"**{text}**" if means[way] == best else text) + f" ({low:.3f} to {high:.3f})")
        lines.append(f"| {task} | {metric[task]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Value and 95 % bootstrap interval of the test rows; with several seeds, the mean of each. Bold: best.",
    ]
    seen = set()
    for result in results:
        repeated, shared = result.get("duplicates_in_train", 0), result.get("test_rows_in_train", 0)
        if result["task"] not in seen and (repeated or shared):
            seen.add(result["task"])
            lines.append(
                f"- {result['task']}: {shared} of {result['test_rows']} test rows also stand in the training rows "
                f"({result['conflicting_labels']} with another label); {repeated} training rows are repeats."
            )
    for result in results:
        strata = result["details"].get("strata") if isinstance(result["details"], dict) else None
        if strata:
            lines += ["", f"## {result['task']}, {_way(result)}, within each kind", ""]
            lines += ["| kind | rows | positive | mean score | AUC |", "|---|---|---|---|---|"]
            for kind, found in strata.items():
                auc = "{value:.3f} ({low:.3f} to {high:.3f})".format(**found["auc"]) if "auc" in found else ""
                lines.append(
                    f"| {kind} | {found['rows']} | {found['positives']} | {found['mean_score']:.3g} | {auc} |"
                )
    return "\n".join(lines) + "\n"


def plot(suite: Suite, results: Sequence[dict[str, Any]], path: Path) -> None:
    """The main metric of every way, a panel per task, with intervals."""
    tasks, ways, found = _main_values(results)
    metric = {result["task"]: result["metric"] for result in results}
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(4 * columns + 2, 0.35 * len(ways) * rows + 1.2 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks, strict=False):
        for place, way in enumerate(ways):
            for estimate in found.get((task, way), []):
                colour = "tab:blue" if "," in way else "tab:gray"
                axis.plot([estimate["low"], estimate["high"]], [place, place], color=colour, linewidth=2)
                axis.plot(estimate["value"], place, "o", color=colour)
        axis.set_title(f"{task} ({metric[task]})", fontsize=9)
        axis.set_yticks(range(len(ways)), ways, fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    write_figure(path, figure)


def write_report(suite: Suite, results: Sequence[dict[str, Any]], output: Path) -> None:
    """Write `results.parquet`, `results.json`, `report.md` and `report.svg`."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json.dumps(list(results), indent=1) + "\n")
    write_whole(output / "results.parquet", results_table(results).to_parquet())
    write_whole(output / "report.md", markdown(suite, results))
    plot(suite, results, output / "report.svg")
