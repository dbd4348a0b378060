"""How many letters of which kind a file holds, counted while it is read."""

import re
from collections import Counter
from dataclasses import dataclass, field

from ..support.printable import printable
from .alphabet import BASES, IUPAC

_LETTERS = "".join(IUPAC) + "".join(IUPAC).lower()
_CODES = _LETTERS.encode()
_BASES = (BASES + "U" + BASES.lower() + "u").encode()

FOREIGN = re.compile(f"[^{_LETTERS}]")  # a character that is no IUPAC code


@dataclass
class LetterCounts:
    """Letters by what a model reads them as.

    Args:
        bases: A, C, G, T (and U, which is read as T).
        unknown: N.
        ambiguous: the other IUPAC codes, which are read as N.
        foreign: every other character and how often it stood there; none of them is DNA.
    """

    bases: int = 0
    unknown: int = 0
    ambiguous: int = 0
    foreign: Counter[str] = field(default_factory=Counter)

    def add(self, text: str) -> int:
        """Count the letters of `text` too; returns how many of them are foreign."""
        data = text.encode("ascii", "ignore")
        others = data.translate(None, _BASES)
        foreign = others.translate(None, _CODES).decode("ascii")
        if len(data) < len(text):
            foreign += "".join(character for character in text if not character.isascii())
        unknown = others.count(b"N") + others.count(b"n")
        self.bases += len(data) - len(others)
        self.unknown += unknown
        self.ambiguous += len(text) - (len(data) - len(others)) - unknown - len(foreign)
        if foreign:
            self.foreign.update(foreign)
        return len(foreign)

    @property
    def total(self) -> int:
        """All characters."""
        return self.bases + self.unknown + self.ambiguous + self.foreign.total()

    @property
    def foreign_share(self) -> float:
        """Foreign characters among all, 0 to 1."""
        return self.foreign.total() / self.total if self.total else 0.0

    def in_words(self) -> str:
        """`1,000 letters, of these 30 N, 2 other IUPAC codes, 5 foreign ('-' 4, 'X' 1)`."""
        parts = [f"{self.unknown:,} N"] if self.unknown else []
        parts += [f"{self.ambiguous:,} other IUPAC codes"] if self.ambiguous else []
        parts += [f"{self.foreign.total():,} foreign ({self.foreign_in_words()})"] if self.foreign else []
        return f"{self.total:,} letters" + (f", of these {', '.join(parts)}" if parts else "")

    def foreign_in_words(self, most: int = 5) -> str:
        """`'-' 4, 'X' 1`, the most frequent first."""
        listed = [f"'{printable(character)}' {count:,}" for character, count in self.foreign.most_common(most)]
        return ", ".join(listed) + (" and others" if len(self.foreign) > most else "")
