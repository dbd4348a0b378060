import datasets
import numpy as np
import pandas as pd
import pytest

from gengram.evaluation.labelled_data import LabelledSequences, check_classes, near_rows, overlap, read_labelled
from gengram.sequences.alphabet import reverse_complement
from gengram.support.errors import InputError


def test_every_kind_of_file_gives_the_same(tmp_path):
    table = pd.DataFrame({"sequence": ["ACG", "tta", "NNN"], "label": [1, 0, 1]})
    table.to_csv(tmp_path / "a.csv.gz", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv.gz", "a.tsv", "a.parquet"):
        found = read_labelled(name, tmp_path)
        assert (found.sequences, found.labels.tolist(), found.classes) == (
            ["ACG", "TTA", "NNN"],
            [1, 0, 1],
            ["0", "1"],
        )


def test_a_fasta_file_per_class(tmp_path):
    (tmp_path / "yes.fa").write_text(">a\nAC\nG\n>b\nTT\n")
    (tmp_path / "no.fa").write_text(">c\nGG\n")
    found = read_labelled({"enhancer": "yes.fa", "none": "no.fa"}, tmp_path)
    assert (found.sequences, found.classes, found.labels.tolist()) == (
        ["ACG", "TT", "GG"],
        ["enhancer", "none"],
        [0, 0, 1],
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("seq,label\nA,1\n", r"a\.csv: expected the columns 'sequence', 'label', got 'seq'"),
        (
            "sequence,label\nA,x\nC,\nG,\n",
            r"a\.csv, line 3: expected a value in the column 'label', got '' \(and 1 more",
        ),
        ("sequence,label\nA,0\nC,nan\nG,1.0\n", r"a\.csv, line 3: expected a value in the column 'label', got 'nan'"),
        ("sequence,label\n,1\n", r"a\.csv, line 2: expected a sequence, got an empty cell"),
        ("sequence,label\nA,1\n  ,1\n", r"a\.csv, line 3: expected a sequence, got an empty cell"),
        ("sequence,label\n", r"a\.csv: expected rows with a sequence and a label each, got none"),
        ("sequence,label\nA,1\nAC-GT,0\n", r"a\.csv, line 3: expected DNA .*, got '-' in 'AC-GT'"),
        ("sequence,label\nMKLV,1\n", r"a\.csv, line 2: expected DNA .*, got 'L' in 'MKLV'"),
        ("sequence,label\nAC GT,1\n", r"line 2: expected DNA .*, got ' ' in 'AC GT'"),
        ("sequence,label\nACß,1\n", r"line 2: expected DNA .*, got 'ß' in 'ACß'"),  # upper case of which is SS
        ("sequence,label\n\x1b[2JA,1\n", r"line 2: expected DNA .* in '\\x1b\[2JA'"),
    ],
)
def test_bad_tables_are_clear_errors(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_labelled("a.csv", tmp_path)
    assert str(error.value).isprintable()


def test_words_for_nothing_are_sequences_and_classes(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nNA,NA\nNAN,None\nUACG,NA\n")
    found = read_labelled("a.csv", tmp_path)
    assert (found.sequences, found.classes, found.labels.tolist()) == (
        ["NA", "NAN", "TACG"],
        ["NA", "None"],
        [0, 1, 0],
    )


def test_a_whole_number_is_one_class_however_it_is_written(tmp_path):
    """A program that had an empty cell in a column of 0 and 1 writes 0.0 and 1.0."""
    (tmp_path / "train.csv").write_text("sequence,label\nA,0\nC,1\n")
    (tmp_path / "test.csv").write_text("sequence,label\nA,1.0\nC,0.0\n")
    train = read_labelled("train.csv", tmp_path)
    assert read_labelled("test.csv", tmp_path, classes=train.classes).labels.tolist() == [1, 0]


def test_records_without_bases_are_refused(tmp_path):
    (tmp_path / "yes.fa").write_text(">a\nACG\n>empty\n>b\nA\n")
    (tmp_path / "no.fa").write_text(">c\nGG\n")
    with pytest.raises(InputError, match=r"record 'empty' of .*yes\.fa: expected a sequence, got an empty"):
        read_labelled({"yes": "yes.fa", "no": "no.fa"}, tmp_path)
    with pytest.raises(InputError, match="FASTA files have no column 'fold'"):
        read_labelled({"yes": "yes.fa", "no": "no.fa"}, tmp_path, group_column="fold")


def rows_of(*labels: str) -> LabelledSequences:
    classes = sorted(set(labels))
    return LabelledSequences(["ACGT"] * len(labels), np.array([classes.index(label) for label in labels]), classes)


def test_classes_that_cannot_be_fitted_are_refused():
    check_classes(rows_of("a", "b", "a", "b"), "x.csv")
    with pytest.raises(InputError, match=r"x\.csv: expected two classes or more, got 'a'"):
        check_classes(rows_of("a", "a"), "x.csv")
    with pytest.raises(
        InputError, match=r"x\.csv: expected 2 training rows or more of each class, got 1 of 'b'; remove"
    ):
        check_classes(rows_of("a", "b", "a"), "x.csv")
    with pytest.raises(
        InputError, match=r"1 of '0\.0', .* and 3 more classes; if the labels are numbers to predict, use"
    ):
        check_classes(rows_of(*(str(i / 10) for i in range(13))), "x.csv")


def test_a_sample_keeps_rare_classes():
    rows = rows_of(*["a"] * 500, *["b"] * 500, *["c"] * 4, *["d"] * 40)
    for seed in range(20):
        sample = rows.sample(200, seed)
        assert len(sample) == 200
        counts = sample.class_rows()
        assert counts["c"] == 4 and counts["d"] >= 20
        assert rows.sample(16, seed).class_rows().keys() == counts.keys()
        assert min(rows.sample(16, seed).class_rows().values()) >= 2
    assert rows.sample(2000, 0) is rows and rows.sample(None, 0) is rows


def test_a_sample_is_a_plain_draw_where_no_class_is_rare():
    rows = rows_of(*["a", "b"] * 500)
    chosen = np.sort(np.random.default_rng(7).choice(1000, 300, replace=False))
    assert rows.sample(300, 7).labels.tolist() == rows.labels[chosen].tolist()


def test_classes_of_the_test_split_are_those_of_training(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nA,x\nC,y\n")
    (tmp_path / "b.csv").write_text("sequence,label\nA,y\n")
    assert read_labelled("b.csv", tmp_path, classes=["x", "y"]).labels.tolist() == [1]
    with pytest.raises(InputError, match=r"a\.csv: expected the classes of the training rows, 'x', got 'y'"):
        read_labelled("a.csv", tmp_path, classes=["x"])


def test_overlap_counts_either_strand(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nAACC,0\nGGTT,0\nACAC,1\nTTTT,1\nTTTTT,0\nAAAAA,1\n")
    (tmp_path / "b.csv").write_text("sequence,label\nGGTT,0\nGTGT,0\nCCCC,1\nAAAA,1\n")
    found = overlap(read_labelled("a.csv", tmp_path), read_labelled("b.csv", tmp_path))
    assert (found.duplicates_in_train, found.conflicts_in_train) == (2, 1)
    assert (found.test_rows_in_train, found.conflicting_labels) == (3, 1)


def random_sequence(generator: np.random.Generator, length: int) -> str:
    return "".join(generator.choice(list("ACGT"), length))


def test_windows_of_one_region_are_near_one_another():
    """Half of the 31-mers, by brute force, of either strand and of several training rows together."""
    generator = np.random.default_rng(0)
    genome, strange = random_sequence(generator, 400), random_sequence(generator, 400)
    train = [genome[:100], reverse_complement(genome[150:250]), "ACGT" * 5, genome[300:400]]
    test = [genome[start : start + 100] for start in range(0, 301, 5)]
    test += [
        strange[:100],
        strange[:30],
        "ACGT" * 5,
        strange[:90] + "N" * 40,
        genome[:60] + "N" * 60,
        reverse_complement(test[2]),
    ]

    def kmers(text: str) -> set[str]:
        found = {text[i : i + 31] for i in range(len(text) - 30) if "N" not in text[i : i + 31]}
        return found | {reverse_complement(kmer) for kmer in found}

    known = set().union(*map(kmers, train))
    expected = [bool(kmers(text)) and len(kmers(text) & known) >= len(kmers(text)) / 2 for text in test]
    assert near_rows(train, test).tolist() == expected and 20 < sum(expected) < 60
    rows = LabelledSequences(train, np.array([0, 1, 0, 1]), ["a", "b"])
    found = overlap(rows, LabelledSequences(test, np.zeros(len(test), dtype=int), ["a", "b"]))
    is_whole = [text in train or reverse_complement(text) in train for text in test]
    assert found.is_near_train.tolist() == [near or whole for near, whole in zip(expected, is_whole, strict=True)]
    assert found.counts() == {
        "duplicates_in_train": 0,
        "conflicts_in_train": 0,
        "test_rows_in_train": sum(is_whole),
        "conflicting_labels": 2,
        "test_rows_near_train": int(found.is_near_train.sum()),
    }
    assert near_rows([], ["ACGT" * 10]).tolist() == [False] and near_rows(train, []).tolist() == []


def test_a_positive_class_is_the_second_of_two(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nA,+1\nC,-1\nG,1.0\n")
    found = read_labelled("a.csv", tmp_path)
    assert (found.classes, found.labels.tolist()) == (["-1", "1"], [1, 0, 1])
    (tmp_path / "b.csv").write_text("sequence,label\nA,nonbinding\nC,binding\n")
    assert read_labelled("b.csv", tmp_path).classes == ["binding", "nonbinding"]
    found = read_labelled("b.csv", tmp_path, positive="binding")
    assert (found.classes, found.labels.tolist()) == (["nonbinding", "binding"], [0, 1])
    with pytest.raises(InputError, match=r"b\.csv: expected two classes, one of them 'bound' \(positive\), got"):
        read_labelled("b.csv", tmp_path, positive="bound")


def test_data_sets_of_the_hub_are_checked_like_files(tmp_path, monkeypatch):
    rows = {"text": ["ACG", "A-G", "AC"], "label": [0, 1, None], "empty": ["", "A", "A"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **named: datasets.Dataset.from_dict(rows))
    source = {"repo": "org/name", "split": "train"}
    for column, label, message in (
        ("sequence", "label", "data set org/name, train: expected the columns 'sequence', 'label', got 'text'"),
        ("text", "label", "data set org/name, train, row 3: expected a value in the column 'label', got ''"),
        ("empty", "text", "data set org/name, train, row 1: expected a sequence, got an empty"),
        ("text", "empty", "data set org/name, train, row 1: expected a value in the column 'empty'"),
    ):
        with pytest.raises(InputError, match=message):
            read_labelled(source, tmp_path, column, label)
    with pytest.raises(InputError, match="expected repo, split, and optionally revision and name"):
        read_labelled({"repo": "org/name"}, tmp_path)
