"""Hosts and uses of other shapes than most: which way a host looks, caches, masks, calls, and what is around it."""

import copy
import dataclasses
import functools
import pickle
import threading
from types import MethodType

import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from graft_hosts import CONFIG, PAIRS, SINGLE, random_ids
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config
from tolerances import CHANGED, SAME_FP32
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from gengram import GengramForCausalLM, GengramTokenizer, MotifMemoryConfig
from gengram.motif_memory import (
    attach_memory,
    attached_memories,
    detach_memory,
    fold_memory,
    load_memory,
    memory_path,
    save_memory,
)
from gengram.motif_memory.grafts.attach import graft_of

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES |= {"image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME_FP32)


def made(name, config, **options):
    torch.manual_seed(0)
    return getattr(hf, name)(getattr(hf, config)(**options)).eval()


def llama(**options):
    return made("LlamaForCausalLM", "LlamaConfig", **{**SIZES, **options})


def gemma3():
    text = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
    others = {"mm_tokens_per_image": 4, "image_token_index": 30, "boi_token_index": 29, "eoi_token_index": 28}
    return made("Gemma3ForConditionalGeneration", "Gemma3Config", text_config=text, vision_config=EYES, **others)


def gpt2(**options):
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 4, "n_head": 4}
    return made("GPT2LMHeadModel", "GPT2Config", **sizes, **options)


def encoder(kind, **options):
    return made(f"{kind}ForMaskedLM", f"{kind}Config", **SIZES, **options)


def trained(model, layers=(1, 2), letters=SINGLE, config=CONFIG, **options):
    attach_memory(model, config, layers=list(layers), token_letters=letters, **options)
    torch.manual_seed(1)
    for memory in attached_memories(model).values():
        for weight in memory.parameters():
            nn.init.normal_(weight, std=0.3)
    return model


class Letters:
    all_special_ids = ()

    def __init__(self, letters=SINGLE):
        self.letters = letters

    def get_vocab(self):
        return {word or f"<{index}>": index for index, word in enumerate(self.letters)}


# ---- which way a host looks


@pytest.mark.parametrize("make", [gemma3, lambda: gpt2(add_cross_attention=True), gpt2, llama])
def test_a_host_that_looks_back_only_gets_windows_that_do(make):
    model, ids = make(), random_ids(length=24)
    assert not model.training
    other = ids.clone()
    other[:, 16:] = ids.flip(0)[:, 16:]
    close(model(input_ids=ids).logits[:, :16], model(input_ids=other).logits[:, :16])
    trained(model)
    assert graft_of(model).is_causal
    close(model(input_ids=ids).logits[:, :16], model(input_ids=other).logits[:, :16])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["DebertaV2", "ConvBert", "MPNet", "RoFormer", "BigBird", "FNet", "Bert"])
def test_an_encoder_gets_centred_windows_and_is_as_it_was(kind, training):
    model = encoder(kind).train(training)
    attach_memory(model, MotifMemoryConfig(ngram_sizes=(1,), embedding_dim=2), layers=[0], token_letters=SINGLE)
    assert not graft_of(model).is_causal and model.training == model.base_model.training == training
    attention = getattr(model.base_model, "attention_type", None)
    assert attention in (None, model.config.attention_type if kind == "BigBird" else None)


def test_a_host_without_values_is_asked_by_its_layers_or_refused():
    with torch.device("meta"):
        llama_of_nothing, deberta = llama(), encoder("DebertaV2")
    attach_memory(llama_of_nothing, CONFIG, layers=[1], token_letters=SINGLE)
    assert graft_of(llama_of_nothing).is_causal
    with pytest.raises(ValueError, match=r"say is_causal=True .a decoder. or is_causal=False"):
        attach_memory(deberta, CONFIG, layers=[1], token_letters=SINGLE)
    attach_memory(deberta, CONFIG, layers=[1], token_letters=SINGLE, is_causal=False)


# ---- caches


def test_caches_that_cannot_keep_the_state_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32}
    model, ids = trained(made("RwkvForCausalLM", "RwkvConfig", **sizes, intermediate_size=48)), random_ids(length=12)
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match=r"state: a motif memory keeps .* got a list; use `generate`, or"):
        model(ids[:, :1], state=state, use_cache=True)


@pytest.mark.parametrize("around", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
def test_continuous_batching_is_refused_when_it_is_asked_for(around):
    model = attach_memory(around(llama()), CONFIG, layers=[1, 3], token_letters=SINGLE)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"generate_batch.* no place\. Use generate\(\)"):
            one.generate_batch([[8, 5, 6]], max_new_tokens=2)
        assert "init_continuous_batching" not in "".join(one.state_dict())
    detach_memory(model)
    assert model.init_continuous_batching.__module__.startswith("transformers.")


def test_a_layer_that_is_computed_twice_has_no_state():
    model, ids = trained(made("HrmTextForCausalLM", "HrmTextConfig", **SIZES), ["L_module.layers.1"]), random_ids()
    other = ids.clone()
    other[:, 16:] = ids.flip(0)[:, 16:]
    with pytest.raises(ValueError, match=r"computed twice in one pass.*use_cache=False"):
        model(ids)
    close(model(ids, use_cache=False).logits[:, :16], model(other, use_cache=False).logits[:, :16])


def test_a_cache_whose_layers_were_cropped_goes_on_from_there():
    model, ids = trained(llama()), random_ids(length=24)
    expected, cache = model(ids).logits, model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.crop(-10)
    close(model(ids[:, 14:], past_key_values=cache).logits, expected[:, 14:])


@pytest.mark.parametrize("crops", [(300, 300), (260, 260), (500, 20), (200, 200, 200), (600,)])
@pytest.mark.parametrize("of_layers", [False, True])
def test_a_cache_takes_back_no_more_than_is_kept_in_several_times_either(crops, of_layers):
    model, ids = trained(llama(max_position_embeddings=2048)), random_ids(length=1200)
    cache = hf.DynamicCache(config=model.config)

    def take_back(tokens: int) -> None:
        if not of_layers:
            cache.crop(-tokens)
            return
        for layer in cache.layers:
            layer.crop(-tokens)
        model(ids[:, :1], past_key_values=cache)  # as any call, which looks at the cache

    model(ids, past_key_values=cache)
    cache.crop(-400)  # what is read again is kept again
    model(ids[:, 800:], past_key_values=cache)
    with pytest.raises(ValueError, match="new cache"):
        for tokens in crops:
            take_back(tokens)
    with pytest.raises(ValueError, match=r"new (cache|one)"):  # also if that was not heeded
        model(ids[:, :5], past_key_values=cache)
    cache.reset()
    close(model(ids[:, :50], past_key_values=cache).logits, model(ids[:, :50]).logits)


def test_tokens_taken_back_in_two_steps_are_read_again_as_in_one_pass():
    model, ids = trained(llama(max_position_embeddings=2048)), random_ids(length=1200)
    cache = hf.DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-200)
    cache.crop(-300)
    close(model(ids[:, 700:750], past_key_values=cache).logits, model(ids[:, :750]).logits[:, 700:])


def test_folds_are_looked_at_again_in_a_cache_that_was_reset():
    model, ids = trained(llama()), random_ids()
    fold_memory(model)
    cache = hf.DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for memory in attached_memories(model).values():
        memory.value_proj.weight.data.mul_(3)
    cache.reset()
    found = model(ids, past_key_values=cache).logits
    with memory_path("token_major"):
        close(found, model(ids).logits)


def test_a_cache_of_other_memories_is_refused():
    model, ids = trained(llama()), random_ids(length=12)
    cache = model(ids, use_cache=True).past_key_values
    trained(detach_memory(model), config=MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=8, window=5))
    with pytest.raises(ValueError, match="filled with other motif memories"):
        model(ids, past_key_values=cache)


def test_caches_are_copied_and_pickled_with_their_state():
    model, ids = trained(llama()), random_ids(length=24)
    expected, cache = model(ids).logits[:, 14:], model(ids[:, :14], use_cache=True).past_key_values
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        close(model(ids[:, 14:], past_key_values=other).logits, expected)


def test_a_compiled_model_makes_a_cache_that_is_not_gone_on_from():
    model, ids = trained(llama()), random_ids(length=24)
    expected = model(ids).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        found = compiled(ids[:, :14])
        close(found.logits, expected[:, :14])
    with pytest.raises(ValueError, match="made inside a compiled model"):
        model(ids[:, 14:], past_key_values=found.past_key_values)
    cache = model(ids[:, :14], use_cache=True).past_key_values
    close(compiled(ids[:, 14:], past_key_values=cache).logits, expected[:, 14:])
    close(model(ids).logits, expected)


# ---- masks and arguments


@pytest.mark.parametrize("make", [llama, lambda: encoder("Bert")])
def test_a_model_that_was_never_called_is_compiled(make):
    model, ids = trained(make()), random_ids()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    found = [compiled(ids).logits for _ in range(3)]
    for logits in found:
        close(logits, model(ids).logits)


@pytest.mark.parametrize("kind", list(CheckpointImpl))
@pytest.mark.parametrize("by_name", [False, True])
def test_layers_are_computed_again_by_a_wrapper_around_them(kind, by_name, monkeypatch):
    """Of two passes whose gradients come together, also in another thread, as those of a GPU."""
    model = trained(llama()).train()
    batches = random_ids(seed=1), random_ids(seed=2)
    layer_class = type(model.model.layers[0])

    def gradients(model) -> dict:
        model.zero_grad()
        with torch.enable_grad():
            loss = sum(model(ids, labels=ids, use_cache=False).loss for ids in batches)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients(model)
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(
        wrapped,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, (layer_class, hf.models.llama.modeling_llama.LlamaDecoderLayer)),
    )
    found = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gradients(wrapped).items()}
    assert found.keys() == expected.keys() and any("motif_memory" in name for name in found)
    for name, value in expected.items():
        close(found[name], value)


def test_layers_computed_again_beside_a_cache_are_told_to_do_without():
    model = trained(llama()).train()
    layer_class = type(model.model.layers[1])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer_class))
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="computed again for gradients, give it use_cache=False"),
    ):
        model(random_ids(), labels=random_ids(), use_cache=True).loss.backward()


def test_a_mask_as_wide_as_a_static_cache():
    model, ids = trained(llama()), random_ids(length=24)
    cache, mask = hf.StaticCache(config=model.config, max_cache_len=32), torch.zeros(2, 32, dtype=torch.int64)
    found = []
    for start, end in ((0, 14), (14, 15), (15, 24)):
        mask[:, start:end] = 1
        found.append(model(ids[:, start:end], attention_mask=mask, past_key_values=cache).logits)
    close(torch.cat(found, dim=1), model(ids).logits)


def test_static_caches_of_sliding_windows_generate_padded_texts():
    model = trained(made("MistralForCausalLM", "MistralConfig", **SIZES, num_key_value_heads=2, sliding_window=6))
    ids = random_ids(length=16)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    alone = model.generate(ids[:1, 9:], **{**options, "attention_mask": mask[:1, 9:]})
    assert torch.equal(expected[:1, 9:], alone)


def test_arguments_count_by_their_place_as_by_their_name():
    ids, positions = random_ids(length=24), torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    model = trained(llama()).model
    named = model(ids, position_ids=positions, use_cache=False)[0]
    close(model(ids, None, positions, use_cache=False)[0], named)
    assert (named - model(ids, use_cache=False)[0])[:, 10:].abs().max() > CHANGED

    model, mask = trained(gpt2()).transformer, torch.ones_like(ids)
    mask[:, :9] = 0
    other = ids.clone()
    other[:, :9] = ids.flip(0)[:, :9]
    for text in (ids, other):  # letters of padding change nothing
        close(model(text, None, mask)[0][:, 9:], model(ids, attention_mask=mask)[0][:, 9:])


# ---- what is around a host, and what is loaded into it


def test_what_accelerate_put_around_a_layer_stays_and_the_memory_is_computed(tmp_path):
    host, ids = llama(), random_ids(length=12)
    expected = trained(copy.deepcopy(host))(ids).logits
    bare = host(ids).logits
    spread = dispatch_model(host, device_map={"": "cpu"}, force_hooks=True)
    close(trained(spread)(ids).logits, expected)
    close(detach_memory(spread)(ids).logits, bare)

    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(4)}
    fetched = dispatch_model(llama(), device_map=devices, offload_dir=tmp_path / "weights", force_hooks=True)
    close(trained(fetched)(ids).logits, expected)
    save_memory(fetched, tmp_path / "memory")
    close(load_memory(llama(), tmp_path / "memory")(ids).logits, expected)

    layer = (whole := llama()).model.layers[1]
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, place_submodules=True))
    with pytest.raises(ValueError, match=r"layers.1 are fetched when they are needed"):
        attach_memory(whole, CONFIG, layers=[2, 1], token_letters=SINGLE)
    assert not hasattr(whole.model.layers[2], "motif_memory")
    close(whole(ids).logits, bare)


def test_a_forward_that_was_replaced_is_refused_and_not_passed_over():
    model, ids = llama(), random_ids(length=12)
    layer = model.model.layers[1]
    layer.forward = MethodType(type(layer).forward, layer)
    with pytest.raises(ValueError, match=r"`forward` of layers.1 was replaced by other code"):
        attach_memory(model, CONFIG, layers=[1], token_letters=SINGLE)
    trained(model, [2])
    layer = model.model.layers[2]
    layer.forward = MethodType(type(llama().model.layers[2]).forward, layer)
    with pytest.raises((RuntimeError, TypeError)):
        model(ids)


def test_memories_that_peft_trains_are_saved_and_adapters_within_them_refused(tmp_path):
    ids = random_ids(length=12)
    model = trained(llama())
    whole = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["motif_memory"]))
    for name, weight in whole.named_parameters():
        if "modules_to_save" in name:
            weight.add_(0.1)
    save_memory(whole, tmp_path / "whole")
    close(load_memory(llama(), tmp_path / "whole")(ids).logits, whole(ids).logits)
    within = get_peft_model(trained(llama()), LoraConfig(target_modules=["key_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_memory(within, tmp_path / "within")
    merged = within.merge_and_unload()
    save_memory(merged, tmp_path / "merged")
    close(load_memory(llama(), tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_memories_are_found_in_a_folder_whose_names_saving_changed(tmp_path):
    model, ids = trained(gemma3()), random_ids(length=12)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    close(load_memory(again, tmp_path, tokenizer=Letters())(input_ids=ids).logits, expected)


def test_memories_of_another_vocabulary_or_direction_are_refused(tmp_path):
    save_memory(trained(llama()), tmp_path)
    swapped = [{"A": "T", "T": "A"}.get(word, word) for word in SINGLE]
    with pytest.raises(ValueError, match="tokens spell other bases than those of Letters"):
        load_memory(llama(), tmp_path, tokenizer=Letters(swapped))
    load_memory(llama(), tmp_path, tokenizer=Letters())
    for wrong in ({"letters": swapped}, {"is_causal": False}):
        with pytest.raises(ValueError, match="another configuration, direction or vocabulary"):
            load_memory(trained(llama(), **wrong), tmp_path)
    config = MotifMemoryConfig(ngram_sizes=(1, 2), embedding_dim=4, window=5, pooling="as_trained")
    with pytest.raises(ValueError, match="tokens of single bases"):
        attach_memory(llama(), config, layers=[1], token_letters=PAIRS)


class Plain(nn.Module):
    """Somebody's own encoder, which is no model of Transformers."""

    def __init__(self):
        super().__init__()
        self.config = hf.LlamaConfig(**SIZES)
        self.emb = nn.Embedding(32, 32)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True) for _ in range(4))

    def get_input_embeddings(self):
        return self.emb

    def forward(self, tokens):
        states = self.emb(tokens)
        for block in self.blocks:
            states = block(states)
        return states


def test_a_plain_module_gets_memories_and_loses_them_again():
    torch.manual_seed(0)
    model, ids = Plain().eval(), random_ids(length=12)
    bare = model(ids)
    trained(model, is_causal=False)
    assert (model(ids) - bare).abs().max() > CHANGED
    close(detach_memory(model)(ids), bare)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([""], "such as layers.0"),
        (["layers"], "such as layers.0"),
        ((name for name in ()), "got none"),
        (3, "got none"),
        ([1.5], "layers 0..3"),
    ],
)
def test_layers_that_are_none_are_refused(layers, words):
    with pytest.raises(ValueError, match=words):
        attach_memory(llama(), CONFIG, layers=layers, token_letters=SINGLE)


def test_models_of_one_configuration_have_memories_of_their_own(tmp_path):
    """As the arms of an experiment, which are made of one configuration."""
    config = hf.LlamaConfig(**SIZES)
    short, long, bare = (hf.LlamaForCausalLM(config).eval() for _ in range(3))
    trained(short)
    trained(long, layers=[2, 3], config=dataclasses.replace(CONFIG, window=2 * CONFIG.window + 1))
    assert short.config is short.model.config is not long.config and not hasattr(bare.config, "motif_memory")
    ids = random_ids()
    for name, model in {"short": short, "long": long}.items():
        model.save_pretrained(tmp_path / name)
        again = load_memory(hf.LlamaForCausalLM.from_pretrained(tmp_path / name), tmp_path / name, tokenizer=Letters())
        close(again(ids).logits, model(ids).logits)
    detach_memory(long)
    assert hasattr(short.config, "motif_memory") and not hasattr(long.config, "motif_memory")


def test_a_place_that_is_taken_is_refused_before_anything_is_attached():
    host = llama()
    host.model.layers[2].motif_memory = None
    expected = host(random_ids()).logits
    with pytest.raises(ValueError, match=r"layers\.2 has a motif memory already, or a place for one"):
        attach_memory(host, CONFIG, layers=[1, 2], token_letters=SINGLE)
    close(host(random_ids()).logits, expected)
    gengram = GengramForCausalLM(tiny_config(memory_layers=[0])).eval()
    for layer in (0, 1):
        with pytest.raises(ValueError, match="of a Gengram model, memory_layers in its configuration says"):
            attach_memory(gengram, CONFIG, layers=[layer], tokenizer=GengramTokenizer())


def test_hosts_whose_states_have_tokens_first_are_refused():
    host = made("XLNetLMHeadModel", "XLNetConfig", vocab_size=32, d_model=32, n_layer=3, n_head=4, d_inner=48)
    for letters in (SINGLE, PAIRS):
        with pytest.raises(ValueError, match=r"take \(length, batch, hidden\)"):
            attach_memory(host, CONFIG, layers=[1], token_letters=letters)
    attach_memory(host, CONFIG, layers=[1], token_letters=PAIRS, is_causal=False)
    with pytest.raises(
        ValueError, match=r"expected hidden states of \(batch, length, hidden\) for tokens of \(1, 8\)"
    ):
        host(random_ids(batch=1, length=8))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "ModernBert"])
def test_an_encoder_of_tiny_weights_gets_centred_windows(kind):
    host = encoder(kind, initializer_range=0.001)
    attach_memory(host, CONFIG, layers=[1], token_letters=SINGLE)
    assert graft_of(host).is_causal is False


def test_layers_may_come_from_a_generator_or_an_array():
    for layers in ((f"layers.{number}" for number in (1, 2)), torch.tensor([1, 2]).numpy()):
        model = attach_memory(llama(), CONFIG, layers=layers, token_letters=SINGLE)
        assert list(attached_memories(model)) == ["layers.1", "layers.2"]
