"""`gengram embed`: files in, files out."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_oracle import embedding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_tree import ROOT
from tolerances import SAME_HIDDEN_STATES_FP32

from gengram import GengramForCausalLM, GengramModel, GengramTokenizer
from gengram.cli import main
from gengram.inference.jobs import ModelOptions, Share
from gengram.inference.jobs.embed import embed_file, embed_job
from gengram.inference.jobs.embedding_outputs import embedding_table, vectors_of, write_embeddings
from gengram.inference.jobs.finished_chunks import FinishedChunks
from gengram.sequences.alphabet import reverse_complement
from gengram.support.errors import InputError, MissingExtraError

POOLINGS = ["mean", "max", "last", "centre", "none"]
LAYER = 2


def random_dna(length, seed):
    return "".join(random.Random(seed).choices("ACGT", k=length))


# Two of them are longer than the context (48), and one than a chunk of the smallest batches.
RECORDS = [(f"s{number}", random_dna(length, number)) for number, length in enumerate([7, 48, 1, 49, 210, 33, 130])]


@pytest.fixture
def options(tiny_folder):
    """Options by which a chunk has 48 bases, so that long sequences are cut."""
    return {"model": ModelOptions(str(tiny_folder), device="cpu", batch_tokens=2), "layer": LAYER}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "sequences.fa"
    path.write_text("".join(f">{name} and more\n{sequence}\n" for name, sequence in RECORDS))
    return path


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """Vectors of `RECORDS`, or other sequences, by brute force."""
    model = GengramModel.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    known = {}

    def vectors(pooling, strands="both", sequences=tuple(sequence for _, sequence in RECORDS)):
        for sequence in sequences:
            if (pooling, strands, sequence) not in known:
                known[pooling, strands, sequence] = embedding(
                    model, GengramTokenizer(), sequence, pooling, strands, LAYER, 48, 24
                )
        return [known[pooling, strands, sequence] for sequence in sequences]

    return vectors


def read(path):
    """Rows of places, and vectors."""
    table = pq.read_table(path)
    assert table.column_names == ["name", "start", "end", "strand", "embedding"]
    rows = list(zip(*(table[name].to_pylist() for name in table.column_names[:4]), strict=True))
    return rows, np.array(table["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("strands", ["both", "forward", "reverse"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_brute_force_though_sequences_are_cut_into_chunks(
    fasta, tmp_path, options, expected, pooling, strands
):
    options["model"] = ModelOptions(**{**vars(options["model"]), "strands": strands})
    job = embed_job(fasta, tmp_path / "out.parquet", pooling=pooling, **options)
    assert len(list(job.chunks())) > len(RECORDS)
    summary = embed_file(fasta, tmp_path / "out.parquet", pooling=pooling, **options)
    rows, vectors = read(summary.output)
    label = {"both": ".", "forward": "+", "reverse": "-"}[strands]
    if pooling == "none":
        assert rows == [(name, base, base + 1, label) for name, text in RECORDS for base in range(len(text))]
        np.testing.assert_allclose(vectors, np.concatenate(expected(pooling, strands)), atol=SAME_HIDDEN_STATES_FP32)
    else:
        assert rows == [(name, 0, len(sequence), label) for name, sequence in RECORDS]
        np.testing.assert_allclose(vectors, expected(pooling, strands), atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_values_depend_neither_on_batches_nor_on_the_order_of_the_file(fasta, tmp_path, options, expected, pooling):
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    fasta.write_text("".join(f">{name}\n{sequence.lower()}\n" for name, sequence in shuffled))
    options["model"] = ModelOptions(**{**vars(options["model"]), "batch_tokens": 4096})
    embed_file(fasta, tmp_path / "out.parquet", pooling=pooling, **options)
    vectors = expected(pooling, sequences=tuple(sequence for _, sequence in shuffled))
    found = read(tmp_path / "out.parquet")[1]
    np.testing.assert_allclose(
        found, np.concatenate([np.atleast_2d(own) for own in vectors]), atol=SAME_HIDDEN_STATES_FP32
    )


def written_as(kind, folder):
    """`RECORDS` in a file of this kind."""
    lines = {
        "fa.gz": "".join(f">{name}\r\n{sequence[:60]}\r\n{sequence[60:]}\r\n" for name, sequence in RECORDS),
        "fastq": "".join(f"@{name}\n{sequence}\n+\n{'I' * len(sequence)}\n" for name, sequence in RECORDS),
        "csv": "Sequence,label,name\n" + "".join(f"{sequence},1,{name}\n" for name, sequence in RECORDS),
        "tsv": "name\tsequence\n" + "".join(f"{name}\t{sequence}\n" for name, sequence in RECORDS),
    }
    path = folder / f"input.{kind}"
    if kind == "parquet":
        pq.write_table(
            pa.table(dict(zip(["name", "sequence"], map(list, zip(*RECORDS, strict=True)), strict=True))), path
        )
    elif kind == "fa.gz":
        path.write_bytes(gzip.compress(lines[kind].encode()))
    else:
        path.write_text(lines[kind])
    return path


@pytest.mark.parametrize("kind", ["fa.gz", "fastq", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same(tmp_path, options, expected, kind):
    summary = embed_file(written_as(kind, tmp_path), tmp_path / "out.parquet", **options)
    rows, vectors = read(summary.output)
    assert rows == [(name, 0, len(sequence), ".") for name, sequence in RECORDS]
    np.testing.assert_allclose(vectors, expected("mean"), atol=SAME_HIDDEN_STATES_FP32)


def test_rows_of_a_table_without_names_are_numbered(tmp_path, options):
    (tmp_path / "in.csv").write_text("seq\nACGT\nGG\n")
    embed_file(tmp_path / "in.csv", tmp_path / "out.parquet", sequence_column="seq", **options)
    assert read(tmp_path / "out.parquet")[0] == [("1", 0, 4, "."), ("2", 0, 2, ".")]


@pytest.mark.parametrize("strands", ["both", "forward", "reverse"])
@pytest.mark.parametrize("pooling", ["last", "none"])
def test_regions_are_read_on_their_strand(tmp_path, options, expected, pooling, strands):
    pytest.importorskip("pysam")
    genome = {"chr1": random_dna(300, 10), "chr2": random_dna(90, 11)}
    (tmp_path / "genome.fa").write_text("".join(f">{name}\n{text}\n" for name, text in genome.items()))
    regions = [
        ("chr2", 10, 90, "-"),
        ("1", 0, 300, "+"),
        ("chr1", 5, 6, "."),
        ("chr1", 5, 6, "-"),
        ("chr1", 40, 210, "-"),
    ]
    bed = "".join(f"{name}\t{start}\t{end}\tpeak\t0\t{strand}\n" for name, start, end, strand in regions)
    (tmp_path / "regions.bed").write_text(f"track name=x\n{bed}")
    options["model"] = ModelOptions(**{**vars(options["model"]), "strands": strands})
    embed_file(tmp_path / "regions.bed", tmp_path / "out.parquet", tmp_path / "genome.fa", pooling=pooling, **options)
    rows, vectors = read(tmp_path / "out.parquet")
    expected_rows, expected_vectors = [], []
    for name, start, end, strand in regions:
        contig = name if name.startswith("chr") else f"chr{name}"
        text = genome[contig][start:end]
        read_strand = {"forward": "+-"[strand == "-"], "reverse": "-+"[strand == "-"], "both": "."}[strands]
        choice = {"+": "forward", "-": "reverse", ".": "both"}[read_strand]
        (own,) = expected(pooling, choice, (text,))
        places = [(start, end)] if pooling == "last" else [(base, base + 1) for base in range(start, end)]
        expected_rows += [(contig, *place, read_strand) for place in places]
        expected_vectors.append(np.atleast_2d(own))
    assert rows == expected_rows
    np.testing.assert_allclose(vectors, np.concatenate(expected_vectors), atol=SAME_HIDDEN_STATES_FP32)


def test_a_region_on_the_minus_strand_is_its_reverse_complement(tmp_path, options):
    pytest.importorskip("pysam")
    text = random_dna(400, 3)
    (tmp_path / "genome.fa").write_text(f">c\n{text}\n")
    (tmp_path / "regions.bed").write_text("c\t20\t395\tx\t0\t-\n")
    (tmp_path / "turned.fa").write_text(f">c\n{reverse_complement(text[20:395])}\n")
    options["model"] = ModelOptions(**{**vars(options["model"]), "strands": "forward"})
    embed_file(tmp_path / "regions.bed", tmp_path / "a.parquet", tmp_path / "genome.fa", **options)
    embed_file(tmp_path / "turned.fa", tmp_path / "b.parquet", **options)
    (region,), (turned,) = (read(tmp_path / name)[1] for name in ("a.parquet", "b.parquet"))
    np.testing.assert_allclose(region, turned, atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_all_formats_hold_the_same_and_how_it_was_made(fasta, tmp_path, options, pooling):
    outputs = {ending: tmp_path / f"out.{ending}" for ending in ("parquet", "npz", "h5ad")}
    for output in outputs.values():
        embed_file(fasta, output, pooling=pooling, **options)
    rows, vectors = read(outputs["parquet"])
    arrays = np.load(outputs["npz"], allow_pickle=False)
    assert list(arrays) == ["name", "start", "end", "strand", "embedding", "record"]
    assert list(zip(*(arrays[name].tolist() for name in ("name", "start", "end", "strand")), strict=True)) == rows
    assert np.array_equal(arrays["embedding"], vectors) and arrays["embedding"].dtype == np.float32
    data = anndata.read_h5ad(outputs["h5ad"])
    assert list(data.obs[["name", "start", "end", "strand"]].itertuples(index=False, name=None)) == rows
    assert np.array_equal(data.X, vectors) and data.obs_names.is_unique
    records = [
        pq.read_schema(outputs["parquet"]).metadata[b"gengram"],
        str(arrays["record"]),
        data.uns["gengram"],
    ]
    for record in map(json.loads, records):
        assert record["settings"] == {
            "layer": LAYER,
            "pooling": pooling,
            "context": 48,
            "overlap": 24,
            "chunks_by_batch_tokens": 2,
            "windows": "each base from the window in which the model sees most around it",
        }
        assert set(record["inputs"]["sequences"]) == {"path", "bytes", "sha256"} and record["model"]["files"]
    frame = pd.read_parquet(outputs["parquet"])
    assert np.array_equal(np.stack(frame["embedding"].to_list()), vectors)


@pytest.mark.parametrize("ending", ["parquet", "npz", "h5ad"])
def test_names_that_repeat_in_a_table_and_those_of_other_scripts_are_kept(tmp_path, options, ending):
    names = ["x", "x", "gène", "染色体", "x"]
    lines = ["name\tsequence", *(f"{name}\tACGT" for name in names)]
    (tmp_path / "in.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = embed_file(tmp_path / "in.tsv", tmp_path / f"out.{ending}", **options).output
    if ending == "h5ad":
        data = anndata.read_h5ad(output)
        assert data.obs["name"].tolist() == names and data.obs_names.is_unique
    else:
        found = pq.read_table(output)["name"].to_pylist() if ending == "parquet" else np.load(output)["name"].tolist()
        assert found == names


@pytest.mark.parametrize("ending", ["parquet", "npz", "h5ad"])
def test_no_rows_make_a_file_too(tmp_path, ending):
    output = tmp_path / f"out.{ending}"
    write_embeddings([], output, {"job": "embed"}, width=32)
    if ending == "parquet":
        assert read(output)[0] == [] and pq.read_schema(output).field("embedding").type.list_size == 32
    elif ending == "npz":
        assert np.load(output)["embedding"].shape == (0, 32)
    else:
        assert anndata.read_h5ad(output).shape == (0, 32)


def test_vectors_come_out_of_tables_as_they_went_in():
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    table = embedding_table({"name": list("abcd"), "start": [0] * 4, "end": [1] * 4, "strand": ["."] * 4}, vectors)
    assert np.array_equal(vectors_of(table), vectors)
    assert np.array_equal(vectors_of(pa.concat_tables([table.slice(1, 2), table.slice(3)])), vectors[1:])


def run_and_die(arguments, after):
    """`gengram` in a process that is killed when it has saved so many chunks."""
    script = (
        "import os, signal, sys\n"
        "from gengram.cli import main\n"
        "from gengram.inference.jobs.finished_chunks import FinishedChunks\n"
        "save, count = FinishedChunks.save, []\n"
        "def dying(self, index, result):\n"
        "    save(self, index, result)\n"
        "    count.append(index)\n"
        f"    if len(count) == {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "FinishedChunks.save = dying\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).returncode


def test_a_killed_run_goes_on_to_the_same_bytes(fasta, tmp_path, options):
    whole = embed_file(fasta, tmp_path / "out.parquet", **options).output.read_bytes()
    (tmp_path / "out.parquet").unlink()
    arguments = ["embed", fasta, "--output", tmp_path / "out.parquet", "--layer", LAYER, "--quiet"]
    arguments += ["--model", options["model"].model, "--batch-tokens", 2, "--device", "cpu"]
    assert run_and_die(arguments, after=4) == -signal.SIGKILL
    summary = embed_file(fasta, tmp_path / "out.parquet", **options)
    assert 0 < summary.computed < summary.items
    assert summary.output.read_bytes() == whole
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("ending", ["parquet", "npz", "h5ad"])
def test_a_stopped_run_goes_on_to_the_same_bytes(fasta, tmp_path, options, ending, monkeypatch):
    output = tmp_path / f"out.{ending}"
    whole = embed_file(fasta, output, **options).output.read_bytes()
    output.unlink()
    saved = []
    save = FinishedChunks.save

    def stopping(self, index, table):
        save(self, index, table)
        saved.append(index)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(FinishedChunks, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed_file(fasta, output, **options)
    assert not output.exists()
    embed_file(fasta, output, **options)
    assert saved == sorted(set(saved)) and len(saved) > 4  # nothing twice
    assert output.read_bytes() == whole


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_parts_joined_are_the_whole_and_no_pooled_sequence_is_cut(fasta, tmp_path, options, expected, pooling):
    rows, vectors = [], []
    for part in range(3):
        output = tmp_path / f"{part}.parquet"
        embed_file(fasta, output, pooling=pooling, shard=Share(part, 3), **options)
        own = read(output)
        rows += own[0]
        vectors.append(own[1].reshape(len(own[0]), 32))
    if pooling == "mean":
        assert [name for name, *_ in rows] == [name for name, _ in RECORDS]
        np.testing.assert_allclose(np.concatenate(vectors), expected("mean"), atol=SAME_HIDDEN_STATES_FP32)
    else:
        assert rows == [(name, base, base + 1, ".") for name, text in RECORDS for base in range(len(text))]


@pytest.mark.slow
def test_launched_processes_make_one_output(fasta, tmp_path, options):
    whole = embed_file(fasta, tmp_path / "whole.parquet", **options).output
    arguments = ["embed", fasta, "--output", tmp_path / "out.parquet", "--layer", LAYER, "--quiet"]
    arguments += ["--model", options["model"].model, "--batch-tokens", 2, "--device", "cpu"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gengram", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank},
        )
        for rank in "10"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found, alone = read(tmp_path / "out.parquet"), read(whole)
    assert found[0] == alone[0]
    np.testing.assert_allclose(found[1], alone[1], atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.slow
def test_ray_gives_the_same(fasta, tmp_path, options):
    ray = pytest.importorskip("ray")
    whole = embed_file(fasta, tmp_path / "whole.parquet", **options).output
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:
        embed_file(fasta, tmp_path / "out.parquet", engine="ray", **options)
    finally:
        ray.shutdown()
    found, alone = read(tmp_path / "out.parquet"), read(whole)
    assert found[0] == alone[0]
    np.testing.assert_allclose(found[1], alone[1], atol=SAME_HIDDEN_STATES_FP32)


def test_memory_does_not_grow_with_a_contig(tmp_path, options):
    length = 10_000_000
    with (tmp_path / "long.fa").open("w") as file:
        file.write(">long\n")
        line = random_dna(100, 0) + "\n"
        for _ in range(length // 100):
            file.write(line)
    options["model"] = ModelOptions(**{**vars(options["model"]), "batch_tokens": 4096})
    job = embed_job(tmp_path / "long.fa", tmp_path / "out.parquet", pooling="centre", **options)
    tracemalloc.start()
    try:
        sizes = [(chunk.size, len(chunk.content[0].text)) for chunk in job.chunks()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(size for size, _ in sizes) == length and len(sizes) > 70
    assert max(text for _, text in sizes) <= 32 * 4096 + 2 * 48
    assert peak < 8_000_000
    assert job.notes.bases == length


REFUSED = {
    "empty record": (
        ">a\nACGT\n>b\n\n>c\nA\n",
        r"in.fa, record 'b': expected bases, got an empty sequence.*remove it",
    ),
    "two of one name": (
        ">a\nACGT\n>b\nA\n>a x\nCC\n",
        r"line 5: the name 'a' .* was used in line 1 already; rename one",
    ),
    "gap": (">a\nAC\nG-T\n", r"record 'a': expected DNA .*, got '-' at base 4; remove the gaps"),
    "protein": (">a\nMKVLAAGE\n", r"record 'a': expected DNA .*, got 'L' at base 4"),
    "no record": ("\n", r"expected"),
    "nothing": ("", "is empty"),
    "text": ("hello world\n", "expected"),
    "BED": ("chr1\t10\t20\n", r"looks like BED: name the genome that its regions are of with --fasta"),
    "another column": ("id,seq\n1,ACGT\n", r"expected a column 'sequence' in its first line, got 'id', 'seq'"),
    "an empty cell": ("id,sequence\n1,ACGT\n2,\n", r"line 3: expected bases, got an empty sequence"),
    "a short row": ("id,sequence\n1\n", r"line 2: expected 2 cells"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_embedding_is_refused_before_the_work(tmp_path, options, capsys, what):
    text, message = REFUSED[what]
    (tmp_path / "in.fa").write_text(text)
    with pytest.raises(InputError, match=message):
        embed_file(tmp_path / "in.fa", tmp_path / "out.parquet", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]
    assert main(["embed", str(tmp_path / "in.fa"), "-o", str(tmp_path / "out.parquet"), "-q"]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bed", "message"),
    [
        ("c\t0\t101\n", r"line 1: its end is 101, but 'c' has 100 bases"),
        ("c\t10\t20\nd\t0\t5\n", r"line 2: no record 'd'"),
        ("c\t5\t5\n", r"expected 0 <= start < end"),
        ("c\t0\t5\tx\t0\t*\n", r"expected the strand"),
        (">c\nACGT\n", r"--fasta is the genome of a BED file, but .* is FASTA: leave it out"),
    ],
)
def test_regions_that_are_not_there_are_refused_with_their_line(tmp_path, options, bed, message):
    pytest.importorskip("pysam")
    (tmp_path / "genome.fa").write_text(f">c\n{'ACGTA' * 20}\n")
    (tmp_path / "in.bed").write_text(bed)
    with pytest.raises(InputError, match=message):
        embed_file(tmp_path / "in.bed", tmp_path / "out.parquet", tmp_path / "genome.fa", **options)


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_numbers_that_are_not_finite_are_not_written(fasta, tmp_path, options, tiny_folder, pooling):
    model = GengramForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "damaged")
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / "damaged")
    options.update(model=ModelOptions(str(tmp_path / "damaged"), device="cpu", batch_tokens=2), layer=-1)
    with pytest.raises(ValueError, match="damaged gives NaN or infinity in float32; are its weights damaged"):
        embed_file(fasta, tmp_path / "out.parquet", pooling=pooling, **options)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": 5}, r"layer: expected 0 \(the embedding\) to 4, or -1 for the last, got 5"),
        ({"pooling": "sum"}, "pooling: expected mean, max, last, centre, none, got 'sum'"),
        ({"context": 49}, "a context of 1 to 48 bases"),
        ({"overlap": 48}, "an overlap of 0 to 47"),
    ],
)
def test_wrong_options_are_refused(fasta, tmp_path, options, changed, message):
    with pytest.raises(ValueError, match=message):
        embed_job(fasta, tmp_path / "out.parquet", **{**options, **changed})
    with pytest.raises(ValueError, match=r"a name that ends in .parquet, .npz, .h5ad, got 'out.csv'"):
        embed_job(fasta, tmp_path / "out.csv", **options)


def test_a_model_that_does_not_say_its_context_needs_one(fasta, tmp_path, tiny_folder, options):
    folder = tmp_path / "unsaid"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, key: 2**31 - 1}))
    options["model"] = ModelOptions(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"says how many bases it reads at once; give .* as --context"):
        embed_job(fasta, tmp_path / "out.parquet", **options)
    assert embed_job(fasta, tmp_path / "out.parquet", context=40, **options).context == 40


def test_h5ad_holds_no_more_rows_than_fit_into_memory(fasta, tmp_path, options, monkeypatch):
    monkeypatch.setattr("gengram.inference.jobs.embed.MOST_ROWS_OF_H5AD", 400)
    embed_file(fasta, tmp_path / "mean.h5ad", **options)
    with pytest.raises(InputError, match=r"--output: this format holds at most 400 rows; write .parquet instead"):
        embed_file(fasta, tmp_path / "none.h5ad", pooling="none", **options)


def test_h5ad_without_anndata_is_refused_before_the_work(fasta, tmp_path, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(MissingExtraError, match=r"needs anndata: pip install 'gengram\[genomics\]'"):
        embed_job(fasta, tmp_path / "out.h5ad", **options)


def test_the_summary_says_what_a_reader_should_know(tmp_path, options, capsys):
    (tmp_path / "in.fa").write_text(f">a\n{random_dna(50, 0)}\n>b\nNNNnn\n>c\nACRYGT\n")
    arguments = ["embed", str(tmp_path / "in.fa"), "--model", options["model"].model, "--device", "cpu"]
    assert main([*arguments, "-o", str(tmp_path / "out.parquet")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'out.parquet'}: 3 sequences of 61 bases",
        "1 longer than the context of 48 bases: read in windows that overlap by 24",
        "7 bases are N or another code of several bases: all were read as N",
        "1 without any A, C, G or T: their vectors say nothing about DNA",
    ]
    assert main([*arguments, "-o", str(tmp_path / "quiet.parquet"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*arguments, "-o", str(tmp_path / "json.parquet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sequences"] == 3 and told["uncertain_bases"] == 7 and told["record"]["job"] == "embed"


def oddly_written(data, records):
    """FASTA of these records as it occurs: any line ends, blank lines, line lengths and case."""
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = ""
    for name, sequence in records:
        text += f">{name}{data.draw(st.sampled_from(['', ' described', chr(9) + 'x']))}{end}"
        width = data.draw(st.integers(1, 60))
        for start in range(0, len(sequence), width):
            line = sequence[start : start + width]
            text += line.lower() if data.draw(st.booleans()) else line
            text += data.draw(st.sampled_from(["", " ", "\t"])) + end * data.draw(st.integers(1, 2))
    return text if data.draw(st.booleans()) else text.rstrip(end)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fasta_is_read_however_it_is_written(tmp_path, options, expected, data):
    records = [
        RECORDS[number]
        for number in data.draw(st.lists(st.integers(0, len(RECORDS) - 1), min_size=1, max_size=4, unique=True))
    ]
    (tmp_path / "odd.fa").write_bytes(oddly_written(data, records).encode())
    output = tmp_path / "odd.parquet"
    output.unlink(missing_ok=True)
    embed_file(tmp_path / "odd.fa", output, **options)
    rows, vectors = read(output)
    assert rows == [(name, 0, len(sequence), ".") for name, sequence in records]
    sequences = tuple(sequence for _, sequence in records)
    np.testing.assert_allclose(vectors, expected("mean", sequences=sequences), atol=SAME_HIDDEN_STATES_FP32)
