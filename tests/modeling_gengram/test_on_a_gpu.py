"""What a GPU computes, beside the CPU: passes, gradients, caches, generation, quantised experts, jobs."""

import copy
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from graft_hosts import ALL, DECODERS, grafted
from graft_hosts import random_ids as graft_ids
from peft import LoraConfig, get_peft_model
from tiny_models import HEADS, random_ids, tiny_model
from tolerances import (
    DENSE_MODEL_BF16,
    LOG_LIKELIHOOD_FP32,
    MODEL_BF16,
    MODEL_FP16,
    MODEL_GRADIENTS_FP32,
    MODEL_GRADIENTS_FP32_RELATIVE,
    MODEL_GRADIENTS_OTHER_DEVICE_FP32,
    MODEL_LOSS_BF16,
    QUANTIZED_PRODUCT,
    QUANTIZED_PRODUCT_BF16,
    SAME_FP32,
    SAME_MODEL_FP32,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from gengram import (
    GengramForCausalLM,
    GengramQuantizationConfig,
    GengramTokenizer,
    MotifMemory,
    MotifMemoryConfig,
    memory_path,
)
from gengram.cli import main
from gengram.inference.effects import SCORES, Change
from gengram.inference.window_effects import WindowEffects
from gengram.modeling_gengram.quantized_experts import _few, _linear, quantize
from gengram.modeling_gengram.quantized_on_gpu import are_few_on_gpu
from gengram.motif_memory import folded_inference, letter_codes, plan_ngrams
from gengram.motif_memory.ways import kept_fold
from gengram.motif_memory.ways.native import status

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

KERNELS = ["torch", "native"]
GENERATION = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def whole_float32():
    """Products in float32, not in TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(params=KERNELS)
def kernels(request):
    if request.param == "native" and not status().has_cuda:
        pytest.skip("the native kernels are built without CUDA")
    with memory_path(kernels=request.param):
        yield request.param


def both(head, **changes):
    """The same model on the CPU and on the GPU."""
    model = tiny_model(head, hidden_size=64, intermediate_size=64, head_dim=16, **changes)
    return model, copy.deepcopy(model).cuda()


def same(ours, theirs, atol=SAME_FP32):
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=atol)


def first_of(outputs):
    return outputs[0] if "logits" not in outputs else outputs.logits


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["token_major", "table_major", "folded"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_every_way_gives_the_cpus_numbers(head, algorithm, kernels):
    model, on_gpu = both(head)
    ids = random_ids(3, 60, seed=5)
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with memory_path(kernels="torch"):
        expected = first_of(model(ids, attention_mask=mask))
    with memory_path(algorithm):
        ours = first_of(on_gpu(ids.cuda(), attention_mask=mask.cuda()))
    if ours.dim() == 3:
        ours, expected = ours[mask.bool().cuda()], expected[mask.bool()]
    same(ours, expected)


@pytest.mark.parametrize("algorithm", ["token_major", "table_major"])
def test_gradients_are_the_cpus_and_the_same_every_time(algorithm, kernels):
    model, on_gpu = both(GengramForCausalLM)
    ids = random_ids(2, 60, seed=6)

    def gradients(model, ids):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    with memory_path("token_major", "torch"):
        expected = gradients(model, ids)
    with memory_path(algorithm):
        ours, again = gradients(on_gpu, ids.cuda()), gradients(on_gpu, ids.cuda())
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad.cpu(),
            expected[name],
            rtol=MODEL_GRADIENTS_FP32_RELATIVE,
            atol=MODEL_GRADIENTS_OTHER_DEVICE_FP32,
            msg=name,
        )
        if "motif_memory" in name:
            torch.testing.assert_close(
                again[name], grad, rtol=MODEL_GRADIENTS_FP32_RELATIVE, atol=MODEL_GRADIENTS_FP32
            )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 1, 13, 8], [29, 1]], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_a_cache_in_pieces_is_the_whole(pieces, folded, kernels):
    model, on_gpu = both(GengramForCausalLM)
    ids = random_ids(2, 30, seed=7)
    if folded:
        on_gpu.fold_memory()
    cache, found = None, []
    for piece in ids.cuda().split(pieces, dim=1):
        outputs = on_gpu(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        found.append(outputs.logits)
    with memory_path(kernels="torch"):
        same(torch.cat(found, dim=1), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 33, 65, 257])
def test_one_head_of_keys_for_all_queries_reads_its_own_mask(length, dtype):
    """PyTorch issue 191937: the last token of such a pass took the mask of another."""
    model, on_gpu = both(GengramForCausalLM, num_attention_heads=4, num_key_value_heads=1, num_local_experts=0)
    before, ids = random_ids(3, 40, seed=21), random_ids(3, length, seed=22)
    mask = torch.ones(3, 40 + length, dtype=torch.int64)
    mask[1, :30], mask[2, :7] = 0, 0
    on_gpu.to(dtype)
    found = []
    for own, device in ((model, "cpu"), (on_gpu, "cuda")):
        first = own(before.to(device), attention_mask=mask[:, :40].to(device), use_cache=True)
        rest = {"attention_mask": mask.to(device), "past_key_values": first.past_key_values}
        found.append(own(ids.to(device), **rest).logits.cpu().float())
    torch.testing.assert_close(
        found[1], found[0], rtol=0, atol=SAME_MODEL_FP32 if dtype == torch.float32 else DENSE_MODEL_BF16
    )


def test_one_head_of_keys_generates_as_on_the_cpu():
    model, on_gpu = both(GengramForCausalLM, num_attention_heads=4, num_key_value_heads=1)
    ids = random_ids(3, 33, seed=23)
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, :5] = 0, 0
    expected = model.generate(ids, attention_mask=mask, **GENERATION)
    for options in ({}, {"cache_implementation": "static"}):
        found = on_gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **GENERATION, **options)
        assert torch.equal(found.cpu(), expected), options


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(num_beams=3),
        dict(cache_implementation="static", disable_compile=True),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=4),
        dict(cache_implementation="offloaded"),
        dict(cache_implementation="offloaded_static", disable_compile=True),
    ],
    ids=str,
)
def test_generation_is_that_of_the_cpu(how):
    model, on_gpu = both(GengramForCausalLM)
    ids = random_ids(2, 14, seed=8)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    if "prefill_chunk_size" in how:
        mask[:] = 1
    on_cpu = {name: value for name, value in how.items() if name == "num_beams"}
    expected = model.generate(ids, attention_mask=mask, **GENERATION, **on_cpu)
    ours = on_gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **GENERATION, **how)
    assert torch.equal(ours.cpu(), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_is_the_eager_one(mode):
    model, on_gpu = both(GengramForCausalLM)
    on_gpu.set_experts_implementation("batched_mm")
    ids = random_ids(2, 40, seed=9)
    compiled = torch.compile(on_gpu, fullgraph=True, mode=None if mode == "default" else mode)
    for _ in range(3):  # the third replays a recorded graph
        found = compiled(ids.cuda(), use_cache=False).logits.clone()
    same(found, model(ids).logits)


@torch.no_grad()
def test_a_cuda_graph_of_a_whole_model_follows_new_letters(kernels):
    model, on_gpu = both(GengramForCausalLM)
    on_gpu.set_experts_implementation("batched_mm")
    first, second = random_ids(1, 40, seed=10, non_letters=0), random_ids(1, 40, seed=11, non_letters=0)
    if kernels != "native":
        pytest.skip("PyTorch's operations ask which windows are full of letters, which waits for the device")
    with folded_inference(on_gpu):
        ids = first.cuda()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                on_gpu(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = on_gpu(ids, use_cache=False).logits
        for letters in (first, second):
            ids.copy_(letters)
            graph.replay()
            with memory_path(kernels="torch"):
                same(logits, model(letters).logits)


@torch.no_grad()
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_on_a_gpu(experts, dtype):
    model, on_gpu = both(GengramForCausalLM)
    on_gpu.set_experts_implementation(experts)
    ids = random_ids(2, 50, seed=12)
    expected, ours = model(ids).logits, on_gpu.to(dtype)(ids.cuda()).logits
    if dtype == torch.float32:
        same(ours, expected)
    else:
        error = (ours.cpu().float() - expected).norm() / expected.norm()
        assert error < (MODEL_BF16 if dtype == torch.bfloat16 else MODEL_FP16)


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_a_step_of_training_in_bfloat16_has_finite_gradients_near_float32(experts, kernels):
    model, on_gpu = both(GengramForCausalLM)
    on_gpu.train().set_experts_implementation(experts)
    ids = random_ids(2, 60, seed=13)
    loss = model(ids, labels=ids).loss
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = on_gpu(ids.cuda(), labels=ids.cuda()).loss
    ours.backward()
    assert abs(ours.item() - loss.item()) < MODEL_LOSS_BF16 * loss.item()
    assert all(torch.isfinite(w.grad).all() for w in on_gpu.parameters() if w.grad is not None)


def test_checkpointing_changes_no_gradient():
    _, on_gpu = both(GengramForCausalLM)
    ids = random_ids(2, 60, seed=14).cuda()
    on_gpu.train()
    found = []
    for is_on in (False, True):
        if is_on:
            on_gpu.gradient_checkpointing_enable()
        on_gpu.zero_grad()
        on_gpu(ids, labels=ids).loss.backward()
        found.append([weight.grad.clone() for weight in on_gpu.parameters() if weight.grad is not None])
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(
            after, before, rtol=MODEL_GRADIENTS_FP32_RELATIVE, atol=MODEL_GRADIENTS_OTHER_DEVICE_FP32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gpu_chooses_the_same_numbers(kind, dtype):
    generator = torch.Generator("cpu").manual_seed(19)
    weight = torch.randn(4, 96, 64, generator=generator).to(dtype)
    for ours, theirs in zip(quantize(weight.cuda(), kind), quantize(weight, kind), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, "int8"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_compute_the_same_and_generate(kind, attention, tmp_path):
    model, _ = both(GengramForCausalLM)
    model.save_pretrained(tmp_path)
    options = dict(quantization_config=GengramQuantizationConfig(kind, attention=attention))
    on_cpu = GengramForCausalLM.from_pretrained(tmp_path, **options).eval()
    ids = random_ids(2, 30, seed=15)
    for way in (dict(device_map="cuda"), {}):
        on_gpu = GengramForCausalLM.from_pretrained(tmp_path, **options, **way).eval().cuda()
        same(on_gpu(ids.cuda()).logits, on_cpu(ids).logits, SAME_MODEL_FP32)
        mask = torch.ones_like(ids)
        expected = on_cpu.generate(ids, attention_mask=mask, **GENERATION)
        for how in ({}, dict(cache_implementation="static")):  # the second compiles
            ours = on_gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **GENERATION, **how)
            assert torch.equal(ours.cpu(), expected), how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_tokens_are_multiplied_as_many_are(kind, dtype):
    """A kernel of its own takes them; its last expert is not there."""
    generator = torch.Generator("cpu").manual_seed(21)
    numbers, scale = (part.cuda() for part in quantize(torch.randn(5, 200, 1120, generator=generator).to(dtype), kind))
    x = torch.randn(64, 1120, generator=generator).to(dtype).cuda()
    experts = torch.randint(6, (64,), generator=generator).sort().values.cuda()
    found, expected = _few(x, numbers, scale, experts), _linear(x, numbers, scale, experts)
    assert are_few_on_gpu(x) and not are_few_on_gpu(x.repeat(2, 1)) and not are_few_on_gpu(x.double())
    assert found[experts == 5].eq(0).all() and (experts == 5).any()
    error = (found - expected).double().norm() / expected.double().norm()
    assert error < (QUANTIZED_PRODUCT if dtype == torch.float32 else QUANTIZED_PRODUCT_BF16)


def test_lora_trains_on_quantised_weights(tmp_path):
    model, _ = both(GengramForCausalLM)
    model.save_pretrained(tmp_path)
    quantization = GengramQuantizationConfig("int8", attention="int8")
    on_gpu = GengramForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cuda")
    on_gpu = get_peft_model(on_gpu, LoraConfig(target_modules=["q_proj", "v_proj"]))
    ids = random_ids(2, 30, seed=16).cuda()
    optimizer = torch.optim.AdamW([w for w in on_gpu.parameters() if w.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = on_gpu(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_layers_that_do_not_fit_lie_in_the_computers_memory(tmp_path):
    model, _ = both(GengramForCausalLM)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    spread = GengramForCausalLM.from_pretrained(tmp_path, device_map=places).eval()
    ids = random_ids(2, 30, seed=17)
    same(spread(ids.cuda()).logits, model(ids).logits)
    ours = spread.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **GENERATION)
    assert torch.equal(ours.cpu(), model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATION))


def test_ids_that_are_no_tokens_are_refused_and_not_looked_up():
    _, on_gpu = both(GengramForCausalLM)
    with pytest.raises(ValueError, match=r"input_ids must lie in 0..127 .*, got 3..500"):
        on_gpu(torch.tensor([[3, 8, 500]]).cuda())
    assert torch.isfinite(on_gpu(torch.tensor([[3, 8, 5]]).cuda()).logits).all()  # the GPU still works


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_grafted_host_generates_by_a_recorded_step(name):
    model, ids = grafted(name), graft_ids(length=12)
    expected = model.generate(ids, **GENERATION)
    model.cuda()
    for _ in range(2):
        assert torch.equal(model.generate(ids.cuda(), **GENERATION, cache_implementation="static").cpu(), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", list(ALL))
def test_a_grafted_memory(name, kernels):
    model = grafted(name, config=MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=8, window=9))
    ids = graft_ids(seed=3)
    with memory_path(kernels="torch"):
        expected = model(ids).logits
    model.cuda()
    same(model(ids.cuda()).logits, expected, SAME_MODEL_FP32)
    if name in DECODERS:
        cache, found = None, []
        for piece in ids.cuda().split([11, 1, 1, 27], dim=1):
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            found.append(outputs.logits)
        same(torch.cat(found, dim=1), expected, SAME_MODEL_FP32)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant", "wrapper"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "modernbert"])
def test_a_grafted_host_has_the_cpus_gradients(name, how, kernels):
    model, ids = grafted(name), graft_ids(seed=4)

    def gradients(model, ids):
        model.train().zero_grad()
        options = {} if name == "modernbert" else {"use_cache": False}
        model(input_ids=ids, labels=ids, **options).loss.backward()
        return {
            key.replace("_checkpoint_wrapped_module.", ""): weight.grad.clone()
            for key, weight in model.named_parameters()
            if weight.grad is not None
        }

    with memory_path(kernels="torch"):
        expected = gradients(model, ids)
    model.cuda()
    if how == "wrapper":
        layers = tuple(
            {type(part) for name, part in model.named_modules() if name.rpartition(".")[0].endswith("layers")}
        )
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layers))
    elif how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    ours = gradients(model, ids.cuda())
    assert ours.keys() == expected.keys() and any("motif_memory" in key for key in ours)
    for key, grad in ours.items():
        torch.testing.assert_close(
            grad.cpu(),
            expected[key],
            rtol=MODEL_GRADIENTS_FP32_RELATIVE,
            atol=MODEL_GRADIENTS_OTHER_DEVICE_FP32,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@torch.no_grad()
def test_padding_on_the_left_of_a_grafted_host(kernels):
    model, ids = grafted("llama"), graft_ids(seed=5)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    ids[1, :13] = 0
    with memory_path(kernels="torch"):
        expected = model(ids, attention_mask=mask).logits
    found = model.cuda()(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    same(found[mask.bool()], expected[mask.bool()], SAME_MODEL_FP32)
    alone = model(ids[1:, 13:].cuda()).logits.cpu()
    same(found[1:, 13:], alone, SAME_MODEL_FP32)


@torch.no_grad()
def test_a_fingerprint_is_the_same_on_every_device():
    for numbers in (7, 2**17, 2**17 * 70 + 11):
        weight = torch.randn(numbers, generator=torch.Generator("cpu").manual_seed(20))
        assert torch.equal(kept_fold._fingerprint(weight.cuda()).cpu(), kept_fold._fingerprint(weight))


def test_scores_of_windows_of_many_lengths_are_the_cpus():
    """A GPU reads windows of about one length side by side, a CPU those of one length."""
    model, on_gpu = both(GengramForCausalLM, num_local_experts=0)
    generator, changes = np.random.default_rng(8), []
    for length in generator.integers(2, 300, 40):
        window = "".join(generator.choice(list("ACGT"), length))
        place = int(generator.integers(length))
        other = generator.choice(list("ACGT".replace(window[place], "")))
        changes.append(Change(window, window[:place] + other + window[place + 1 :], place))
    found = [list(WindowEffects(own, GengramTokenizer(), SCORES).of(changes)) for own in (model, on_gpu)]
    for theirs, ours in zip(*found, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert list(one) == pytest.approx(list(two), abs=LOG_LIKELIHOOD_FP32, nan_ok=True)


@torch.no_grad()
def test_a_pass_over_a_hundred_thousand_bases(kernels):
    config = MotifMemoryConfig(embedding_dim=16)
    torch.manual_seed(0)
    memory = MotifMemory(config, 64).eval()
    for weight in memory.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    letters = [8, 5, 6, 7, 9]
    ids = random_ids(1, 100_000, seed=18, non_letters=0.001)
    states = torch.randn(1, 100_000, 64)

    def residual(device):
        plan = plan_ngrams(letter_codes(ids.to(device), letters), config)
        return memory.to(device)(states.to(device), plan).residual.cpu()

    with memory_path("token_major", "torch"):
        expected = residual("cpu")
    for algorithm in ("token_major", "folded"):
        with memory_path(algorithm):
            same(residual("cuda"), expected, SAME_MODEL_FP32)


@pytest.mark.parametrize(
    "job",
    [
        "embed {fasta} --output {out}/vectors.npz",
        "generate --number 3 --length 60 --seed 4 --output {out}/new.fa",
        "fill {fasta} --output {out}/filled.fa",
        "score {vcf} --fasta {genome} --output {out}/scores.tsv",
    ],
    ids=lambda job: job.split()[0],
)
def test_jobs_give_the_same_on_either_device(job, tmp_path):
    if "vcf" in job:
        pytest.importorskip("pysam")
    fasta = tmp_path / "some.fa"
    fasta.write_text(">a\n" + "ACGTTGCATATAAANCGC" * 12 + "\n>b\n" + "GGGCCCATN" * 5 + "\n>c\nA\n")
    data = resources.files("gengram") / "demo_data"
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        out.mkdir()
        words = job.format(fasta=fasta, out=out, vcf=data / "region.vcf.gz", genome=data / "region.fa.gz").split()
        assert main([*words, "--device", device]) in (None, 0)
        found[device] = Path(job.split()[-1].format(out=out))
    if found["cpu"].suffix == ".npz":
        ours, theirs = (np.load(found[device])["embedding"] for device in ("cuda", "cpu"))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=SAME_MODEL_FP32)
    elif found["cpu"].suffix == ".fa":
        assert found["cuda"].read_text() == found["cpu"].read_text()
    else:
        for ours, theirs in zip(*(found[d].read_text().splitlines() for d in ("cuda", "cpu")), strict=True):
            for mine, other in zip(ours.split("\t"), theirs.split("\t"), strict=True):
                assert mine == other or abs(float(mine) - float(other)) <= SAME_MODEL_FP32, (ours, theirs)
