"""Single tokens, as decoding calls the memory: the brute force's numbers, in few operations."""

import memory_oracle
import pytest
import torch
from graft_hosts import DECODERS, SINGLE, random_ids
from tolerances import RANDOM_MEMORY_FP64
from transformers import DynamicCache

from gengram.motif_memory import (
    MemoryState,
    MotifMemory,
    MotifMemoryConfig,
    attach_memory,
    fold_memory,
    letter_codes,
    memory_path,
    plan_ngrams,
)
from gengram.motif_memory.definition import memory_gate, rms_norm
from gengram.motif_memory.ways import compute, folded
from gengram.motif_memory.ways.one_token import gate_of_few

LETTERS = (3, 1, 4, 0, 2)
CONFIGS = {
    "plain": dict(ngram_sizes=(1, 2, 3), window=7, conv_kernel=3, conv_dilation=2),
    "other order, window of one n-gram": dict(ngram_sizes=(4, 2), window=4, conv_kernel=2, conv_dilation=5),
    "no convolution": dict(ngram_sizes=(1, 3), window=6, conv_kernel=0),
    "one tap": dict(ngram_sizes=(2,), window=5, conv_kernel=1),
}


@pytest.mark.parametrize("algorithm", ["token_major", "folded"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_token_by_token_is_the_brute_force(name, algorithm, monkeypatch):
    config = MotifMemoryConfig(embedding_dim=3, **CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    memory = MotifMemory(config, 6).double().eval()
    for weight in memory.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    ids = torch.randint(5, (2, 60), generator=generator)
    ids[0, 21] = 7  # no letter
    segments = torch.arange(60) // 33
    positions = (torch.arange(60) % 33).expand(2, -1)
    hidden = torch.randn(2, 60, 6, generator=generator, dtype=torch.float64)

    short, place = [], folded if algorithm == "folded" else compute
    of_a_token = place.one_token_memory if algorithm == "folded" else compute.one_token_features
    monkeypatch.setattr(place, of_a_token.__name__, lambda *given: short.append(of_a_token(*given)) or short[-1])
    state, parts = MemoryState(config), []
    with memory_path(algorithm, "torch"):
        for t in range(60):
            codes = letter_codes(ids[:, t : t + 1], LETTERS)
            plan = plan_ngrams(codes, config, positions=positions[:, t : t + 1], state=state)
            output = memory(hidden[:, t : t + 1], plan, state)
            parts.append(output.residual)
            state.advance(memory.layer_idx, output)
            state.advance_letters(codes)
    assert 15 < sum(made is not None for made in short) < 60  # windows full of letters, and others

    truth = [
        memory_oracle.memory(
            hidden[row],
            ids[row].tolist(),
            memory.state_dict(),
            sizes=config.ngram_sizes,
            window=config.window,
            letters=LETTERS,
            dilation=config.conv_dilation or 1,
            segments=segments.tolist(),
        )
        for row in range(2)
    ]
    torch.testing.assert_close(
        torch.cat(parts, dim=1), torch.stack(truth), rtol=RANDOM_MEMORY_FP64, atol=RANDOM_MEMORY_FP64
    )


@pytest.mark.parametrize("is_folded", [False, True])
@torch.no_grad()
def test_a_decoding_step_of_a_graft_takes_few_operations(is_folded):
    """The definition takes some 500 for a memory, most of which pool windows of tokens that are not asked for."""
    ids, counts = random_ids(batch=1, length=60), []
    for memories in (0, 2):
        model = DECODERS["llama"].make()
        if memories:
            attach_memory(model, MotifMemoryConfig(embedding_dim=8), layers=[1, 3], token_letters=SINGLE)
        if memories and is_folded:
            fold_memory(model)
        cache = DynamicCache(config=model.config)
        model(ids[:, :50], past_key_values=cache)
        for place in range(50, 55):
            model(ids[:, place : place + 1], past_key_values=cache)
        with torch.profiler.profile() as profile:
            model(ids[:, 55:56], past_key_values=cache)
        counts.append(sum(event.cpu_parent is None for event in profile.events() if event.name.startswith("aten::")))
    assert (counts[1] - counts[0]) / 2 < 130


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_the_gate_in_numbers_of_python_is_the_definition(eps):
    """Also where nothing is looked up, where numbers are large, and where they are none."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 9, 1, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, generator=generator, dtype=torch.float64)
    query[1], key[2], query[3], key[4] = 1e-9, 0, 1e6, -1e6
    key[5], query[6], key[7, 0, 3], query[8, 0, 2] = query[5] * 1e3 * weight, 0, torch.nan, torch.inf
    norms = [rms_norm(part, torch.ones(16, dtype=torch.float64), eps) for part in (query, key)]
    expected = memory_gate(norms[0] * weight * 1e4, norms[1])
    found = gate_of_few(query, key, weight * 1e4, eps)
    assert found.shape == expected.shape == (9, 1) and 3 < len(found.unique()) and found[7].isnan()
    torch.testing.assert_close(found, expected, rtol=RANDOM_MEMORY_FP64, atol=RANDOM_MEMORY_FP64, equal_nan=True)
