"""What a memory changes in each task, over pairs of models that were trained with different seeds.

    python probe_differences.py probes-1 probes-2 probes-3 exons-1 exons-2 exons-3 --report DIFFERENCES.json \
        --figure DIFFERENCES.svg

Each folder was written by `gengram bench BASELINE MEMORY` for one pair. Each pair has an interval of its own, by
bootstrap over test rows: what other rows would change. The interval over pairs (Student's t) says what another
training would.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gengram.support.bootstrap import interval_over_seeds
from gengram.support.figures import pyplot, write_figure
from gengram.support.whole_output import write_whole


def of_tasks(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """For each task: the difference of every pair with its bootstrap interval, and the mean with that over pairs.

    Raises:
        ValueError: if a folder does not compare two models, or not by one protocol.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        values = {(each["task"], each["model"]): each for each in json.loads((folder / "results.json").read_text())}
        differences = json.loads((folder / "differences.json").read_text())
        if not differences or len({each["task"] for each in differences}) != len(differences):
            raise ValueError(f"{folder}: expected two models and one protocol for each task.")
        for each in differences:
            task, metric = each["task"], each["metric"]
            models = {"reference": each["reference"], "model": each["model"]}
            found = {which: values[task, name]["metrics"][metric]["value"] for which, name in models.items()}
            kept = {name: each[name] for name in ("value", "low", "high")}
            pairs.setdefault(task, []).append({"metric": metric, **kept, "of": found, "names": models})
    rows = []
    for task, found in pairs.items():
        mean, half = interval_over_seeds([each["value"] for each in found])
        whole = {"mean": mean, "half_width_95": None if math.isnan(half) else half}
        rows.append({"task": task, "metric": found[0]["metric"], **whole, "pairs": found})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The tasks as Markdown."""
    lines = ["| task | without memory | with memory | difference | of each pair |", "|---|---|---|---|---|"]
    for row in rows:
        means = [
            sum(each["of"][which] for each in row["pairs"]) / len(row["pairs"]) for which in ("reference", "model")
        ]
        half = "" if row["half_width_95"] is None else f" ± {row['half_width_95']:.3f}"
        each_pair = ", ".join(f"{each['value']:+.3f}" for each in row["pairs"])
        lines.append(f"| {row['task']} | {means[0]:.3f} | {means[1]:.3f} | {row['mean']:+.3f}{half} | {each_pair} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Thin lines are pairs with what other test rows would change, thick ones the mean with what other seeds would."""
    figure, axis = pyplot().subplots(figsize=(7, 0.8 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        for number, each in enumerate(row["pairs"]):
            height = place + 0.12 * (number + 1)
            axis.plot([each["low"], each["high"]], [height, height], color="tab:gray", linewidth=1)
            axis.plot(each["value"], height, ".", color="tab:gray")
        axis.errorbar(
            row["mean"], place - 0.1, xerr=row["half_width_95"], fmt="o", capsize=4, color="tab:blue", linewidth=2
        )
    axis.axvline(0, color="black", linewidth=0.5, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["task"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"{rows[0]['metric']} with memory minus without")
    axis.set_title("blue: over seeds of training; gray: each pair, over test rows; 95 %", fontsize=10)
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="outputs of `gengram bench BASELINE MEMORY`")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="draw this SVG or PNG")
    arguments = parser.parse_args()
    rows = of_tasks(arguments.folders)
    print(table(rows))
    write_whole(arguments.report, json.dumps(rows, indent=1) + "\n")
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
