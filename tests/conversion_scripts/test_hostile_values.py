"""Values that no one expects end in one message, before the work, and no name is obeyed by the terminal.

What a user cannot mend must not be a traceback, and what a file says must not look as if we had said it.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gengram.cli import main as gengram
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
ESCAPES = "\x1b[2J\x1b[31mx\nok: everything is verified\r\x9b1m\u202e"


@pytest.fixture
def folder(small_torch, tmp_path):
    convert_to_hf(small_torch.root, tmp_path / "hf", progress=False)
    return tmp_path / "hf"


def said(capfd, *arguments):
    """The exit code and everything that a command prints, which must be one message if it fails."""
    code = gengram([str(argument) for argument in arguments])
    streams = capfd.readouterr()
    assert "Traceback" not in streams.err
    if code and "--json" not in arguments:
        assert streams.err.count("\n") <= 1, streams.err
    return code, streams.out + streams.err


def commands_on(folder, tmp_path):
    shutil.rmtree(tmp_path / "back", ignore_errors=True)
    yield "info", folder
    yield "verify", folder, "--no-load"
    yield "convert", "to-megatron", folder, tmp_path / "back", "--quiet"
    yield "diff", folder, folder, "--quiet"


def write(path, content):
    path.write_text(json.dumps(content))


# Configurations

WRONG = [
    None,
    True,
    -1,
    1.5,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "32",
    "\ud800",
    [],
    [[]],
    [None],
    ["x"],
    {},
]
FIELDS = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_local_experts", "vocab_size", "head_dim"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "memory_layers", "memory_ngram_sizes"),
    *("memory_token_ids", "memory_conv_kernel", "memory_window", "dtype", "architectures", "model_type"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_values_of_a_wrong_kind_in_a_configuration_are_one_message(field, folder, tmp_path, capfd):
    config = json.loads((folder / "config.json").read_text())
    for value in WRONG:
        write(folder / "config.json", {**config, field: value})
        for command in commands_on(folder, tmp_path):
            code, text = said(capfd, *command)
            assert code in (0, 1, 2) and text.isascii(), (field, value, command)


@pytest.mark.parametrize("content", [[], None, 7, "x", {}, {"model_type": ["gengram"]}, {"model_type": ESCAPES}])
def test_a_configuration_that_is_of_another_kind(content, folder, tmp_path, capfd):
    write(folder / "config.json", content)
    for command in commands_on(folder, tmp_path):
        code, text = said(capfd, *command)
        assert code in (1, 2) and ("config.json" in text or "model_type" in text)


@pytest.mark.parametrize(
    "fields", [dict(num_hidden_layers=4096, num_local_experts=4096), dict(num_hidden_layers=10**9)]
)
def test_a_configuration_of_millions_of_tensors_is_refused_before_they_are_named(fields, folder, tmp_path, capfd):
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, **fields})
    code, text = said(capfd, "convert", "to-megatron", folder, tmp_path / "back", "--quiet")
    assert code == 1 and ("at most 262,144 are read or written" in text or "num_hidden_layers" in text)


def test_extra_fields_that_transformers_would_act_on_are_one_message(folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    for extra in ({"quantization_config": {"quant_method": "awq"}}, {"quantization_config": 5}, {"id2label": [1]}):
        write(folder / "config.json", {**config, **extra})
        code, text = said(capfd, "verify", folder)
        assert code in (0, 1), (extra, text)


# Records

SPOILED = {
    "a list": lambda record: [],
    "a source that is a list": lambda record: {**record, "source": []},
    "tensors that are text": lambda record: {**record, "source": {**record["source"], "tensors": "x"}},
    "arguments that are a list": lambda record: {**record, "source": {**record["source"], "args": [1]}},
    "an iteration that is text": lambda record: {**record, "source": {**record["source"], "iteration": "ten"}},
    "a path that is a number": lambda record: {**record, "source": {**record["source"], "path": 3}},
    "weights that are null": lambda record: {**record, "weights": None},
    "a hash of three letters": lambda record: {
        **record,
        "weights": {name: {**entry, "sha256": "abc"} for name, entry in record["weights"].items()},
    },
    "a shape of text": lambda record: {
        **record,
        "weights": {name: {**entry, "shape": "12"} for name, entry in record["weights"].items()},
    },
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_record_of_another_kind_is_one_message(kind, folder, tmp_path, capfd):
    record = json.loads((folder / "conversion.json").read_text())
    write(folder / "conversion.json", SPOILED[kind](record))
    for command in commands_on(folder, tmp_path):
        code, text = said(capfd, *command)
        if command[0] == "diff":
            assert code == 0
        else:
            assert code == 1 and "conversion.json is not the record of a conversion" in text, text


# Arguments


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_arguments_that_json_cannot_say_do_not_stop_a_conversion(form, tmp_path, megatron, capfd):
    shape = megatron.Shape()
    strange = dict(tokenizer_type="\ud800" + ESCAPES, consumed_train_samples=10**6000, seq_length=64)
    args = megatron.args(shape, **strange, consumed_valid_samples=float("nan"), moe_token_dispatcher_type="x" * 10**6)
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    if form == "torch":
        megatron.save_torch(tmp_path / "source", weights, args, **{ESCAPES: torch.ones(2), "more": 1})
    else:
        tensors = megatron.stacked(weights, shape) | {f"optimizer.{ESCAPES}": torch.ones(2)}
        megatron.save_torch_dist(tmp_path / "source", tensors, args)
    for command in (["info", tmp_path / "source"], ["convert", "to-hf", tmp_path / "source", tmp_path / "hf"]):
        for more in (["--dry-run"] if command[0] == "convert" else [], []):
            code, text = said(capfd, *command, *more)
            assert code == 0, text
            shown_safely(text.replace("\x1b[A", "").replace("\r", ""))  # of progress bars
    text = (tmp_path / "hf" / "conversion.json").read_text()
    record = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert len(text) < 10**5 and record["source"]["args"]["seq_length"] == 64
    assert record["source"]["args"]["consumed_train_samples"].startswith("an integer of ")
    text.encode("utf-8")
    assert said(capfd, "convert", "to-megatron", tmp_path / "hf", tmp_path / "back", "--quiet")[0] == 0


# Git LFS pointers


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_pointers_of_git_lfs_are_named_in_a_checkpoint(form, tmp_path, megatron, capfd):
    shape = megatron.Shape()
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    if form == "torch":
        megatron.save_torch(tmp_path / "source", weights, megatron.args(shape), stages=(1, 2))
    else:
        megatron.save_torch_dist(tmp_path / "source", megatron.stacked(weights, shape), megatron.args(shape))
    for path in sorted(path for path in (tmp_path / "source").rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_text(POINTER)
        for command in (
            ["convert", "to-hf", tmp_path / "source", tmp_path / "out", "--quiet"],
            ["info", tmp_path / "source"],
            ["diff", tmp_path / "source", tmp_path / "source", "--quiet"],
        ):
            code, text = said(capfd, *command)
            assert code in (1, 2) and f"{path}: this is a Git LFS pointer, the file of 12.3 kB" in text, text
            assert "git lfs pull" in text
        path.write_bytes(content)


def test_pointers_of_git_lfs_are_named_in_a_folder(folder, tmp_path, capfd):
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        path.write_text(POINTER)
        for command in commands_on(folder, tmp_path):
            is_read = path.name in ("config.json", "model.safetensors", "conversion.json")
            if command[0] == "verify" or (is_read and (path.name != "conversion.json" or command[0] != "diff")):
                code, text = said(capfd, *command)
                assert code in (1, 2) and f"{path}: this is a Git LFS pointer" in text, (command, text)
        path.write_bytes(content)


# Names


def shown_safely(text):
    assert not any(not letter.isprintable() for letter in text.replace("\n", "")), ascii(text)
    assert not any(line.startswith("ok: everything") for line in text.splitlines()), text


def test_names_in_a_folder_are_not_obeyed(folder, tmp_path, capfd):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, ESCAPES: torch.ones(2)}, folder / "model.safetensors")
    for command in (*commands_on(folder, tmp_path), ["diff", folder, tmp_path / "source", "--quiet"]):
        shown_safely(said(capfd, *command)[1])
    save_file({**weights, ESCAPES: torch.ones(2, dtype=torch.int32)}, folder / "model.safetensors")
    for command in commands_on(folder, tmp_path):
        shown_safely(said(capfd, *command)[1])


def test_text_in_configuration_and_record_is_not_obeyed(folder, tmp_path, capfd):
    config = json.loads((folder / "config.json").read_text())
    record = json.loads((folder / "conversion.json").read_text())
    for field in config:
        write(folder / "config.json", {**config, field: ESCAPES})
        for command in commands_on(folder, tmp_path):
            shown_safely(said(capfd, *command)[1])
    write(folder / "config.json", {**config, ESCAPES: 1, "rope_parameters": {ESCAPES: 1, "rope_type": "default"}})
    for field in ("path", "format"):
        write(folder / "conversion.json", {**record, "source": {**record["source"], field: ESCAPES}})
        for command in commands_on(folder, tmp_path):
            shown_safely(said(capfd, *command)[1])


def test_names_of_files_are_not_obeyed(folder, tmp_path, megatron, capfd):
    shape = megatron.Shape()
    strange = tmp_path / ESCAPES.replace("\n", "")
    weights = megatron.named_for(megatron.canonical(shape), shape, "te")
    megatron.save_torch(strange, weights, megatron.args(shape))
    (strange / "iter_0000123" / "mp_rank_00" / ESCAPES).write_text("x")
    for command in (["info", strange], ["convert", "to-hf", strange, tmp_path / "out", "--dry-run"]):
        code, text = said(capfd, *command)
        assert code == 0
        shown_safely(text)
    (strange / "iter_0000123" / f"mp_rank_{ESCAPES}").mkdir()
    (strange / "latest_checkpointed_iteration.txt").write_text(ESCAPES)
    for command in (["info", strange], ["convert", "to-hf", strange, tmp_path / "out"], ["diff", strange, folder]):
        code, text = said(capfd, *command)
        assert code in (1, 2)
        shown_safely(text)
    code, text = said(capfd, "info", tmp_path / f"nowhere{ESCAPES}")
    shown_safely(text)
    assert code == 1


# What is not there


def test_messages_say_what_else_could_be_given(folder, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for place, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is not a Megatron checkpoint"),
    ):
        code, text = said(capfd, "info", place)
        assert code == 1 and words in text and "or ORG/NAME on the Hub" in text
        code, text = said(capfd, "diff", folder, place, "--quiet")
        assert code == 2 and words in text and "or a Hugging Face folder, which has a config.json" in text
    (folder / "model.safetensors").unlink()
    for command in (["info", folder], ["diff", folder, folder, "--quiet"]):
        code, text = said(capfd, *command)
        assert code in (1, 2) and "missing 'model.safetensors'" in text and "Errno" not in text


def test_files_that_may_not_be_read_are_said_in_words(folder, tmp_path, capfd, monkeypatch):
    original = open

    def refused(path, *words, **more):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *words, **more)

    monkeypatch.setattr("builtins.open", refused)
    code, text = said(capfd, "info", folder)
    assert code == 1 and "model.safetensors: permission denied" in text and "Errno" not in text
