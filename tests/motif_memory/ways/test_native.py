"""The native kernels against the definition: values, gradients, and the same bits whatever the pieces.

Every test runs on the CPU's kernels, on the CUDA kernels' thread bodies emulated on the host, and on a GPU, as far as
each is there.
"""

import contextlib
from functools import partial

import pytest
import torch
from emulated_cuda import COMPILER, EmulatedKernels
from memory_cases import LETTERS, random_case
from tolerances import GRADIENTS_FP32, KERNELS_FP32, ZERO_NORM
from torch.library import opcheck

from gengram.motif_memory import definition
from gengram.motif_memory.definition import MemoryLayer
from gengram.motif_memory.ways import operators
from gengram.motif_memory.ways.native import slab_width, status
from gengram.motif_memory.ways.packed_tables import pack_tables
from gengram.motif_memory.ways.table_major import packed_rows, used_rows

HIDDEN = [16, 32, 48, 256, 512]


class Kernels:
    """What a test runs: kernels, and the device that they are for."""

    def __init__(self, device: str, emulated: EmulatedKernels | None = None, patch: pytest.MonkeyPatch | None = None):
        self.device, self.emulated, self.patch = torch.device(device), emulated, patch

    @contextlib.contextmanager
    def forced(self):
        if self.emulated is None:
            yield
            return
        with self.patch.context() as patch:
            patch.setattr(operators, "_native", lambda name: getattr(self.emulated, name))
            yield

    def slab_width(self, hidden: int) -> int:
        return slab_width(hidden, "cpu" if self.device.type == "cpu" and self.emulated is None else "cuda")


@pytest.fixture(scope="session")
def emulation():
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    return EmulatedKernels()


@pytest.fixture(params=["cpu", "cuda, emulated", "cuda"])
def kernels(request, monkeypatch):
    if request.param == "cuda, emulated":
        return Kernels("cpu", request.getfixturevalue("emulation"), monkeypatch)
    if not status().available:
        pytest.skip(status().reason)
    if request.param == "cuda" and not status().has_cuda:
        pytest.skip("the native kernels are built without CUDA")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return Kernels(request.param)


def single(case, dtype=torch.float32):
    """The case with weights in float32, hidden states in `dtype`; all of them numbers that both can hold."""
    for name in ("key_weight", "value_weight", "norm_weight", "conv_weight", "history"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.detach().float())
    case.tables = [table.detach().float() for table in case.tables]
    case.hidden_states = case.hidden_states.detach().to(dtype)
    return case


def lean_to(case, key):
    """Hidden states that lean towards the keys: the gate is steep near 0, where any rounding of a key shows."""
    case.hidden_states = case.hidden_states + 1.5 * key / key.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def exact(case):
    """Residual, gate and last inputs by the definition in float64."""
    plan = case.plan
    features = definition.window_features([t.double() for t in case.tables], plan)
    key, value = features @ case.key_weight.double().T, features @ case.value_weight.double().T
    weight, taps, history = (None if x is None else x.double() for x in (*case.layer[:3:2], case.history))
    layer = case.layer._replace(norm_weight=weight, taps=taps)
    return definition.gated_memory(case.hidden_states.double(), key, value, plan, layer, history)[:3]


def prepared(kernels, seed, hidden=None, dtype=torch.float32, **changes):
    hidden = hidden or HIDDEN[seed % len(HIDDEN)]
    endings = 16 if seed % 3 == 0 else None  # the number that the kernels are made for
    case = random_case(seed, hidden=hidden, width=16, endings=endings, **changes).to(kernels.device)
    features = definition.window_features(case.tables, case.plan)
    case.norm_weight = case.norm_weight.abs() + 0.5
    lean_to(case, features @ case.key_weight.T)
    return single(case, dtype)


def folded(kernels, case, dtype=torch.float32):
    width = kernels.slab_width(case.hidden_states.shape[-1])
    return pack_tables(case.tables, case.key_weight, case.value_weight, case.sizes, case.plan.window, dtype, width)


def assert_near(ours, truth, tolerance):
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs.double()).norm() <= tolerance * theirs.double().norm() + ZERO_NORM


@pytest.mark.parametrize("seed", range(60))
def test_folded_memory_equals_the_definition(kernels, seed):
    case = prepared(kernels, seed, length=[None, 600, 0][seed % 20 if seed % 20 < 3 else 0])
    with kernels.forced():
        ours = operators.folded_memory(
            case.hidden_states, folded(kernels, case), case.plan, case.layer, case.history, native=True
        )[:3]
    assert_near(ours, exact(case), KERNELS_FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_hidden_states_and_tables(kernels, dtype, rows):
    for seed in range(6):
        case = prepared(kernels, seed, dtype=dtype)
        with kernels.forced():
            ours = operators.folded_memory(
                case.hidden_states, folded(kernels, case, rows), case.plan, case.layer, case.history, native=True
            )[:3]
        assert ours[0].dtype == dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(rows).eps)
        assert_near(ours, exact(case), 2 * eps)


@pytest.mark.parametrize("seed", range(20))
def test_gated_memory_equals_the_definition(kernels, seed):
    case = prepared(kernels, seed)
    features = definition.window_features(case.tables, case.plan)
    key, value = features @ case.key_weight.T, features @ case.value_weight.T
    with kernels.forced():
        ours = operators.gated_memory(
            case.hidden_states, key, value, case.plan, case.layer, case.history, native=True
        )[:3]
    assert_near(ours, exact(case), KERNELS_FP32)


@pytest.mark.parametrize("seed", range(16))
def test_four_taps_over_long_segments(kernels, seed):
    """Most positions of such sequences, those of real models, are no special case."""
    case = prepared(kernels, seed, hidden=48, length=300, taps=4, segment=70)
    features = definition.window_features(case.tables, case.plan)
    key, value = features @ case.key_weight.T, features @ case.value_weight.T
    rest = case.plan, case.layer, case.history
    with kernels.forced():
        given = operators.gated_memory(case.hidden_states, key, value, *rest, native=True)[:3]
        summed = operators.folded_memory(case.hidden_states, folded(kernels, case), *rest, native=True)[:3]
    for ours in (given, summed):
        assert_near(ours, exact(case), KERNELS_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_window_features_equal_the_definition(kernels, seed, dtype):
    case = prepared(kernels, seed)
    tables = [table.to(dtype) for table in case.tables]
    with kernels.forced():
        ours = operators.window_features(tables, case.plan, native=True)
    truth = definition.window_features([table.double() for table in tables], case.plan)
    assert ours.dtype == dtype
    assert_near([ours], [truth], torch.finfo(dtype).eps)


def test_features_of_more_tables_than_sizes(kernels):
    case = prepared(kernels, 0)
    case.plan = case.plan._replace(ngram_sizes=tuple([*case.sizes, *[1, 2] * 5]))
    tables = [torch.randn(5**n, 16, device=kernels.device) for n in case.sizes]
    with kernels.forced():
        ours = operators.window_features(tables, case.plan, native=True)
    assert_near([ours], [definition.window_features([table.double() for table in tables], case.plan)], KERNELS_FP32)


@pytest.mark.parametrize("seed", range(20))
def test_plan_equals_the_definition(kernels, seed):
    case = random_case(seed, largest=6).to(kernels.device)
    codes = definition.letter_codes(case.tokens, LETTERS)
    truth = definition.ngram_rows_and_runs(codes, max(case.sizes), case.plan.behind)
    with kernels.forced():
        ours = operators.ngram_rows_and_runs(codes, max(case.sizes), case.plan.behind, native=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, truth, strict=True))


def through_tables(kernels, case):
    used, top = used_rows(case.plan)
    width = kernels.slab_width(case.hidden_states.shape[-1])
    rows = packed_rows(case.tables, case.key_weight, case.value_weight, case.plan, used, width)
    return operators.folded_memory(case.hidden_states, rows, case.plan, case.layer, None, top, native=True)[:2]


def through_tokens(kernels, case):
    features = operators.window_features(case.tables, case.plan, native=True)
    key, value = features @ case.key_weight.T, features @ case.value_weight.T
    return operators.gated_memory(case.hidden_states, key, value, case.plan, case.layer, native=True)[:2]


def gradients(case, outputs):
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)).sum() for y in outputs
    )
    return torch.autograd.grad(loss, case.weights, materialize_grads=True)


@pytest.mark.parametrize("way", [through_tables, through_tokens])
@pytest.mark.parametrize("seed", range(40))
def test_gradients_equal_those_of_the_definition(kernels, seed, way):
    case = prepared(kernels, seed, length=[None, 600][seed % 10 == 0])
    case.history = None
    for weight in case.weights:
        weight.requires_grad_()
    truth = gradients(case, exact(case)[:2])
    with kernels.forced():
        ours = gradients(case, way(kernels, case))
        again = gradients(case, way(kernels, case))
    assert_near(ours, truth, GRADIENTS_FP32)
    assert all(torch.equal(first, second) for first, second in zip(ours, again, strict=True))


@pytest.mark.parametrize("way", [through_tables, through_tokens])
def test_gradients_do_not_depend_on_the_number_of_threads(kernels, way):
    case = prepared(kernels, 3, hidden=256, length=700)
    case.history = None
    for weight in case.weights:
        weight.requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with kernels.forced():
                outputs = way(kernels, case)
                found.append([*outputs, *gradients(case, outputs)[len(case.tables) + 2 :]])  # not of matrix products
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rows", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [21, 9])
def test_decoding_gives_the_bits_of_prefill(kernels, rows, window):
    """Token by token, and in pieces of any length, with history: the same bits as all at once."""
    generator = torch.Generator().manual_seed(1)
    sizes, hidden, dilation = [1, 2, 3, 4, 5, 6], 48, 6
    tables = [torch.randn(5**n, 16, generator=generator) for n in sizes]
    weights = torch.randn(2, hidden, 96, generator=generator)
    tables = [table.to(kernels.device) for table in tables]
    weights = weights.to(kernels.device)
    tables = pack_tables(tables, *weights, sizes, window, rows, kernels.slab_width(hidden))
    tokens = torch.tensor(LETTERS)[torch.randint(5, (2, 700), generator=generator)].to(kernels.device)
    tokens[0, 50] = tokens[1, 640] = tokens[0, 100:140] = tokens[1, 645:652] = 3  # single ones, and gaps
    codes = definition.letter_codes(tokens, LETTERS)
    hidden_states = torch.randn(2, 700, hidden, generator=generator).bfloat16().to(kernels.device)
    taps, reach = torch.randn(hidden, 4, generator=generator).to(kernels.device), 3 * dilation
    layer = MemoryLayer(torch.ones(hidden, device=kernels.device), 1e-5, taps, dilation, reach)

    with kernels.forced():
        plan = definition.plan_windows(codes, sizes, window)
        whole = operators.folded_memory(hidden_states, tables, plan, layer, native=True).residual
        history, parts, start = torch.zeros(2, reach, hidden, device=kernels.device), [], 0
        padded = torch.nn.functional.pad(codes, (window - 1, 0))
        for length in [3, 1, 1, 600, *[1] * 60, 35]:
            piece = padded[:, start : start + window - 1 + length]
            rows_and_runs = partial(operators.ngram_rows_and_runs, native=True)
            plan = definition.plan_windows(piece, sizes, window, context=window - 1, rows_and_runs=rows_and_runs)
            states = hidden_states[:, start : start + length]
            part = operators.folded_memory(states, tables, plan, layer, history, native=True)
            history = torch.cat([history, part.gated], dim=1)[:, -reach:]
            parts.append(part.residual)
            start += length
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_not_finite_numbers_stay_where_they_are(kernels):
    case = next(c for c in (prepared(kernels, seed, length=40) for seed in range(99)) if c.conv_weight is not None)
    case.history = None
    case.hidden_states[0, 20] = float("nan")
    with kernels.forced():
        tables = folded(kernels, case)
        residual = operators.folded_memory(case.hidden_states, tables, case.plan, case.layer, native=True).residual
    assert residual[1].isfinite().all()
    assert residual[0, : 20 - case.conv_weight.shape[1] * case.dilation].isfinite().all()


def test_wrong_arguments_are_errors_not_crashes(kernels):
    if kernels.emulated is not None:
        pytest.skip("the operators check their arguments, the kernels do not")
    case = prepared(kernels, 0, hidden=32)
    tables = folded(kernels, case)
    native = torch.ops.gengram_native

    def run(hidden_states=case.hidden_states, rows=tables.rows, grams=case.plan.grams, sizes=case.sizes, norm=None):
        norm = case.norm_weight if norm is None else norm
        native.folded_memory(
            hidden_states, rows, grams, case.plan.runs, None, None, None, None, norm, None, None, sizes,
            case.plan.window, case.plan.reach_ahead, 1.0, 1e-5, 1, 0,
        )  # fmt: skip

    run()
    for message, wrong in [
        ("multiple of 16", dict(hidden_states=case.hidden_states[..., :20], norm=case.norm_weight[:20])),
        ("batch, length, hidden", dict(hidden_states=case.hidden_states[0])),
        ("packed tables must be", dict(rows=tables.rows[:, :3])),
        ("packed tables of some rows need `top`", dict(rows=torch.cat([tables.rows, tables.rows], dim=1))),
        ("grams must be int32", dict(grams=case.plan.grams.long())),
        ("n-gram sizes must be 1 to 8", dict(sizes=[9])),
        ("norm_weight must be float32", dict(norm=case.norm_weight.double())),
        ("expected float32, float16 or bfloat16", dict(hidden_states=case.hidden_states.double())),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(**wrong)


def test_gradients_of_full_windows_in_float32(kernels):
    """Text without a break, longer than a tile, so that the sweeps and the pooling take their fast ways."""
    generator = torch.Generator().manual_seed(2)
    sizes, window, hidden, length = [1, 2, 3, 4, 5, 6], 21, 160, 400
    case = prepared(kernels, 3, hidden=hidden, length=length, context=False)
    codes = torch.randint(1, 5, (2, length), generator=generator).to(kernels.device)
    case.plan = definition.plan_windows(codes, sizes, window)
    case.tables = [torch.randn(5**n, 16, generator=generator).to(kernels.device) for n in sizes]
    weights = torch.randn(2, hidden, 16 * len(sizes), generator=generator).to(kernels.device)
    case.key_weight, case.value_weight = weights[0].clone(), weights[1].clone()
    case.conv_weight = torch.randn(hidden, 4, generator=generator).to(kernels.device)
    case.dilation, case.reach_back, case.history = 6, 18, None
    lean_to(case, definition.window_features(case.tables, case.plan) @ case.key_weight.T)
    for weight in case.weights:
        weight.requires_grad_()
    truth = gradients(case, exact(case)[:2])
    for way in (through_tables, through_tokens):
        with kernels.forced():
            assert_near(gradients(case, way(kernels, case)), truth, GRADIENTS_FP32)


@pytest.mark.parametrize("seed", [0, 4])
def test_operators_are_what_pytorch_expects(kernels, seed):
    case = prepared(kernels, seed, hidden=32, context=False, length=20)
    plan = case.plan
    for weight in case.weights:
        weight.requires_grad_()
    key, value = (torch.randn_like(case.hidden_states).requires_grad_() for _ in range(2))
    tables = folded(kernels, case)
    with kernels.forced():
        opcheck(operators.OPERATORS["window_features"], (case.tables, *plan, True))
        states = (case.hidden_states, key, value)
        opcheck(operators.OPERATORS["gated_memory"], (*states, *plan, *case.layer, None, True))
        rows = tables.rows.detach().requires_grad_()
        arguments = (case.hidden_states, rows, tables.scale, *plan, *case.layer, None, None, True)
        opcheck(operators.OPERATORS["folded_memory"], arguments)


@torch.no_grad()
def test_a_cuda_graph_replays_the_forward_pass(kernels):
    if kernels.device.type != "cuda":
        pytest.skip("needs a GPU")
    case = prepared(kernels, 3, hidden=256, length=300)
    tables = folded(kernels, case)

    def run():
        return operators.folded_memory(
            case.hidden_states, tables, case.plan, case.layer, case.history, native=True
        ).residual

    with kernels.forced():
        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
        graph.replay()
    assert torch.equal(replayed, expected)
