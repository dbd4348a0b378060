import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.data_preparation.split_rules import (
    ENDLESS,
    Part,
    SplitRule,
    cut_record,
    parts_of_record,
    read_split_rules,
)
from gengram.support.errors import InputError

PLACES = st.one_of(st.none(), st.integers(0, 12))
RULES = st.builds(
    lambda pattern, split, start, end: SplitRule(pattern, split, start, (start or 0) + end if end else None),
    st.sampled_from(["*", "f:r", "f:s"]),
    st.sampled_from(["a", "b", "-"]),
    PLACES,
    PLACES,
)


@given(st.lists(RULES, max_size=8))
def test_every_base_belongs_to_the_first_rule_that_matches_it(rules):
    parts = cut_record(rules, "f", "r")
    assert parts[0].start == 0 and parts[-1].end == ENDLESS
    assert all(left.end == right.start and left.split != right.split for left, right in itertools.pairwise(parts))
    for base in range(30):
        matching = [
            rule.split
            for rule in rules
            if rule.pattern in ("*", "f:r") and (rule.start or 0) <= base < (ENDLESS if rule.end is None else rule.end)
        ]
        (split,) = [part.split for part in parts if part.start <= base < part.end]
        assert split == (matching[0] if matching else "")


def test_the_first_rule_that_matches_wins_base_by_base():
    rules = [
        SplitRule("*:chr1", "test", 10, 20),
        SplitRule("*:chr1", "-", 15, 30),
        SplitRule("*", "train", keep=0.5),
    ]
    assert parts_of_record(rules, "a.fa", "chr1", 40) == [
        Part(0, 10, "train", 0.5),
        Part(10, 20, "test"),
        Part(30, 40, "train", 0.5),
    ]
    assert parts_of_record(rules, "a.fa", "chr2", 40) == [Part(0, 40, "train", 0.5)]
    assert parts_of_record(rules, "a.fa", "chr1", 12) == [Part(0, 10, "train", 0.5), Part(10, 12, "test")]


def test_a_region_is_held_out_for_all_species_together():
    rules = [SplitRule("*.ENm002.*:*", "test"), SplitRule("*", "train")]
    for species in ("human", "chimp", "mouse"):
        assert parts_of_record(rules, f"{species}.ENm002.fa.gz", "whatever", 5) == [Part(0, 5, "test")]
        assert parts_of_record(rules, f"{species}.ENm001.fa.gz", "whatever", 5) == [Part(0, 5, "train")]


def test_bases_without_a_rule_are_an_error():
    with pytest.raises(ValueError, match=r"no rule .* matches a\.fa:chr1, bases 5 to 9"):
        parts_of_record([SplitRule("*", "train", 0, 5)], "a.fa", "chr1", 9)


def test_reading_a_table(tmp_path):
    path = tmp_path / "splits.tsv"
    path.write_text("# comment\npattern\tsplit\tstart\tend\tkeep\n*:a\ttest\t5\t.\t\n\n*\ttrain\t\t\t0.25\n")
    assert read_split_rules(path) == [SplitRule("*:a", "test", 5), SplitRule("*", "train", keep=0.25)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("pattern\tsplitt\n", "line 1: expected a header"),
        ("pattern\n", "line 1: expected a header"),
        ("pattern\tsplit\n", "at least one rule"),
        ("pattern\tsplit\n*\n", "line 2"),
        ("pattern\tsplit\tstart\n*\ttrain\tx\n", "line 2"),
        ("pattern\tsplit\tkeep\n*\ttrain\t0\n", "0 < keep <= 1"),
        ("pattern\tsplit\tstart\tend\n*\ttrain\t5\t5\n", "start < end"),
        ("pattern\tsplit\n*\ttrain\tmore\n", "line 2"),
        ("pattern\tsplit\tsplit\n*\ttrain\ttest\n", "line 1: expected a header .* each once"),
        ("pattern\tsplit\tstart\n*\ttrain\t1_000\n", "line 2: expected start and end as whole numbers"),
        ("pattern\tsplit\tstart\n*\ttrain\t-5\n", "line 2: expected start and end as whole numbers"),
        ("pattern\tsplit\tkeep\n*\ttrain\tnan\n", "line 2: expected keep as a number"),
        ("pattern\tsplit\n*\t../evil\n", r"line 2: expected a split's name .* got '\.\./evil'"),
        ("pattern\tsplit\n*\ttr\x1bain\n", r"line 2: expected a split's name .* got 'tr\\x1bain'"),
        ("", "is empty, expected a split table file"),
    ],
)
def test_bad_tables_name_the_line(text, message, tmp_path):
    path = tmp_path / "splits.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"splits\.tsv.*{message}") as caught:
        read_split_rules(path)
    assert str(caught.value).isprintable()
