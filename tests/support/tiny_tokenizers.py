"""Small tokenizers of other models."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def one_per_base(letters: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of these letters, and what the template puts around a sequence."""
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template:
        special = [("[CLS]", 1), ("[SEP]", 2)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
