"""Models spread over two processes by Transformers' `DistributedConfig` compute, learn and are saved as in one."""

import inspect
import os
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import MODEL_GRADIENTS_FP32_RELATIVE, SAME_FP32, SAME_MODEL_FP32
from transformers.distributed import DistributedConfig

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramQuantizationConfig

PROCESSES = 2
HAS_EP_SIZE = "ep_size" in inspect.signature(DistributedConfig).parameters
EXPERTS = {"ep_size": PROCESSES} if HAS_EP_SIZE else {"enable_expert_parallel": True}

# How each model is spread; `fsdp_size` gives each process its part of the batch.
TENSORS = {"tp_plan": "auto"}
SHARDS = {"fsdp_size": PROCESSES}
SPREAD = {
    "dense, tensors": ("dense", TENSORS),
    "dense, shards": ("dense", SHARDS),
    "tied, tensors": ("tied", TENSORS),
    "experts, tensors": ("experts", TENSORS),
    "experts, experts": ("experts", {"tp_size": PROCESSES} | EXPERTS),
    "experts, shards": ("experts", SHARDS),
}
SPREAD_QUANTISED = {
    "experts": {"tp_size": PROCESSES} | EXPERTS,
    "shards": SHARDS,
}
if HAS_EP_SIZE:
    SPREAD["experts, experts and shards"] = ("experts", SHARDS | EXPERTS)
    SPREAD_QUANTISED["experts and shards"] = SHARDS | EXPERTS
QUANTISED = {kind: GengramQuantizationConfig(kind) for kind in ("int8", "int4")}
CHANGES = {
    "dense": {"num_local_experts": 0},
    "tied": {"num_local_experts": 0, "tie_word_embeddings": True},
    "experts": {"hidden_size": 64, "intermediate_size": 64},
}


def model_of(kind):
    model = tiny_model(GengramForCausalLM, **CHANGES[kind])
    if kind == "tied":  # rows of unit length, so that logits are of the order of 1
        with torch.no_grad():
            model.lm_head.weight /= model.config.hidden_size**0.5
    return model


def ids_of(options, rank):
    """The rows that a process computes."""
    ids = random_ids(2 * PROCESSES, 40)
    return ids[2 * rank : 2 * rank + 2] if "fsdp_size" in options else ids


def generate(model, ids):
    return model.generate(ids[:, :20], max_new_tokens=6, min_new_tokens=6, do_sample=False)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compute_and_learn(model, ids):
    """Logits, what is generated, the loss and its gradients; the model has taken a step of training then."""
    with torch.no_grad():
        found = {"logits": model(ids).logits, "generated": generate(model, ids)}
        found["embedded"] = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    found["loss"] = model(ids, labels=ids, use_cache=False).loss
    found["loss"].backward()
    found["gradients"] = {name: whole(weight.grad).clone() for name, weight in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


def in_each_process(rank, folder):
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    found = {}
    for name, (kind, options) in SPREAD.items():
        model = GengramForCausalLM.from_pretrained(folder / kind, distributed_config=DistributedConfig(**options))
        found[name] = compute_and_learn(model.eval(), ids_of(options, rank))
        model.save_pretrained(folder / name)
    model = GengramForMaskedLM.from_pretrained(folder / "tied", distributed_config=DistributedConfig(**TENSORS))
    with torch.no_grad():
        found["masked"] = model.eval()(ids_of(TENSORS, rank)).logits
    for name, options in SPREAD_QUANTISED.items():
        for kind in QUANTISED:
            model = GengramForCausalLM.from_pretrained(folder / kind, distributed_config=DistributedConfig(**options))
            with torch.no_grad():
                ids = ids_of(options, rank)
                found[kind, name] = {"logits": model.eval()(ids).logits, "generated": generate(model, ids)}
            model.save_pretrained(folder / f"{kind}, {name}")
    for kind, config in QUANTISED.items():  # while it is spread
        model = GengramForCausalLM.from_pretrained(
            folder / "experts",
            quantization_config=config,
            distributed_config=DistributedConfig(**SPREAD_QUANTISED["experts"]),
        )
        model.save_pretrained(folder / f"{kind}, at once")
    model = GengramForCausalLM.from_pretrained(folder / "attention", distributed_config=DistributedConfig(**SHARDS))
    with torch.no_grad():
        ids = ids_of(SHARDS, rank)
        found["attention"] = {"logits": model.eval()(ids).logits, "generated": generate(model, ids)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """The folder in which two processes have saved all models, and what each of them found."""
    folder = tmp_path_factory.mktemp("spread")
    for kind in CHANGES:
        model_of(kind).save_pretrained(folder / kind)
    for kind, config in QUANTISED.items():
        GengramForCausalLM.from_pretrained(folder / "experts", quantization_config=config).save_pretrained(
            folder / kind
        )
    config = GengramQuantizationConfig("int4", attention="int8")
    GengramForCausalLM.from_pretrained(folder / "experts", quantization_config=config).save_pretrained(
        folder / "attention"
    )
    torch.multiprocessing.spawn(in_each_process, (folder,), nprocs=PROCESSES)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def check_same(found, model, options):
    """Logits and generated tokens of the processes are those of one model."""
    ids = random_ids(2 * PROCESSES, 40)
    for key in ("logits", "embedded", "generated"):
        parts = [process[key] for process in found if key in process]
        for part in [torch.cat(parts)] if "fsdp_size" in options and parts else parts:
            if key == "generated":
                assert torch.equal(part, generate(model, ids))
            else:
                with torch.no_grad():
                    torch.testing.assert_close(part, model(ids).logits, rtol=0, atol=SAME_FP32)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_are_one(spread, name):
    folder, processes = spread
    kind, options = SPREAD[name]
    found = [process[name] for process in processes]
    model = model_of(kind)
    check_same(found, model, options)
    expected = compute_and_learn(model, random_ids(2 * PROCESSES, 40))
    losses = [process["loss"] for process in found]
    if "fsdp_size" in options:
        losses = [torch.stack(losses).mean()]
    for loss in losses:
        torch.testing.assert_close(loss, expected["loss"], rtol=0, atol=SAME_FP32)
    for process in found:
        assert process["gradients"].keys() == expected["gradients"].keys()
        for weight, gradient in expected["gradients"].items():
            apart = (process["gradients"][weight] - gradient).norm()
            assert apart <= MODEL_GRADIENTS_FP32_RELATIVE * gradient.norm(), weight
    saved = GengramForCausalLM.from_pretrained(folder / name)
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[weight], value, rtol=0, atol=SAME_MODEL_FP32)


@pytest.mark.slow
def test_a_head_that_shares_the_cut_embedding_is_cut_too(spread):
    folder, processes = spread
    with torch.no_grad():
        expected = GengramForMaskedLM.from_pretrained(folder / "tied").eval()(ids_of(TENSORS, 0)).logits
    for process in processes:
        torch.testing.assert_close(process["masked"], expected, rtol=0, atol=SAME_FP32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", SPREAD_QUANTISED)
def test_two_processes_with_quantised_experts_are_one(spread, kind, name):
    folder, processes = spread
    model = GengramForCausalLM.from_pretrained(folder / kind).eval()
    check_same([process[kind, name] for process in processes], model, SPREAD_QUANTISED[name])
    for copy in (name, "at once"):
        saved = GengramForCausalLM.from_pretrained(folder / f"{kind}, {copy}").state_dict()
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[weight], value) for weight, value in model.state_dict().items())


@pytest.mark.slow
def test_two_sharded_processes_with_quantised_attention_are_one(spread):
    folder, processes = spread
    model = GengramForCausalLM.from_pretrained(folder / "attention").eval()
    check_same([process["attention"] for process in processes], model, SHARDS)


def spread_over_two(model, **options):
    sizes = {"tp_size": 1, "fsdp_size": 1, "pp_size": 1, "enable_expert_parallel": False}
    mesh = object()  # nothing is asked of it: the model is refused first
    return GengramForCausalLM.maybe_distribute_model(model, SimpleNamespace(**{**sizes, **options}), mesh)


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_quantised_experts_cannot_do_is_refused_while_loading(kind, tmp_path):
    model_of("experts").save_pretrained(tmp_path)
    model = GengramForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTISED[kind])
    with pytest.raises(ValueError, match=r"would cut quantised weights apart .* Use expert parallelism"):
        spread_over_two(model, tp_size=2)
    with torch.device("meta"):
        unread = GengramForCausalLM(model.config)
    model.hf_quantizer.pre_quantized = False
    model.hf_quantizer.preprocess_model(unread)
    with pytest.raises(ValueError, match=r"fully sharded processes\. Save a quantised folder first"):
        spread_over_two(unread, fsdp_size=2)


def test_a_quantised_attention_is_not_cut(tmp_path):
    model_of("experts").save_pretrained(tmp_path)
    config = GengramQuantizationConfig("int8", attention="int8")
    model = GengramForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for options in ({}, {"enable_expert_parallel": True}):
        with pytest.raises(ValueError, match=r"cut the attention, which is quantised .* Quantise the experts only"):
            spread_over_two(model, tp_size=2, **options)


def test_pipeline_parallelism_is_refused_for_a_memory():
    with pytest.raises(ValueError, match=r"pipeline parallelism \(pp_size\) hands later layers no tokens"):
        spread_over_two(tiny_model(GengramForCausalLM), pp_size=2)


def test_experts_have_a_plan_where_there_are_experts():
    assert tiny_model(GengramForCausalLM)._ep_plan["model.layers.*.mlp.experts.gate_up_proj"] == "grouped_gemm"
    assert tiny_model(GengramForCausalLM, num_local_experts=0)._ep_plan == {}
