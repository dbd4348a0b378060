import json

import pytest

from gengram.cli import main
from gengram.inference.generation import BaseGenerator, Sampling, random_draws
from gengram.inference.jobs import ModelOptions, Share
from gengram.inference.jobs.generate import GenerateJob, generate_file
from gengram.inference.loaded_model import load_model
from gengram.sequences.fasta import read_fasta, stream_fasta
from gengram.support.errors import InputError

PROMPTS = {"one": "ACGTTGCAA", "two": "ttgacN", "long": "ACGTTGCAAA" * 6, "none": ""}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.fa"
    path.write_text("".join(f">{name} a gene\n{text}\n" for name, text in PROMPTS.items()))
    return path


@pytest.fixture
def options(tiny_folder):
    return {"model": ModelOptions(str(tiny_folder), device="cpu"), "length": 20, "number": 3, "seed": 7}


def test_every_prompt_is_continued_by_its_own_random_numbers(prompts, options, tiny_folder, tmp_path):
    summary = generate_file(tmp_path / "out.fa", prompts, **options)
    assert summary.items == 4 * 3 * 20
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    generator = BaseGenerator(loaded.model, loaded.tokenizer, Sampling())
    expected = {}
    for name, text in PROMPTS.items():
        for sample in (1, 2, 3):
            (new,) = generator.continued([text], random_draws(7, name, sample, 20)[None])
            expected[f"{name}_{sample}"] = text + new
    assert dict(read_fasta(tmp_path / "out.fa")) == expected
    descriptions = {piece.name: piece.description for piece in stream_fasta(tmp_path / "out.fa")}
    assert descriptions["two_2"] == "prompt=two prompt_bases=6 new_bases=20 seed=7"
    record = json.loads((tmp_path / "out.fa.json").read_text())
    assert record["settings"]["seed"] == 7 and record["inputs"]["prompts"]["sha256"]


@pytest.mark.parametrize("batch_tokens", [1, 60, 100])
def test_batches_parts_and_number_change_no_sequence(batch_tokens, prompts, options, tiny_folder, tmp_path):
    generate_file(tmp_path / "whole.fa", prompts, **options)
    whole = (tmp_path / "whole.fa").read_text()
    options["model"] = ModelOptions(str(tiny_folder), device="cpu", batch_tokens=batch_tokens)
    parts = []
    for part in range(2):
        output = tmp_path / f"part{part}.fa"
        generate_file(output, prompts, shard=Share(part, 2), **options)
        parts.append(output.read_text() if output.exists() else "")
    assert "".join(parts) == whole
    generate_file(tmp_path / "first.fa", prompts, **{**options, "number": 1})
    assert dict(read_fasta(tmp_path / "first.fa")).items() <= dict(read_fasta(tmp_path / "whole.fa")).items()


def test_chunks_fit_into_batches_and_their_prompts_end_near_one_another(prompts):
    job = GenerateJob(ModelOptions(batch_tokens=150), prompts, number=4, length=20)
    chunks = list(job.chunks())
    assert sum(chunk.size for chunk in chunks) == 4 * 4 * 20
    for chunk in chunks:
        lengths = [len(wanted.prompt) for wanted in chunk.content]
        assert max(lengths) - min(lengths) <= 20
        assert len(lengths) == 1 or len(lengths) * (max(lengths) + 20) <= 150


def test_from_nothing_and_new_bases_only(options, prompts, tmp_path):
    generate_file(tmp_path / "out.fa.gz", **options)
    found = dict(read_fasta(tmp_path / "out.fa.gz"))
    assert list(found) == ["generated_1", "generated_2", "generated_3"]
    assert len(set(found.values())) == 3 and all(len(text) == 20 for text in found.values())
    generate_file(tmp_path / "new.fa", prompts, with_prompt=False, **options)
    generate_file(tmp_path / "all.fa", prompts, **options)
    new = dict(read_fasta(tmp_path / "new.fa"))
    for name, text in read_fasta(tmp_path / "all.fa"):
        assert text == PROMPTS[name.rpartition("_")[0]] + new[name]


def test_the_command(prompts, tiny_folder, tmp_path, capsys):
    words = ["generate", "--model", str(tiny_folder), "--prompts", str(prompts), "--length", "9", "--temperature", "0"]
    assert main([*words, "--output", str(tmp_path / "a.fa"), "--device", "cpu"]) == 0
    assert "wrote 4 sequences with 36 new bases to" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "b.fa"), "--seed", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sequences"] == 4
    found = [dict(read_fasta(tmp_path / name)) for name in ("a.fa", "b.fa")]
    for sequences in found:
        del sequences["none_1"]  # whose first base is random in any case
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output", "x.txt"], "expected a name that ends in .fa"),
        (["--output", "x.fa", "--number", "0"], "number: expected at least 1, got 0"),
        (["--output", "x.fa", "--length", "-3"], "length: expected at least 1, got -3"),
        (["--output", "x.fa", "--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--output", "x.fa", "--top-k", "5"], "top_k: expected 1 to 4, got 5"),
        (["--output", "x.fa", "--prompts", "nowhere.fa"], "nowhere.fa"),
    ],
)
def test_what_cannot_be_done_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *words]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and message in error and list(tmp_path.iterdir()) == []


def test_a_masked_model_is_refused(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    config["architectures"] = ["GengramForMaskedLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="predicts masked bases from both sides"):
        generate_file(tmp_path / "out.fa", model=ModelOptions(str(tmp_path)))


def test_the_record_of_something_else_stays(options, tmp_path):
    (tmp_path / "new.fa.json").write_text("precious")
    with pytest.raises(FileExistsError, match=r"new\.fa\.json exists already"):
        generate_file(tmp_path / "new.fa", **options)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("text, letter", [("ACGT--AC", "-"), ("ACGTXXAC", "X"), ("MKVLAAG", "L"), ("ACG 61 T", " ")])
def test_prompts_that_are_no_dna_are_refused_before_the_work(text, letter, options, tmp_path):
    (tmp_path / "prompts.fa").write_text(f">good\nACGT\n>bad\n{text}\n")
    with pytest.raises(InputError, match=rf"prompts\.fa, record 'bad': expected DNA .* got '{letter}' at base"):
        generate_file(tmp_path / "out.fa", tmp_path / "prompts.fa", **options)
    assert not list(tmp_path.glob("*out.fa*"))
