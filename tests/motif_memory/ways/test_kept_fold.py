"""Folded tables are never of other weights than the present ones, whatever changed these, and are made only to pay."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import CHANGED, SAME_FP32, SAME_MODEL_FP32
from torch import nn
from transformers import DynamicCache, StaticCache

from gengram import GengramForCausalLM, memory_path
from gengram.motif_memory import (
    MotifMemory,
    MotifMemoryConfig,
    fold_memory,
    folded_inference,
    letter_codes,
    plan_ngrams,
    unfold_memory,
)
from gengram.motif_memory.ways import compute, kept_fold
from gengram.motif_memory.ways.weights import weights_at_hand

CONFIG = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=6, window=9)
HIDDEN = 32
LETTERS = [8, 5, 6, 7, 9]
CLOSE = dict(rtol=0, atol=SAME_FP32)


@pytest.fixture(autouse=True)
def eager_folds(monkeypatch):
    """The worst case: a fold is made at once and used in every pass."""
    monkeypatch.setattr(kept_fold, "tokens_to_repay", lambda weights, plan: 0)
    monkeypatch.setattr(kept_fold, "tokens_to_check", lambda weights, plan: 0)


@pytest.fixture
def ways(monkeypatch):
    taken = []
    original = compute.choose_way

    def choose(*states, **arguments):
        taken.append(original(*states, **arguments).algorithm)
        return original(*states, **arguments)

    monkeypatch.setattr(compute, "choose_way", choose)
    return taken


def new_memory(seed: int = 0) -> MotifMemory:
    memory = MotifMemory(CONFIG, HIDDEN, initializer_range=0.4).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in memory.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4 + (weight.dim() == 1))
    return memory


def inputs(length: int = 60):
    ids = random_ids(2, length, non_letters=0)
    hidden_states = torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(1))
    return hidden_states, plan_ngrams(letter_codes(ids, LETTERS), CONFIG)


@torch.no_grad()
def fresh(memory: MotifMemory, hidden_states, plan) -> torch.Tensor:
    """The definition's result for a copy of the present weights."""
    other = MotifMemory(memory.config, HIDDEN)
    other.load_state_dict({name: value.clone() for name, value in memory.state_dict().items()})
    return other.by_definition(hidden_states, plan).residual


def by_optimizer(make):
    def change(memory, weight):
        optimizer = make([weight])
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        optimizer.step()
        weight.grad = None

    return change


def no_grad(change):
    def changed(memory, weight):
        with torch.no_grad():
            change(memory, weight)

    return changed


def new_values(weight):
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight)


def load(assign):
    def change(memory, weight):
        other = new_memory(seed=9)
        memory.load_state_dict(other.state_dict(), assign=assign)

    return change


def replace_parameter(memory, weight):
    for module in memory.modules():
        for name, value in module.named_parameters(recurse=False):
            if value is weight:
                setattr(module, name, nn.Parameter(new_values(weight)))


def replace_module(memory, weight):
    new = nn.Linear(CONFIG.features, HIDDEN, bias=False)
    memory.key_proj = new


def through_inference_mode(memory, weight):
    with torch.inference_mode():
        weight.mul_(-1.5)


def through_storage(memory, weight):
    weight.untyped_storage().copy_(new_values(weight).untyped_storage())


def negate_some_columns(memory, weight):
    weight.data.view(weight.shape[0], -1)[:, ::2].neg_()


def swap_rows(memory, weight):
    if weight.dim() == 1:
        weight.data.copy_(weight.data.flip(0))
    else:
        weight.data[[0, -1]] = weight.data[[-1, 0]]


def one_bit_of_each_row(memory, weight):
    bits = weight.data.view(weight.shape[0], -1).view(torch.int32)
    numbers = bits if bits.is_cuda else bits.numpy()
    numbers[:, 0] ^= 1 << 29


def numpy_view(weight):
    if weight.is_cuda:
        pytest.skip("NumPy writes into no GPU")
    return weight.detach().numpy()


def round_trip(memory, weight):
    memory.to(torch.bfloat16).to(torch.float32)


def vector(memory, weight):
    parameters = list(memory.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) * 1.5, parameters)


def swapped(memory, weight):
    torch.utils.swap_tensors(weight, nn.Parameter(new_values(weight)))


def averaged(memory, weight):
    average = torch.optim.swa_utils.AveragedModel(new_memory(seed=5))
    for mine, theirs in zip(memory.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(theirs)


CHANGES = {
    "in place": no_grad(lambda m, w: w.mul_(-1.5)),
    "copy_": no_grad(lambda m, w: w.copy_(new_values(w))),
    "an element": no_grad(lambda m, w: w.view(-1)[3:4].add_(1.0)),
    "data, in place": lambda m, w: w.data.mul_(-1.5),
    "data.copy_": lambda m, w: w.data.copy_(new_values(w)),
    "data.zero_": lambda m, w: w.data.zero_(),
    "data replaced": lambda m, w: setattr(w, "data", new_values(w)),
    "data[...]": lambda m, w: w.data.__setitem__(Ellipsis, new_values(w)),
    "detached alias": lambda m, w: w.detach().mul_(-1.5),
    "numpy": lambda m, w: np.multiply(numpy_view(w), -1.5, out=numpy_view(w)),
    "dlpack": lambda m, w: torch.from_dlpack(w.detach()).mul_(-1.5),
    "storage": through_storage,
    "inference mode": through_inference_mode,
    "foreach": no_grad(lambda m, w: torch._foreach_mul_([w], -1.5)),
    "SGD": by_optimizer(lambda p: torch.optim.SGD(p, lr=0.5)),
    "AdamW": by_optimizer(lambda p: torch.optim.AdamW(p, lr=0.5)),
    "AdamW, fused": by_optimizer(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)),
    "AdamW, foreach": by_optimizer(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True)),
    "load_state_dict": load(assign=False),
    "load_state_dict, assign": load(assign=True),
    "parameter replaced": replace_parameter,
    "module replaced": replace_module,
    "columns negated": negate_some_columns,
    "rows swapped": swap_rows,
    "one bit of each row": one_bit_of_each_row,
    "dtype there and back": round_trip,
    "vector_to_parameters": vector,
    "swap_tensors": swapped,
    "averaged weights": averaged,
}
WEIGHTS = ["embeddings.2.weight", "key_proj.weight", "value_proj.weight", "norm_k.weight", "short_conv.conv.weight"]


@pytest.mark.parametrize("keep", ["by itself", "on request"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_no_change_of_a_weight_goes_unseen(change, keep, ways):
    for name in WEIGHTS:
        memory, (hidden_states, plan) = new_memory(), inputs()
        if keep == "on request":
            fold_memory(memory)
        # taken before, they write past PyTorch
        views = [weight.detach().numpy() for weight in memory.parameters() if not weight.is_cuda]
        with torch.no_grad():
            before = memory(hidden_states, plan).residual
            assert ways[-1] == "folded"
            torch.testing.assert_close(before, fresh(memory, hidden_states, plan), **CLOSE)
        CHANGES[change](memory, memory.get_parameter(name))
        with torch.no_grad():
            after = memory(hidden_states, plan).residual
            assert not torch.allclose(after, before, atol=CHANGED), (change, name)
            torch.testing.assert_close(after, fresh(memory, hidden_states, plan), **CLOSE, msg=f"{change}, {name}")
            again = memory(hidden_states, plan).residual
            torch.testing.assert_close(again, after, **CLOSE)
        del views


@pytest.mark.parametrize("change", list(CHANGES))
def test_no_change_of_a_weight_goes_unseen_by_compiled_code(change):
    torch._dynamo.reset()
    memory, (hidden_states, plan) = fold_memory(new_memory()), inputs()
    with torch.no_grad():
        memory(hidden_states, plan)  # an evaluation before
    compiled = torch.compile(lambda x: memory(x, plan).residual, backend="eager")
    with torch.no_grad():
        before = compiled(hidden_states)
    try:
        CHANGES[change](memory, memory.get_parameter("key_proj.weight"))
    except RuntimeError as error:
        if "weakref" not in str(error):
            raise
        pytest.skip("this PyTorch swaps no weight that a compiled function knows")
    with torch.no_grad():
        after = compiled(hidden_states)
        assert not torch.allclose(after, before, atol=CHANGED)
        torch.testing.assert_close(after, fresh(memory, hidden_states, plan), **CLOSE)


@torch.no_grad()
def test_a_numpy_view_from_before_the_fold_writes_what_is_read():
    memory, (hidden_states, plan) = new_memory(), inputs()
    view = numpy_view(memory.value_proj.weight)
    memory(hidden_states, plan)
    view *= -2
    torch.testing.assert_close(memory(hidden_states, plan).residual, fresh(memory, hidden_states, plan), **CLOSE)


def test_another_process_writes_what_is_read():
    memory, (hidden_states, plan) = new_memory().share_memory(), inputs()
    with torch.no_grad():
        before = memory(hidden_states, plan).residual
    process = torch.multiprocessing.get_context("spawn").Process(target=_negate, args=(memory.key_proj.weight.data,))
    process.start()
    process.join()
    assert process.exitcode == 0
    with torch.no_grad():
        after = memory(hidden_states, plan).residual
        assert not torch.allclose(before, after, atol=CHANGED)
        torch.testing.assert_close(after, fresh(memory, hidden_states, plan), **CLOSE)


def _negate(weight):
    weight.neg_()


@torch.no_grad()
def test_adapters_merged_into_the_memory_after_an_evaluation():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 40, non_letters=0)
    model(ids)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["key_proj", "value_proj"], lora_alpha=64))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    adapted(input_ids=ids)
    merged = adapted.eval().merge_and_unload()
    ours = merged(ids).logits
    other = GengramForCausalLM(model.config).eval()
    other.load_state_dict(merged.state_dict())
    with memory_path("token_major"):
        torch.testing.assert_close(ours, other(ids).logits, rtol=0, atol=SAME_MODEL_FP32)


@torch.no_grad()
def test_the_trained_copy_of_a_memory_is_folded(ways):
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(GengramForCausalLM), random_ids(1, 40, non_letters=0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["motif_memory"]))
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            weight.mul_(-1.5)
    with memory_path("token_major"):
        truth = adapted.eval()(input_ids=ids).logits
    ways.clear()
    with folded_inference(adapted):
        torch.testing.assert_close(adapted(input_ids=ids).logits, truth, **CLOSE)
    assert set(ways) == {"folded"}
    keepers = [each.kept_fold for name, each in model.named_modules() if name.endswith("original_module")]
    assert keepers and not any(keeper.is_requested for keeper in keepers)


def test_a_loop_that_never_calls_train_validates_the_present_weights():
    model, ids = tiny_model(GengramForCausalLM, num_local_experts=0), random_ids(2, 40, non_letters=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
            with memory_path("token_major"):
                torch.testing.assert_close(loss, model(ids, labels=ids).loss, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_generation_reads_the_weights_that_it_began_with_and_the_next_one_the_new(kind, ways):
    model, ids = tiny_model(GengramForCausalLM).fold_memory(), random_ids(1, 30, non_letters=0)
    extra = {} if kind is DynamicCache else {"max_cache_len": 64}
    cache = kind(config=model.config, **extra)

    def generation(cache):
        return torch.cat([model(part, cache=cache).logits for part in ids.split([20, 1, 1, 8], dim=1)], 1)

    generation(cache)
    assert set(ways) == {"folded"}
    model.model.layers[0].motif_memory.key_proj.weight.data.mul_(-2)
    cache.reset() if kind is StaticCache else None
    ours = generation(cache if kind is StaticCache else kind(config=model.config))
    with memory_path("token_major"):
        torch.testing.assert_close(ours, generation(kind(config=model.config, **extra)), **CLOSE)


@torch.no_grad()
def test_a_short_prompt_is_not_checked_and_its_continuation_once(monkeypatch, ways):
    monkeypatch.setattr(kept_fold, "tokens_to_check", lambda weights, plan: 100)
    checks = []
    original = kept_fold.same_fingerprint
    monkeypatch.setattr(kept_fold, "same_fingerprint", lambda *both: checks.append(1) or original(*both))
    model, ids = tiny_model(GengramForCausalLM).fold_memory(), random_ids(1, 30, non_letters=0)
    cache = DynamicCache(config=model.config)
    for part in ids[:, :13].split([10, 1, 1, 1], dim=1):
        model(part, cache=cache)
    assert ways == ["token_major"] * 2 + ["folded"] * 6
    assert len(checks) == 2  # one for each memory layer


@torch.no_grad()
def test_a_block_of_folded_inference_checks_once_and_refuses_what_changed_unseen(monkeypatch):
    memory, (hidden_states, plan) = new_memory(), inputs()
    checks = []
    original = kept_fold.same_fingerprint
    monkeypatch.setattr(kept_fold, "same_fingerprint", lambda *both: checks.append(1) or original(*both))
    with folded_inference(memory):
        for _ in range(4):
            ours = memory(hidden_states, plan).residual
        assert not checks
    assert len(checks) == 1 and memory.kept_fold.fold is None
    torch.testing.assert_close(ours, fresh(memory, hidden_states, plan), **CLOSE)
    for change in (lambda w: w.data.mul_(2), lambda w: w.mul_(2), lambda w: (w.data.mul_(2), memory.train().eval())):
        with pytest.raises(RuntimeError, match="changed inside the block"), folded_inference(memory):
            change(memory.key_proj.weight)
            memory(hidden_states, plan)
        assert memory.kept_fold.fold is None and memory.kept_fold.owners == 0
    torch.testing.assert_close(memory(hidden_states, plan).residual, fresh(memory, hidden_states, plan), **CLOSE)


@torch.no_grad()
def test_a_block_of_folded_inference_leaves_everything_as_it_was():
    memory, (hidden_states, plan) = fold_memory(new_memory()), inputs()
    before = memory(hidden_states, plan).residual
    with folded_inference(memory, torch.float16):
        assert memory.kept_fold.fold.tables.rows.dtype == torch.float16
    assert memory.kept_fold.is_requested and memory.kept_fold.dtype is None
    assert torch.equal(memory(hidden_states, plan).residual, before)


@torch.no_grad()
def test_a_fold_made_under_autocast_is_as_exact_as_any(ways):
    memory, (hidden_states, plan) = new_memory(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        memory(hidden_states, plan)
    ours = memory(hidden_states, plan).residual
    assert ways == ["folded", "folded"]
    torch.testing.assert_close(ours, fresh(memory, hidden_states, plan), **CLOSE)


def with_bias(memory):
    memory.value_proj = nn.Linear(CONFIG.features, HIDDEN)


def with_other_norm(memory):
    memory.norm_k = nn.LayerNorm(HIDDEN)


def with_other_epsilons(memory):
    memory.norm_q.eps = memory.norm_k.eps = 0.5


def with_one_other_epsilon(memory):
    memory.norm_k.eps = 0.5


def with_bounded_rows(memory):
    memory.embeddings[2].max_norm = 0.1


def with_other_dilation(memory):
    memory.short_conv.conv.dilation, memory.short_conv.context = 1, 3


def with_wrapped_convolution(memory):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments):
            return 2 * self.inner(*arguments)

    memory.short_conv = Wrapper(memory.short_conv)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        with_bias,
        with_other_norm,
        with_other_epsilons,
        with_one_other_epsilon,
        with_bounded_rows,
        with_other_dilation,
        with_wrapped_convolution,
    ],
)
def test_parts_that_are_not_what_they_were_are_computed_as_they_are(change):
    memory, (hidden_states, plan) = fold_memory(new_memory()), inputs()
    before = memory(hidden_states, plan).residual
    change(memory)
    after = memory(hidden_states, plan).residual
    assert not torch.allclose(after, before, atol=CHANGED)
    torch.testing.assert_close(after, memory.by_definition(hidden_states, plan).residual, **CLOSE)


def test_hooks_on_gradients_are_called():
    memory, (hidden_states, plan), seen = new_memory(), inputs(), []
    memory.key_proj.register_full_backward_pre_hook(lambda *_: seen.append(1))
    with memory_path("table_major"), pytest.raises(ValueError, match="hooks"):
        memory(hidden_states, plan)
    memory(hidden_states, plan).residual.sum().backward()
    assert seen == [1]


@torch.no_grad()
def test_copies_and_saved_memories_hold_no_fold():
    memory, (hidden_states, plan) = new_memory(), inputs()
    names = set(memory.state_dict())
    memory(hidden_states, plan)
    assert memory.kept_fold.fold is not None and set(memory.state_dict()) == names
    assert copy.deepcopy(memory).kept_fold.fold is None
    assert pickle.loads(pickle.dumps(memory)).kept_fold.fold is None
    assert memory.train().kept_fold.fold is None
    memory.eval()(hidden_states, plan)
    unfold_memory(memory)
    assert memory.kept_fold.fold is None


@torch.no_grad()
def test_weights_that_are_not_finite_give_what_the_definition_gives(ways):
    memory, (hidden_states, plan) = new_memory(), inputs()
    memory.embeddings[2].weight[7] = float("nan")
    ours, expected = memory(hidden_states, plan).residual, fresh(memory, hidden_states, plan)
    assert ways == ["folded"]
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(ours, expected, **CLOSE, equal_nan=True)
    with folded_inference(memory):
        torch.testing.assert_close(memory(hidden_states, plan).residual, expected, **CLOSE, equal_nan=True)


def test_a_fingerprint_changes_with_every_bit():
    memory = new_memory()
    weights, _ = weights_at_hand(memory, memory.key_proj.weight.device)
    first = kept_fold.fingerprint(weights)
    assert kept_fold.same_fingerprint(first, kept_fold.fingerprint(weights))
    generator = np.random.default_rng(0)
    for tensor in weights.tensors():
        bits = tensor.data.view(-1).view(torch.int32)
        numbers = bits if bits.is_cuda else bits.numpy()
        for place in generator.integers(len(numbers), size=5):
            for bit in range(31):
                numbers[place] ^= 1 << bit
                assert not kept_fold.same_fingerprint(first, kept_fold.fingerprint(weights))
                numbers[place] ^= 1 << bit
    assert kept_fold.same_fingerprint(first, kept_fold.fingerprint(weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_of_any_dtype_and_layout(dtype):
    weight = torch.randn(7, 3).to(dtype)
    first = kept_fold._fingerprint(weight)
    assert torch.equal(kept_fold._fingerprint(weight.t().contiguous().t()), first)
    for place in range(weight.numel()):
        weight.view(-1)[place] *= -1
        assert not torch.equal(kept_fold._fingerprint(weight), first)
        weight.view(-1)[place] *= -1
