"""The example of a workflow, run by Snakemake where it is installed."""

import os
import shutil
import subprocess
import sys

import pytest
from example_scripts import EXAMPLES

from gengram import DEMO_DATA
from gengram.cli import main


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("snakemake") is None, reason="Snakemake is not installed")
def test_parts_that_snakemake_runs_are_the_whole(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "gengram"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gengram "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name in ("region.vcf.gz", "region.fa.gz"):
        shutil.copy(DEMO_DATA / name, tmp_path)
    given = ["options=--context 32", "variants=region.vcf.gz", "fasta=region.fa.gz", "parts=3"]
    snakemake = [
        "snakemake",
        "--snakefile",
        EXAMPLES / "workflows" / "Snakefile",
        "--cores",
        "2",
        "--config",
        *given,
    ]
    done = subprocess.run(snakemake, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert main("score region.vcf.gz --fasta region.fa.gz --output whole.tsv --context 32 --quiet".split()) == 0
    assert (tmp_path / "scores.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
