"""Results as Parquet, JSON, a Markdown table and a plot."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..support.errors import quoted, shortened
from ..support.figures import pyplot, write_figure
from ..support.printable import printable
from ..support.whole_output import write_whole
from .run_files import json_text
from .suite import Suite


def metrics_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per run and metric; what has parts is JSON."""
    rows = []
    for result in results:
        shared = {name: value for name, value in result.items() if name not in ("metrics", "metric")}
        shared |= {name: json.dumps(value) for name, value in shared.items() if isinstance(value, dict | list)}
        for metric, estimate in result["metrics"].items():
            rows.append({**shared, "metric": metric, "is_main_metric": metric == result["metric"], **estimate})
    return pd.DataFrame(rows).astype({name: float for name in ("value", "low", "high")})


def _shown_models(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the report calls each model; models of one name are told apart by their folders."""
    models = {result["model"] for result in results if result["model"] is not None}
    counts = Counter(Path(model).name for model in models)
    return {model: Path(model).name if counts[Path(model).name] == 1 else model for model in models}


def _ways(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a column of the report is about, for each result."""
    shown = _shown_models(results)
    return [
        f"{shown[result['model']]}, {result['protocol']}"
        if result["model"] is not None
        else str(result["protocol"]).replace("baseline-", "")
        for result in results
    ]


def _main_values(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], list[Any]]]:
    """Tasks, ways, and the estimates of the main metric of each, one per seed."""
    found: dict[tuple[str, str], list[Any]] = {}
    for result, way in zip(results, _ways(results), strict=True):
        found.setdefault((result["task"], way), []).append(result["metrics"][result["metric"]])
    tasks = list(dict.fromkeys(task for task, _ in found))
    ways = sorted(dict.fromkeys(way for _, way in found), key=lambda way: ("," not in way, way))
    return tasks, ways, found


def _mean(estimates: Sequence[dict[str, float | None]], name: str) -> float | None:
    """The mean of a field over seeds; None if it is not defined for one."""
    values = [estimate[name] for estimate in estimates]
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if len(defined) == len(values) else None


def _estimate_text(estimates: Sequence[dict[str, float | None]], is_best: bool = False, signed: bool = False) -> str:
    """`**0.671** (0.625 to 0.714)`; signed, `+0.012 (-0.004 to +0.028)`."""
    value, low, high = (_mean(estimates, name) for name in ("value", "low", "high"))
    if value is None:
        return "not defined"
    form = "+.3f" if signed else ".3f"
    text = f"**{value:{form}}**" if is_best else f"{value:{form}}"
    return text if low is None or high is None else f"{text} ({low:{form}} to {high:{form}})"


def _cell(text: str) -> str:
    """Text as a cell of a table may hold it, whatever is in it."""
    return printable(text).replace("|", "\\|")


def markdown(suite: Suite, results: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]] = ()) -> str:
    """A table of the main metric with its interval, a row per task; what is odd about the data; differences."""
    tasks, ways, found = _main_values(results)
    metric = {result["task"]: result["metric"] for result in results}
    lines = [f"# {printable(suite.name)}", "", suite.description.strip(), ""]
    lines.append("| task | metric | " + " | ".join(map(_cell, ways)) + " |")
    lines.append("|" + "---|" * (len(ways) + 2))
    for task in tasks:
        means = {way: _mean(found[task, way], "value") for way in ways if (task, way) in found}
        defined = [mean for mean in means.values() if mean is not None]
        best = (min if metric[task] == "bits_per_base" else max)(defined, default=None)
        cells = [_estimate_text(found[task, way], means[way] == best) if (task, way) in found else "" for way in ways]
        lines.append(f"| {_cell(task)} | {metric[task]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Value and 95 % bootstrap interval of the test rows; with several seeds, the mean of each. Bold: best.",
    ]
    lines += _notes(results) + _differences(results, differences) + _far(results) + _strata(results)
    return "\n".join(lines) + "\n"


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What is odd about the rows, each line once: repeats, classes without test rows, rows left out."""
    lines = []
    kinds_left_out: dict[str, set[str]] = {}
    for result in results:
        kinds_left_out.setdefault(result["task"], set()).add(json.dumps(result.get("left_out", {}), sort_keys=True))
    for result, way in zip(results, _ways(results), strict=True):
        task = printable(result["task"])
        repeated, shared = result.get("duplicates_in_train", 0), result.get("test_rows_in_train", 0)
        if repeated or shared:
            lines.append(
                f"- {task}: {shared} of {result['test_rows']} test rows also stand in the training rows "
                f"({result['conflicting_labels']} with another label); {repeated} training rows are repeats "
                f"({result['conflicts_in_train']} with another label)."
            )
        near, far = result.get("test_rows_near_train", 0), result.get("metrics_far_from_train", {})
        if near > shared:
            of = f"{near} of {result['test_rows']} test rows"
            also = f"; {result['metric']} of the others below." if far else "."
            lines.append(f"- {task}: {of} share half of their 31-mers or more with training rows{also}")
        if result["metric"] == "auprc" and len(result.get("test_rows_of_classes", {})) == 2:
            lines.append(f"- {task}: AUPRC is that of the class {quoted(list(result['test_rows_of_classes'])[1:])}.")
        absent = [name for name, rows in result.get("test_rows_of_classes", {}).items() if not rows]
        if absent:
            lines.append(
                f"- {task}: no test rows of {quoted(absent)}; AUC and AUPRC are means over the other classes."
            )
        left_out = sorted(result.get("left_out", {}).items(), key=lambda item: -item[1])
        if left_out:
            total = sum(count for _, count in left_out)
            reasons = "; ".join(f"{printable(reason)} ({count:,})" for reason, count in left_out)
            of = f"{task}, {printable(way)}" if len(kinds_left_out[result["task"]]) > 1 else task
            lines.append(f"- {of}: {total:,} of {total + result['test_rows']:,} rows were left out: {reasons}.")
        others = result["details"].get("compared_with", {}) if isinstance(result["details"], dict) else {}
        if len(others) > 1:
            labels = ", ".join(f"{shortened(name)} ({count:,})" for name, count in list(others.items())[:10])
            lines.append(f"- {task}: compared with the labels {labels}.")
    return list(dict.fromkeys(lines))


def _differences(results: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> list[str]:
    """A table of how much models differ from the first one."""
    if not differences:
        return []
    shown = _shown_models(results)
    lines = ["", f"## Differences from {_cell(shown[differences[0]['reference']])}", ""]
    lines += ["| task | protocol | model | metric | difference |", "|---|---|---|---|---|"]
    for row in differences:
        names = [row["task"], row["protocol"], shown[row["model"]], row["metric"]]
        lines.append(f"| {' | '.join(map(_cell, names))} | {_estimate_text([row], signed=True)} |")
    return [*lines, "", "95 % interval over bootstrap samples of the test rows, the same samples for both models."]


def _far(results: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the main metric on the test rows that are not nearly training rows."""
    found = [
        {**result, "metrics": result["metrics_far_from_train"]}
        for result in results
        if result.get("test_rows_near_train") and result["metrics_far_from_train"]
    ]
    if not found:
        return []
    tasks, ways, values = _main_values(found)
    lines = ["", "## Without test rows that share half of their 31-mers or more with training rows", ""]
    lines += ["| task | " + " | ".join(map(_cell, ways)) + " |", "|" + "---|" * (len(ways) + 1)]
    for task in tasks:
        cells = [_estimate_text(values[task, way]) if (task, way) in values else "" for way in ways]
        lines.append(f"| {_cell(task)} | " + " | ".join(cells) + " |")
    return lines


def _strata(results: Sequence[dict[str, Any]]) -> list[str]:
    """Tables of the areas under the curve within each kind of variant."""
    lines = []
    for result, way in zip(results, _ways(results), strict=True):
        strata = result["details"].get("strata") if isinstance(result["details"], dict) else None
        if strata:
            lines += ["", f"## {printable(result['task'])}, {printable(way)}, within each kind", ""]
            lines += ["| kind | rows | positive | mean score | AUC |", "|---|---|---|---|---|"]
            for kind, found in strata.items():
                auc = _estimate_text([found["auc"]]) if "auc" in found else ""
                lines.append(
                    f"| {_cell(kind)} | {found['rows']} | {found['positives']} | {found['mean_score']:.3g} | {auc} |"
                )
    return lines


def _plain(text: str) -> str:
    """Text for Matplotlib, which takes what is between dollar signs for a formula."""
    return printable(text).replace("$", r"\$")


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
                if estimate["value"] is None:
                    continue
                colour = "tab:blue" if "," in way else "tab:gray"
                if estimate["low"] is not None:
                    axis.plot([estimate["low"], estimate["high"]], [place, place], color=colour, linewidth=2)
                axis.plot(estimate["value"], place, "o", color=colour)
        axis.set_title(_plain(f"{task} ({metric[task]})"), fontsize=9)
        axis.set_yticks(range(len(ways)), map(_plain, ways), fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    write_figure(path, figure)


def write_report(
    suite: Suite, results: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], output: Path
) -> None:
    """Write `results.parquet`, `results.json`, `differences.json`, `report.md` and `report.svg`."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json_text(list(results)))
    write_whole(output / "results.parquet", metrics_table(results).to_parquet())
    write_whole(output / "differences.json", json_text(list(differences)))
    write_whole(output / "report.md", markdown(suite, results, differences))
    plot(suite, results, output / "report.svg")
