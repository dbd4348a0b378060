"""Generation of bases and nothing else."""

from typing import Any

from ..sequences.alphabet import BASES


def all_but_bases(tokenizer: Any, config: Any, letters: str = BASES) -> list[int]:
    """Ids of all tokens but the bases, for `model.generate(..., suppress_tokens=all_but_bases(tokenizer, config))`.

    The heads of DNA models score special tokens too, and rows that only fill the vocabulary up to a round size.

    Args:
        tokenizer: has one token per base.
        config: of the model; its `vocab_size` counts the scores.
        letters: what may be generated; `"ACGTN"` with unknown bases.

    Raises:
        ValueError: if a letter is no token.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [letter for letter in letters if letter not in vocabulary]
    if missing:
        raise ValueError(f"expected a tokenizer with the tokens {', '.join(letters)}; it lacks {', '.join(missing)}.")
    kept = {vocabulary[letter] for letter in letters}
    return [token for token in range(config.vocab_size) if token not in kept]
