import pandas as pd
import pytest

from gengram.evaluation.labelled_data import overlap, read_labelled


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
        ("seq,label\nA,1\n", r"expected the columns \['sequence', 'label'\]"),
        ("sequence,label\nA,\n", "empty cells"),
        ("sequence,label\n", "no rows"),
    ],
)
def test_bad_tables_are_clear_errors(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labelled("a.csv", tmp_path)


def test_classes_of_the_test_split_are_those_of_training(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nA,x\nC,y\n")
    (tmp_path / "b.csv").write_text("sequence,label\nA,y\n")
    assert read_labelled("b.csv", tmp_path, classes=["x", "y"]).labels.tolist() == [1]
    with pytest.raises(ValueError, match="expected the classes"):
        read_labelled("a.csv", tmp_path, classes=["x"])


def test_overlap_counts_either_strand(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,label\nAACC,0\nGGTT,0\nACAC,1\nTTTT,1\n")
    (tmp_path / "b.csv").write_text("sequence,label\nGGTT,0\nGTGT,0\nCCCC,1\nAAAA,1\n")
    found = overlap(read_labelled("a.csv", tmp_path), read_labelled("b.csv", tmp_path))
    assert (found.duplicates_in_train, found.test_rows_in_train, found.conflicting_labels) == (1, 3, 1)
