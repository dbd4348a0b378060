import pytest
import torch

from gengram import GengramConfig, GengramTokenizer
from gengram.inference.generation import all_but_bases
from gengram.inference.loaded_model import load_model


def test_only_bases_are_generated(tiny_folder):
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    prompt = loaded.tokenizer("ACGT", return_tensors="pt")
    others = all_but_bases(loaded.tokenizer, loaded.model.config)
    assert sorted(others + loaded.tokenizer.nucleotide_ids[:4]) == list(range(loaded.model.config.vocab_size))
    torch.manual_seed(0)
    found = loaded.model.generate(**prompt, max_new_tokens=40, do_sample=True, suppress_tokens=others)
    assert set(loaded.tokenizer.decode(found[0])) == set("ACGT") and found.shape[1] == 44


def test_letters_are_chosen_and_have_to_be_tokens():
    config = GengramConfig()
    others = all_but_bases(GengramTokenizer(), config, "ACGTN")
    assert others == [token for token in range(config.vocab_size) if token not in config.memory_token_ids]
    with pytest.raises(ValueError, match="it lacks X"):
        all_but_bases(GengramTokenizer(), config, "ACX")
