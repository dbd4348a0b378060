"""Suites of one small task, run by the command; their intervals come from few samples, and nothing is drawn."""

from pathlib import Path

import numpy as np
import pytest

from gengram.cli import main
from gengram.evaluation import metrics, report
from gengram.support.bootstrap import estimate


@pytest.fixture
def quick_results(monkeypatch):
    """No figure, and 10 bootstrap samples instead of 1000."""
    monkeypatch.setattr(report, "plot", lambda *arguments: None)
    monkeypatch.setattr(
        metrics, "estimate", lambda statistic, rows, samples: estimate(statistic, rows, min(samples, 10))
    )


def random_sequence(generator: np.random.Generator, length: int) -> str:
    return "".join(generator.choice(list("ACGT"), length))


def run_suite(folder: Path, fields: str, capsys, *words: str) -> tuple[int, str]:
    """Exit code of a task on files of `folder`, and its error or report."""
    (folder / "suite.yaml").write_text(f"tasks: [{{name: it, {fields}}}]\n")
    files = ["--suite", folder / "suite.yaml", "--data", folder, "--output", folder / "results"]
    code = main(["bench", *map(str, files), "--quiet", *words])
    captured = capsys.readouterr()
    return code, captured.err if code else captured.out


def write_table(path: Path, rows: list[tuple], columns: str = "sequence,label") -> None:
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")


def labelled(counts: dict[str, int], seed: int = 0) -> list[tuple[str, str]]:
    """Rows of each class: a motif of its own in random bases."""
    generator = np.random.default_rng(seed)
    return [
        (random_sequence(generator, 12) + label.upper() * 8 + random_sequence(generator, 12), label)
        for label, count in counts.items()
        for _ in range(count)
    ]


def write_variants(folder: Path, rows: list[tuple], columns: str = "pos,ref,alt,label") -> None:
    (folder / "genome.fa").write_text(">g\n" + "ACGT" * 50 + "\n")
    write_table(folder / "variants.csv", rows, columns)


GOOD = [(i + 1, "ACGT"[i % 4], "CGTA"[i % 4], i % 3 % 2) for i in range(40)]
FIELDS = "kind: variants, variants: variants.csv, fasta: genome.fa, protocols: [baseline-transversion]"
