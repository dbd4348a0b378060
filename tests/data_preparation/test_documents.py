"""Documents of a stream equal those of the whole sequence, wherever its pieces end."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengram.data_preparation import documents
from gengram.data_preparation.documents import Document, DocumentCutter, cut_documents
from gengram.data_preparation.split_rules import SplitRule, parts_of_record
from gengram.sequences.alphabet import reverse_complement
from gengram.sequences.pieces import SequencePiece
from gengram.sequences.windows import runs_between_gaps
from gengram.support.errors import InputError

SEQUENCE = st.text("ACgtNNNNnR", max_size=60)


def cut_up(name: str, sequence: str, cuts: list[int]) -> list[SequencePiece]:
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(sequence)}), len(sequence)]
    return [
        SequencePiece(name, start, sequence[start:end], end == len(sequence))
        for start, end in itertools.pairwise(bounds)
    ]


@given(SEQUENCE, st.lists(st.integers(1, 60), max_size=8), st.integers(0, 4), st.booleans(), st.sampled_from([2, 99]))
def test_documents_are_the_runs_between_gaps_of_every_part(sequence, cuts, longest_gap, in_parts, in_memory):
    rules = [SplitRule("f:*", "-", 20, 30), SplitRule("f:*", "test", 10, 25)] if in_parts else []
    rules.append(SplitRule("*", "train"))
    expected = [
        (part.split, part.start + start, part.start + end)
        for part in parts_of_record(rules, "f", "r", len(sequence))
        for start, end in runs_between_gaps(sequence[part.start : part.end], longest_gap)
    ]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "IN_MEMORY", in_memory)
        cutter = DocumentCutter(longest_gap, True, None)
        for part, document in cut_documents(cut_up("r", sequence, cuts), "f", rules, cutter):
            found.append((part.split, document.start, document.end))
            text, size = sequence[document.start : document.end].replace("n", "N"), len(document)
            bounds = [(0, size), (size // 3, size // 2), (size - 1, size), (0, 1)]
            assert document.record == "r" and len(document) == len(text)
            for left, right in bounds:
                assert document.text(left, right, "+").replace("n", "N") == text[left:right]
                assert document.text(left, right, "-").replace("n", "N") == reverse_complement(text)[left:right]
                start, end = re.fullmatch(r"r:(\d+)-(\d+)\(-\)", document.origin(left, right, "-")).groups()
                placed = sequence[int(start) : int(end)].replace("n", "N")
                assert reverse_complement(placed) == reverse_complement(text)[left:right]
    assert found == expected


@given(st.text("ACN-X", max_size=40), st.lists(st.integers(1, 40), max_size=6), st.booleans())
def test_foreign_characters_end_a_document_or_stay_in_it(sequence, cuts, cut_foreign):
    cutter = DocumentCutter(2, cut_foreign, None)
    pieces = cut_up("r", sequence, cuts)
    found = [(d.start, d.text(0, len(d), "+")) for _, d in cut_documents(pieces, "f", [SplitRule("*", "a")], cutter)]
    ends = r"N{3,}|[-X]+" if cut_foreign else r"N{3,}"
    expected, place = [], 0
    for piece in [*re.finditer(ends, sequence), None]:
        text = sequence[place : piece.start() if piece else len(sequence)]
        if text.strip("N"):
            expected.append((place + len(text) - len(text.lstrip("N")), text.strip("N")))
        place = piece.end() if piece else place
    assert found == expected


def test_a_document_may_be_read_and_lengthened_in_turn(monkeypatch):
    monkeypatch.setattr(documents, "IN_MEMORY", 3)
    document = Document("r", 5, None)
    for end in range(1, 30):
        document.append("ACGT"[end % 4])
        expected = "".join("ACGT"[i % 4] for i in range(1, end + 1))
        assert document.text(0, end, "+") == expected and document.end == 5 + end
    document.close()


def test_bases_that_no_rule_matches_are_an_error_as_soon_as_they_come():
    pieces = cut_up("r", "ACGTACGT", [3])
    with pytest.raises(InputError, match=r"no rule of the split table matches f:r, bases 4 to 8"):
        list(cut_documents(pieces, "f", [SplitRule("*", "a", 0, 4)], DocumentCutter(9, True, None)))
    assert list(cut_documents(cut_up("r", "", []), "f", [SplitRule("x", "a")], DocumentCutter(9, True, None))) == []
