"""Adapters of peft: what they must remember of the base model, and prompts in front of the memory."""

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import random_ids, tiny_model
from tolerances import CHANGED_LOGITS, SAME_FP32
from transformers import AutoModelForSequenceClassification, DynamicCache, Trainer, TrainingArguments

from gengram import (
    GengramForCausalLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
)

IDS = random_ids(8, 30)
FP32 = dict(rtol=0, atol=SAME_FP32)
AUTO = {
    GengramForCausalLM: ("CAUSAL_LM", AutoPeftModelForCausalLM),
    GengramForSequenceClassification: ("SEQ_CLS", AutoPeftModelForSequenceClassification),
    GengramForTokenClassification: ("TOKEN_CLS", AutoPeftModelForTokenClassification),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a causal model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(GengramForCausalLM).save_pretrained(folder)
    return folder


@torch.no_grad()
def outputs(model, ids=IDS):
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))


def trained(base, head, **settings) -> PeftModel:
    """An adapter with weights as training leaves them, on a model loaded with these settings."""
    torch.manual_seed(0)
    task = AUTO[head][0]
    model = head.from_pretrained(base, **settings)
    adapted = get_peft_model(model, LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return adapted


# Settings that the base model's folder does not have

LABELS = dict(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})


@pytest.mark.parametrize(
    ("head", "settings", "is_said"),
    [
        (GengramForSequenceClassification, dict(classifier_pooling="mean"), True),
        (GengramForSequenceClassification, dict(is_causal=False, classifier_pooling="centre"), True),
        (GengramForTokenClassification, dict(is_causal=False), True),
        (GengramForSequenceClassification, LABELS, False),
        (GengramForSequenceClassification, {}, False),
    ],
    ids=str,
)
def test_a_reloaded_adapter_has_the_settings_that_it_was_trained_with(base, head, settings, is_said, tmp_path, caplog):
    model = trained(base, head, **settings)
    before = outputs(model).logits
    model.save_pretrained(tmp_path)
    caplog.clear()
    again = AUTO[head][1].from_pretrained(tmp_path)
    assert torch.equal(outputs(again).logits, before)
    assert {name: getattr(again.config, name) for name in settings} == settings
    assert any("was trained with" in message for message in caplog.messages) is is_said
    again.save_pretrained(tmp_path / "again")  # not forgotten the second time either
    assert torch.equal(outputs(AUTO[head][1].from_pretrained(tmp_path / "again")).logits, before)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(head.from_pretrained(tmp_path / "merged")).logits, before, **FP32)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        (GengramForCausalLM, dict(num_experts_per_tok=1)),
        (GengramForCausalLM, dict(memory_pooling="as_trained")),
        (GengramForCausalLM, dict(memory_conv_dilation=2)),
        (GengramForCausalLM, dict(rms_norm_eps=1e-3)),
        (GengramForSequenceClassification, dict(num_labels=3)),
    ],
    ids=str,
)
def test_settings_that_a_loaded_model_cannot_take_over_are_an_error(base, head, settings, tmp_path):
    model = trained(base, head, **settings)
    before = outputs(model).logits
    model.save_pretrained(tmp_path)
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"was trained with {name}={value!r}, but this model has {name}="):
        AUTO[head][1].from_pretrained(tmp_path)
    again = AUTO[head][1].from_pretrained(tmp_path, **settings)
    assert torch.equal(outputs(again).logits, before)
    facts = PeftConfig.from_pretrained(tmp_path)
    facts.auto_mapping = None  # who knows better can say so
    PeftModel.from_pretrained(
        head.from_pretrained(base, num_labels=settings.get("num_labels", 2)), tmp_path, config=facts
    )


def test_adapters_of_different_settings_do_not_share_a_model(base, tmp_path):
    for name, settings in (("last", {}), ("mean", dict(classifier_pooling="mean"))):
        trained(base, GengramForSequenceClassification, **settings).save_pretrained(tmp_path / name)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "last")
    model.load_adapter(tmp_path / "last", adapter_name="second")
    with pytest.raises(ValueError, match="'third' was trained with classifier_pooling='mean', but this model has"):
        model.load_adapter(tmp_path / "mean", adapter_name="third")


def test_the_librarys_own_adapters_are_checked_too(base, tmp_path):
    trained(base, GengramForCausalLM, num_experts_per_tok=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained with num_experts_per_tok=1"):
        GengramForCausalLM.from_pretrained(base).load_adapter(tmp_path)


def test_an_adapter_of_before_is_loaded_as_before(base, tmp_path):
    model = trained(base, GengramForSequenceClassification)
    before = outputs(model).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("auto_mapping")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(outputs(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)).logits, before)


def test_prompts_and_adapters_without_a_task_say_what_they_do_not_carry(base, tmp_path, caplog):
    load = AutoModelForSequenceClassification.from_pretrained
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, token_dim=32)
    get_peft_model(load(base), prompts).save_pretrained(tmp_path)
    assert not any("does not carry" in message for message in caplog.messages)
    get_peft_model(load(base, classifier_pooling="mean"), prompts).save_pretrained(tmp_path)
    assert any("does not carry" in message and "pooling='mean'" in message for message in caplog.messages)
    caplog.clear()
    lora = LoraConfig(target_modules=["q_proj"])
    get_peft_model(load(base, is_causal=False), lora).save_pretrained(tmp_path / "lora")
    assert any("does not carry" in message and "is_causal=False" in message for message in caplog.messages)


# Prefix tuning: keys and values in a cache, and no letters


def prefixed(head, task: str, **fields) -> PeftModel:
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=3, token_dim=24, num_attention_heads=2)
    torch.manual_seed(0)
    return get_peft_model(tiny_model(head, **fields), config).eval()


@pytest.mark.parametrize("fields", [{}, {"memory_layers": []}, {"memory_pooling": "as_trained"}], ids=str)
@pytest.mark.parametrize(
    ("head", "task"),
    [
        (GengramForCausalLM, "CAUSAL_LM"),
        (GengramForSequenceClassification, "SEQ_CLS"),
        (GengramForTokenClassification, "TOKEN_CLS"),
        (GengramModel, "FEATURE_EXTRACTION"),
    ],
)
def test_a_prefix_is_seen_by_attention_and_unknown_to_the_memory(head, task, fields):
    model = prefixed(head, task, **fields)
    plain = model.get_base_model()
    (keys, values) = model.get_prompt(8).layers[0].keys, model.get_prompt(8).layers[0].values
    assert keys.shape == values.shape == (8, 2, 3, 12)
    found, without = outputs(model)[0], outputs(plain)[0]
    assert found.shape == without.shape and (found - without).abs().max() > CHANGED_LOGITS
    # by hand: a cache that is built for the model, with the same keys and values
    cache = DynamicCache(config=plain.config)
    for layer, prompt in enumerate(model.get_prompt(8).layers):
        cache.update(prompt.keys, prompt.values, layer)
    with torch.no_grad():
        expected = plain(IDS, cache=cache, attention_mask=torch.ones(8, 33))[0]
    torch.testing.assert_close(found, expected, **FP32)
    if plain.config.memory_layers and head is not GengramModel:  # the first memory reads letters only
        arguments = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_memory_gates=True)
        with torch.no_grad():
            gates = model(**arguments).memory_gates[0], plain(**arguments).memory_gates[0]
        torch.testing.assert_close(*gates, **FP32)


@pytest.mark.parametrize("fields", [{}, {"memory_layers": []}], ids=str)
def test_generation_behind_a_prefix_is_that_of_recomputation(fields):
    model = prefixed(GengramForCausalLM, "CAUSAL_LM", **fields)
    ids = IDS[:, :9]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert not torch.equal(cached, model.get_base_model().generate(**options))
    with torch.no_grad():
        behind = torch.ones_like(cached)
        behind[0, :4] = 0
        positions = (behind.cumsum(-1) - 1).clamp_min(0)
        logits = model(input_ids=cached, attention_mask=behind, position_ids=positions).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), cached[:, 9:])
    beams = model.generate(**options, num_beams=2)
    assert torch.equal(beams, model.generate(**options, num_beams=2, use_cache=False))


def test_a_prefix_trains_and_is_saved(tmp_path):
    model = prefixed(GengramForSequenceClassification, "SEQ_CLS", classifier_pooling="mean")
    before = outputs(model).logits
    rows = [{"input_ids": row.tolist(), "labels": int(row[0] > 6)} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    after = outputs(model).logits
    assert (after - before).abs().max() > CHANGED_LOGITS
    model.save_pretrained(tmp_path / "prefix")
    plain = tiny_model(GengramForSequenceClassification, classifier_pooling="mean")
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(plain, tmp_path / "prefix")).logits, after, **FP32)


@torch.no_grad()
def test_a_cache_without_a_configuration_is_given_room_in_place(caplog):
    model = tiny_model(GengramForCausalLM)
    full, cache = model(IDS).logits, DynamicCache()
    parts = [model(part, cache=cache).logits for part in IDS.split([11, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, **FP32)
    assert not caplog.messages
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])  # the letters are lost
    model(IDS[:, :1], cache=rebuilt)
    assert any("without the letters" in message for message in caplog.messages)
