"""The engine of the jobs: whole or not at all, once each, resumable, in parts, in several processes and on Ray."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_tree import ROOT
from squares_job import Squares

import gengram
from gengram.inference.jobs import ModelOptions, Share, finished_chunks, run_job
from gengram.inference.jobs.dependency import dependency_job
from gengram.inference.jobs.embed import embed_job
from gengram.inference.jobs.explain import explain_job
from gengram.inference.jobs.fill import fill_job
from gengram.inference.jobs.generate import GenerateJob
from gengram.inference.jobs.mutate import mutate_job
from gengram.inference.jobs.score import ScoreJob
from gengram.inference.jobs.tables import write_table
from gengram.inference.jobs.track import track_job
from gengram.support.errors import InputError

NUMBERS = list(range(20))  # seven chunks


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(map(str, NUMBERS)))
    return Squares(path, ModelOptions())


def computed(job):
    log = job.numbers.with_suffix(".log")
    return log.read_text().splitlines() if log.exists() else []


def squares(output):
    return pq.read_table(output)["square"].to_pylist()


def in_process(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/squares_job.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(job, output, rank, count, *arguments):
    """One of the processes that torchrun would start."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    return in_process(job.numbers, output, *arguments, **environment)


def ended_well(processes):
    try:
        for process in processes:
            _, error = process.communicate(timeout=300)  # a hang fails instead of staying
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def appears(*paths):
    """Wait for the first of these."""
    for _ in range(30_000):
        if any(path.exists() for path in paths):
            return
        time.sleep(0.01)
    raise AssertionError(f"none of {paths} appeared")


def leave_unfinished(job, output):
    """What a run leaves that fails after three of seven chunks."""
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), output)


def test_an_output_holds_all_results_in_order_and_the_record(job, tmp_path):
    summary = run_job(job, tmp_path / "out.parquet")
    assert squares(summary.output) == [number**2 for number in NUMBERS]
    assert (summary.items, summary.computed, summary.is_written) == (20, 20, True)
    record = json.loads(pq.read_schema(summary.output).metadata[b"gengram"])
    assert record["settings"] == {"per_chunk": 3} and record["inputs"]["numbers"]["bytes"] == 49
    assert set(record["model"]["files"]) >= {"model.safetensors", "config.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.log", "numbers.txt", "out.parquet"]
    with pytest.raises(FileExistsError, match=r"out.parquet exists already"):
        run_job(job, tmp_path / "out.parquet")


def test_a_tsv_has_plain_columns_and_its_record_beside_it(job, tmp_path):
    run_job(job, tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["number", "square"] and lines[4] == "3\t9" and len(lines) == 21
    assert json.loads((tmp_path / "out.tsv.json").read_text())["job"] == "squares"


def test_text_in_a_tsv_is_quoted_only_where_it_must_be(tmp_path):
    table = pa.table({"text": ["chr1", 'a "b"', "", None], "number": [0.1, None, 1e-9, -3.0]})
    write_table([table], tmp_path / "out.tsv", {}, table.schema)
    lines = (tmp_path / "out.tsv").read_text().split("\n")
    assert lines == ["text\tnumber", "chr1\t0.1", '"a ""b"""\t', "\t1e-09", "\t-3.0", ""]


def test_what_stands_beside_an_output_is_not_overwritten(job, tmp_path):
    own = tmp_path / "out.tsv.json"
    own.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.tsv\.json exists already; choose another output"):
        run_job(job, tmp_path / "out.tsv")
    assert not computed(job)
    own.unlink()
    with pytest.raises(FileExistsError, match=r"out\.tsv\.json exists already"):
        run_job(replace(job, at_write=lambda: own.write_text("precious")), tmp_path / "out.tsv")
    assert own.read_text() == "precious" and not (tmp_path / "out.tsv").exists()
    own.unlink()
    assert len(run_job(job, tmp_path / "out.tsv").output.read_text().splitlines()) == 21 and len(computed(job)) == 7


def test_an_empty_input_gives_an_empty_table(job, tmp_path):
    job.numbers.write_text("")
    assert run_job(job, tmp_path / "out.parquet").items == 0
    assert squares(tmp_path / "out.parquet") == []


def test_a_failed_run_goes_on_where_it_stopped(job, tmp_path):
    whole = run_job(job, tmp_path / "whole.parquet").output.read_bytes()
    job.numbers.with_suffix(".log").unlink()
    with pytest.raises(RuntimeError, match="cannot square 11") as raised:
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    assert "3 of 7 parts are finished" in raised.value.__notes__[0]
    assert not (tmp_path / "out.parquet").exists() and len(computed(job)) == 3
    summary = run_job(job, tmp_path / "out.parquet")
    assert summary.output.read_bytes() == whole and summary.computed == 11
    assert len(computed(job)) == 7  # nothing twice
    assert not list(tmp_path.glob(".out*"))


def test_a_run_that_lacked_memory_goes_on_with_smaller_batches(job, tmp_path):
    leave_unfinished(job, tmp_path / "out.parquet")
    smaller = replace(job, model=ModelOptions(batch_tokens=512))
    record = json.loads(pq.read_schema(run_job(smaller, tmp_path / "out.parquet").output).metadata[b"gengram"])
    assert record["model"]["batch_tokens"] == 512 and len(computed(job)) == 7


@pytest.mark.parametrize("name", ["score", "mutate", "dependency", "fill", "track", "explain", "embed", "generate"])
def test_jobs_whose_chunks_depend_on_the_batch_say_so_in_their_settings(name, tmp_path):
    pytest.importorskip("pysam")
    fasta, place = gengram.DEMO_DATA / "region.fa.gz", "chr21_25.7M:1-300"
    (tmp_path / "gaps.fa").write_text(">a\nACGNNACGT\n>b\n" + "ACGTN" * 200 + "\n")

    def job_of(model):
        jobs = {
            "score": lambda: ScoreJob(gengram.DEMO_DATA / "region.vcf.gz", fasta, tmp_path / "a.tsv", model),
            "mutate": lambda: mutate_job(fasta, "a.tsv", [place], model=model),
            "dependency": lambda: dependency_job(fasta, "a.tsv", [place], model=model),
            "fill": lambda: fill_job(tmp_path / "gaps.fa", "a.tsv", model=model),
            "track": lambda: track_job(fasta, model, whole_genome=True),
            "explain": lambda: explain_job(fasta, "a", [place], model=model),
            "embed": lambda: embed_job(fasta, "a.parquet", model=model),
            "generate": lambda: GenerateJob(model, number=40),
        }
        return jobs[name]()

    one, other = job_of(ModelOptions()), job_of(ModelOptions(batch_tokens=64))
    is_cut_alike = [chunk[:2] for chunk in one.chunks()] == [chunk[:2] for chunk in other.chunks()]
    assert is_cut_alike == (name not in ("embed", "generate")) == (one.settings() == other.settings())


@pytest.mark.parametrize("kills", [[4], [0, 10, 19]])
def test_a_killed_process_loses_only_the_chunk_in_hand(job, tmp_path, kills):
    for kill in kills:
        process = in_process(job.numbers, tmp_path / "out.parquet", kill)
        assert process.wait() == -9
        process.stderr.close()
        job.numbers.with_suffix(".died").unlink()
    run_job(job, tmp_path / "out.parquet")
    assert squares(tmp_path / "out.parquet") == [number**2 for number in NUMBERS]
    assert len(computed(job)) == 7


def test_another_run_for_the_same_output_is_not_mixed_in(job, tmp_path):
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=r"differs in settings.per_chunk.*--restart"):
        run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")
    job.numbers.write_text("\n".join(map(str, reversed(NUMBERS))))
    with pytest.raises(ValueError, match=r"differs in inputs.numbers.sha256"):
        run_job(job, tmp_path / "out.parquet")
    assert squares(run_job(job, tmp_path / "out.parquet", restart=True).output) == [n**2 for n in reversed(NUMBERS)]


@pytest.mark.parametrize(
    "name, decides",
    [
        *((name, True) for name in ("pytorch_model.bin", "adapter_model.bin", "vocab.txt", "code/own.py")),
        *((name, True) for name in ("spiece.model", "chat_template.jinja", "additional_chat_templates/a.jinja")),
        *(
            (name, False)
            for name in (
                "README.md",
                "optimizer.pt",
                "checkpoint-5/model.safetensors",
                ".cache/a.json",
                "eval/.cache/a.json",
            )
        ),
    ],
)
def test_a_run_goes_on_only_with_the_same_model(job, tmp_path, name, decides):
    place = tmp_path / "model" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"one")
    job.model = ModelOptions(str(tmp_path / "model"))
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    place.write_bytes(b"two")
    expected = (
        pytest.raises(InputError, match=f"differs in model.files.{name}") if decides else contextlib.nullcontext()
    )
    with expected:
        run_job(job, tmp_path / "out.parquet")


def test_a_run_that_finished_nothing_leaves_nothing(job, tmp_path):
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=0), tmp_path / "out.parquet")
    assert not list(tmp_path.glob(".out*"))
    run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")  # so that a wrong option can be mended


@pytest.mark.parametrize("kills_after", range(1, 6))
def test_a_kill_while_an_earlier_run_is_discarded_mixes_nothing(job, tmp_path, monkeypatch, kills_after):
    folder = tmp_path / ".out.parquet.chunks"

    class Killed(BaseException):
        pass

    def unlink(self, *arguments, **options):
        original(self, *arguments, **options)
        if self.parent == folder:
            removed.append(self)
            if len(removed) == kills_after:
                raise Killed

    original, removed = Path.unlink, []
    leave_unfinished(job, tmp_path / "out.parquet")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink)
        run_job(replace(job, per_chunk=4), tmp_path / "out.parquet", restart=True)
    if list(folder.glob("*.arrow")):
        with pytest.raises(InputError, match=r"differs in settings\.per_chunk"):
            run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")
    else:
        run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")
        assert squares(tmp_path / "out.parquet") == [number**2 for number in NUMBERS]


def test_chunks_without_a_record_are_of_another_run(job, tmp_path):
    leave_unfinished(job, tmp_path / "out.parquet")
    (tmp_path / ".out.parquet.chunks" / "record.json").unlink()
    with pytest.raises(InputError, match=r"keeps the finished part of another run.*differs in record\..*--restart"):
        run_job(job, tmp_path / "out.parquet")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "record.json", "00000000.arrow"])
def test_a_work_folder_of_somebody_else_is_refused(job, tmp_path, name):
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    os.chown(tmp_path / ".out.parquet.chunks" / name, 12345, 12345)
    with pytest.raises(InputError, match="owner"):
        run_job(job, tmp_path / "out.parquet", restart=True)


def test_parts_joined_are_the_whole(job, tmp_path):
    found = []
    for part in range(4):
        summary = run_job(job, tmp_path / f"{part}.parquet", shard=Share(part, 4))
        found += squares(summary.output)
    assert found == [number**2 for number in NUMBERS] and len(computed(job)) == 7
    assert Share.parse("2/4") == Share(1, 4)
    for wrong in ("0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2"):
        with pytest.raises(ValueError, match="expected a part"):
            Share.parse(wrong)


def test_chunks_that_belong_together_stay_in_one_part(job, tmp_path):
    together = replace(job, joined=3)  # chunks 0 to 2, 3 to 5, and 6
    parts = [run_job(together, tmp_path / f"{part}.parquet", shard=Share(part, 5)).output for part in range(5)]
    assert [len(squares(part)) for part in parts] == [0, 9, 0, 9, 2]
    assert [square for part in parts for square in squares(part)] == [number**2 for number in NUMBERS]


def test_launched_processes_make_one_output(job, tmp_path):
    processes = [launched(job, tmp_path / "out.parquet", rank, 2) for rank in (1, 0)]
    ended_well(processes)
    assert squares(tmp_path / "out.parquet") == [number**2 for number in NUMBERS]
    assert len(computed(job)) == 7 and not list(tmp_path.glob(".out*"))


def test_launched_processes_discard_together_what_an_earlier_run_left(job, tmp_path):
    output, folder = tmp_path / "out.parquet", tmp_path / ".out.parquet.chunks"
    process = launched(job, output, 1, 2, "--restart")
    appears(folder / "lock-1")
    leave_unfinished(job, output)  # under the eyes of process 1, as of a launch before
    (folder / "start.json").write_text(json.dumps({"word": "of before", "answers": {"1": "of before"}}))
    appears(folder / "here-1")
    ended_well([process, launched(job, output, 0, 2, "--restart")])
    assert squares(output) == [number**2 for number in NUMBERS]
    assert len(computed(job)) == 3 + 7 and not list(tmp_path.glob(".out*"))


def test_a_launched_process_without_chunks_may_come_late(job, tmp_path):
    job.numbers.write_text("5")
    output = tmp_path / "out.parquet"
    processes = [launched(job, output, 0, 3)]
    appears(tmp_path / ".out.parquet.chunks" / "record.json", output)
    processes += [launched(job, output, rank, 3) for rank in (1, 2)]
    ended_well(processes)
    assert squares(output) == [25] and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("removed", [shutil.rmtree, lambda folder: (folder / "record.json").unlink(missing_ok=True)])
def test_a_launched_process_without_chunks_may_find_the_output_written(job, tmp_path, monkeypatch, removed):
    job.numbers.write_text("5")
    monkeypatch.setattr(finished_chunks, "wait_to_begin", lambda folder, index: removed(folder))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    summary = run_job(job, tmp_path / "out.parquet")
    assert (summary.computed, summary.is_written) == (0, False)


def test_launched_processes_with_different_options_are_refused(job, tmp_path, monkeypatch):
    process = launched(job, tmp_path / "out.parquet", 0, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"process 1 of this run differs from process 0 in settings\.per_chunk; give"):
        run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")
    process.kill()
    process.communicate()


@pytest.mark.parametrize("rank, missing", [("0", "process 1, 2 of 3"), ("1", "process 0")])
def test_a_launched_process_does_not_wait_for_ever(job, tmp_path, monkeypatch, rank, missing):
    monkeypatch.setattr("gengram.inference.jobs.common_start.LONGEST_WAIT", 0.0)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TimeoutError, match=f"{missing} did not begin within 0 minutes.*as torchrun does"):
        run_job(job, tmp_path / "out.parquet")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    run_job(replace(job, per_chunk=4), tmp_path / "out.parquet")  # nothing was finished, so other options may come


def test_two_runs_at_once_for_one_output_are_refused(job, tmp_path, monkeypatch):
    def worker(self, device):
        with pytest.raises(InputError, match=r"out\.parquet is being written by process [0-9]+"):
            run_job(job, tmp_path / "out.parquet")
        return original(self, device)

    original = Squares.worker
    monkeypatch.setattr(Squares, "worker", worker)
    run_job(replace(job), tmp_path / "out.parquet")


@pytest.mark.parametrize("kind", ["link", "file", "pipe"])
def test_a_planted_work_folder_is_refused(job, tmp_path, kind):
    place, elsewhere = tmp_path / ".out.parquet.chunks", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    {"link": lambda: place.symlink_to(elsewhere), "file": place.touch, "pipe": lambda: os.mkfifo(place)}[kind]()
    with pytest.raises((ValueError, FileExistsError)):
        run_job(job, tmp_path / "out.parquet")
    assert (elsewhere / "precious").read_text() == "kept"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize(
    "name", ["record.json", "lock-0", "00000000.arrow", "failed-0", "failed-1", "output", "other"]
)
def test_what_is_planted_in_the_work_folder_is_refused(job, tmp_path, name, kind, restart):
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    planted = tmp_path / ".out.parquet.chunks" / name
    planted.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to(elsewhere if name == "output" else elsewhere / "precious")
    with pytest.raises(InputError, match="is not what a run of this command leaves"):
        run_job(job, tmp_path / "out.parquet", restart=restart)
    assert os.path.lexists(planted)
    assert (elsewhere / "precious").read_text() == "kept"
    assert not (tmp_path / "out.parquet").exists()


def test_a_damaged_result_is_computed_again(job, tmp_path):
    with pytest.raises(RuntimeError):
        run_job(replace(job, fail_at=11), tmp_path / "out.parquet")
    (tmp_path / ".out.parquet.chunks" / "00000001.arrow").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"00000001.arrow is damaged and was removed; repeat the command"):
        run_job(job, tmp_path / "out.parquet")
    assert squares(run_job(job, tmp_path / "out.parquet").output) == [number**2 for number in NUMBERS]


@pytest.mark.parametrize("when", ["first", "last", "writing"])
@pytest.mark.parametrize("change", ["shorter", "longer", "same size", "another file", "gone"])
def test_an_input_that_changes_during_a_run_leaves_no_output(job, tmp_path, change, when):
    before, other = job.numbers.read_text(), tmp_path / "other"
    other.write_text(before[::-1])
    actions = {
        "shorter": lambda: job.numbers.write_text("0 1"),
        "longer": lambda: job.numbers.write_text(f"{before} 20 21 22 23"),
        "same size": lambda: job.numbers.write_text(before[::-1]),
        "another file": lambda: other.replace(job.numbers),
        "gone": job.numbers.unlink,
    }
    act = {"at_write": actions[change]} if when == "writing" else {}
    act = act or {"at_number": (0 if when == "first" else 19, actions[change])}
    with pytest.raises(InputError, match=r"numbers\.txt has changed since this run began.*--restart"):
        run_job(replace(job, **act), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    job.numbers.write_text(before)  # put back as it was: what is kept is still right
    assert squares(run_job(job, tmp_path / "out.parquet").output) == [number**2 for number in NUMBERS]


def test_a_model_that_changes_during_a_run_leaves_no_output(job, tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"one")
    changing = replace(
        job, model=ModelOptions(str(weights.parent)), at_number=(10, lambda: weights.write_bytes(b"two"))
    )
    with pytest.raises(InputError, match=r"model\.safetensors has changed since this run began"):
        run_job(changing, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_an_input_that_is_only_touched_has_not_changed(job, tmp_path):
    def touch():
        text = job.numbers.read_text()
        job.numbers.unlink()
        job.numbers.write_text(text)
        os.utime(job.numbers, (1, 1))

    summary = run_job(replace(job, at_number=(10, touch), at_write=touch), tmp_path / "out.parquet")
    assert squares(summary.output) == [number**2 for number in NUMBERS]


@pytest.mark.parametrize("what", ["pipe", "folder", "nothing"])
def test_inputs_that_cannot_be_read_twice_are_refused(job, tmp_path, what):
    place = tmp_path / "input"
    {"pipe": lambda: os.mkfifo(place), "folder": place.mkdir, "nothing": lambda: None}[what]()
    with pytest.raises(OSError, match=r"input (is a pipe|is a folder|does not exist)"):
        run_job(replace(job, numbers=place), tmp_path / "out.parquet")
    assert not list(tmp_path.glob(".out*"))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="strands: expected both, forward, reverse, got 'left'"):
        ModelOptions(strands="left")
    for wrong in (0, -1, 1.5, True, "8"):
        with pytest.raises(ValueError, match="batch_tokens: expected a whole number"):
            ModelOptions(batch_tokens=wrong)


@pytest.mark.slow
def test_ray_gives_the_same_though_a_worker_is_killed(job, tmp_path):
    ray = pytest.importorskip("ray")
    import squares_job as module

    ray.cloudpickle.register_pickle_by_value(module)
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        run_job(replace(job, kill_at=10), tmp_path / "out.parquet", engine="ray")
    finally:
        ray.shutdown()
    assert squares(tmp_path / "out.parquet") == [number**2 for number in NUMBERS]
    assert job.numbers.with_suffix(".died").exists()
