"""Draw the losses of one training, of one or more stages, from their `log.jsonl`.

python plot_log.py STAGE1/log.jsonl STAGE2/log.jsonl --figure training.svg
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from gengram.support.figures import pyplot, write_figure


def read_stages(paths: list[Path]) -> tuple[list[tuple[int, float]], list[tuple[int, float]], list[int]]:
    """(tokens seen, bits per base) of training and of validation, and the tokens seen at the end of each stage."""
    training, validation, ends = [], [], []
    before = 0
    for path in paths:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            tokens = before + line.get("num_input_tokens_seen", 0)
            if "loss" in line:
                training.append((tokens, line["loss"] / math.log(2)))
            if "eval_bits_per_base" in line:
                validation.append((tokens, line["eval_bits_per_base"]))
        before += max(line.get("num_input_tokens_seen", 0) for line in lines)
        ends.append(before)
    return training, validation, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of each stage, in order")
    parser.add_argument("--figure", type=Path, required=True, help="SVG or PNG to write")
    parser.add_argument("--line", action="append", default=[], metavar="NAME=BITS", help="a level to compare with")
    arguments = parser.parse_args()
    training, validation, ends = read_stages(arguments.logs)
    figure, axis = pyplot().subplots(figsize=(7, 4), constrained_layout=True)
    axis.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.6, label="training (router losses included)")
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation")
    for place, level in enumerate(arguments.line):
        name, bits = level.rsplit("=", 1)
        axis.axhline(float(bits), color=f"C{place + 2}", linestyle="--", label=name)
    for end in ends[:-1]:
        axis.axvline(end, color="tab:gray", linewidth=0.8)
    axis.set_xlabel("tokens seen")
    axis.set_ylabel("bits per base")
    axis.legend()
    write_figure(arguments.figure, figure)


if __name__ == "__main__":
    main()
