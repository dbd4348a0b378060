"""A model gives the same numbers whichever way its memories are computed, and takes the intended way."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import MODEL_GRADIENTS_FP32, MODEL_GRADIENTS_FP32_RELATIVE, SAME_FP32
from transformers import DynamicCache

import gengram
from gengram import GengramForCausalLM, GengramForMaskedLM, memory_path
from gengram.motif_memory import plan_ngrams
from gengram.motif_memory.ways import choose, compute, kept_fold

CLOSE = dict(rtol=0, atol=SAME_FP32)
GRADIENTS = dict(rtol=MODEL_GRADIENTS_FP32_RELATIVE, atol=MODEL_GRADIENTS_FP32)


def memories(model):
    return [layer.motif_memory for layer in model.model.layers if layer.motif_memory is not None]


def folds(model):
    return [memory.kept_fold.fold for memory in memories(model)]


@pytest.fixture
def algorithms(monkeypatch):
    """The algorithms taken, one entry per memory layer and pass."""
    taken = []

    def choose(*states, **arguments):
        taken.append(original(*states, **arguments))
        return taken[-1]

    class Names(list):
        def __getitem__(self, which):
            found = taken[which]
            return [way.algorithm for way in found] if isinstance(which, slice) else found.algorithm

        def __iter__(self):
            return (way.algorithm for way in taken)

        def __len__(self):
            return len(taken)

    original = compute.choose_way
    monkeypatch.setattr(compute, "choose_way", choose)
    return Names()


@torch.no_grad()
@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
@pytest.mark.parametrize("algorithm", ["folded", "table_major"])
def test_all_ways_give_the_same_numbers(head, algorithm):
    model, ids = tiny_model(head), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (torch.arange(60) % 37).expand(2, -1)
    for inputs in (dict(), dict(attention_mask=mask), dict(position_ids=positions, use_cache=False)):
        with memory_path("token_major", "torch"):
            expected = model(ids, **inputs).logits
        with memory_path(algorithm, "torch"):
            logits = model(ids, **inputs).logits
        kept = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask, dtype=torch.bool)
        assert not torch.equal(logits, expected)  # another way was taken
        torch.testing.assert_close(logits[kept], expected[kept], **CLOSE)


def test_gradients_are_the_same_through_tokens_and_through_tables():
    model, ids = tiny_model(GengramForCausalLM).train(), random_ids(2, 50)
    gradients = {}
    for algorithm in ("token_major", "table_major"):
        model.zero_grad()
        with memory_path(algorithm, "torch"):
            model(ids, labels=ids).loss.backward()
        gradients[algorithm] = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    for name, truth in gradients["token_major"].items():
        torch.testing.assert_close(gradients["table_major"][name], truth, **GRADIENTS, msg=name)


def test_training_is_the_same_every_time():
    model, ids = tiny_model(GengramForCausalLM).train(), random_ids(2, 50)
    runs = []
    for _ in range(2):
        model.zero_grad()
        with memory_path("table_major"):
            model(ids, labels=ids).loss.backward()
        runs.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_long_pass_folds_by_itself_and_training_does_not(algorithms, monkeypatch):
    monkeypatch.setattr(kept_fold, "tokens_to_repay", lambda weights, plan: 20)
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 20, non_letters=0)
    model(ids)
    assert set(algorithms) == {"token_major"} and folds(model) == [None, None]
    with torch.no_grad():
        model(ids[:, :19])
        assert set(algorithms) == {"token_major"} and folds(model) == [None, None]
        model(ids)
        assert algorithms[-2:] == ["folded"] * 2 and None not in folds(model)
        before = folds(model)
        model(ids)
        assert all(a is b for a, b in zip(before, folds(model), strict=True))
        model(ids[:, :5])
        assert algorithms[-2:] == ["token_major"] * 2  # as if there were no folded tables
        alone = tiny_model(GengramForCausalLM)(ids[:, :5]).logits
        assert torch.equal(model(ids[:, :5]).logits, alone)  # the same bits, whatever was computed before
        model.train()(ids)
    assert algorithms[-2:] == ["token_major"] * 2 and folds(model) == [None, None]
    model(random_ids(8, 1200))
    assert algorithms[-2:] == ["table_major"] * 2


@torch.no_grad()
def test_a_short_pass_makes_no_fold(algorithms):
    model = GengramForCausalLM.from_pretrained(gengram.DEFAULT_MODEL).eval()
    model(random_ids(1, 8))
    assert set(algorithms) == {"token_major"} and folds(model) == [None]


@torch.no_grad()
def test_few_full_windows_are_not_folded(algorithms, monkeypatch):
    monkeypatch.setattr(kept_fold, "tokens_to_repay", lambda weights, plan: 0)
    model = tiny_model(GengramForMaskedLM)
    model(random_ids(1, 200, non_letters=0.3))
    assert set(algorithms) == {"token_major"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_get_float16_tables(dtype):
    model, ids = tiny_model(GengramForCausalLM).to(dtype), random_ids(1, 40, non_letters=0)
    memory, hidden = memories(model)[0], torch.randn(1, 40, 32).to(dtype)
    plan = plan_ngrams(model.model._letter_codes(ids, None), model.config.memory)
    with memory_path("folded"):
        ours = memory(hidden, plan).residual.double()
    assert folds(model)[0].tables.rows.dtype == torch.float16
    with memory_path("token_major", "torch"):
        exact = memory.double()(hidden.double(), plan).residual
    assert (ours - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_decoding_equals_prefill():
    model, ids = tiny_model(GengramForCausalLM).fold_memory(torch.float16), random_ids(2, 40)
    with memory_path("folded"):
        full, cache = model(ids).logits, DynamicCache(config=model.config)
        parts = [model(piece, cache=cache).logits for piece in ids.split([7, 1, 1, 20, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_compiled_model_is_one_graph(folded):
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 50, non_letters=0)
    with memory_path("token_major"):
        expected = model(ids, use_cache=False).logits
    model.unfold_memory()
    if folded:
        model.fold_memory()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.parametrize("device", [None, "cpu"], ids=["", "default device"])
def test_compiled_training_is_one_graph(device):
    """With a default device PyTorch's compiler cannot read every method of a tensor."""
    # dense: Transformers 5.18 cannot compile the backward pass of experts
    model, ids = tiny_model(GengramForCausalLM, num_local_experts=0).train(), random_ids(2, 40)
    for algorithm in ("token_major", "table_major"):
        with memory_path(algorithm), torch.device(device) if device else nullcontext():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            expected = memories(model)[0].embeddings[0].weight.grad.clone()
            model.zero_grad()
            torch._dynamo.reset()
            torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
        torch.testing.assert_close(memories(model)[0].embeddings[0].weight.grad, expected, **GRADIENTS)


@torch.no_grad()
def test_memory_is_exported_with_its_operators():
    memory = memories(tiny_model(GengramForCausalLM))[0]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = memory

        def forward(self, hidden_states, codes):
            return self.memory(hidden_states, plan_ngrams(codes, memory.config)).residual

    arguments = (torch.randn(1, 40, 32), torch.randint(1, 6, (1, 40)))
    layer = Layer().eval()
    length = torch.export.Dim("length", min=30, max=1000)
    with memory_path("table_major"):
        program = torch.export.export(layer, arguments, dynamic_shapes=({1: length}, {1: length}))
    assert "gengram.folded_memory" in str(program.graph)
    longer = (torch.randn(1, 77, 32), torch.randint(1, 6, (1, 77)))
    torch.testing.assert_close(program.module()(*longer), layer(*longer), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
def test_a_whole_model_is_exported_for_batches_and_lengths_of_any_size(experts, grad):
    model = tiny_model(GengramForCausalLM, num_local_experts=experts, num_hidden_layers=3)

    def inputs(batch, length):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, : length // 4] = 0
        return {"input_ids": random_ids(batch, length, seed=length), "attention_mask": mask, "use_cache": False}

    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (), inputs(2, 40), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        for batch, length in ((1, 2), (3, 9), (2, 200)):
            given = inputs(batch, length)
            found, expected = program.module()(**given).logits, model(**given).logits
            exists = given["attention_mask"] == 1
            torch.testing.assert_close(found[exists], expected[exists], rtol=0, atol=SAME_FP32)


def test_autocast_trains_through_both_ways():
    model, ids = tiny_model(GengramForCausalLM).train(), random_ids(2, 60)
    losses = {}
    for algorithm in ("token_major", "table_major"):
        model.zero_grad()
        with memory_path(algorithm), torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert memories(model)[0].key_proj.weight.grad.dtype == torch.float32
        losses[algorithm] = loss.item()
    assert abs(losses["token_major"] - losses["table_major"]) < 0.02


def test_what_cannot_be_folded_is_an_error():
    with pytest.raises(ValueError, match="as_trained"):
        tiny_model(GengramForCausalLM, memory_pooling="as_trained").fold_memory()
    model = tiny_model(GengramForCausalLM)
    with pytest.raises(ValueError, match=r"model\.eval"):
        copy.deepcopy(model).train().fold_memory()
    memories(model)[0].key_proj = torch.nn.Sequential(memories(model)[0].key_proj)
    with pytest.raises(ValueError, match="adapters"):
        model.fold_memory()
    with torch.device("meta"):
        offloaded = GengramForCausalLM(model.config).eval()
    with pytest.raises(ValueError, match="offloaded"):
        offloaded.fold_memory()


@torch.no_grad()
def test_hooks_on_parts_of_the_memory_are_called():
    model, seen = tiny_model(GengramForCausalLM), []
    memories(model)[0].value_proj.register_forward_hook(lambda *_: seen.append(1))
    model(random_ids(1, 40, non_letters=0))
    assert seen == [1]


@torch.no_grad()
def test_forcing_a_way_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="algorithm must be one of"), memory_path("fastest"):
        pass
    with pytest.raises(ValueError, match="kernels must be one of"), memory_path(kernels="cuda"):
        pass
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 30)
    with memory_path("folded"), torch.enable_grad(), pytest.raises(ValueError, match="needs gradients"):
        model(ids)
    as_trained = tiny_model(GengramForCausalLM, memory_pooling="as_trained")
    with memory_path("folded"), pytest.raises(ValueError, match="as_trained"):
        as_trained(ids)
    monkeypatch.setattr(choose, "_is_read", False)
    monkeypatch.setenv("GENGRAM_MEMORY_ALGORITHM", "slow")
    with pytest.raises(ValueError, match="GENGRAM_MEMORY_ALGORITHM must be one of"):
        model(ids)


@torch.no_grad()
def test_the_environment_forces_a_way(monkeypatch, algorithms):
    monkeypatch.setattr(choose, "_is_read", False)
    monkeypatch.setattr(choose, "_forced", choose.MemoryPath())
    monkeypatch.setenv("GENGRAM_MEMORY_ALGORITHM", "table_major")
    monkeypatch.setenv("GENGRAM_MEMORY_KERNELS", "torch")
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 30)
    model(ids)
    assert set(algorithms) == {"table_major"}
    with memory_path("token_major"):
        model(ids)
    assert algorithms[-1] == "token_major" and choose.forced_path().kernels == "torch"


@torch.no_grad()
def test_the_way_and_its_reason_are_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(choose, "_logged", set())
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 40, non_letters=0)
    with caplog.at_level("INFO", "gengram.motif_memory.ways.choose"), memory_path(kernels="torch"):
        model(ids)
        model(ids)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "token_major (the tokens of this pass do not repay folding" in lines[0]
    assert "PyTorch's operations (PyTorch's operations are asked for)" in lines[0]


@torch.no_grad()
def test_folded_tables_are_never_saved(tmp_path):
    model = tiny_model(GengramForCausalLM).fold_memory()
    model.save_pretrained(tmp_path)
    loaded = GengramForCausalLM.from_pretrained(tmp_path)
    assert folds(loaded) == [None, None] and None not in folds(model)
    assert set(loaded.state_dict()) == set(model.state_dict())
