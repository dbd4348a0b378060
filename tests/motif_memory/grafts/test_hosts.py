"""Every host with a memory can still do what it can do without."""

import copy
import inspect
import io

import pytest
import torch
from graft_hosts import (
    ALL,
    DECODERS,
    ENCODERS,
    OF_INNER_MODELS,
    OTHER_DECODERS,
    SINGLE,
    VOCABULARIES,
    grafted,
    random_ids,
)
from tolerances import SAME_FP32, SAME_MODEL_FP32
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from gengram.motif_memory import attached_memories, detach_memory, load_memory, save_memory

GENERATING = DECODERS | OTHER_DECODERS


def close(one, other, tolerance=SAME_FP32):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_attaching_changes_nothing_before_training_and_detaching_nothing_after(name):
    bare, ids = ALL[name].make(), random_ids()
    expected = bare(ids).logits
    model = grafted(name, trained=False)
    assert torch.equal(model(ids).logits, expected)
    trained = grafted(name)
    assert (trained(ids).logits - expected).abs().max() > SAME_MODEL_FP32
    detach_memory(trained)
    assert torch.equal(trained(ids).logits, expected)
    assert type(trained) is type(bare)
    assert [type(module) for module in trained.modules()] == [type(module) for module in bare.modules()]
    assert trained.state_dict().keys() == bare.state_dict().keys()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_pieces_through_a_cache_are_the_whole(name, vocabulary):
    letters = VOCABULARIES[vocabulary]
    model, ids = grafted(name, letters), random_ids(letters)
    expected = model(ids).logits
    for lengths in ([40], [30, 10], [5, 1, 1, 1, 32], [1] * 40):
        cache, pieces, start = DynamicCache(config=model.config), [], 0
        for length in lengths:
            output = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
            start += length
        close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("name", OF_INNER_MODELS)
@torch.no_grad()
def test_heads_that_call_a_model_within_the_base_model(name):
    bare, ids = OF_INNER_MODELS[name].make(), random_ids()
    expected = bare(ids).logits
    assert torch.equal(grafted(name, trained=False)(ids).logits, expected)
    model = grafted(name)
    changed = model(ids).logits
    assert (changed - expected).abs().max() > SAME_MODEL_FP32
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, part], past_key_values=cache, use_cache=True).logits for part in (slice(30), slice(30, 40))]
    close(torch.cat(pieces, dim=1), changed)
    if name == "opt":  # the same memories, called from further out
        close(model.lm_head(model.model(ids, use_cache=False).last_hidden_state), changed)
    detach_memory(model)
    assert torch.equal(model(ids).logits, expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in bare.modules()]


@pytest.mark.parametrize("name", OTHER_DECODERS)
@torch.no_grad()
def test_a_recurrent_host_decodes_as_it_reads(name):
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits
    name_of_cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "cache_params"  # 5.18
    options = {name_of_cache: DynamicCache(config=model.config), "use_cache": True}
    pieces = [model(ids[:, :30], **options).logits]
    pieces += [model(ids[:, place : place + 1], **options).logits for place in range(30, 40)]
    close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_padding_is_nothing_and_a_batch_is_its_rows(name, vocabulary):
    letters = VOCABULARIES[vocabulary]
    model, ids = grafted(name, letters), random_ids(letters, batch=3)
    lengths, rows = (40, 33, 11), []
    alone = [
        model(ids[row : row + 1, :length], attention_mask=torch.ones(1, length)).logits[0]
        for row, length in enumerate(lengths)
    ]
    sides = ("right",) if name in ENCODERS or name in OTHER_DECODERS else ("right", "left")
    for side in sides:
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            part = slice(0, length) if side == "right" else slice(40 - length, 40)
            padded[row, part], mask[row, part] = ids[row, :length], 1
        # Padding spells DNA here: the mask decides.
        padded = torch.where(mask == 1, padded, random_ids(letters, batch=3, seed=5))
        options = {}
        if side == "left":
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        rows = model(padded, attention_mask=mask, **options).logits
        for row, length in enumerate(lengths):
            part = slice(0, length) if side == "right" else slice(40 - length, 40)
            close(rows[row, part], alone[row])


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 5},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_generation_is_that_without_a_cache(name, way):
    options = GENERATION[way]
    if name == "mamba" and way in ("static cache", "prompt lookup"):
        pytest.skip("Transformers has none for a recurrent model")
    model, ids = grafted(name), random_ids(batch=1 if way == "prompt lookup" else 2, length=12)
    plain = {key: value for key, value in options.items() if key in ("do_sample", "num_beams")}
    expected = model.generate(ids, max_new_tokens=14, min_new_tokens=14, use_cache=False, **plain)
    assert torch.equal(model.generate(ids, max_new_tokens=14, min_new_tokens=14, **options), expected)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_sampling_assistants_and_left_padding(name):
    model, ids = grafted(name), random_ids(length=12)
    torch.manual_seed(3)
    with_cache = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(
        with_cache, model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=True, use_cache=False)
    )
    assistant = ALL[name].make(seed=7)
    expected = model.generate(ids[:1], max_new_tokens=10, min_new_tokens=10, do_sample=False)
    helped = model.generate(ids[:1], max_new_tokens=10, min_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert torch.equal(helped, expected)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = model.generate(ids * mask, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    alone = model.generate(ids[:1, 5:], max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert torch.equal(padded[0, 12:], alone[0, 7:])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_packed_rows_do_not_see_one_another(name, vocabulary):
    letters = VOCABULARIES[vocabulary]
    model, ids = grafted(name, letters), random_ids(letters, batch=1)
    positions = torch.cat([torch.arange(length) for length in (15, 3, 22)]).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([15, 3, 22], dim=1)]
    close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_cache_is_cropped_repeated_selected_and_copied_with_its_letters(name):
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)
    copied.crop(-10)
    close(model(ids[:, 30:], past_key_values=copied, use_cache=True).logits, expected[:, 30:])
    cache.crop(-10)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    close(model(ids.flip(0)[:, 30:], past_key_values=cache, use_cache=True).logits, expected.flip(0)[:, 30:])


@pytest.mark.parametrize("name", ["llama"])
@torch.no_grad()
def test_a_cache_gives_back_only_what_is_kept(name):
    model, ids = grafted(name), random_ids(length=500)
    cache = DynamicCache(config=model.config)
    for _ in range(4):  # the first is let go
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"asked to forget \d+ tokens more than it keeps, .* 512 before"):
        cache.crop(-1600)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_checkpointed_gradients_are_the_same_also_of_two_passes_at_once(name, reentrant):
    model = grafted(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    batches = random_ids(seed=1), random_ids(seed=2)

    def both():
        model.zero_grad()
        (model(batches[0], labels=batches[0]).loss + model(batches[1], labels=batches[1]).loss).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    expected = both()
    assert any("motif_memory" in weight for weight in expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = both()
    assert found.keys() == expected.keys()
    for weight, grad in expected.items():
        close(found[weight], grad, SAME_MODEL_FP32)


@pytest.mark.parametrize("name", ALL)
def test_memories_learn_from_the_first_step_on(name):
    model, ids = grafted(name, trained=False), random_ids()
    found = gradients(model.train(), ids)
    learning = {weight for weight, grad in found.items() if "motif_memory" in weight and grad.abs().max() > 0}
    assert any("value_proj" in weight for weight in learning)
    optimizer = torch.optim.SGD([weight for key, weight in model.named_parameters() if "motif_memory" in key], lr=0.5)
    optimizer.step()
    second = gradients(model, ids)
    assert all(grad.abs().max() > 0 for weight, grad in second.items() if "motif_memory.embeddings" in weight)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_saved_memories_load_into_a_bare_host(name, tmp_path):
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits
    save_memory(model, tmp_path / "memory")
    model.save_pretrained(tmp_path / "whole")
    bare = ALL[name].make()
    close(load_memory(bare, tmp_path / "memory")(ids).logits, expected)
    for place in ("memory", "whole"):
        host = type(bare).from_pretrained(tmp_path / "whole").eval()
        loaded = load_memory(host, tmp_path / place, tokenizer=None if place == "memory" else Letters())
        close(loaded(ids).logits, expected)
    shaken = grafted(name, trained=False)
    close(load_memory(shaken, tmp_path / "memory")(ids).logits, expected)


class Letters:
    """A vocabulary of single bases, as far as letters are learnt from it."""

    all_special_ids = (0, 1, 2, 3, 4)

    def get_vocab(self):
        return {word or f"<{index}>": index for index, word in enumerate(SINGLE)}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_copies_and_pickles_have_memories_of_their_own(name):
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    for memory in attached_memories(model).values():
        torch.nn.init.zeros_(memory.value_proj.weight)
    for other in (copied, pickled):
        close(other(ids).logits, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_autocast_stays_near(name):
    model, ids = grafted(name), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(ids).logits
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert (model.to(torch.bfloat16)(ids).logits.float() - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("name", DECODERS)
def test_lora_beside_a_memory(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits.detach()
    config = peft.LoraConfig(
        target_modules="all-linear", exclude_modules=r".*(motif_memory|gate|router).*", modules_to_save=[]
    )
    adapted = peft.get_peft_model(model, config)
    close(adapted(ids).logits, expected)
    adapted(ids, labels=ids).loss.backward()
    assert not any(weight.grad is not None for key, weight in adapted.named_parameters() if "motif_memory" in key)
    save_memory(adapted, tmp_path / "memory")
    close(load_memory(ALL[name].make(), tmp_path / "memory")(ids).logits, expected)
    close(adapted.merge_and_unload()(ids).logits, expected, SAME_MODEL_FP32)


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_host_is_one_graph(name):
    model, ids = grafted(name), random_ids()
    expected = model(ids).logits
    torch.compiler.reset()
    options = {} if name == "bert" else {"use_cache": False}
    close(torch.compile(model, fullgraph=True)(ids, **options).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_step_beside_a_static_cache_is_compiled_once_and_leaves_its_state_in_place(name):
    """A CUDA graph, which `generate` records on a GPU, finds what the step before wrote only at the same address."""
    model, ids = grafted(name), random_ids(length=20)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=24)
    close(model(ids[:, :9], past_key_values=cache).logits, expected[:, :9])
    torch.compiler.reset()
    counter = CompileCounter()
    compiled, found, places = torch.compile(model, backend=counter), [], set()
    for place in range(9, 20):
        found.append(compiled(ids[:, place : place + 1], past_key_values=cache).logits)
        windows = cache.motif_memory_state._pieces.values()
        places.add(tuple(window.tensor.data_ptr() for window in windows))
    close(torch.cat(found, dim=1), expected[:, 9:])
    assert counter.frame_count == 1 and len(places) == 1
    cache.reset()  # a new text at the same place
    close(model(ids[:, 4:], past_key_values=cache).logits, model(ids[:, 4:]).logits)
    assert {tuple(window.tensor.data_ptr() for window in windows)} == places
    with pytest.raises(ValueError, match="use a DynamicCache"):
        cache.motif_memory_state.crop(1)


def test_two_threads_do_not_read_each_others_letters():
    from concurrent.futures import ThreadPoolExecutor

    model = grafted("llama")
    batches = [random_ids(seed=seed, length=20 + seed) for seed in range(12)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]

        def run(ids):
            with torch.no_grad():
                return model(ids).logits

        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(run, batches * 5), expected * 5, strict=True):
                close(found, wanted)


def test_hidden_states_and_attentions_are_still_returned():
    model, ids = grafted("llama"), random_ids()
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
