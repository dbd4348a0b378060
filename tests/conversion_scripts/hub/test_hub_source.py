"""Checkpoints on the Hub: the same result as from a local folder, from only the bytes that hold weights."""

import hashlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import Hub, git_hash, serving
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from gengram.cli import main as gengram
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf, plan_conversion
from gengram.conversion_scripts.files.partial_folder import PartialFolder
from gengram.conversion_scripts.files.weight_hash import tensor_bytes
from gengram.conversion_scripts.hub import patience, repository
from gengram.conversion_scripts.hub.hub_path import open_source
from gengram.conversion_scripts.inspect_checkpoint import inspect_checkpoint
from gengram.conversion_scripts.megatron.open_checkpoint import open_checkpoint
from gengram.conversion_scripts.verify_conversion import verify_conversion
from gengram.support.errors import ConversionError, FetchError
from gengram.support.work_folder import work_path

REPO = "lab/gengram"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty repository; huggingface_hub asks it, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    state = Hub(tmp_path / "repository")
    state.root.mkdir()
    with serving(state) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)
        monkeypatch.setattr(repository, "BLOCK", 512)
        monkeypatch.setattr(repository, "SMALL_FILE", 1024)
        yield state
        close_session()


def saved(hub, form, megatron, folder=""):
    """A checkpoint with optimizer state in the repository."""
    shape = megatron.Shape(layers=2, hidden=32, experts=2, width=24, vocab=64, active=(1,))
    weights = megatron.canonical(shape)
    root = hub.root / folder
    if form == "torch":
        # The masters stand before the weights, so that a reader that runs on beyond a tensor meets them.
        optimizer = {name: value.float() for name, value in weights.items()}
        names = megatron.named_for(weights, shape, "te")
        megatron.save_torch(root, names, megatron.args(shape), stages=(1, 1), optimizer=optimizer)
    else:
        tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
        masters = {f"optimizer.state.param.{name}": value.float() for name, value in tensors.items()}
        mixed = {}
        for (name, value), (master, copy) in zip(tensors.items(), masters.items(), strict=True):
            mixed |= {name: value, master: copy}
        megatron.save_torch_dist(root, mixed, megatron.args(shape), boxes=one_layer_and_expert)
    return SimpleNamespace(root=root, expected=megatron.expected_hf(weights, shape), shape=shape)


def one_layer_and_expert(shape):
    """The chunks of the released layout: layers and experts, of which the tests' model has two each, are separate."""
    axes = 0
    while axes < len(shape) - 1 and shape[axes] == 2:
        axes += 1
    rest = (0,) * (len(shape) - axes)
    return [((*index, *rest), (*(1,) * axes, *shape[axes:])) for index in np.ndindex(*shape[:axes])]


def hashes(folder, leave=()):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in leave
    }


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_the_same_as_from_a_local_folder(form, hub, tmp_path, megatron):
    made = saved(hub, form, megatron)
    convert_to_hf(made.root, tmp_path / "local", progress=False)
    report = convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert hashes(tmp_path / "out", ["conversion.json"]) == hashes(tmp_path / "local", ["conversion.json"])
    records = [json.loads((tmp_path / name / "conversion.json").read_text()) for name in ("out", "local")]
    commit = "a" * 40
    assert records[0]["source"].pop("hub") == {"repo_id": REPO, "revision": "main", "commit": commit}
    assert records[0]["source"].pop("path") == f"hf://{REPO}@{commit}/iter_0000123"
    records[1]["source"].pop("path")
    assert records[0] == records[1]
    assert not hub.leaked_tokens and report.fetched and not work_path(tmp_path / "out").exists()
    assert verify_conversion(tmp_path / "out").skipped[0].startswith("the source on the Hub")
    checks = verify_conversion(tmp_path / "out", f"hf://{REPO}@{commit}", load=False).checks
    assert any("have the recorded hashes" in check and "hf://" in check for check in checks)


def test_optimizer_bytes_of_torch_dist_are_not_fetched(hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)
    folder = made.root / "iter_0000123"
    weights, total = {}, 0
    for index, place in pickle.loads((folder / ".metadata").read_bytes()).storage_data.items():
        total += place.length
        if not index.fqn.startswith(("optimizer", "rng")):
            chunk = range(place.offset, place.offset + place.length)
            weights.setdefault(f"iter_0000123/{place.relative_path}", set()).update(chunk)
    report = convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    for name, start, end in hub.intervals:
        assert not name.endswith(".distcp") or weights[name].issuperset(range(start, end))
    assert report.fetched < 1.2 * sum(map(len, weights.values())) < 0.6 * total


def test_optimizer_bytes_of_torch_are_not_fetched(hub, tmp_path, megatron):
    made = saved(hub, "torch", megatron)
    weights = {}
    for tensor in open_checkpoint(made.root).tensors.values():
        for span in tensor.spans:
            chunk = range(span.start, span.start + span.length)
            weights.setdefault(span.path.relative_to(hub.root).as_posix(), set()).update(chunk)
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    for name in weights:
        path = hub.root / name
        fetched = set()
        for served, start, end in hub.intervals:
            fetched.update(range(start, end) if served == name else ())
        beyond = len(fetched - weights[name])
        with zipfile.ZipFile(path) as archive:
            described = archive.getinfo("model_optim_rng/data.pkl").file_size
            described += path.stat().st_size - archive.start_dir
        # The pickle and the directory; and the first and last block of the file.
        assert beyond <= described + 2 * repository.BLOCK + 1024
        assert path.stat().st_size > 2.5 * len(weights[name])


def test_every_fixture_from_the_hub(authors_checkpoint, hub, tmp_path, megatron):
    hub.root.rmdir()
    hub.root.symlink_to(authors_checkpoint)
    report = convert_to_hf(REPO, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), megatron.truth(authors_checkpoint))
    assert report.iteration == 24000
    for path in authors_checkpoint.rglob("distrib_optim.pt"):
        assert hub.served[path.relative_to(authors_checkpoint).as_posix()] == 0
    if "optim" in str(authors_checkpoint):
        total = sum(path.stat().st_size for path in authors_checkpoint.rglob("*") if path.is_file())
        assert sum(hub.served.values()) < 0.75 * total


def test_the_plan_is_shown_and_right(hub, tmp_path, megatron, capsys):
    made = saved(hub, "torch_dist", megatron)
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out"), "--dry-run", "--json", "--fetch", "ranges"]) == 0
    plan = json.loads(capsys.readouterr().out)
    fetch = plan["fetch"]
    assert not (tmp_path / "out").exists() and not work_path(tmp_path / "out").exists()
    assert fetch["repo_id"] == REPO and fetch["commit"] == "a" * 40 and not fetch["rate_is_measured"]
    assert fetch["seconds"] >= 0 and fetch["bytes_into_cache"] == 0
    names = {path.name for path in (made.root / "iter_0000123").iterdir()}
    assert {file["name"] for file in fetch["files"]} == names
    data = [file for file in fetch["files"] if file["name"].endswith(".distcp")]
    assert all(file["how"] == "ranges" and 0 < file["fetched"] < 0.6 * file["size"] for file in data)
    before = sum(hub.served[f"iter_0000123/{file['name']}"] for file in data)
    assert before == 0  # metadata only

    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out"), "--fetch", "ranges"]) == 0
    captured = capsys.readouterr()
    assert re.search(rf"{REPO} at main \(commit a{{12}}\), iter_0000123: fetches .* of .*", captured.err)
    assert "2 files in part, only byte ranges that hold weights" in captured.err
    assert "about 1 s at 20.0 MB/s, an assumption" in captured.err and "Fetched" in captured.out
    served = sum(hub.served[f"iter_0000123/{file['name']}"] for file in data)
    assert served <= fetch["bytes_fetched"] + 16384  # ends of archives may come twice


def test_the_rate_is_measured_if_much_is_to_be_fetched(hub, tmp_path, megatron, monkeypatch):
    from gengram.conversion_scripts.hub import fetch_plan

    made = saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(fetch_plan, "PROBE_FROM", 1000)
    plan = plan_conversion(REPO, tmp_path / "out", fetch="ranges").fetch
    assert plan.measured and plan.rate > 0 and "as measured just now" in plan.summary()
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)


def test_a_quiet_conversion_says_nothing(hub, tmp_path, megatron, capsys):
    saved(hub, "torch", megatron)
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "a"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "b"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fetched"] > 0 and captured.err == ""


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_info_fetches_metadata_only(form, hub, megatron, capsys):
    made = saved(hub, form, megatron, folder="release/megatron")
    assert gengram(["info", REPO]) == 0
    text = capsys.readouterr().out
    assert f"hf://{REPO}@{'a' * 40}/release/megatron/iter_0000123: megatron {form}" in text
    assert "optimizer state" in text and "nothing is missing" in text
    total = sum(path.stat().st_size for path in made.root.rglob("*"))
    weights = sum(value.nbytes for value in made.expected.values())
    assert sum(hub.served.values()) < total - 2.5 * weights
    info = inspect_checkpoint(f"{REPO}/release", revision="v1")
    assert info.iteration == 123 and info.parameters


def test_info_of_a_converted_repository(hub, tmp_path, megatron, small_torch):
    hub.root.rmdir()
    convert_to_hf(small_torch.root, hub.root, progress=False)
    info = inspect_checkpoint(REPO)
    assert info.kind == "hugging face" and info.iteration == 123 and not info.problem and info.files == 1
    assert hub.served["model.safetensors"] == 0


def test_several_checkpoints_in_one_repository(hub, tmp_path, megatron):
    saved(hub, "torch", megatron, folder="a")
    made = saved(hub, "torch_dist", megatron, folder="b")
    with pytest.raises(
        ConversionError, match="several checkpoints; name one of them: 'lab/gengram/a', 'lab/gengram/b'"
    ):
        convert_to_hf(REPO, tmp_path / "out", progress=False)
    convert_to_hf(f"{REPO}/b", tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    with pytest.raises(ConversionError, match="has no folder 'c'"):
        open_source(f"{REPO}/c")


@pytest.mark.parametrize("fetch", ["auto", "files"])
def test_whole_files_come_through_the_cache_and_serve_offline(fetch, hub, tmp_path, megatron, monkeypatch):
    if fetch == "files":
        made = saved(hub, "torch_dist", megatron)
    else:  # without optimizer state, nearly all of each file is wanted
        shape = megatron.Shape(layers=2, hidden=32, experts=2, width=24, vocab=64, active=(1, 2))
        weights = megatron.canonical(shape)
        tensors = megatron.stacked(megatron.named_for(weights, shape, "te"), shape)
        megatron.save_torch_dist(hub.root, tensors, megatron.args(shape), boxes=one_layer_and_expert)
        made = SimpleNamespace(expected=megatron.expected_hf(weights, shape))
    plan = plan_conversion(REPO, tmp_path / "out", fetch=fetch).fetch
    assert {file.how for file in plan.files if file.name.endswith(".distcp")} == {"whole"} and plan.into_cache
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch=fetch)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    data = [f"iter_0000123/__0_{i}.distcp" for i in (0, 1)]
    assert all(hub.served[name] == (hub.root / name).stat().st_size for name in data)

    before = len(hub.log)
    plan = plan_conversion(REPO, tmp_path / "again").fetch
    assert plan.fetched == 0 and {file.how for file in plan.files} == {"cached"}
    assert [path for method, path, *_ in hub.log[before:] if method == "GET" and "/resolve/" in path] == []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    before = len(hub.log)
    convert_to_hf(REPO, tmp_path / "offline", progress=False)
    assert inspect_checkpoint(REPO).iteration == 123
    assert len(hub.log) == before
    assert hashes(tmp_path / "offline", ["conversion.json"]) == hashes(tmp_path / "out", ["conversion.json"])


def test_offline_without_a_cache(hub, tmp_path, megatron, monkeypatch):
    saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(ConversionError, match=r"not in the Hub's cache.*HF_HUB_OFFLINE is set"):
        convert_to_hf(REPO, tmp_path / "out", progress=False)
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    inspect_checkpoint(REPO)  # leaves the small files in the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(ConversionError, match=r"missing.*distcp"):
        convert_to_hf(REPO, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_connections_cut_in_the_middle(form, hub, tmp_path, megatron):
    made = saved(hub, form, megatron)
    hub.cut_every = 2000
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    # What arrived before a cut is not fetched again.
    per_file = {}
    for name, start, end in hub.intervals:
        if name.endswith(".distcp"):
            per_file.setdefault(name, []).extend(range(start, end))
    assert all(len(offsets) < len(set(offsets)) + 16384 for offsets in per_file.values())


def test_large_reads_are_cut_into_parts_side_by_side(hub, tmp_path, megatron, monkeypatch):
    made = saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(repository, "PART", 1000)
    hub.cut_every = 900
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)


def test_busy_servers_are_asked_again(hub, tmp_path, megatron):
    made = saved(hub, "torch", megatron)
    codes = [503, 502, 500]
    generator = random.Random(1)

    def sometimes(method, path):
        if generator.random() < 0.05 and not hub.busy:
            hub.busy.append(generator.choice(codes))

    hub.on_request = sometimes
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert any(status in codes for *_, status in hub.log)


def test_too_many_requests(hub, tmp_path, megatron, monkeypatch):
    made = saved(hub, "torch", megatron)
    hub.retry_after = "7"
    waits = []
    monkeypatch.setattr(patience.Patience, "_sleep_until", lambda self, end: waits.append(end - time.monotonic()))
    once = iter([429])

    def limited(method, path):
        if path.startswith("/cdn/"):
            hub.busy.extend(once)

    hub.on_request = limited
    convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert any(6 < wait <= 7 for wait in waits)  # what Retry-After said


@pytest.mark.parametrize("place", ["/api/models", "/cdn/"])
@pytest.mark.parametrize("asked", ["3600", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_a_server_that_asks_for_a_long_wait_is_not_waited_for(place, asked, hub, tmp_path, megatron, capsys):
    saved(hub, "torch", megatron)
    hub.retry_after = asked
    hub.on_request = lambda method, path: hub.busy.append(429) if place in path else None
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out"), "--fetch", "ranges", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "is busy and asks to wait" in error and "run the same command again then" in error
    assert len(hub.log) < 100


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
from gengram.conversion_scripts import convert_megatron_to_hf as convert
sys.exit(convert.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("trouble", "number"), [("a wait", signal.SIGTERM), ("silence", signal.SIGINT)])
def test_a_wait_is_shown_and_can_be_interrupted(trouble, number, hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)
    out = tmp_path / "out"
    reached = threading.Event()

    def trouble_from_some_weights_on(method, path):
        if "/cdn/" in path and sum(hub.served.values()) > 70_000:
            reached.set()
            if trouble == "a wait":
                hub.busy.append(429)
            else:
                hub.silent_at = "/cdn/"

    hub.retry_after, hub.on_request = "250", trouble_from_some_weights_on
    settings = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    settings["HF_HUB_DOWNLOAD_TIMEOUT"] = "250"
    command = [sys.executable, "-c", INTERRUPTED, REPO, str(out), "--fetch", "ranges", "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True)
    assert reached.wait(120)
    shown = process.stderr.readline() if trouble == "a wait" else ""
    process.send_signal(number)
    _, error = process.communicate(timeout=120)  # less than the wait
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "waiting 4 min" in shown or trouble == "silence"
    assert "the start of a weight file kept in" in error and "Traceback" not in error
    hub.on_request, hub.silent_at = lambda method, path: None, ""
    convert_to_hf(REPO, out, progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(out), made.expected)


@pytest.mark.parametrize("place", ["/api/models", "/resolve/", "/cdn/"])
@pytest.mark.parametrize("fetch", ["ranges", "files"])
def test_a_hub_that_never_answers_is_given_up(place, fetch, hub, tmp_path, megatron, monkeypatch):
    saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(patience, "ANSWER_WITHIN", 0.5)
    monkeypatch.setattr(repository, "SLOWEST_RANGE", 0.5)
    monkeypatch.setattr(repository, "SLOWEST_FILE", 0.5)
    monkeypatch.setattr(patience, "GRACE", 0.1)
    hub.silent_at = place
    with pytest.raises(FetchError, match=r"arrived in 1 s; .* does not answer.*run the same command again"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch=fetch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fetch", ["ranges", "files"])
def test_a_hub_that_drips_is_given_up(fetch, hub, tmp_path, megatron, monkeypatch):
    saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(repository, "SLOWEST_RANGE", 0.5)
    monkeypatch.setattr(repository, "SLOWEST_FILE", 0.5)
    monkeypatch.setattr(repository, "SMALL_FILE", 0)
    monkeypatch.setattr(patience, "GRACE", 0.1)
    hub.drips = True
    with pytest.raises(FetchError, match=r"arrived in 1 s; .* the connection is too slow"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch=fetch)


def test_a_hub_that_sends_a_byte_per_answer_is_not_asked_thousands_of_times(hub, tmp_path, megatron, monkeypatch):
    saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(repository, "SLOWEST_RANGE", 2)
    hub.cut_every = 1
    with pytest.raises(FetchError, match="too slow"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    assert len(hub.log) < 300


def lose_the_connection(hub, after):
    """From so many served bytes on, nothing arrives."""

    def count(method, path):
        hub.cut_always = sum(hub.served.values()) > after

    hub.on_request = count


def test_a_connection_that_never_delivers_keeps_what_is_finished(hub, tmp_path, megatron):
    made = saved(hub, "torch", megatron)
    out = tmp_path / "out"
    lose_the_connection(hub, 60_000)
    with pytest.raises(FetchError, match=r"could not be fetched in 6 tries .*; check the connection and try again"):
        convert_to_hf(REPO, out, max_shard_size="10000", progress=False, fetch="ranges")
    assert not out.exists() and work_path(out).exists()
    hub.on_request = lambda method, path: None
    hub.cut_always = False
    before = sum(hub.served.values())
    convert_to_hf(REPO, out, max_shard_size="10000", progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(out), made.expected)
    assert sum(hub.served.values()) - before < before  # the rest only


def test_a_server_without_ranges(hub, tmp_path, megatron):
    made = saved(hub, "torch", megatron)
    hub.ranges = False
    with pytest.raises(ConversionError, match=r"does not send parts of files.*hf download"):
        plan_conversion(REPO, tmp_path / "out")
    convert_to_hf(REPO, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)


def test_a_cache_without_room(hub, tmp_path, megatron, monkeypatch):
    saved(hub, "torch_dist", megatron)
    monkeypatch.setattr(repository, "cache_free", lambda: 3000)
    with pytest.raises(ConversionError, match=r"cache.*has 3\.0 kB free"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="files")
    assert not (tmp_path / "out").exists()


def test_repositories_that_cannot_be_read(hub, tmp_path, megatron, capsys):
    saved(hub, "torch", megatron)
    with pytest.raises(ConversionError, match=r"lab/other is no folder here, and on the Hub .* no such repository"):
        convert_to_hf("lab/other", tmp_path / "out", progress=False)
    with pytest.raises(ConversionError, match="has no revision 'v2'"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, revision="v2")
    with pytest.raises(ConversionError, match="local path"):
        convert_to_hf(hub.root, tmp_path / "out", progress=False, revision="v1")
    with pytest.raises(ConversionError, match="expected hf://ORG/NAME"):
        convert_to_hf("hf://../../etc", tmp_path / "out", progress=False)
    hub.gated, hub.token = True, "hf_other"
    with pytest.raises(FetchError, match=r"access is gated; ask for it.*HF_TOKEN"):
        convert_to_hf(REPO, tmp_path / "out", progress=False)
    hub.gated = False
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no such repository can be seen; check the name, or log in with `hf auth login`" in error
    assert "Traceback" not in error and not (tmp_path / "out").exists() and not work_path(tmp_path / "out").exists()
    hub.token = "hf_test"
    convert_to_hf(REPO, tmp_path / "out", progress=False)
    assert not hub.leaked_tokens


def test_no_server(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"the Hub \(http://127\.0\.0\.1:9\) cannot be reached"):
        convert_to_hf(REPO, tmp_path / "out", progress=False)


FILES = [{"rfilename": ".metadata", "size": 10, "blobId": "a" * 40}]
STRANGE_ANSWERS = {
    "a list": [],
    "null": None,
    "a number": 7,
    "nothing": {},
    "no commit": {"id": REPO, "siblings": FILES},
    "a commit that is a number": {"id": REPO, "sha": 5, "siblings": FILES},
    "a commit that is a path": {"id": REPO, "sha": "../../evil", "siblings": FILES},
    "files that are a number": {"id": REPO, "sha": "a" * 40, "siblings": 5},
    "files that are names": {"id": REPO, "sha": "a" * 40, "siblings": ["x"]},
    "a name that is a number": {"id": REPO, "sha": "a" * 40, "siblings": [{**FILES[0], "rfilename": 3}]},
    "a size that is text": {"id": REPO, "sha": "a" * 40, "siblings": [{**FILES[0], "size": "ten"}]},
    "a size below zero": {"id": REPO, "sha": "a" * 40, "siblings": [{**FILES[0], "size": -1}]},
    "a hash that is a list": {"id": REPO, "sha": "a" * 40, "siblings": [{**FILES[0], "blobId": [1]}]},
    "large files without facts": {"id": REPO, "sha": "a" * 40, "siblings": [{**FILES[0], "lfs": 3}]},
}


@pytest.mark.parametrize("name", STRANGE_ANSWERS)
def test_json_of_another_kind_is_not_the_hubs(name, hub, capsys):
    hub.api_answer = json.dumps(STRANGE_ANSWERS[name]).encode()
    assert gengram(["info", REPO]) == 1
    error = capsys.readouterr().err
    assert "the answer is not the Hub's" in error and error.count("\n") == 1


def test_deeply_nested_json_is_not_the_hubs(hub, capsys):
    hub.api_answer = b"[" * 100_000
    assert gengram(["info", REPO]) == 1
    assert "the answer is not the Hub's" in capsys.readouterr().err


def test_names_of_files_on_the_hub_stay_inside_and_are_not_obeyed_by_a_terminal(hub, tmp_path, megatron, capfd):
    made = saved(hub, "torch", megatron)
    names = ["../../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "mp_rank_00/\x1b[2Jx", "iter_0000123/a\nb"]
    siblings = [{"rfilename": name, "size": 5, "blobId": git_hash(b"12345")} for name in names]
    hub.api_answer = json.dumps({**hub.info("a" * 40, True), "siblings": siblings}).encode()
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out")]) == 1
    hub.api_answer = json.dumps(
        hub.info("a" * 40, True) | {"siblings": hub.info("a" * 40, True)["siblings"] + siblings}
    ).encode()
    assert gengram(["convert", "to-hf", REPO, str(tmp_path / "out")]) == 0
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert "\x1b" not in "".join(capfd.readouterr()).replace("\x1b[A", "") and not list(tmp_path.rglob("evil*"))


def test_a_revision_that_is_a_path_is_refused(hub):
    for revision in ("../../evil", "/etc", "a\x1b[2J"):
        with pytest.raises(ConversionError, match="is not the name of a branch, tag or commit"):
            open_source(REPO, revision)


def test_a_push_while_converting_changes_nothing(hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)

    def push(method, path):
        if "/resolve/" in path:
            hub.revisions["main"] = "b" * 40

    hub.on_request = push
    convert_to_hf(REPO, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert all(f"/resolve/{'a' * 40}/" in path for _, path, *_ in hub.log if "/resolve/" in path)


def test_an_unfinished_conversion_is_not_mixed_with_another_commit(hub, tmp_path, megatron, capsys):
    made = saved(hub, "torch_dist", megatron)
    out = tmp_path / "out"
    lose_the_connection(hub, 50_000)
    with pytest.raises(FetchError):
        convert_to_hf(REPO, out, max_shard_size="10000", progress=False, fetch="ranges")
    hub.on_request, hub.cut_always = lambda method, path: None, False
    hub.revisions["main"] = "b" * 40
    with pytest.raises(ConversionError, match=rf"unfinished conversion of 'hf://{REPO}@a+/iter_0000123' that differs"):
        convert_to_hf(REPO, out, max_shard_size="10000", progress=False, fetch="ranges")
    hub.revisions["old"] = "a" * 40
    convert_to_hf(REPO, out, max_shard_size="10000", progress=False, fetch="ranges", revision="a" * 40)
    megatron.assert_same(megatron.load_hf(out), made.expected)


@pytest.mark.parametrize("changed", ["size", "content"])
def test_a_file_that_is_not_the_one_that_was_listed(changed, hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)
    name = "iter_0000123/__0_1.distcp"
    data = (made.root / name).read_bytes()
    hub.lie_about[name] = data + b"x" if changed == "size" else data[::-1]
    with pytest.raises(FetchError, match=r"the Hub now says that its (size|identity)"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    assert not (tmp_path / "out").exists()


def test_damaged_bytes_are_noticed(hub, tmp_path, megatron, monkeypatch):
    made = saved(hub, "torch_dist", megatron)
    name = "iter_0000123/__0_1.distcp"
    data = bytearray((made.root / name).read_bytes())
    tensors = open_checkpoint(made.root).tensors
    tensor = next(t for t in tensors.values() if t.nbytes > 500 and t.files[0].name == "__0_1.distcp")
    data[bytes(data).index(tensor_bytes(tensor.read())) + 100] ^= 1
    hub.lie_about[name] = bytes(data)
    monkeypatch.setattr(repository.HubRepository, "_check_file", lambda self, name: None)
    with pytest.raises(ConversionError, match="do not have the checksum of the archive"):
        convert_to_hf(REPO, tmp_path / "out", progress=False, fetch="ranges")
    assert not (tmp_path / "out").exists()


def test_a_listing_without_sizes(hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)
    hub.sizes_in_info = False
    convert_to_hf(REPO, tmp_path / "out", progress=False)
    megatron.assert_same(megatron.load_hf(tmp_path / "out"), made.expected)
    assert any("/tree/" in path for _, path, *_ in hub.log)


def test_a_local_folder_goes_first(hub, tmp_path, small_torch):
    (tmp_path / "lab").mkdir()
    os.rename(small_torch.root, tmp_path / "lab" / "gengram")
    convert_to_hf(REPO, tmp_path / "out", progress=False)
    assert hub.log == []
    with pytest.raises(ConversionError, match=r"not a Megatron checkpoint|does not exist"):
        convert_to_hf(f"hf://{REPO}", tmp_path / "more", progress=False)
    assert hub.log


@pytest.mark.parametrize(
    "last", ["0.motif_memory.value_proj.weight", "0.self_attn.k_proj.weight", "1.mlp.experts.down_proj"]
)
def test_an_interrupted_file_is_continued(last, hub, tmp_path, megatron, monkeypatch):
    made = saved(hub, "torch_dist", megatron)
    out = tmp_path / "out"
    original = PartialFolder.record_part

    def record(self, part):
        original(self, part)
        if part.tensor == f"model.layers.{last}":  # of the experts, the first slice
            raise FetchError("the connection is lost")

    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "record_part", record)
        with pytest.raises(FetchError) as caught:
            convert_to_hf(REPO, out, progress=False, fetch="ranges")  # one weight file
    parts = [json.loads(line) for line in (work_path(out) / "parts.jsonl").read_text().splitlines()]
    assert len(parts) > 10 and {part["file"] for part in parts} == {"model.safetensors"} and not out.exists()
    assert "the start of a weight file kept in" in caught.value.__notes__[0]
    before = len(hub.intervals)
    convert_to_hf(REPO, out, progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(out), made.expected)
    verify_conversion(out, made.root, load=False)
    # What was written is not fetched again, unless something else is made of it: keys are written before queries.
    record = json.loads((out / "conversion.json").read_text())["weights"]
    whole = {part["tensor"] for part in parts if part["index"] is None}
    slices = {source for part in parts if part["index"] is not None for source in part["sources"]}
    needed = {source for name in record.keys() - whole for source in record[name]["sources"]} - slices
    kept = {source for part in parts for source in part["sources"]} - needed
    assert len(kept) > 10
    tensors = open_checkpoint(made.root).tensors
    again = {(name.rpartition("/")[2], place) for name, *ends in hub.intervals[before:] for place in range(*ends)}
    for name in kept:
        for span in tensors[name].spans:
            assert not again.intersection((span.path.name, span.start + i) for i in range(span.length)), name


def test_a_connection_that_is_lost_keeps_the_start_of_a_file(hub, tmp_path, megatron):
    made = saved(hub, "torch_dist", megatron)
    out = tmp_path / "out"
    lose_the_connection(hub, 70_000)
    with pytest.raises(FetchError) as caught:
        convert_to_hf(REPO, out, progress=False, fetch="ranges")  # one weight file
    assert "the start of a weight file kept in" in caught.value.__notes__[0] and not out.exists()
    hub.on_request, hub.cut_always = lambda method, path: None, False
    before = sum(hub.served.values())
    convert_to_hf(REPO, out, progress=False, fetch="ranges")
    megatron.assert_same(megatron.load_hf(out), made.expected)
    assert sum(hub.served.values()) - before < before  # the rest only


# Imports once and forks; each child dies at its n-th request for a range.
DRIVER = """
import os, signal, sys
import gengram.cli
from gengram.conversion_scripts import convert_megatron_to_hf as convert
from gengram.conversion_scripts.hub import repository
from huggingface_hub.utils import close_session
arguments, kills = sys.argv[1:-1], [int(number) for number in sys.argv[-1].split(",")]
original = repository.HubRepository._fetch
def fetch(self, *words):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *words)
repository.HubRepository._fetch = fetch
for left in [*kills, -1]:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = convert.main(arguments)
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    print(status, flush=True)
    if status == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("form", [pytest.param("torch", marks=pytest.mark.slow), "torch_dist"])
def test_killed_again_and_again_while_fetching_and_continued(form, hub, tmp_path, megatron):
    made = saved(hub, form, megatron)
    out = tmp_path / "out"
    generator = random.Random(form)
    fewest = 9 if form == "torch" else 2  # some requests go by before the first weight
    kills = ",".join(str(generator.randrange(fewest, fewest + 3)) for _ in range(10))
    settings = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-c", DRIVER, REPO, str(out), "--fetch", "ranges", "--quiet", kills]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0] and len(codes) > 4  # it may be done before the tenth
    megatron.assert_same(megatron.load_hf(out), made.expected)
    assert not work_path(out).exists()
