"""The Rust pipeline that `tokenizer.json` holds, and its byte table."""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .byte_table import ByteTable

# Ids are positions: `tokenizer/one_hot.bpe.model` of the authors, then the tokens that Megatron's wrapper adds to it.
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "G", "T", "A", "N")
MEGATRON_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<BOS>", "<EOS>")
# What is read as a letter beside the letter itself: soft-masked bases, uracil, the IUPAC ambiguity codes.
_READ_AS = {"A": "a", "C": "c", "G": "g", "T": "tUu", "N": "nRYSWKMBDHVryswkmbdhv"}


def build_backend(vocabulary: dict[str, int], unk_token: str) -> Tokenizer:
    """
    The pipeline that `tokenizer.json` holds: normalize letters, cut into characters, look each up.

    WordPiece over single characters, because WordLevel renumbers its ids when saved, and because the token
    classification pipeline takes the tokens of a blank-free string for one word unless the model has a
    `continuing_subword_prefix`.
    """
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unk_token, continuing_subword_prefix="##"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"[{others}]"), letter) for letter, others in _READ_AS.items()]
    )
    backend.pre_tokenizer = pre_tokenizers.FixedLength(length=1)
    backend.decoder = decoders.Fuse()
    bracketed = [token for token in vocabulary if token.startswith("[") and token.endswith("]")]
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*bracketed, *MEGATRON_TOKENS)])
    return backend


_DEFAULT_BACKEND = json.loads(build_backend({t: i for i, t in enumerate(VOCABULARY)}, "[UNK]").to_str())


@functools.lru_cache(maxsize=64)
def byte_table(serialized_backend: str) -> ByteTable | None:
    """The table of a backend; None if its pipeline is not the one of `build_backend`."""
    backend = Tokenizer.from_str(serialized_backend)
    backend.no_truncation()
    backend.no_padding()
    return ByteTable.of(backend, _DEFAULT_BACKEND)
