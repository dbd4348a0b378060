from hypothesis import given
from hypothesis import strategies as st

from gengram.sequences.letter_counts import LetterCounts


@given(st.lists(st.text("ACGTUNacgtunRYKMSWBDHVrykmswbdhvX-*. 1é\x1b", max_size=30), max_size=4))
def test_every_character_is_counted_once_and_by_its_kind(texts):
    counts = LetterCounts()
    text = "".join(texts)
    foreign = [counts.add(part) for part in texts]
    assert counts.bases == sum(character in "ACGTUacgtu" for character in text)
    assert counts.unknown == sum(character in "Nn" for character in text)
    assert counts.ambiguous == sum(character in "RYKMSWBDHVrykmswbdhv" for character in text)
    assert dict(counts.foreign) == {c: text.count(c) for c in set(text) & set("X-*. 1é\x1b")}
    assert counts.total == len(text) and sum(foreign) == counts.foreign.total()
    assert counts.in_words().isprintable()


def test_counts_in_words():
    counts = LetterCounts()
    assert counts.in_words() == "0 letters" and counts.foreign_share == 0
    counts.add("ACGTNNR----\x1bX" + "A" * 87)
    assert counts.in_words() == (r"100 letters, of these 2 N, 1 other IUPAC codes, 6 foreign ('-' 4, '\x1b' 1, 'X' 1)")
    assert counts.foreign_share == 0.06
