"""Which bases the tokens of a vocabulary spell, and what that makes of a batch of ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LETTERS = "ACGTN"  # in the order of the tables' digits
_AMINO_ACIDS = "EFILPQ"  # letters of proteins that are no code of DNA
_MOST_TOKENS_OF_PROTEIN = 128  # vocabularies of bytes have more, and every letter too
_WORD_STARTS = "Ġ▁"  # in front of what follows a blank, in vocabularies of byte pairs
_WITHIN_WORD = "##"  # in front of what does not, in those of WordPiece
_WORD_END = "</w>"
_WORD_GOES_ON = "@@"  # behind what does not end a word, in those of subword-nmt
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # of vocabularies that spell unknown characters in bytes


def token_letters_of(tokenizer: Any) -> list[str]:
    """The bases that each token spells, upper case, `""` for a token that is no DNA; U is read as T.

    Raises:
        ValueError: if the vocabulary is of proteins, or no token spells DNA.
    """
    vocabulary = tokenizer.get_vocab()
    plain = {_plain(token).upper() for token in vocabulary}
    if len(vocabulary) < _MOST_TOKENS_OF_PROTEIN and set(_AMINO_ACIDS) <= plain:
        raise ValueError(
            f"the tokens of {type(tokenizer).__name__} are amino acids, among which A, C, G and T are no bases; give "
            "token_letters, the string of bases of each token, if they are to be read as DNA."
        )
    special = set(tokenizer.all_special_ids)
    letters = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        spelled = _as_dna(_plain(token))
        is_word = index not in special or spelled == "N"  # N may stand for what is unknown
        if is_word and spelled and not set(spelled) - set(_LETTERS):
            letters[index] = spelled
    if not any(letters):
        raise ValueError(f"no token of {type(tokenizer).__name__} spells DNA; give token_letters.")
    return letters


def _plain(token: str) -> str:
    """A token without what says where in a word it stands; of a single byte, its character."""
    if byte := _BYTE.fullmatch(token):
        return chr(int(byte[1], 16))
    return token.lstrip(_WORD_STARTS).removeprefix(_WITHIN_WORD).removesuffix(_WORD_END).removesuffix(_WORD_GOES_ON)


def check_token_letters(token_letters: Sequence[str], vocabulary: int | None) -> list[str]:
    """The same strings in upper case, with T for U.

    Args:
        token_letters: of every token.
        vocabulary: rows of the model's embedding, None if not known.

    Raises:
        ValueError: if a string holds anything but A, C, G, T and N, or the model has fewer tokens.
    """
    letters = [_as_dna(str(spelled)) for spelled in token_letters]
    for index, spelled in enumerate(letters):
        if set(spelled) - set(_LETTERS):
            raise ValueError(f"token_letters[{index}]: expected A, C, G, T and N only, or '', got {spelled[:40]!r}.")
    if not any(letters):
        raise ValueError("token_letters: expected at least one token that spells DNA, got none.")
    if vocabulary is not None and len(letters) > vocabulary and any(letters[vocabulary:]):
        raise ValueError(f"token_letters has {len(letters)} tokens, but the model only {vocabulary}.")
    return letters


def _as_dna(text: str) -> str:
    return text.upper().replace("U", "T")


@dataclass(frozen=True)  # torch.compile of PyTorch 2.9 reads no property of a NamedTuple
class Spelling:
    """The letters of a vocabulary's tokens as tensors."""

    codes: torch.Tensor  # (tokens, longest): 1..5 for A, C, G, T, N, 0 behind the end
    counts: torch.Tensor  # (tokens,): letters of each token; 1 for a token without any, which is a gap of one

    @classmethod
    def of(cls, token_letters: Sequence[str]) -> "Spelling":
        """The tensors of these strings."""
        longest = max(1, max(map(len, token_letters)))
        rows = [[_LETTERS.index(letter) + 1 for letter in word] for word in token_letters]
        codes = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        return cls(codes, torch.tensor([max(1, len(row)) for row in rows], dtype=torch.int64))

    @property
    def is_of_single_bases(self) -> bool:
        """Whether a token is a position of the memory."""
        return self.codes.shape[1] == 1

    def to(self, device: torch.device) -> "Spelling":
        """On another device."""
        return Spelling(self.codes.to(device), self.counts.to(device))

    def known(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids with those behind the end of the list, which spell nothing, as -1."""
        return torch.where((input_ids >= 0) & (input_ids < len(self.counts)), input_ids, -1)

    def letter_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Of single bases: the letter code of each id, (batch, length); 0 for -1."""
        return self.codes[:, 0][ids.clamp_min(0)].masked_fill(ids < 0, 0)

    def spelled(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The letters of rows of tokens, written out.

        Args:
            ids: (batch, length) from `known`; -1 is a gap of one letter.

        Returns:
            codes (batch, letters), rows filled up with 0 behind their end; the place of each token's last letter and
            the number of its letters, both (batch, length).
        """
        counts = torch.where(ids < 0, 1, self.counts[ids.clamp_min(0)])
        last = counts.cumsum(1) - 1
        longest = self.codes.shape[1]
        if torch.compiler.is_compiling() or not ids.numel():
            letters = ids.shape[1] * longest
        else:
            letters = int(last[:, -1].max()) + 1
        within = torch.arange(longest, device=ids.device)
        places = (last - counts + 1).unsqueeze(-1) + within  # (batch, length, longest)
        places = places.masked_fill(within >= counts.unsqueeze(-1), letters)  # where nothing is read
        words = self.codes[ids.clamp_min(0)].masked_fill((ids < 0).unsqueeze(-1), 0)
        codes = torch.zeros(ids.shape[0], letters + 1, dtype=torch.int64, device=ids.device)
        codes.scatter_(1, places.flatten(1), words.flatten(1))
        return codes[:, :letters], last, counts
