"""A saved tiny model, for tests of what loads one by its name."""

import pytest
from tiny_models import tiny_model

from gengram import GengramForCausalLM, GengramTokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny causal model with 48 tokens of context, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    model = tiny_model(GengramForCausalLM, max_position_embeddings=48)
    model.save_pretrained(folder)
    GengramTokenizer(model_max_length=48).save_pretrained(folder)
    return folder
