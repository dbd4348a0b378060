"""Serving engines that know no motif memory: whole prompts are right, anything else is refused in plain words."""

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from gengram import GengramForCausalLM, GengramModel


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    """The name under which an engine registers its attention; here it is PyTorch's."""
    if request.param not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(request.param, sdpa_attention_forward)
        AttentionMaskInterface.register(request.param, sdpa_mask)
    return request.param


@torch.no_grad()
def test_whole_prompts_in_one_row_are_those_one_by_one(engine):
    model = tiny_model(GengramModel)
    prompts = [random_ids(1, length, seed=length) for length in (9, 1, 30)]
    alone = torch.cat([model(ids, use_cache=False)[0] for ids in prompts], dim=1)
    model.set_attn_implementation(engine)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in prompts])[None]
    packed = model(torch.cat(prompts, dim=1), position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=SAME_FP32)


def test_a_pass_that_continues_a_sequence_is_refused(engine):
    model = tiny_model(GengramForCausalLM)
    model.set_attn_implementation(engine)
    ids = random_ids(1, 3)
    for positions in ([[30, 0, 1]], [[0, 1, 17]], [[5, 6, 7]]):  # decoding beside a prompt, after it, a chunk
        with pytest.raises(ValueError, match=r"continues a sequence .* only whole prompts .* model\.generate"):
            model(ids, position_ids=torch.tensor(positions), use_cache=False)
    with pytest.raises(ValueError, match="cannot be seen here where sequences begin"):
        model(ids, use_cache=False)


def test_a_model_without_memory_is_left_alone(engine):
    model = tiny_model(GengramForCausalLM, memory_layers=[])
    model.set_attn_implementation(engine)
    model(random_ids(1, 3), position_ids=torch.tensor([[5, 6, 7]]), use_cache=False)


def test_continuous_batching_names_what_to_use_instead():
    model = tiny_model(GengramForCausalLM)
    for start in (lambda: model.generate_batch([[8, 5, 6]], max_new_tokens=2), model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"generate_batch.* no place\. Use generate\(\)"):
            start()
