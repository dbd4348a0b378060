"""Quantised experts beside brute force in float64, through loading, saving, training of adapters and compiling."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_ids, tiny_model
from tolerances import QUANTIZED_PRODUCT, QUANTIZED_PRODUCT_BF16, SAME_FP32
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, FineGrainedFP8Config
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gengram import GengramForCausalLM, GengramQuantizationConfig
from gengram.modeling_gengram import quantized_experts
from gengram.modeling_gengram.quantized_experts import _linear, dequantize, quantize
from gengram.motif_memory.ways import native

KINDS = ["int8", "int4"]


def by_hand(numbers, scale, kind):
    """Weights of one matrix from its stored bytes, written from the description of the format."""
    rows = []
    for row, scales in zip(numbers.tolist(), scale.double().tolist(), strict=True):
        if kind == "int8":
            rows.append([number * scales for number in row])
            continue
        weights = []
        for group, one in enumerate(scales):
            octets = row[16 * group : 16 * group + 16]
            weights += [((octet % 16) - 8) * one for octet in octets] + [((octet // 16) - 8) * one for octet in octets]
        rows.append(weights)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(GengramForCausalLM, intermediate_size=64, head_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, folder, tmp_path_factory):
    """A kind, a model that was quantised while it was loaded, and the folder it was saved in."""
    config = GengramQuantizationConfig(experts=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    saved = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(saved)
    return request.param, model, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_off_by_at_most_half_a_step(kind, dtype):
    weight = (torch.randn(3, 5, 96) * torch.logspace(-3, 0, 5)[:, None]).to(dtype)
    numbers, scale = quantize(weight, kind)
    found = torch.stack([by_hand(n, s, kind) for n, s in zip(numbers, scale, strict=True)])
    assert torch.equal(dequantize(numbers, scale, torch.float64), found)
    step = scale.double().abs().unsqueeze(-1)
    step = step if kind == "int8" else step.repeat_interleave(32, -1).reshape(weight.shape)
    # A weight of the sign opposite to the largest may lie beyond the last of 16 steps: at 8.5 of 7 at most.
    most = 0.51 if kind == "int8" else 1.53
    assert bool(((found - weight.double()).abs() <= most * step).all())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_refused(kind):
    numbers, scale = quantize(torch.zeros(1, 2, 32), kind)
    assert not dequantize(numbers, scale, torch.float32).any()
    weight = torch.ones(1, 2, 32)
    weight[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, kind)


def test_int4_has_a_smaller_error_than_rounding_to_the_largest_number():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = (dequantize(*quantize(weight, "int4"), torch.float32) - weight).square().mean()
    groups = weight.view(64, 8, 32)
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().mean()
    assert error < 0.85 * plain


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_those_of_the_stored_weights(kind, dtype, tokens, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(quantized_experts, "_has_native_product", lambda x, numbers: False)
    elif not native.status().available:
        pytest.skip(native.status().reason)
    generator = torch.Generator().manual_seed(tokens)
    numbers, scale = quantize(torch.randn(4, 9, 64, generator=generator).to(dtype), kind)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    experts = torch.randint(5, (tokens,), generator=generator).sort().values  # 4: no expert
    expected = torch.zeros(tokens, 9, dtype=torch.float64)
    for token, expert in enumerate(experts.tolist()):
        if expert < 4:
            expected[token] = by_hand(numbers[expert], scale[expert], kind) @ x[token].double()
    found = _linear(x, numbers, scale, experts)
    assert found.dtype == dtype
    tolerance = QUANTIZED_PRODUCT if dtype == torch.float32 else QUANTIZED_PRODUCT_BF16
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [40, 64, 136])
@pytest.mark.parametrize("offset", [0, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_numbers_may_stand_anywhere_in_memory_and_have_rows_of_any_length(dtype, columns, offset, tokens):
    """As in a file that is mapped; PyTorch's kernel of AVX-512 ended the process, or gave numbers of 1e34."""
    numbers, scale = quantize(torch.randn(2, 64, columns).to(dtype), "int8")
    memory = torch.zeros(numbers.numel() + 64, dtype=torch.int8)
    start = -memory.data_ptr() % 64 + offset
    moved = memory[start : start + numbers.numel()].view(numbers.shape).copy_(numbers)
    values = torch.randn(tokens * columns + 1).to(dtype)
    x = values[1:].view(tokens, columns)  # 2 bytes behind an aligned address
    for hidden in (x, x.clone()):
        found = _linear(hidden, moved, scale, torch.ones(tokens, dtype=torch.int64)).double()
        expected = x.double() @ by_hand(numbers[1], scale[1], "int8").T
        assert (found - expected).norm() <= QUANTIZED_PRODUCT_BF16 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_whole_numbers_that_float16_cannot_hold(kind, dtype):
    numbers, scale = quantize(torch.full((1, 32, 1024), 0.02, dtype=dtype), kind)
    x = torch.full((40, 1024), 100.0, dtype=dtype, requires_grad=True)
    found = _linear(x, numbers, scale, torch.zeros(40, dtype=torch.int64))
    assert bool(((found.double() - 2048).abs() <= QUANTIZED_PRODUCT_BF16 * 2048).all())
    found.backward(torch.full_like(found, 100.0))
    assert bool(((x.grad.double() - 64).abs() <= QUANTIZED_PRODUCT_BF16 * 64).all())


@pytest.mark.parametrize("kind", KINDS)
def test_small_weights_in_float16_are_not_cut_off(kind):
    weight = (torch.randn(6, 64).clamp(-2, 2) * torch.logspace(-8, -4, 6)[:, None]).half()
    numbers, scale = quantize(weight, kind)
    step = (scale.double().abs().unsqueeze(-1)).repeat_interleave(64 if kind == "int8" else 32, -1)
    step = step.reshape(weight.shape)
    most = 0.5 if kind == "int8" else 1.53  # of a step; see above
    assert bool(((by_hand(numbers, scale, kind) - weight.double()).abs() <= most * step).all())
    largest = weight.double().abs().amax(-1, keepdim=True)
    assert bool((step <= (largest / 127 if kind == "int8" else largest / 7.5) + 2.0**-24).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_at_the_end_of_the_range_stay_finite(kind, dtype):
    weight = 2 * torch.rand(300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    weight[:, 0] = torch.linspace(0.9, 1, 300)
    weight = (weight * torch.finfo(dtype).max).to(dtype)
    numbers, scale = quantize(weight, kind)
    found = dequantize(numbers, scale, dtype)
    step = weight.double().abs().amax(-1, keepdim=True) / (127 if kind == "int8" else 7.5)
    assert torch.isfinite(found).all()
    most = 1.01 if kind == "int8" else 1.53
    assert bool(((found.double() - weight.double()).abs() <= most * step).all())


@pytest.mark.skipif(not native.status().available, reason=native.status().reason)
@pytest.mark.parametrize("columns", [32, 96, 80])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16])
def test_the_native_product_takes_any_number_of_rows_and_tokens(tokens, columns):
    for kind in KINDS if columns % 32 == 0 else ["int8"]:
        numbers, scale = quantize(torch.randn(35, columns), kind)
        x = torch.randn(tokens, 2 * columns)[:, ::2]
        expected = x.double() @ by_hand(numbers, scale, kind).T
        found = torch.ops.gengram_native.quantized_product(x, numbers, scale)
        assert (found - expected).norm() <= QUANTIZED_PRODUCT * expected.norm()


@pytest.mark.skipif(not native.status().available, reason=native.status().reason)
def test_the_native_product_refuses_what_does_not_fit():
    numbers, scale = quantize(torch.randn(4, 32), "int8")
    product = torch.ops.gengram_native.quantized_product
    with pytest.raises(RuntimeError, match=r"numbers .rows, columns."):
        product(torch.randn(1, 48), numbers, scale)
    with pytest.raises(RuntimeError, match="scale must be Float"):
        product(torch.randn(1, 32), numbers, scale.half())
    with pytest.raises(RuntimeError, match="int8 or uint8"):
        product(torch.randn(1, 32), numbers.int(), scale)
    assert product(torch.randn(0, 32), numbers, scale).shape == (0, 4)


def test_the_kernel_for_gpus_multiplies_as_the_stored_weights_do():
    """Triton's interpreter runs it here; `test_on_a_gpu.py` runs it on a GPU."""
    pytest.importorskip("triton")
    code = """if True:
        import torch
        from gengram.modeling_gengram.quantized_experts import dequantize, quantize
        from gengram.modeling_gengram.quantized_on_gpu import products_of_few

        torch.manual_seed(0)
        for kind, dtype, rows, columns in [
            ("int8", torch.float32, 33, 80), ("int8", torch.bfloat16, 16, 600), ("int4", torch.float32, 33, 96),
            ("int4", torch.float16, 7, 1120), ("int4", torch.bfloat16, 16, 32),
        ]:
            numbers, scale = quantize(torch.randn(3, rows, columns, dtype=dtype), kind)
            x, experts = torch.randn(5, columns, dtype=dtype), torch.tensor([2, 0, 3, 1, 2])
            apart = [part.repeat_interleave(2, -1)[..., ::2] for part in (x, numbers, scale)]
            found = products_of_few(*apart, experts).double()
            weights = torch.cat([dequantize(numbers, scale.double(), torch.float64), torch.zeros(1, rows, columns)])
            truth = torch.einsum("tc,trc->tr", x.double(), weights[experts])
            error = (found - truth).norm() / truth.norm()
            assert found[2].eq(0).all() and error < 4 * torch.finfo(dtype).eps, (kind, dtype, error)
        assert products_of_few(x[:0], numbers, scale, experts[:0]).shape == (0, rows)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_has_shapes_and_gradients_for_the_compiler(kind):
    numbers, scale = quantize(torch.randn(3, 8, 32), kind)
    x = torch.randn(5, 32, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_linear, (x, numbers, scale, torch.tensor([0, 0, 1, 2, 2])), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind):
    numbers, scale = quantize(torch.randn(3, 8, 32, dtype=torch.float64), kind)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([0, 0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda x: _linear(x, numbers, scale, experts), x)


def test_few_tokens_on_a_gpu_are_not_sorted_by_expert_and_give_the_same(quantized, monkeypatch):
    """The kernel's place is taken by the products of any number of tokens, which want them sorted."""
    _, model, _ = quantized
    ids = random_ids(2, 7)
    expected = model(ids).logits

    def one_by_one(x, numbers, scale, experts):
        rows = [_linear(x[i : i + 1], numbers, scale, experts[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)

    monkeypatch.setattr(quantized_experts, "are_few_on_gpu", lambda x, copies=1: True)
    monkeypatch.setattr(quantized_experts, "products_of_few", one_by_one)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=SAME_FP32)


def test_a_quantised_model_computes_what_its_weights_say(quantized):
    kind, model, saved = quantized
    plain = AutoModelForCausalLM.from_pretrained(saved).dequantize().eval()
    stack = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        expected = torch.stack(
            [by_hand(n, s, kind) for n, s in zip(getattr(stack, name), getattr(stack, f"{name}_scale"), strict=True)]
        )
        assert torch.equal(getattr(plain.model.layers[1].mlp.experts, name).double(), expected.float().double())
    ids = random_ids(2, 40)
    expected, found = plain(ids).logits, model(ids).logits
    assert (found - expected).norm() <= QUANTIZED_PRODUCT * expected.norm()
    assert not hasattr(plain.config, "quantization_config")


def test_only_the_experts_are_quantised(quantized, folder):
    kind, model, _ = quantized
    whole = GengramForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(weight, whole[name]), name
        elif not name.endswith("_scale"):
            assert weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts." in n)


def test_a_saved_folder_loads_without_options_and_is_saved_again_the_same(quantized, tmp_path):
    kind, model, saved = quantized
    fields = json.loads((saved / "config.json").read_text())
    assert fields["quantization_config"] == {"quant_method": "gengram_experts", "experts": kind, "attention": None}
    loaded, notes = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(notes.values())
    ids = random_ids(2, 30)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == fields


def test_the_code_in_a_saved_folder_loads_it_without_the_package(quantized, tmp_path):
    kind, model, saved = quantized
    if kind == "int8":
        pytest.skip("one kind is enough: it takes a process of its own")
    ids = random_ids(1, 20)
    torch.save(ids, tmp_path / "ids.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
assert not any(name.partition(".")[0] == "gengram" for name in sys.modules)
torch.save(model(torch.load({str(tmp_path / "ids.pt")!r})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    home = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", script], check=True, env=home, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")  # without native kernels
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=SAME_FP32)


def test_copies_of_the_code_in_one_process_quantise_attention_each(folder, tmp_path):
    """Every folder's code is a module of its own; the quantiser is that of the first."""
    for name in ("first", "second"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=GengramQuantizationConfig("int8", attention="int8")
        )
        model.save_pretrained(tmp_path / name)
        with open(tmp_path / name / "modeling_gengram_losses.py", "a") as file:
            file.write(f"# {name}\n")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
found = []
for name in ("first", "second"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    found.append(model(torch.tensor([[8, 5, 6, 7, 8]])).logits.detach())
assert not any(name.partition(".")[0] == "gengram" for name in sys.modules)
assert len({name for name in sys.modules if name.endswith(".modeling_gengram")}) == 2
assert torch.equal(*found)
"""
    home = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", script], check=True, env=home, cwd=tmp_path)


def test_another_head_takes_a_quantised_folder(quantized):
    _, model, saved = quantized
    masked = AutoModelForMaskedLM.from_pretrained(saved)
    ids = random_ids(1, 20)
    assert torch.equal(masked.model(ids, is_causal=True)[0], model.model(ids)[0])


def test_a_quantised_folder_loads_in_another_dtype(quantized):
    _, model, saved = quantized
    narrow = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert (
        narrow.model.layers[0].mlp.experts.gate_up_proj.dtype == model.model.layers[0].mlp.experts.gate_up_proj.dtype
    )
    assert torch.isfinite(narrow(random_ids(1, 20)).logits).all()
    experts = [layer.mlp.experts for layer in narrow.model.layers]
    assert all(quantized_experts.is_aligned(weight) for module in experts for weight in module.parameters())


def test_a_quantised_model_generates_as_it_reads(quantized):
    _, model, _ = quantized
    ids = random_ids(1, 20)
    longer = model.generate(ids, max_new_tokens=8, do_sample=False)
    logits = model(longer).logits[0, 19:-1]
    assert torch.equal(logits.argmax(-1), longer[0, 20:])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_takes_quantised_ones(quantized, implementation):
    _, model, saved = quantized
    found = AutoModelForCausalLM.from_pretrained(saved, experts_implementation=implementation)
    ids = random_ids(1, 20)
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_a_layer_of_quantised_experts_compiles_without_a_break(quantized):
    _, model, _ = quantized
    block = model.model.layers[0].mlp
    x = torch.randn(1, 7, 32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), block(x))


def test_lora_on_the_attention_has_the_gradients_of_the_unquantised_weights(quantized):
    _, _, saved = quantized
    ids, gradients = random_ids(2, 30), []
    for model in (
        AutoModelForCausalLM.from_pretrained(saved),
        AutoModelForCausalLM.from_pretrained(saved).dequantize(),
    ):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        adapted(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 10 * QUANTIZED_PRODUCT * gradients[1].norm()


def test_lora_on_the_stored_numbers_is_refused(quantized):
    _, _, saved = quantized
    model = AutoModelForCausalLM.from_pretrained(saved)
    adapted = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"]))
    with pytest.raises(ValueError, match="LoRA on them"):
        adapted(random_ids(1, 10))


@pytest.fixture(scope="module", params=KINDS)
def quantized_attention(request, folder, tmp_path_factory):
    """A kind, a model with experts and attention in it, and the folder it was saved in."""
    config = GengramQuantizationConfig(experts=request.param, attention=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    saved = tmp_path_factory.mktemp("attention")
    model.save_pretrained(saved)
    return request.param, model, saved


def test_quantised_attention_computes_what_its_weights_say(quantized_attention, folder):
    kind, model, saved = quantized_attention
    loaded, notes = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(notes.values())
    ids = random_ids(2, 30)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(saved).dequantize().eval()
    whole = GengramForCausalLM.from_pretrained(folder)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kept = model.model.layers[1].self_attn.get_submodule(name)
        linear = plain.model.layers[1].self_attn.get_submodule(name)
        assert type(linear) is torch.nn.Linear and linear.weight.dtype == torch.float32
        expected = by_hand(kept.qweight, kept.weight_scale, kind)
        assert torch.equal(linear.weight.double(), expected.float().double())
        assert torch.equal(
            linear.weight,
            dequantize(*quantize(whole.get_submodule(f"model.layers.1.self_attn.{name}").weight, kind), torch.float32),
        )
        assert not kept.qweight.requires_grad
    expected, found = plain(ids).logits, model(ids).logits
    assert (found - expected).norm() <= QUANTIZED_PRODUCT * expected.norm()
    longer = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(model(longer).logits[0, 29:-1].argmax(-1), longer[0, 30:])
    attention = torch.compile(model.model.layers[0].self_attn.q_proj, fullgraph=True, backend="eager")
    x = torch.randn(2, 7, 32)
    assert torch.equal(attention(x), model.model.layers[0].self_attn.q_proj(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_on_quantised_attention_train_save_and_load(quantized_attention, options, tmp_path):
    _, _, saved = quantized_attention
    ids, found = random_ids(2, 30), []
    for dequantized in (False, True):
        model = AutoModelForCausalLM.from_pretrained(saved)
        torch.manual_seed(0)
        settings = LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", **options)
        adapted = get_peft_model(model.dequantize() if dequantized else model, settings)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        adapted(ids, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad]))
        if not dequantized:
            adapted.save_pretrained(tmp_path)
            logits = adapted.eval()(ids).logits
    assert found[1].norm() > 0
    assert (found[0] - found[1]).norm() <= 10 * QUANTIZED_PRODUCT * found[1].norm()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)
    for is_safe in (False, True):
        with pytest.raises(ValueError, match="quantised weights cannot be changed"):
            again.merge_and_unload(safe_merge=is_safe)
    again.base_model.model.dequantize()
    merged = again.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert (merged(ids).logits - logits).norm() <= 10 * QUANTIZED_PRODUCT * logits.norm()


def test_quantised_weights_can_be_read_and_not_be_written(quantized_attention):
    kind, model, _ = quantized_attention
    layer = model.model.layers[0].self_attn.q_proj
    numbers = layer.qweight.clone()
    assert torch.equal(layer.weight.double(), by_hand(layer.qweight, layer.weight_scale, kind).float().double())
    assert type(layer.weight + 1) is torch.Tensor and type(layer.weight[0]) is torch.Tensor
    for change in (
        lambda: layer.weight.add_(1),
        lambda: layer.weight.copy_(torch.zeros_like(layer.weight)),
        lambda: setattr(layer.weight, "data", torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="cannot be changed"):
            change()
    assert torch.equal(layer.qweight, numbers)


def test_unfit_models_and_options_are_refused_in_plain_words(folder, tmp_path):
    with pytest.raises(ValueError, match="one of 'int8', 'int4', got 'int3'"):
        GengramQuantizationConfig(experts="int3")
    with pytest.raises(ValueError, match="attention must be one of 'int8', 'int4', got 8"):
        GengramQuantizationConfig(attention=8)
    with pytest.raises(ValueError, match="not 'bits'"):
        GengramQuantizationConfig(bits=4)
    tiny_model(GengramForCausalLM, num_local_experts=0).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=GengramQuantizationConfig())
    tiny_model(GengramForCausalLM, intermediate_size=40).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="multiple of 32"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "narrow", quantization_config=GengramQuantizationConfig(experts="int4")
        )


def test_layers_on_disk_compute_the_same_and_are_not_quantised_there(quantized, folder, tmp_path):
    kind, model, saved = quantized
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)}
    options = {"device_map": places, "offload_folder": str(tmp_path)}
    found = AutoModelForCausalLM.from_pretrained(saved, **options)
    ids = random_ids(1, 20)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=SAME_FP32)
    with pytest.raises(ValueError, match="layers on disk cannot be quantised while they are loaded"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=GengramQuantizationConfig(kind), **options)


class _LinearOnlyConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "linear_only"


class _LinearOnly(HfQuantizer):
    """Does what the libraries' quantisers do to stacked experts: nothing."""

    is_trainable = False

    def is_serializable(self):
        return True


def test_a_quantisation_that_leaves_the_experts_alone_says_so(folder, caplog):
    register_quantization_config("linear_only")(_LinearOnlyConfig)
    register_quantizer("linear_only")(_LinearOnly)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=_LinearOnlyConfig())
    (said,) = [record.message for record in caplog.records if "_LinearOnlyConfig" in record.message]
    assert "leaves 100% of the model's parameters as they are" in said
    assert 'GengramQuantizationConfig(experts="int8")' in said


def test_floats_of_8_bits_count_as_quantised(folder, caplog, monkeypatch):
    """Weights can be made so on any machine, once it says that it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    logging.getLogger("transformers").propagate = True
    config = FineGrainedFP8Config(weight_block_size=(16, 16))
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    experts = [weight for name, weight in model.named_parameters() if name.endswith("experts.down_proj")]
    assert experts and all(weight.dtype == torch.float8_e4m3fn for weight in experts)
    said = " ".join(record.message for record in caplog.records if "as they are" in record.message)
    plain = sum(weight.numel() for weight in model.parameters() if weight.itemsize > 1)
    whole = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(folder).parameters())
    if plain > 0.1 * whole:  # tables of a tiny model; Transformers 5.18 quantises other parts than 5.24
        assert f"leaves {plain / whole:.0%} of" in said and "experts" not in said
    else:
        assert not said


def test_loading_with_the_right_quantisation_is_silent(quantized, caplog):
    _, _, saved = quantized
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(saved)
    assert not [record for record in caplog.records if "as they are" in record.message]


@pytest.mark.parametrize("asked", ["grouped_mm", "batched_mm"])  # the second by `generate` on a GPU
def test_weights_of_torchao_take_the_loop_over_experts(folder, asked):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    kinds = {r"re:.*experts\.(gate_up_proj|down_proj)": torchao.Int8WeightOnlyConfig(version=2)}
    config = TorchAoConfig(torchao.FqnToConfig(kinds))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.set_experts_implementation(asked)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = random_ids(1, 20)
    expected = plain(ids).logits
    assert (model(ids).logits - expected).norm() < 0.05 * expected.norm()
