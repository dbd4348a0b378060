import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gengram
from gengram import GengramForCausalLM
from gengram.inference.memory_use import fast_memory
from gengram.motif_memory.ways.kept_fold import memories_of


@torch.no_grad()
def test_a_block_folds_once_and_leaves_no_traces():
    model, ids = tiny_model(GengramForCausalLM, hidden_size=8, memory_embedding_dim=48), random_ids(2, 40)
    memories, expected = memories_of(model), model(ids).logits
    assert len(memories) == 2
    with fast_memory(model):
        folds = [memory.kept_fold.fold for memory in memories]
        assert all(fold is not None for fold in folds)
        torch.testing.assert_close(model(ids).logits, expected, atol=SAME_FP32, rtol=0)
        with fast_memory(model):
            assert [memory.kept_fold.fold for memory in memories] == folds
        assert [memory.kept_fold.owners for memory in memories] == [1, 1]
    assert all(memory.kept_fold.fold is None and not memory.kept_fold.owners for memory in memories)


def test_tables_that_would_be_much_larger_than_the_model_are_not_made():
    model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL)
    with fast_memory(model):
        assert all(memory.kept_fold.fold is None for memory in memories_of(model))


@pytest.mark.parametrize("pooling", ["as_trained", None])
def test_models_whose_memory_cannot_be_folded_or_that_have_none(pooling):
    if pooling is None:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=8, num_hidden_layers=1))
    else:
        model = tiny_model(GengramForCausalLM, hidden_size=8, memory_embedding_dim=48, memory_pooling=pooling)
    with fast_memory(model.eval()):
        assert all(memory.kept_fold.fold is None for memory in memories_of(model))
