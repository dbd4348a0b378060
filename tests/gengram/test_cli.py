"""The `gengram` command as a user types it."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from saved_sources import SAVED_SOURCES
from tolerances import LOGITS_FP32
from transformers import AutoTokenizer

from gengram import GengramForCausalLM, __version__
from gengram.cli import main
from gengram.commands import doctor
from gengram.commands.demo import DEMO_DATA
from gengram.sequences.fasta import read_fasta
from gengram.support.errors import ConversionError, FetchError, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
TINY = str(DEMO_DATA / "tiny_checkpoint")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"gengram {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["convert"], ["convert", "to-hf", TINY], ["nonsense"]])
def test_wrong_usage_says_what_is_expected(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: gengram" in capsys.readouterr().err


def test_convert_info_verify(tmp_path, capsys):
    output = tmp_path / "hf"
    assert main(["info", TINY]) == 0
    assert "66,816 parameters in bfloat16" in capsys.readouterr().out
    assert main(["convert", "to-hf", TINY, str(output), "--dtype", "float32"]) == 0
    assert "Kept 57 tensors" in capsys.readouterr().out
    assert main(["verify", str(output)]) == 0
    assert "is verified" in capsys.readouterr().out
    assert main(["info", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtypes"] == ["float32"]
    assert main(["convert", "to-hf", TINY, str(output)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_back_to_megatron_and_diff(tmp_path, capsys):
    folder, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert main(["convert", "to-hf", TINY, folder, "--quiet"]) == 0
    assert main(["convert", "to-megatron", folder, back, "--name-prefix", "engram_dna"]) == 0
    assert "the memory is called engram_dna" in capsys.readouterr().out
    assert main(["diff", TINY, back, "--quiet"]) == 0
    assert "57 tensors are equal" in capsys.readouterr().out
    assert main(["convert", "to-megatron", folder, back, "--quiet"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_converted_folder_is_complete(tmp_path):
    assert main(["convert", "to-hf", TINY, str(tmp_path / "hf"), "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == SAVED_SOURCES | {
        "README.md",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_gengram.GengramForCausalLM"
    assert config["architectures"] == ["GengramForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == config["max_position_embeddings"]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\n")


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_folder_is_the_same_when_the_model_saves_itself(shard, tmp_path):
    argv = ["convert", "to-hf", TINY, str(tmp_path / "hf"), "--quiet", "--max-shard-size", shard]
    assert main(argv) == 0
    model = GengramForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) == (1 if shard == "5GB" else 4)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_demo_on_the_example(tmp_path, capsys):
    for library in ("pysam", "pyBigWig", "matplotlib"):
        pytest.importorskip(library)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    difference = float(re.search(r"logits of the authors' code: (\S+)", out)[1])
    assert difference < LOGITS_FP32
    assert out.count("llr ") == 5 and "Done." in out and "left out" not in out
    surprisal = float(re.search(r"surprisal: (\S+)", out)[1])
    assert 1.5 < surprisal < 2  # of real sequence: below chance, though this part is less repetitive than most
    files = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"region.fa.gz", "region.gtf.gz", "region.vcf.gz", "scores.tsv", "exons.parquet", "tracks.svg"} <= files
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert "holds something already" in capsys.readouterr().err


def test_demo_on_a_given_fasta(tmp_path, capsys):
    fasta = tmp_path / "mine.fa.gz"
    with gzip.open(fasta, "wt") as file:
        file.write(">one\nacgtNNRY\nACGT\n>empty\n>x with words\nA\n" + ">long\n" + "ACGTT" * 1200 + "\n")
    assert main(["demo", "--fasta", str(fasta)]) == 0
    out = capsys.readouterr().out
    assert "one: 12 bases\n" in out and "x: 1 bases\n" in out and "empty" not in out
    assert "long: 6,000 bases, of which the first 5,000 are used" in out
    assert "one:1-12: 192 numbers" in out and "long:1-5,000: 192 numbers" in out


def test_the_demo_leaves_out_what_needs_a_library_that_is_not_there(tmp_path, capsys, monkeypatch):
    from gengram.commands import score, track

    def run(arguments):
        raise MissingExtraError('pip install "gengram[genomics]"')

    for command in (score, track):
        monkeypatch.setattr(command, "run", run)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count('   left out: pip install "gengram[genomics]"') == 2
    assert "numbers [" in out and "logits of the authors' code" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n", r"expected FASTA \('>' and a name\), got 'ACGT'"),
        (b"", "is empty, expected a FASTA file"),
        (b">\nACGT\n", "expected a name after '>'"),
        (b"\xff\xfe\x00", "text in UTF-16"),
        (b">only a name\n", "at least one record with a sequence"),
        (None, "no such file"),
    ],
)
def test_demo_with_a_bad_fasta_is_one_clear_message(content, message, tmp_path, capsys):
    path = tmp_path / "bad.fa"
    if content is not None:
        path.write_bytes(content)
    assert main(["demo", "--fasta", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error)


def test_read_fasta_keeps_case_and_order(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">b 1\r\nacGT\r\nNN\r\n\r\n>a\nT\n")
    assert list(read_fasta(path)) == [("b", "acGTNN"), ("a", "T")]


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("a wrong value"), 1, "error: a wrong value\n"),
        (ConversionError("a wrong file"), 1, "error: a wrong file\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "error: x: no such file or folder\n",
        ),
        (FetchError("no network"), 1, "error: no network\n"),
        (MissingExtraError("needs peft"), 1, "error: needs peft\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_that_the_user_can_mend_are_one_message(error, code, printed, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == printed
    error.__notes__ = ["What is written is kept."]
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"{printed}What is written is kept.\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def run(arguments):
        raise KeyError("ours")

    monkeypatch.setattr(doctor, "run", run)
    with pytest.raises(KeyError):
        main(["doctor"])


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    code = """
import sys
from gengram import cli
def run(arguments):
    print("x" * 10**int(sys.argv[1]))
    return 0
cli.doctor.run = run
sys.exit(cli.main(["doctor"]))
"""
    for size in ("1", "6"):
        command = subprocess.Popen(
            [sys.executable, "-c", code, size], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait() == 1
        command.stderr.close()


def test_names_reach_the_terminal_as_text_and_not_as_escapes(tmp_path, capsys):
    name = "no\x1b[31m\udc80.fa"
    assert main(["prepare", str(tmp_path / name), "--output", str(tmp_path / "out"), "--json"]) == 1
    shown = r"no\x1b[31m\udc80.fa"
    assert capsys.readouterr().err == f"error: {tmp_path}/{shown}: no such file or folder\n"
    assert main(["info", str(tmp_path / name)]) == 1
    assert "\x1b" not in capsys.readouterr().err
