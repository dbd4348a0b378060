"""Fine-tuning as users do it: `Trainer` on real sequences, language modelling, and adapters of peft."""

import csv
import gzip

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from shared_files import DATA, needs_data
from tiny_models import random_ids, tiny_config, tiny_model
from tolerances import SAME_FP32, SAME_MODEL_FP32, UNTRAINED_LOSS
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from gengram import (
    DEFAULT_MODEL,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramTokenizer,
)
from gengram.data_preparation import DataCollatorForGenomeModeling

TOKENIZER = GengramTokenizer()
IDS = random_ids(4, 30)
FP32 = dict(rtol=0, atol=SAME_FP32)  # a merged weight W + BA multiplies in another order


def arguments(folder, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return TrainingArguments(**{**settings, **changes})


def new_model(head, seed: int = 0, **changes):
    """A small model as a user would create it: initialised by the package."""
    torch.manual_seed(seed)
    return head(tiny_config(initializer_range=0.05, **changes))


def repeats(count: int, seed: int = 0) -> Dataset:
    """Random units of five bases, each repeated up to a random length: easy to learn, ragged."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        unit = "".join(random.choice(list("ACGT"), 5))
        sequences.append((unit * 8)[: random.integers(20, 40)])
    return Dataset.from_dict({"input_ids": TOKENIZER(sequences)["input_ids"]})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# A labelled set


def nfe2(split: str) -> Dataset:
    """NF-E2 ChIP-seq peaks (1) and background (0), in an order that mixes them."""
    with gzip.open(DATA / "bench" / "tf_nfe2" / f"{split}.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    data = Dataset.from_dict(
        {
            "input_ids": TOKENIZER([row["sequence"] for row in rows])["input_ids"],
            "labels": [int(row["label"]) for row in rows],
        }
    )
    return data.shuffle(seed=0)


def auc(prediction) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    logits = prediction.predictions
    return {"auc": roc_auc_score(prediction.label_ids, logits[:, 1] - logits[:, 0])}


@needs_data
def test_sequence_classification_learns_and_is_saved(tmp_path):
    data = nfe2("train").select(range(48))
    trainer = Trainer(
        new_model(GengramForSequenceClassification),
        arguments(tmp_path, max_steps=12, per_device_train_batch_size=16),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(TOKENIZER),
        processing_class=TOKENIZER,
        compute_metrics=auc,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.05 and after["eval_auc"] > before["eval_auc"]

    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(model) is GengramForSequenceClassification and type(tokenizer) is GengramTokenizer
    again = Trainer(model, arguments(tmp_path), data_collator=DataCollatorWithPadding(tokenizer))
    np.testing.assert_array_equal(again.predict(data).predictions, trainer.predict(data).predictions)


@pytest.mark.parametrize(
    "head", [GengramForCausalLM, GengramForSequenceClassification], ids=lambda head: head.__name__
)
def test_training_leaves_the_special_tokens_of_a_model_alone(head, tmp_path, caplog):
    """`Trainer` makes a model's configuration agree with what its tokenizer names."""
    data = repeats(8)
    if head is GengramForSequenceClassification:
        data = data.map(lambda row: {"labels": row["input_ids"][0] % 2})
    for tokenizer in (TOKENIZER, AutoTokenizer.from_pretrained(DEFAULT_MODEL)):
        model = new_model(head)
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=1),
            train_dataset=data,
            data_collator=LANGUAGE_MODELS.get(head, DataCollatorWithPadding(tokenizer)),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        again = head.from_pretrained(tmp_path / "saved")
        assert not any("PAD/BOS/EOS" in message for message in caplog.messages)
        assert (again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id) == (None, None, 0)


@needs_data
@pytest.mark.slow
def test_sequence_classification_finds_the_motif(tmp_path, record_property):
    """A small model trained from nothing must beat counts of k-mers, which reach 0.981 (../shared/data/README.md)."""
    model = new_model(
        GengramForSequenceClassification,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        memory_layers=[0, 1],
        memory_ngram_sizes=[1, 2, 3, 4, 5, 6],
        memory_embedding_dim=32,
        memory_window=21,
        is_causal=False,
    )
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            num_train_epochs=5,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=20,
        ),
        train_dataset=nfe2("train"),
        eval_dataset=nfe2("test"),
        data_collator=DataCollatorWithPadding(TOKENIZER),
        compute_metrics=auc,
    )
    trainer.train()
    result = trainer.evaluate()
    record_property("auc", result["eval_auc"])
    print(f"NF-E2 test AUC: {result['eval_auc']:.3f}")
    assert result["eval_auc"] > 0.981


def test_token_classification_learns_labels_of_bases(tmp_path):
    """Labels: C or G, a base of which the memory's window holds many others; ragged rows, padded by the library."""
    data = repeats(64).map(lambda row: {"labels": [int(i in (5, 6)) for i in row["input_ids"]]})
    trainer = Trainer(
        new_model(GengramForTokenClassification),
        arguments(tmp_path, max_steps=12),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForTokenClassification(TOKENIZER),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3 * before


# Language modelling


LANGUAGE_MODELS = {
    GengramForCausalLM: DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    GengramForMaskedLM: DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.2),
}
each_language_model = pytest.mark.parametrize("head", LANGUAGE_MODELS, ids=lambda head: head.__name__)


def language_model_trainer(head, folder, model=None, **changes) -> Trainer:
    model = new_model(head) if model is None else model
    return Trainer(
        model,
        arguments(folder, **{"max_steps": 40, "learning_rate": 1e-2, **changes}),
        train_dataset=repeats(128),
        eval_dataset=repeats(16, seed=1),
        data_collator=LANGUAGE_MODELS[head],
    )


@each_language_model
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"gradient_checkpointing": True, "bf16": True}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_language_models_learn(head, options, tmp_path):
    trainer = language_model_trainer(head, tmp_path, **options)
    trainer.train()
    history = losses(trainer)
    print(history)
    assert history[0] == pytest.approx(np.log(128), abs=UNTRAINED_LOSS)  # knows nothing yet
    assert np.mean(history[-3:]) < 1.6  # little more than which tokens are bases: log(4) is 1.39
    assert trainer.model.dtype == torch.float32
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_checkpointing_and_accumulation_change_no_step(tmp_path):
    """16 ragged rows at once, in four parts, and with recomputation: equal weights after three steps."""
    results = []
    for batch, options in [(16, {}), (4, {"gradient_accumulation_steps": 4}), (16, {"gradient_checkpointing": True})]:
        trainer = language_model_trainer(
            GengramForCausalLM,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=batch,
            optim="sgd",
            learning_rate=0.5,
            **options,
        )
        trainer.train()
        results.append(trainer.model.state_dict())
    start = new_model(GengramForCausalLM).state_dict()
    for name, weight in results[0].items():
        assert not torch.equal(weight, start[name]), name
        for other in results[1:]:
            torch.testing.assert_close(other[name], weight, **FP32, msg=lambda m, n=name: f"{n}: {m}")


def test_resumed_training_equals_uninterrupted(tmp_path):
    """Weights, optimizer and order of the data go on where the checkpoint was made.

    Not so with random masks: the library's data loader is one batch, and so its draws, ahead of the checkpoint.
    """
    head = GengramForCausalLM
    whole = language_model_trainer(head, tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = language_model_trainer(head, tmp_path, model=new_model(head, seed=5), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@each_language_model
def test_router_losses_in_the_trainer(head, tmp_path):
    """With router losses on, the model returns more than logits; evaluation has to put them together too."""
    trainer = language_model_trainer(head, tmp_path, model=new_model(head, output_router_logits=True), max_steps=3)
    trainer.train()
    plain = language_model_trainer(head, tmp_path, max_steps=3)
    plain.train()
    assert losses(trainer)[0] > losses(plain)[0]
    trainer.compute_metrics = lambda prediction: {"outputs": len(prediction.predictions)}
    assert trainer.evaluate()["eval_outputs"] > 1


# Adapters


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": (dict(target_modules=ATTENTION), ["self_attn"]),
    "all-linear": (dict(target_modules="all-linear"), ["self_attn", "motif_memory.key", "motif_memory.value"]),
    "experts": (dict(target_modules=[], target_parameters=EXPERTS), ["mlp.experts"]),
    "router": (dict(target_modules=[], target_parameters=["mlp.gate.weight"]), ["mlp.gate"]),
    "memory": (dict(target_modules=ATTENTION, modules_to_save=["motif_memory"]), ["self_attn", "motif_memory"]),
    "everything": (
        dict(target_modules="all-linear", target_parameters=EXPERTS, modules_to_save=["motif_memory"]),
        ["self_attn", "mlp.experts", "motif_memory"],
    ),
}
TASKS = {GengramForCausalLM: "CAUSAL_LM", GengramForSequenceClassification: "SEQ_CLS"}

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
each_task = pytest.mark.parametrize("head", TASKS, ids=lambda head: head.__name__)


def adapted(head, adapter: str, base=None) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "task_type": TASKS[head], **ADAPTERS[adapter][0]}
    return get_peft_model(tiny_model(head) if base is None else base, LoraConfig(**settings))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def train(model: PeftModel, head, folder, **options) -> None:
    """A few steps, so that no adapter is at its start, where B = 0."""
    data = repeats(32)
    if head is GengramForSequenceClassification:
        data = data.map(lambda row: {"labels": row["input_ids"][0] % 2})
    trainer = Trainer(
        model,
        arguments(folder, max_steps=4, learning_rate=1e-2, **options),
        train_dataset=data,
        data_collator=LANGUAGE_MODELS.get(head, DataCollatorWithPadding(TOKENIZER)),
    )
    trainer.train()


@each_adapter
@each_task
def test_lora_trains_what_it_should_and_survives_saving(head, adapter, tmp_path):
    model = adapted(head, adapter)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    base = logits(tiny_model(head))
    torch.testing.assert_close(logits(model), base, **FP32)

    train(model, head, tmp_path / "run")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}
    places = ADAPTERS[adapter][1] + (["score"] if head is GengramForSequenceClassification else [])
    for place in places:
        assert any(place in name for name in changed), place
    for name in changed:
        assert any(place in name for place in places) and ("lora_" in name or "modules_to_save" in name), name

    trained = logits(model)
    assert (trained - base).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, **FP32)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny_model(head), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)
    merged = reloaded.merge_and_unload()
    assert type(merged) is head
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=SAME_MODEL_FP32)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(head.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize(
    "head, auto_class",
    [
        (GengramForCausalLM, AutoPeftModelForCausalLM),
        (GengramForSequenceClassification, AutoPeftModelForSequenceClassification),
    ],
)
def test_auto_peft_model_finds_the_base(head, auto_class, tmp_path):
    tiny_model(head).save_pretrained(tmp_path / "base")
    model = adapted(head, "everything", base=head.from_pretrained(tmp_path / "base"))
    train(model, head, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    reloaded = auto_class.from_pretrained(tmp_path / "adapter")
    assert type(reloaded.get_base_model()) is head
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_lora_with_checkpointing_and_bf16(options, tmp_path):
    model = adapted(GengramForCausalLM, "everything")
    train(model, GengramForCausalLM, tmp_path, **options)
    if "bf16" not in options:
        plain = adapted(GengramForCausalLM, "everything")
        train(plain, GengramForCausalLM, tmp_path)
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=SAME_MODEL_FP32)
    assert logits(model).isfinite().all()


def test_adapted_model_generates(tmp_path):
    model = adapted(GengramForCausalLM, "everything")
    train(model, GengramForCausalLM, tmp_path)
    options = dict(max_new_tokens=8, do_sample=False)
    cached = model.eval().generate(input_ids=IDS, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
