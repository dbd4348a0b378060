"""The memory module: against the authors' recorded outputs, and against brute force in values and gradients."""

import json

import memory_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_files import FIXTURES, fixture_json, fixture_tensors, needs_fixtures
from tolerances import (
    AS_TRAINED_BF16,
    GRADIENTS_FP32,
    MEMORY_FP32,
    MEMORY_FP64,
    RANDOM_MEMORY_FP64,
    RANDOM_MEMORY_GRADIENT_FP64,
    SAME_FP32,
    ZERO_NORM,
)

from gengram.motif_memory import MemoryState, MotifMemory, MotifMemoryConfig, letter_codes, plan_ngrams
from gengram.motif_memory.ways.choose import memory_path
from gengram.motif_memory.ways.native import status

LETTERS = [8, 5, 6, 7, 9]

FOLDERS = ("module_gengram", "module_gengram_small")


def memory_config(kwargs: dict, **changes) -> MotifMemoryConfig:
    """Our configuration of a module that the original builds with these keyword arguments."""
    return MotifMemoryConfig(
        ngram_sizes=kwargs["ngram_sizes"],
        embedding_dim=kwargs["embed_dim_per_ngram"],
        window=kwargs["window_size"],
        conv_kernel=kwargs["short_conv_kernel_size"] if kwargs["use_short_conv"] else 0,
        conv_dilation=kwargs["short_conv_dilation"],
        **changes,
    )


def plan_for(config: MotifMemoryConfig, ids: torch.Tensor, letters=LETTERS, **arguments):
    return plan_ngrams(letter_codes(ids, letters), config, **arguments)


def run(config: MotifMemoryConfig, weights: dict, hidden: torch.Tensor, ids: torch.Tensor, letters=LETTERS):
    module = MotifMemory(config, hidden.shape[-1]).to(hidden)
    wanted = {name: value.to(hidden.dtype) for name, value in weights.items() if name in module.state_dict()}
    module.load_state_dict(wanted)
    with torch.no_grad():
        return module(hidden, plan_for(config, ids, letters)).residual


def recorded():
    if not FIXTURES.is_dir():
        return []
    return [(folder, variant) for folder in FOLDERS for variant in fixture_json(folder, "index.json")["variants"]]


@needs_fixtures
@pytest.mark.parametrize(("folder", "variant"), recorded())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, MEMORY_FP64), (torch.float32, MEMORY_FP32)])
def test_module_equals_the_authors(folder, variant, dtype, tolerance):
    index = fixture_json(folder, "index.json")["variants"][variant]
    config = memory_config(index["kwargs"])
    weights, inputs = fixture_tensors(folder, "weights.safetensors"), fixture_tensors(folder, "inputs.safetensors")
    outputs = fixture_tensors(folder, f"out_{variant}.safetensors")
    cases = sorted({name.split("/")[0] for name in outputs})
    assert cases
    for case in cases:
        ids = inputs[f"{case}/input_ids"]
        hidden = inputs[f"{case}/hidden_states"].transpose(0, 1).to(dtype)  # (batch, length, hidden)
        expected = outputs[f"{case}/out_fp64"].transpose(0, 1)
        ours = run(config, weights, hidden, ids, index["kwargs"]["dna_token_ids"])
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance, msg=lambda m, c=case: f"{c}: {m}")


@needs_fixtures
def test_plan_equals_the_authors_ngram_ids():
    config = memory_config(fixture_json("module_gengram", "index.json")["variants"]["w21_conv"]["kwargs"])
    inputs = fixture_tensors("module_gengram", "inputs.safetensors")
    outputs = fixture_tensors("module_gengram", "out_w21_conv.safetensors")
    for case in sorted({name.split("/")[0] for name in outputs}):
        plan = plan_for(config, inputs[f"{case}/input_ids"])
        for index, size in enumerate(config.ngram_sizes):
            assert torch.equal(plan.rows(index).long(), outputs[f"{case}/ngram_ids.{size}"].T), (case, size)
            assert torch.equal(plan.valid(index), outputs[f"{case}/ngram_valid.{size}"].T.bool()), (case, size)


@needs_fixtures
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_as_trained_equals_the_authors_in_bfloat16(device):
    """`as_trained` repeats the original's bf16 on CUDA: within rounding of it, where exact pooling is far away."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    kwargs = fixture_json("module_gengram", "index.json")["variants"]["w21_conv"]["kwargs"]
    weights = fixture_tensors("module_gengram", "weights.safetensors")
    inputs = fixture_tensors("module_gengram", "inputs.safetensors")
    outputs = fixture_tensors("module_gengram", "out_w21_conv.safetensors")
    cases = sorted(name.split("/")[0] for name in outputs if name.endswith("out_bf16_cuda_emulated"))
    errors = {}
    for pooling in ("as_trained", "exact"):
        config = memory_config(kwargs, pooling=pooling)
        for case in cases:
            hidden = inputs[f"{case}/hidden_states"].transpose(0, 1).bfloat16().to(device)
            expected = outputs[f"{case}/out_bf16_cuda_emulated"].transpose(0, 1).double()
            ours = run(config, weights, hidden, inputs[f"{case}/input_ids"].to(device)).double().cpu()
            errors[pooling, case] = ((ours - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    for case in cases:
        assert errors["as_trained", case] < AS_TRAINED_BF16, (case, errors)
    assert errors["as_trained", "s150_b1"] < 0.5 * errors["exact", "s150_b1"]


GRADIENTS = dict(rtol=RANDOM_MEMORY_GRADIENT_FP64, atol=RANDOM_MEMORY_GRADIENT_FP64)
sizes_of_ngrams = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(0, 24),
    sizes=sizes_of_ngrams,
    extra=st.integers(0, 6),
    kernel=st.sampled_from([0, 1, 2, 3, 4]),
    dilation=st.integers(1, 3),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_module_equals_brute_force_in_values_and_gradients(length, sizes, extra, kernel, dilation, is_causal, seed):
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randperm(12, generator=generator)[:5].tolist()
    config = MotifMemoryConfig(
        ngram_sizes=sizes,
        embedding_dim=2,
        window=max(sizes) + extra,
        conv_kernel=kernel,
        conv_dilation=dilation,
    )
    module = MotifMemory(config, 6).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    ids = torch.randint(12, (2, length), generator=generator)
    ids = torch.where(torch.rand(2, length, generator=generator) < 0.8, torch.tensor(letters)[ids % 5], ids)
    hidden = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)
    direction = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)

    ours_in = hidden.clone().requires_grad_()
    ours, gate = module(ours_in, plan_for(config, ids, letters, is_causal=is_causal))[:2]
    weights = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    truth_in = hidden.clone().requires_grad_()
    truth = torch.stack(
        [
            memory_oracle.memory(
                truth_in[b],
                ids[b].tolist(),
                weights,
                sizes=sizes,
                window=config.window,
                letters=letters,
                dilation=dilation,
                centred=not is_causal,
            )
            for b in range(2)
        ]
    )
    assert gate.shape == (2, length)
    torch.testing.assert_close(ours, truth, rtol=RANDOM_MEMORY_FP64, atol=RANDOM_MEMORY_FP64)
    if length == 0:
        return
    (ours * direction).sum().backward()
    (truth * direction).sum().backward()
    torch.testing.assert_close(ours_in.grad, truth_in.grad, **GRADIENTS)
    for name, weight in module.named_parameters():
        expected = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weight)
        torch.testing.assert_close(weight.grad, expected, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_rounding(dtype):
    kwargs = dict(
        hidden_size=64,
        dna_token_ids=[8, 5, 6, 7, 9],
        ngram_sizes=[1, 2, 3, 4],
        embed_dim_per_ngram=16,
        window_size=21,
        use_short_conv=True,
        short_conv_kernel_size=4,
        short_conv_dilation=4,
    )
    config = memory_config(kwargs)
    generator = torch.Generator().manual_seed(0)
    module = MotifMemory(config, 64)
    weights = {
        name: (torch.randn(w.shape, generator=generator) / (w.shape[-1] ** 0.5 if w.dim() > 1 else 1)).to(dtype)
        for name, w in module.named_parameters()
    }
    ids = torch.tensor([8, 5, 6, 7, 9])[torch.randint(5, (1, 3000), generator=generator)]
    hidden = torch.randn(1, 3000, 64, generator=generator).to(dtype)
    exact = run(config, {k: v.double() for k, v in weights.items()}, hidden.double(), ids)
    ours = run(config, weights, hidden, ids).double()
    # Where query and key are nearly orthogonal the signed square root magnifies any rounding of the key; the mean
    # over the sequence is of the size of the three roundings that follow one another: features, value, result.
    error = (ours - exact).square().sum(-1)
    size = exact.square().sum(-1)
    assert (error.mean() / size.mean()).sqrt() < torch.finfo(dtype).eps
    early, late = slice(20, 1020), slice(2000, 3000)
    assert error[0, late].mean() / size[0, late].mean() < 2 * error[0, early].mean() / size[0, early].mean()


def test_a_letter_changes_only_what_its_window_and_convolution_reach():
    config = memory_config(
        dict(
            hidden_size=8,
            dna_token_ids=[8, 5, 6, 7, 9],
            ngram_sizes=[1, 2],
            embed_dim_per_ngram=4,
            window_size=5,
            use_short_conv=True,
            short_conv_kernel_size=3,
            short_conv_dilation=2,
        )
    )
    module = MotifMemory(config, 8).double()
    torch.nn.init.normal_(module.short_conv.conv.weight)
    ids = torch.tensor([[8, 5, 6, 7] * 8])
    changed = ids.clone()
    changed[0, 10] = 7
    hidden = torch.randn(1, 32, 8, dtype=torch.float64)
    for is_causal, reached in ((True, range(10, 10 + 5 + 4)), (False, range(10 - 2 - 2, 10 + 3 + 2))):
        with torch.no_grad():
            before, after = (module(hidden, plan_for(config, x, is_causal=is_causal)).residual for x in (ids, changed))
        moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
        assert moved == list(reached)


def test_a_new_memory_initialises_itself():
    memory = MotifMemory(MotifMemoryConfig(embedding_dim=8), 64, initializer_range=0.05)
    for name, weight in memory.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            assert 0.03 < weight.std() < 0.07 and weight.isfinite().all(), name


def test_a_configuration_is_checked_and_goes_through_json():
    config = MotifMemoryConfig(ngram_sizes=[2, 3], embedding_dim=4, window=8)
    assert MotifMemoryConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.conv_dilation == 3 and config.features == 8 and config.conv_context == 9
    for wrong, message in [
        (dict(ngram_sizes=[]), "ngram_sizes must name at least one size"),
        (dict(ngram_sizes=[9], window=8), "window must be at least the largest of ngram_sizes"),
        (dict(norm_eps=float("nan")), "norm_eps must be a finite number"),
        (dict(norm_eps=-1.0), "norm_eps must be"),
        (dict(pooling="mean"), "pooling must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            MotifMemoryConfig(**wrong)


def test_plans_and_codes_of_something_else_are_errors():
    config = MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=4, window=5)
    memory, ids, hidden_states = MotifMemory(config, 8), torch.tensor([[8, 5, 6, 7]]), torch.randn(1, 4, 8)
    plan = plan_for(config, ids)
    assert memory(hidden_states, plan).residual.shape == (1, 4, 8)
    for other in (dict(ngram_sizes=(1,)), dict(window=6)):
        changed = MotifMemoryConfig(**{**config.to_dict(), **other})
        with pytest.raises(ValueError, match="make the plan with the memory's own configuration"):
            memory(hidden_states, plan_for(changed, ids))
    with pytest.raises(ValueError, match=r"expected hidden states of .* \(1, 4, 8\)"):
        memory(hidden_states[:, :3], plan)
    with pytest.raises(TypeError, match="expected a plan"):
        memory(hidden_states, ids)
    with pytest.raises(ValueError, match=r"letter codes 0\.\.5"):
        plan_ngrams(ids, config)
    for letters in ((8, 5, 6, 7), "ACGTN"):
        with pytest.raises(ValueError, match="five token ids"):
            letter_codes(ids, letters)


def test_a_continued_text_has_gradients():
    """Native kernels have none through the history; the way chosen must."""
    config = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=32, window=5)
    torch.manual_seed(0)
    memory, ids, hidden = MotifMemory(config, 32), torch.randint(5, 9, (2, 40)), torch.randn(2, 40, 32)
    for weight in memory.parameters():  # far from 0, where the gate's square root is steep
        torch.nn.init.normal_(weight, mean=0.2, std=0.3)
    whole = memory(hidden, plan_for(config, ids)).residual
    expected = torch.autograd.grad(whole.square().sum(), list(memory.parameters()))
    for lengths in ([40], [30, 10], [37, 1, 1, 1]):
        state, pieces, start = MemoryState(config), [], 0
        for layer_length in lengths:
            part = slice(start, start + layer_length)
            output = memory(hidden[:, part], plan_for(config, ids[:, part], state=state), state)
            state.advance(0, output)
            state.advance_letters(letter_codes(ids[:, part], LETTERS))
            pieces.append(output.residual)
            start += layer_length
        joined = torch.cat(pieces, dim=1)
        torch.testing.assert_close(joined, whole, rtol=0, atol=SAME_FP32)
        found = torch.autograd.grad(joined.square().sum(), list(memory.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= GRADIENTS_FP32 * other.norm().clamp(min=ZERO_NORM)


@pytest.mark.parametrize("path", [{"algorithm": "table_major"}, {"kernels": "native"}])
def test_ways_without_gradients_through_a_history_are_refused(path):
    if "kernels" in path and not status().available:
        pytest.skip(status().reason)
    config = MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=16, window=5)
    memory, ids, hidden = MotifMemory(config, 16), torch.randint(5, 9, (1, 8)), torch.randn(1, 8, 16)
    state = MemoryState(config)
    with torch.no_grad():
        state.advance(0, memory(hidden, plan_for(config, ids, state=state), state))
        state.advance_letters(letter_codes(ids, LETTERS))
    plan = plan_for(config, ids, state=state)
    with (
        memory_path(**path),
        pytest.raises(ValueError, match=r"only the definition has gradients .* torch.no_grad\(\)"),
    ):
        memory(hidden, plan, state)
    with memory_path(**path), torch.no_grad():
        memory(hidden, plan, state)
