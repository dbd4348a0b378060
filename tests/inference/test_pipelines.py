"""`transformers.pipeline` of DNA tasks: the numbers of the jobs, whatever the inputs come in."""

import datasets
import foreign_models
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import SAME_FP32, SAME_HIDDEN_STATES_FP32
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import gengram
from gengram.inference.embeddings import SequenceEncoder
from gengram.inference.filling import GapFiller, gap_windows
from gengram.inference.variant_effects import variant_effects
from gengram.inference.window_effects import WindowEffects
from gengram.sequences.gaps import find_gaps
from gengram.sequences.genome import genome_of
from gengram.sequences.variants import Variant

SEQUENCES = ["ACGTNacgtTTGACC", "GGA", "TTTACGCATGNNACGTACGTTAAA"]
GENOME = {"chr1": "ACGTTGCAAATTGACCAGTTACGGT" * 3, "2": "GATTACA" * 8}
VARIANTS = [
    ("chr1", 20, "A", "G"),
    ("2", 2, "TT", "T"),
    ("chr1", 1, "C", "CAA"),
    ("2", 0, "A", "G"),
    ("2", 8, "A", "*"),
]
STATUSES = ["scored", "scored", "scored", "ref_mismatch", "spanning_deletion"]


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model, tokenizer = foreign_models.bert()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(task, folder, **options):
    return pipeline(task, model=str(folder), device="cpu", **options)


def test_embeddings_are_those_of_the_encoder(tiny_folder):
    pipe = make("dna-embedding", tiny_folder, layer=2)
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    for options in ({}, {"pooling": "max", "strands": "forward"}, {"layer": -1, "context": 12, "overlap": 4}):
        found = pipe(SEQUENCES, **options)
        own = {"layer": 2, **options}
        windows = {name: own.pop(name) for name in ("context", "overlap") if name in own}
        if windows:
            encoder = SequenceEncoder(str(tiny_folder), device="cpu", **windows)
        np.testing.assert_allclose(found, encoder.vectors(SEQUENCES, **own), atol=SAME_HIDDEN_STATES_FP32)
    bases = pipe(SEQUENCES, pooling="none")
    assert [vectors.shape for vectors in bases] == [(len(text), 32) for text in SEQUENCES]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(SEQUENCES)

    def __getitem__(self, index):
        return {"sequence": SEQUENCES[index]}


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_inputs_of_every_kind(tiny_folder, batch_size):
    pipe = make("dna-embedding", tiny_folder)
    expected = np.stack([pipe(text) for text in SEQUENCES])
    table = datasets.Dataset.from_dict({"sequence": SEQUENCES})
    for inputs in (
        SEQUENCES,
        tuple(SEQUENCES),
        [{"sequence": text} for text in SEQUENCES],
        (text for text in SEQUENCES),
        Rows(),
        table,
        KeyDataset(table, "sequence"),
        table.to_iterable_dataset(),
        iter(SEQUENCES),
    ):
        found = pipe(inputs, batch_size=batch_size)
        assert isinstance(found, list) == isinstance(inputs, list | tuple)
        np.testing.assert_allclose(np.stack(list(found)), expected, atol=SAME_HIDDEN_STATES_FP32)
    assert pipe([]) == [] and list(pipe(iter([]))) == []


def test_results_come_as_they_are_asked_for(tiny_folder):
    taken = []

    def stream():
        for text in SEQUENCES * 100:
            taken.append(text)
            yield text

    results = make("dna-embedding", tiny_folder, batch_size=2)(stream())
    assert next(results).shape == (32,) and len(taken) == 2


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_gaps_are_filled_by_the_head_that_was_saved(kind, tiny_folder, masked_folder):
    pipe = make("dna-fill-mask", tiny_folder if kind == "causal" else masked_folder)
    assert type(pipe.model).__name__ == ("GengramForCausalLM" if kind == "causal" else "BertForMaskedLM")
    filler = GapFiller(pipe.model, pipe.tokenizer)
    texts = ["ACNTTG?CAnG", "ACGT", "[MASK]" * 5 + "ACGTACGGTA"]
    for text, found in zip(texts, pipe(texts, joint=4, batch_size=2), strict=True):
        gapped = find_gaps(text)
        windows = list(gap_windows(gapped.letters, gapped.gaps, 40, None if kind == "masked" else 4))
        gaps = [gap.row() for own in filler.fill(windows) for gap in own]
        assert [gap["start"] for gap in found["gaps"]] == [gap.place for gap in gapped.gaps]
        assert [gap["status"] for gap in found["gaps"]] == [gap["status"] for gap in gaps]
        for ours, theirs in zip(found["gaps"], gaps, strict=True):
            assert ours["p_G"] == (theirs["p_G"] and pytest.approx(theirs["p_G"], abs=SAME_FP32))
            if ours["status"] == "filled":
                assert found["sequence"][ours["start"]].upper() == ours["base"]
    assert pipe("ACGT") == {"sequence": "ACGT", "gaps": []}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_variants_of_sequences_and_of_a_genome(tiny_folder, tmp_path, batch_size):
    pipe = make("dna-variant-effect", tiny_folder, context=16)
    effects = WindowEffects(pipe.model, pipe.tokenizer, ("llr", "jsd", "embedding", "memory"))
    expected = list(variant_effects(effects, genome_of(GENOME), [Variant(*each) for each in VARIANTS[:3]], 16))
    names = ("sequence", "start", "ref", "alt")
    rows = [dict(zip(names, (GENOME[each[0]], *each[1:]), strict=True)) for each in VARIANTS]
    found = pipe(rows, batch_size=batch_size)
    assert [each["status"] for each in found] == STATUSES
    for ours, theirs in zip(found, expected, strict=False):
        assert ours == pytest.approx({**theirs.effects.numbers(), "status": "scored"}, abs=SAME_HIDDEN_STATES_FP32)
    assert found[4]["llr"] is None

    pytest.importorskip("pysam")
    fasta = tmp_path / "genome.fa"
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in GENOME.items()))
    of_genome = [dict(zip(("chrom", "pos", "ref", "alt"), (x[0], x[1] + 1, *x[2:]), strict=True)) for x in VARIANTS]
    again = pipe(of_genome, batch_size=batch_size, fasta=str(fasta))
    for ours, theirs in zip(again, found, strict=True):
        assert ours == pytest.approx(theirs, abs=SAME_HIDDEN_STATES_FP32)


def test_fewer_scores_and_one_strand(tiny_folder):
    pipe = make("dna-variant-effect", tiny_folder, scores=["llr"], strands="forward")
    found = pipe({"sequence": GENOME["2"], "start": 3, "ref": "T", "alt": "A"})
    assert found["llr"] == found["llr_forward"] and found["llr_reverse"] is None and found["jsd"] is None


def test_the_default_model_is_the_one_that_ships():
    pipe = pipeline("dna-fill-mask", device="cpu")
    assert type(pipe.model) is gengram.GengramForCausalLM and pipe.model.name_or_path == gengram.DEFAULT_MODEL


@pytest.mark.parametrize(
    "task, given, options, message",
    [
        ("dna-embedding", 5, {}, r"dna-embedding: expected a sequence or {\"sequence\": ...}, got 5"),
        ("dna-embedding", {"text": "ACG"}, {}, "expected a sequence or"),
        ("dna-embedding", "", {}, "expected bases, got an empty sequence"),
        ("dna-fill-mask", "MEEPQ", {}, "expected letters of DNA"),
        ("dna-variant-effect", "ACGT", {}, "expected a dictionary with sequence, start"),
        ("dna-variant-effect", {"chrom": "1", "pos": 1, "ref": "A", "alt": "C"}, {}, "give the genome as fasta=..."),
        ("dna-embedding", "ACGT", {"layers": 1}, "expected some of layer, .*, got layers"),
    ],
)
def test_what_cannot_be_read_is_said(task, given, options, message, tiny_folder):
    with pytest.raises((ValueError, TypeError), match=message):
        make(task, tiny_folder)([given] if isinstance(given, int) else given, **options)


def test_a_saved_pipeline_is_a_model_and_its_tokenizer(tiny_folder, tmp_path):
    pipe = make("dna-embedding", tiny_folder)
    pipe.save_pretrained(tmp_path)
    again = make("dna-embedding", tmp_path)
    np.testing.assert_allclose(again("ACGT"), pipe("ACGT"), atol=SAME_FP32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"start": "4"}, "expected start as a whole number, got '4'"),
        ({"start": 4.0}, "expected start as a whole number, got 4.0"),
        ({"start": True}, "expected start as a whole number, got True"),
        ({"start": None}, "expected start as a whole number, got None"),
        ({"alt": 5}, "expected alt as text, got 5"),
        ({"sequence": None}, "expected sequence as text, got None"),
    ],
)
def test_variants_of_other_kinds_are_refused(changes, words, tiny_folder):
    variant = {"sequence": "ACGTTGCAAATTG", "start": 4, "ref": "T", "alt": "A", **changes}
    with pytest.raises(ValueError, match=words):
        make("dna-variant-effect", tiny_folder)(variant)


def test_alleles_that_a_table_lacks_are_missing(tiny_folder):
    variant = {"sequence": "ACGTTGCAAATTG", "start": np.int64(4), "ref": "T"}
    found = make("dna-variant-effect", tiny_folder)([{**variant, "alt": alt} for alt in (None, float("nan"), "A")])
    assert [each["status"] for each in found] == ["missing_allele", "missing_allele", "scored"]


@pytest.mark.parametrize(
    "task, options",
    [
        ("dna-variant-effect", {"context": 1}),
        ("dna-variant-effect", {"context": 49}),
        ("dna-fill-mask", {"context": 0}),
        ("dna-fill-mask", {"context": 49}),
        ("dna-fill-mask", {"joint": 0}),
        ("dna-fill-mask", {"joint": 7}),
        ("dna-fill-mask", {"longest_run": 0}),
        ("dna-fill-mask", {"least_probability": float("nan")}),
        ("dna-embedding", {"context": 49}),
    ],
)
def test_options_out_of_range_are_refused_as_by_the_commands(task, options, tiny_folder):
    sequence = "ACGTTGCNAATTG"
    given = {"sequence": sequence, "start": 4, "ref": "T", "alt": "A"} if "effect" in task else sequence
    with pytest.raises(ValueError, match="expected"):
        make(task, tiny_folder)(given, **options)


def test_a_pipeline_takes_no_weights_that_are_made_up(tmp_path):
    tiny_model(gengram.GengramForSequenceClassification).save_pretrained(tmp_path)
    gengram.GengramTokenizer().save_pretrained(tmp_path)
    for task in ("dna-fill-mask", "dna-variant-effect"):
        with pytest.raises(ValueError, match=r"got none of 'lm_head\.weight'"):
            make(task, tmp_path)
