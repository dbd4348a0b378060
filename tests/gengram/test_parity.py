"""From the authors' checkpoint to the authors' numbers: convert, load through the Auto classes, compare everything."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from shared_files import FIXTURES, fixture_json, fixture_tensors, needs_fixtures
from tolerances import LOGITS_FP32, LOGITS_FP64
from transformers import AutoModelForCausalLM

import gengram
from gengram.commands.demo import DEMO_DATA
from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf


def checkpoints() -> list[tuple[str, str]]:
    """(folder of the references, checkpoint) of every recorded checkpoint."""
    found = []
    for folder in ("model_a", "model_b", "model_b_optim"):
        for path in sorted((FIXTURES / folder).glob("torch*")):
            found.append((folder.removesuffix("_optim"), f"{folder}/{path.name}"))
    return found


@functools.cache
def references(model: str, kind: str) -> dict[str, torch.Tensor]:
    return fixture_tensors(model, f"reference_{kind}.safetensors")


def cases(model: str, kind: str) -> list[str]:
    return sorted({name.split("/")[0] for name in references(model, kind)})


def load(folder, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert type(model) is gengram.GengramForCausalLM
    return model


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


@needs_fixtures
@torch.no_grad()
@pytest.mark.parametrize(("model", "checkpoint"), checkpoints())
def test_logits_equal_the_authors(model, checkpoint, tmp_path):
    convert_to_hf(FIXTURES / checkpoint, tmp_path / "hf", progress=False)
    for kind, dtype, bound in (("fp32", torch.float32, LOGITS_FP32), ("fp64", torch.float64, LOGITS_FP64)):
        ours = load(tmp_path / "hf", dtype)
        for case in cases(model, kind):
            ids = references(model, "fp32")[f"{case}/input_ids"]
            logits = ours(ids).logits
            assert logits.dtype == dtype
            assert difference(logits, references(model, kind)[f"{case}/logits"]) < bound, (kind, case)


@needs_fixtures
@torch.no_grad()
@pytest.mark.parametrize("model", ["model_a", "model_b"])
def test_every_layer_equals_the_authors(model, tmp_path):
    checkpoint = next(name for folder, name in checkpoints() if folder == model)
    convert_to_hf(FIXTURES / checkpoint, tmp_path / "hf", progress=False)
    ours = load(tmp_path / "hf", torch.float32)
    config, reference = ours.config, references(model, "fp32")
    residuals, after_memory = {}, {}
    for layer in config.memory_layers:
        memory = ours.model.layers[layer].motif_memory
        memory.register_forward_hook(lambda _m, _i, out, i=layer: residuals.__setitem__(i, out[0]))
        norm = ours.model.layers[layer].input_layernorm
        norm.register_forward_pre_hook(lambda _m, args, i=layer: after_memory.__setitem__(i, args[0]))
    compared = 0
    for case in cases(model, "fp32"):
        if f"{case}/hidden.embed" not in reference:
            continue
        ids = reference[f"{case}/input_ids"]
        outputs = ours(ids, output_hidden_states=True, output_router_logits=True, output_memory_residual_norms=True)
        expected = {"hidden.embed": outputs.hidden_states[0], "hidden.final_norm": outputs.hidden_states[-1]}
        for layer in range(config.num_hidden_layers - 1):  # the last one is recorded after the final norm
            expected[f"hidden.layer.{layer}"] = outputs.hidden_states[layer + 1]
        for index, layer in enumerate(config.memory_layers):
            expected[f"gengram_residual.{layer}"] = residuals[layer]
            expected[f"hidden.post_gengram.{layer}"] = after_memory[layer]
            norms = reference[f"{case}/gengram_residual.{layer}"].norm(dim=-1)
            assert difference(outputs.memory_residual_norms[index], norms) < LOGITS_FP32
        for layer, logits in enumerate(outputs.router_logits):
            chosen, indices = logits.topk(config.num_experts_per_tok)
            weights = torch.zeros_like(logits).scatter(1, indices, chosen.softmax(-1))
            expected[f"router_probs.{layer}"] = weights.view(*ids.shape, -1)
        for name, value in expected.items():
            assert difference(value, reference[f"{case}/{name}"]) < LOGITS_FP32, (case, name)
            compared += 1
    assert compared > 50


@needs_fixtures
@torch.no_grad()
@pytest.mark.parametrize("model", ["model_a", "model_b"])
def test_bfloat16_logits_are_statistically_the_authors(model, tmp_path):
    """In bfloat16 a rounding may flip an expert; most logits must still be near, relative to the spread of logits."""
    checkpoint = next(name for folder, name in checkpoints() if folder == model)
    convert_to_hf(FIXTURES / checkpoint, tmp_path / "hf", progress=False)
    ours = load(tmp_path / "hf", torch.bfloat16)
    exact, theirs = references(model, "fp32"), references(model, "bf16")
    errors = {"ours": [], "theirs": []}
    for case in cases(model, "bf16"):
        truth = exact[f"{case}/logits"]
        errors["ours"].append((ours(exact[f"{case}/input_ids"]).logits.float() - truth).abs().flatten())
        errors["theirs"].append((theirs[f"{case}/logits"].float() - truth).abs().flatten())
    median = {name: torch.cat(values).median().item() for name, values in errors.items()}
    assert median["ours"] < 2 * median["theirs"], median


@torch.no_grad()
def test_bundled_checkpoint_gives_the_authors_logits(tmp_path):
    convert_to_hf(DEMO_DATA / "tiny_checkpoint", tmp_path / "hf", progress=False)
    reference = load_file(DEMO_DATA / "reference_logits.safetensors")
    logits = load(tmp_path / "hf", torch.float32)(reference["input_ids"]).logits
    assert difference(logits, reference["logits"]) < LOGITS_FP32


@needs_fixtures
def test_original_crashes_where_ours_does_not():
    """The recorded crash list of the original: lengths 3 and 4 where the largest k-mer is 6."""
    crashed = fixture_json("module_gengram", "index.json")["variants"]["w21_conv"]["errors"]
    assert set(crashed) == {"s=3", "s=4"}
