import gzip
import json
import re

import numpy as np
import pytest
from datasets import load_dataset

from gengram import GengramTokenizer
from gengram.cli import main
from gengram.data_preparation import SplitRule, WindowOptions, prepare_genome_dataset, stream_genome_dataset
from gengram.sequences.alphabet import reverse_complement

TOKENIZER = GengramTokenizer()


def random_sequence(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGTacgt"), length))


@pytest.fixture
def genome(tmp_path):
    """Two files with gaps; sequences by record."""
    one = random_sequence(500, 0) + "N" * 30 + random_sequence(300, 1) + "NNN" + random_sequence(100, 2)
    records = {"one": "NN" + one, "two": random_sequence(90, 3), "three": random_sequence(410, 4)}
    with open(tmp_path / "a.fa", "w") as file:
        for name in ("one", "two"):
            file.write(f">{name} with words\n" + "\n".join(re.findall(".{1,60}", records[name])) + "\n")
    with gzip.open(tmp_path / "b.fa.gz", "wt") as file:
        file.write(f">three\n{records['three']}\n")
    return [tmp_path / "a.fa", tmp_path / "b.fa.gz"], records


def spelled(origin: str, records: dict[str, str]) -> str:
    """The bases that an `origin` names, as they were read."""
    name, start, end, strand = re.fullmatch(r"(.*):(\d+)-(\d+)\(([+-])\)", origin).groups()
    bases = records[name][int(start) : int(end)].upper()
    return bases if strand == "+" else reverse_complement(bases)


@pytest.mark.parametrize("both_strands", [False, True])
@pytest.mark.parametrize("stride", [None, 20])
def test_windows_are_the_bases_that_their_origin_names(genome, both_strands, stride, tmp_path):
    files, records = genome
    options = WindowOptions(length=64, stride=stride, both_strands=both_strands, shortest=16)
    record = prepare_genome_dataset(files, tmp_path / "out", options, progress=False)
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(data) == record["splits"]["train"]["examples"] > 10
    starts = set()
    for example in data:
        (origin,) = example["origin"]
        assert TOKENIZER.decode(example["input_ids"]) == spelled(origin, records)
        starts.add(origin)
    assert len(starts) == len(data)
    assert any("(-)" in origin for origin in starts) == both_strands
    assert not any("N" * 11 in TOKENIZER.decode(example["input_ids"]) for example in data)
    assert sum(map(len, data["input_ids"])) == record["splits"]["train"]["tokens"]


def test_packed_examples_are_full_and_hold_every_document_in_order(genome, tmp_path):
    files, records = genome
    options = WindowOptions(length=128, packed=True, both_strands=True, shortest=16)
    record = prepare_genome_dataset(files, tmp_path / "out", options, progress=False)
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert all(len(example["input_ids"]) == 128 for example in data)
    for example in data:
        documents = TOKENIZER.decode(example["input_ids"]).split("<EOD>")
        assert [d for d in documents if d] == [spelled(origin, records) for origin in example["origin"]]
    everything = "".join(TOKENIZER.decode(example["input_ids"]) for example in data)
    gap = re.search("N{30}", records["one"])
    pieces = [records["one"][2 : gap.start()], records["one"][gap.end() :], records["two"], records["three"]]
    expected = "".join(
        f"{strand}<EOD>" for piece in pieces for strand in (piece.upper(), reverse_complement(piece.upper()))
    )
    assert expected.startswith(everything)
    left_over = record["splits"]["train"]["bases_left_over"]
    tokens = len(expected.replace("<EOD>", "#"))
    assert left_over == tokens - 128 * len(data) < 128


def test_splits_by_region_and_what_they_share(genome, tmp_path):
    files, records = genome
    files[0].write_text(files[0].read_text() + f">copy\n{reverse_complement(records['three'][:200])}\n")
    rules = [SplitRule("*:copy", "test"), SplitRule("*:two", "-"), SplitRule("*", "train")]
    record = prepare_genome_dataset(files, tmp_path / "out", WindowOptions(32), rules, sketch_scale=1, progress=False)
    assert record["share_of_31mers_also_in_train"] == {"test": 1.0}
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {o.split(":")[0] for e in data["test"] for o in e["origin"]} == {"copy"}
    assert {o.split(":")[0] for e in data["train"] for o in e["origin"]} == {"one", "three"}
    assert json.loads((tmp_path / "out" / "preparation.json").read_text()) == json.loads(json.dumps(record))


def test_a_share_is_drawn_by_the_seed(genome):
    files, _ = genome

    def origins(seed):
        options = WindowOptions(length=8, shortest=1, seed=seed)
        data = stream_genome_dataset(files, options=options, rules=[SplitRule("*", "train", keep=0.5)])
        return [example["origin"][0] for example in data]

    kept = origins(1)
    assert kept == origins(1) != origins(2)
    assert 60 < len(kept) < 120


def test_streamed_examples_equal_prepared_ones(genome, tmp_path):
    files, _ = genome
    options = WindowOptions(length=50, packed=True)
    prepare_genome_dataset(files, tmp_path / "out", options, progress=False)
    prepared = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    from_parquet = load_dataset(str(tmp_path / "out"), streaming=True)["train"]
    streamed = stream_genome_dataset(files, options=options)
    assert list(streamed) == list(prepared) == list(from_parquet)


def test_nothing_half_written_remains(genome, tmp_path):
    files, _ = genome
    bad = tmp_path / "bad.fa"
    bad.write_text("this is not FASTA\n")
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected FASTA"):
        prepare_genome_dataset([*files, bad], tmp_path / "out", WindowOptions(16), progress=False)
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="nothing is left"):
        prepare_genome_dataset(files, tmp_path / "out", WindowOptions(5000, packed=True), progress=False)
    assert set(tmp_path.iterdir()) == before


def test_an_output_that_holds_something_is_left_alone(genome, tmp_path):
    files, _ = genome
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        prepare_genome_dataset(files, tmp_path / "out", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_command(genome, tmp_path, capsys):
    files, _ = genome
    table = tmp_path / "splits.tsv"
    table.write_text("pattern\tsplit\n*:three\ttest\n*\ttrain\n")
    words = ["prepare", *map(str, files), "--output", str(tmp_path / "out"), "--length", "32", "--packed"]
    assert main([*words, "--both-strands", "--splits", str(table), "--shortest", "8", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["splits"]) == {"train", "test"}
    assert main([*words, "--stride", "3"]) == 1
    assert "stride is for windows that are not packed" in capsys.readouterr().err
