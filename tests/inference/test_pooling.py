import pytest
import torch

from gengram.configuration.configuration_gengram import SEQUENCE_POOLINGS
from gengram.inference.pooling import POOLINGS, pool
from gengram.modeling_gengram.modeling_gengram import pool_hidden_states

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 0]])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_pooled_as_the_heads_of_the_model_do(pooling):
    assert POOLINGS == SEQUENCE_POOLINGS
    hidden = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool(hidden, MASK, pooling), pool_hidden_states(hidden, MASK, pooling))


def test_an_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match="expected a pooling of"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "median")
