"""Malformed and hostile checkpoints end in one clear message: nothing crashes, runs, grows or stays behind.

One process imports the package, then forks once per case, so that each has its own limits of memory and time.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and RLIMIT_AS")

MEMORY = 400 * 2**20  # bytes that a case may take on top of the imports
SECONDS = 60
CASES = {}


def case(form, fate="error"):
    """A function that spoils a checkpoint of format `form` ("torch" or "dist")."""

    def register(function):
        CASES[function.__name__] = (form, function, fate)
        return function

    return register


def model_file(folder):
    return folder / "mp_rank_00" / "model_optim_rng.pt"


def repack(path, compression=zipfile.ZIP_STORED, **replaced):
    """Writes an archive again with other entries; `None` leaves one out."""
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = replaced.get(name.partition("/")[2].replace("data.pkl", "pickle"), old.read(name))
            if content is not None:
                new.writestr(name, content)


def with_pickle(folder, data):
    repack(model_file(folder), pickle=data)


def change_pickle(path, old, new):
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        data = archive.read(name)
    assert old in data
    repack(path, pickle=data.replace(old, new))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def bomb(folder):
    """A pickle that makes a file if it is executed."""
    return pickle.dumps(Call(os.system, f"touch {folder / 'EXECUTED'}"))


def edit_metadata(folder, edit):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first_place(metadata):
    return next(info for index, info in metadata.storage_data.items() if index.fqn.startswith("decoder"))


# Files


@case("torch")
def empty_file(folder):
    model_file(folder).write_bytes(b"")


@case("torch")
def not_a_zip(folder):
    model_file(folder).write_text("<html>404</html>" * 1000)


@case("torch")
def half_a_zip(folder):
    data = model_file(folder).read_bytes()
    model_file(folder).write_bytes(data[: len(data) // 2])


@case("torch")
def zip_without_its_last_byte(folder):
    model_file(folder).write_bytes(model_file(folder).read_bytes()[:-1])


@case("torch")
def zip_after_garbage(folder):
    model_file(folder).write_bytes(b"x" * 100 + model_file(folder).read_bytes())


@case("torch")
def zip_without_pickle(folder):
    with_pickle(folder, None)


@case("torch")
def zip_bomb(folder):
    repack(model_file(folder), zipfile.ZIP_DEFLATED, pickle=bytes(300 * 2**20))


@case("torch")
def zip_with_a_huge_entry(folder):
    data = bytearray(model_file(folder).read_bytes())
    place = data.index(b"PK\x01\x02")  # sizes at 20 and 24 of a directory entry
    data[place + 20 : place + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    model_file(folder).write_bytes(data)


@case("torch")
def zip_directory_with_lying_offsets(folder):
    data = bytearray(model_file(folder).read_bytes())
    place = -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:
        data[place + 42 : place + 46] = struct.pack("<I", 0x7FFFFFFF)
    model_file(folder).write_bytes(data)


@case("torch")
def zip_with_directory_beyond_the_end(folder):
    data = bytearray(model_file(folder).read_bytes())
    place = data.rindex(b"PK\x06\x06")  # the record with 64 bits: length of the directory at 40, its start at 48
    data[place + 40 : place + 56] = struct.pack("<QQ", 2**62, 2**62)
    model_file(folder).write_bytes(data)


@case("torch")
def flipped_weight(folder):
    with zipfile.ZipFile(model_file(folder)) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size if "/data/" in entry.filename else 0)
        content = archive.read(entry)
    data = bytearray(model_file(folder).read_bytes())
    data[data.index(content) + 3] ^= 64
    model_file(folder).write_bytes(data)


@case("torch")
def folder_instead_of_file(folder):
    model_file(folder).unlink()
    model_file(folder).mkdir()


@case("torch")
def pipe_instead_of_file(folder):
    model_file(folder).unlink()
    os.mkfifo(model_file(folder))


@case("torch")
def rank_with_a_strange_name(folder):
    (folder / "mp_rank_00").rename(folder / "mp_rank_0;touch EXECUTED")


# Pickles


@case("torch")
def pickle_that_calls_system(folder):
    with_pickle(folder, bomb(folder))


@case("torch")
def pickle_that_calls_eval(folder):
    with_pickle(folder, pickle.dumps({"args": Call(eval, f"open({str(folder / 'EXECUTED')!r}, 'w')")}))


@case("torch")
def pickle_with_inst(folder):
    with_pickle(folder, f"(S'touch {folder / 'EXECUTED'}'\nios\nsystem\n.".encode())


@case("torch")
def pickle_that_starts_a_process(folder):
    with_pickle(folder, pickle.dumps(Call(subprocess.Popen, ["touch", str(folder / "EXECUTED")])))


@case("torch")
def pickle_that_imports_us(folder):
    with_pickle(folder, b"\x80\x04\x8c\x0bgengram.cli\x8c\x04main\x93)R.")


@case("torch")
def pickle_that_loads_another(folder):
    with_pickle(folder, pickle.dumps(Call(torch.load, "/etc/passwd")))


@case("torch")
def pickle_that_sets_state_of_a_class(folder):
    with_pickle(folder, b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93}\x8c\x01a\x8c\x01bsb.")


@case("torch")
def pickle_with_an_extension(folder):
    with_pickle(folder, b"\x80\x02\x82\x01.")


@case("torch")
def pickle_that_declares_too_much(folder):
    with_pickle(folder, b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.")


@case("torch")
def pickle_of_a_billion_laughs(folder):
    data = b"\x80\x04]\x94"  # each list holds the one before twice
    for i in range(60):
        data += b"]\x94" + 2 * (b"j" + struct.pack("<I", i) + b"a")
    with_pickle(folder, data + b".")


@case("torch")
def pickle_of_doubling_tuples_as_key(folder):
    data = b"\x80\x04}K\x01"
    for _ in range(60):
        data += b"2\x86"
    with_pickle(folder, data + b"Ns.")


@case("torch")
def pickle_of_deep_lists(folder):
    with_pickle(folder, b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".")


@case("torch")
def pickle_of_an_endless_number(folder):
    with_pickle(folder, b"\x80\x02}X\x04\x00\x00\x00args\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b"s.")


@case("torch")
def pickle_of_a_huge_memo_index(folder):
    with_pickle(folder, b"\x80\x02}r\xff\xff\xff\xffj\xfe\xff\xff\xff.")


@case("torch")
def pickle_without_stop(folder):
    with_pickle(folder, b"\x80\x02" + b"N" * 1000)


@case("torch")
def pickle_of_noise(folder):
    with_pickle(folder, random.Random(1).randbytes(5000))


@case("torch")
def tensor_larger_than_its_storage(folder):
    change_pickle(model_file(folder), b"K\x10K\x0c\x86", b"J\xff\xff\xff\x7fK\x0c\x86")


@case("torch")
def tensor_with_strides_of_zero(folder):
    change_pickle(model_file(folder), b"K\x10K\x0c\x86", b"J\xff\xff\xff\x7fK\x0c\x86")
    change_pickle(model_file(folder), b"K\x0cK\x01\x86", b"K\x00K\x00\x86")


@case("torch")
def tensor_with_a_negative_offset(folder):
    change_pickle(model_file(folder), b"QK\x00K\x10K\x0c\x86", b"QJ\xff\xff\xff\xffK\x10K\x0c\x86")


@case("torch")
def storage_named_by_a_path(folder):
    change_pickle(model_file(folder), b"X\x01\x00\x00\x000", b"X\x0d\x00\x00\x00../data/../x0")


# Arguments; the weights stay as they are


def with_args(folder, **changes):
    saved = torch.load(model_file(folder), weights_only=False)
    vars(saved["args"]).update(changes)
    torch.save(saved, model_file(folder))


@case("torch")
def billions_of_layers(folder):
    with_args(folder, num_layers=10**10)


@case("torch")
def many_layers(folder):
    with_args(folder, num_layers=4096, num_experts=2**24)


@case("torch")
def enormous_experts(folder):
    with_args(folder, num_experts=2**62, moe_ffn_hidden_size=2**62)


@case("torch")
def enormous_motifs(folder):
    with_args(folder, gengram_ngram_sizes=[1, 10**6])


@case("torch")
def arguments_that_are_not_numbers(folder):
    with_args(folder, hidden_size="4096; rm -rf /", rotary_base=float("nan"))


@case("torch")
def many_stages(folder):
    with_args(folder, pipeline_model_parallel_size=2**40)


# torch_dist


@case("dist")
def metadata_that_calls_system(folder):
    (folder / ".metadata").write_bytes(bomb(folder))


@case("dist")
def truncated_metadata(folder):
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-100])


@case("dist")
def metadata_of_another_kind(folder):
    (folder / ".metadata").write_bytes(pickle.dumps([1, 2, 3]))


@case("dist")
def enormous_metadata(folder):
    with open(folder / ".metadata", "wb") as file:
        file.truncate(2**40)


@case("dist")
def enormous_backend(folder):
    with open(folder / "metadata.json", "wb") as file:
        file.truncate(2**40)


@case("dist")
def nested_backend(folder):
    (folder / "metadata.json").write_text("[" * 60000)


@case("dist")
def common_that_calls_system(folder):
    repack(folder / "common.pt", pickle=bomb(folder))


@case("dist")
def path_out_of_the_folder(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "relative_path", "../../../etc/passwd"))


@case("dist")
def absolute_path(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "relative_path", "/etc/passwd"))


@case("dist")
def path_with_a_null_byte(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "relative_path", "a\0.distcp"))


@case("dist")
def chunk_beyond_the_end(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "offset", 2**50))


@case("dist")
def chunk_that_is_too_long(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "length", 2**60))


@case("dist")
def chunk_at_a_negative_place(folder):
    edit_metadata(folder, lambda m: setattr(first_place(m), "offset", -4096))


@case("dist")
def chunk_of_another_tensor(folder):
    def edit(metadata):
        for info in metadata.storage_data.values():
            info.offset, info.length = first_place(metadata).offset, first_place(metadata).length

    edit_metadata(folder, edit)


def with_size(metadata, size, offsets=None):
    entry = metadata.state_dict_metadata["output_layer.weight"]
    entry.size = torch.Size(size)
    entry.chunks = [type(entry.chunks[0])(torch.Size(o), torch.Size(s)) for o, s in offsets or [((0, 0), size)]]
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "output_layer.weight")
    for key in [index for index in metadata.storage_data if index.fqn == "output_layer.weight"]:
        del metadata.storage_data[key]
    for place, _ in offsets or [((0, 0), size)]:
        metadata.storage_data[type(key)("output_layer.weight", torch.Size(place))] = info


@case("dist")
def names_of_millions_of_experts(folder):
    """Layers and experts of one number each, in a file that is large enough for them."""
    common = torch.load(folder / "common.pt", weights_only=False)
    common["args"].num_layers = common["args"].num_experts = 4096
    torch.save(common, folder / "common.pt")
    name, size = "decoder.layers.mlp.experts.experts.linear_fc1.weight", (4096, 4096, 1, 1)

    def edit(metadata):
        entry, box = metadata.state_dict_metadata[name], metadata.state_dict_metadata[name].chunks[0]
        entry.size, entry.chunks = torch.Size(size), [type(box)(torch.Size((0,) * 4), torch.Size(size))]
        key = next(index for index in metadata.storage_data if index.fqn == name)
        info = metadata.storage_data[key]
        for index in [index for index in metadata.storage_data if index.fqn == name]:
            del metadata.storage_data[index]
        info.relative_path, info.offset, info.length = "__0_0.distcp", 0, 2**25
        metadata.storage_data[type(key)(name, torch.Size((0,) * 4))] = info

    edit_metadata(folder, edit)
    os.truncate(folder / "__0_0.distcp", 40 * 10**6)


@case("dist")
def tensor_of_enormous_size(folder):
    edit_metadata(folder, lambda m: with_size(m, (2**40, 2**20)))


@case("dist")
def tensor_with_a_gap(folder):
    edit_metadata(folder, lambda m: with_size(m, (16, 12), [((0, 0), (8, 12)), ((9, 0), (7, 12))]))


@case("dist")
def tensor_with_overlapping_chunks(folder):
    edit_metadata(folder, lambda m: with_size(m, (16, 12), [((0, 0), (8, 12)), ((7, 0), (9, 12))]))


@case("dist")
def tensor_of_a_huge_grid(folder):
    boxes = [((i, i), (1, 1)) for i in range(3000)]
    edit_metadata(folder, lambda m: with_size(m, (3000, 3000), boxes))


@case("dist")
def truncated_chunks(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-500])


@case("dist")
def chunks_of_noise(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(random.Random(2).randbytes(path.stat().st_size))


@case("dist")
def chunk_that_calls_system(folder):
    data = io.BytesIO()
    torch.save(torch.zeros(1), data)
    path = folder / "chunk.pt"
    path.write_bytes(data.getvalue())
    repack(path, pickle=bomb(folder))
    chunk = path.read_bytes()
    path.unlink()
    (folder / "__0_0.distcp").write_bytes(chunk + bytes(2**20))

    def edit(metadata):
        for info in metadata.storage_data.values():
            if info.relative_path == "__0_0.distcp":
                info.offset, info.length = 0, len(chunk)

    edit_metadata(folder, edit)


@case("dist")
def tracker_that_points_elsewhere(folder):
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("../../../etc")


@case("dist")
def tracker_of_noise(folder):
    (folder.parent / "latest_checkpointed_iteration.txt").write_bytes(random.Random(3).randbytes(10**6))


def flipped(path, seed):
    """Bytes changed in the parts that describe, which for zip files are their pickle and directory."""
    data = bytearray(path.read_bytes())
    generator = random.Random(seed)
    places = [i for mark in (b"PK\x01\x02", b"data.pkl", b"\x80\x02") for i in [data.find(mark)] if i >= 0]
    for _ in range(generator.randint(1, 8)):
        start = generator.choice([*places, len(data) - 300])
        data[min(max(start, 0) + generator.randrange(300), len(data) - 1)] = generator.randrange(256)
    path.write_bytes(data)


for _seed in range(10):
    CASES[f"noise_in_model_file_{_seed}"] = ("torch", lambda f, seed=_seed: flipped(model_file(f), seed), "any")
    CASES[f"noise_in_metadata_{_seed}"] = ("dist", lambda f, seed=_seed: flipped(f / ".metadata", seed), "any")
    CASES[f"noise_in_chunks_{_seed}"] = ("dist", lambda f, seed=_seed: flipped(f / "__0_0.distcp", seed), "any")

DRIVER = """
import json, os, resource, signal, sys
import gengram.cli
from gengram.conversion_scripts import convert_megatron_to_hf as convert
memory, seconds, *folders = sys.argv[1:]
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
results = {}
for folder in folders:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (size + int(memory), -1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(int(seconds))
        error = os.open(os.path.join(folder, "stderr"), os.O_CREAT | os.O_WRONLY)
        os.dup2(error, 2)
        code = 70
        try:
            code = convert.main([os.path.join(folder, "source"), os.path.join(folder, "out"), "--quiet"])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    results[os.path.basename(folder)] = os.waitpid(child, 0)[1]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, megatron):
    """What became of each case: its folder, and how its process ended."""
    base = tmp_path_factory.mktemp("malformed")
    shape = megatron.Shape(layers=2, active=(1,))
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    megatron.save_torch(base / "torch", weights, megatron.args(shape))
    megatron.save_torch_dist(base / "dist", megatron.stacked(weights, shape), megatron.args(shape))
    for name, (form, spoil, _) in CASES.items():
        shutil.copytree(base / form, base / "cases" / name / "source")
        spoil(base / "cases" / name / "source" / "iter_0000123")
    for form in ("torch", "dist"):
        shutil.copytree(base / form, base / "cases" / f"sound_{form}" / "source")
    folders = [str(base / "cases" / name) for name in [*CASES, "sound_torch", "sound_dist"]]
    command = [sys.executable, "-c", DRIVER, str(MEMORY), str(SECONDS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=base)
    assert done.returncode == 0, done.stderr
    return base / "cases", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_malformed_input_ends_in_one_message(name, outcomes):
    cases, ends = outcomes
    folder, fate = cases / name, CASES[name][2]
    error = (folder / "stderr").read_text()
    assert not list(cases.parent.rglob("EXECUTED*"))
    if fate == "any" and ends[name] == 0:
        return
    assert os.waitstatus_to_exitcode(ends[name]) == 1, (ends[name], error)
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 3000, error
    assert {path.name for path in folder.iterdir()} == {"source", "stderr"}


def test_the_limits_suffice_for_a_sound_checkpoint(outcomes):
    cases, ends = outcomes
    assert ends["sound_torch"] == ends["sound_dist"] == 0
    assert sum(fate == "error" for _, _, fate in CASES.values()) >= 50
    assert (cases / "sound_torch" / "out" / "config.json").is_file()
