"""Losses that do not depend on how an optimizer step is cut into passes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tolerances import MODEL_GRADIENTS_FP32_RELATIVE, SAME_FP32
from transformers import DataCollatorForLanguageModeling, DynamicCache, Trainer, TrainingArguments

from gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramTokenizer,
)
from gengram.data_preparation import DataCollatorForGenomeModeling

FP32 = dict(rtol=0, atol=SAME_FP32)
ROUTER = dict(output_router_logits=True, router_aux_loss_coef=1.0, router_z_loss_coef=0.5)
ROWS, LENGTH = 8, 16
IDS = random_ids(ROWS, LENGTH)
HEADS = {
    "causal": (GengramForCausalLM, {}, IDS),
    "masked": (GengramForMaskedLM, {}, IDS),
    "bases": (GengramForTokenClassification, {}, IDS % 2),
    "classes": (GengramForSequenceClassification, {}, torch.arange(ROWS) % 2),
    "numbers": (GengramForSequenceClassification, {"num_labels": 1}, torch.arange(ROWS) / 3),
    "several classes": (GengramForSequenceClassification, {"num_labels": 3}, (torch.arange(24) % 2.0).view(ROWS, 3)),
}
each_head = pytest.mark.parametrize("name", HEADS)


def labels_with_gaps(name: str) -> torch.Tensor:
    """Labels of which each row has another number, so that means of passes are not the mean of the step."""
    labels = HEADS[name][2].clone()
    if labels.shape == IDS.shape:
        labels[torch.arange(LENGTH) < 2 * torch.arange(ROWS)[:, None] - 2] = -100
    return labels


def counted(name: str, labels: torch.Tensor) -> int:
    """As `Trainer` counts labels."""
    return int((labels[:, 1:] if name == "causal" else labels).ne(-100).sum())


@each_head
def test_the_parts_of_a_step_add_up_to_its_mean(name):
    head, fields, _ = HEADS[name]
    model, labels = tiny_model(head, **fields), labels_with_gaps(name)
    total = counted(name, labels)
    whole = model(IDS, labels=labels).loss
    for rows in (1, 2, 4, 8):
        parts = [
            model(ids, labels=part, num_items_in_batch=torch.tensor(total)).loss
            for ids, part in zip(IDS.split(rows), labels.split(rows), strict=True)
        ]
        torch.testing.assert_close(sum(parts), whole, **FP32)
    torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=total).loss, whole, **FP32)


@each_head
def test_the_routers_losses_have_the_weight_of_the_step_whatever_its_parts(name):
    """Each part weighs as much as its labels do: twice the same rows are once the loss, as one pass has it."""
    head, fields, _ = HEADS[name]
    model, labels = tiny_model(head, **fields, **ROUTER), HEADS[name][2]
    once = model(IDS, labels=labels)
    expected = tiny_model(head, **fields)(IDS, labels=labels).loss + once.aux_loss + 0.5 * once.z_loss
    torch.testing.assert_close(once.loss, expected, **FP32)
    for times in (1, 2, 4, 8):
        total = torch.tensor(times * counted(name, labels))
        parts = [model(IDS, labels=labels, num_items_in_batch=total).loss for _ in range(times)]
        torch.testing.assert_close(sum(parts), once.loss, **FP32)


def one_step(folder, name: str, batch_size: int, accumulation: int) -> tuple[float, torch.Tensor]:
    """The loss of a step of stochastic gradient descent on eight equal rows, and a router's weight after it.

    Equal rows, so that the router's losses, which are not linear, are those of one row in any batch.
    """
    head, fields, labels = HEADS[name]
    row = {"input_ids": IDS[0].tolist(), "labels": labels[1].tolist()}
    model = tiny_model(head, **fields, **ROUTER)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Logged(model, arguments, train_dataset=[row] * ROWS)
    trainer.train()
    return trainer.total, model.model.layers[1].mlp.gate.weight.detach()


class Logged(Trainer):
    """Keeps the sum of the losses of each step, which is what gradients are taken of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.total = 0.0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.total += loss.item()
        return loss


NEAR = dict(rtol=MODEL_GRADIENTS_FP32_RELATIVE, atol=SAME_FP32)


@each_head
def test_in_the_trainer_a_step_is_the_same_whatever_its_accumulation(name, tmp_path):
    (loss, weight), *others = [one_step(tmp_path, name, ROWS // steps, steps) for steps in (1, 2, 8)]
    for other_loss, other_weight in others:
        assert other_loss == pytest.approx(loss, abs=SAME_FP32)
        torch.testing.assert_close(other_weight, weight, **NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "classes"])
def test_in_the_trainer_a_step_is_the_same_in_two_processes(name, tmp_path):
    script = f"""
import sys, torch, torch.distributed
sys.path[:0] = {sys.path!r}
from test_losses import one_step
loss, weight = one_step({str(tmp_path)!r}, {name!r}, 2, 2)
assert torch.distributed.get_world_size() == 2
torch.save(weight, {str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}.pt")
"""
    (tmp_path / "step.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "step.py"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    _, weight = one_step(tmp_path, name, ROWS, 1)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), weight, **NEAR)


@each_head
@pytest.mark.parametrize("total", [None, 0], ids=["alone", "in a step without labels"])
def test_a_batch_of_padding_has_a_loss_and_gradients_that_are_numbers(name, total):
    head, fields, labels = HEADS[name]
    model = tiny_model(head, **fields, **ROUTER).train()
    labels = torch.full_like(labels, -100)
    outputs = model(IDS, attention_mask=torch.zeros_like(IDS), labels=labels, num_items_in_batch=total)
    assert outputs.loss.item() == outputs.aux_loss.item() == outputs.z_loss.item() == 0
    outputs.loss.backward()
    for parameter, weight in model.named_parameters():
        assert weight.grad is None or not weight.grad.any(), parameter


@torch.no_grad()
def test_router_losses_leave_out_the_padding_of_a_pass_that_continues():
    """The mask covers the cache too; the router's logits are of this pass."""
    model = tiny_model(GengramForCausalLM, **ROUTER)
    mask = torch.ones_like(IDS)
    mask[0, :12] = 0
    cache = DynamicCache(config=model.config)
    model(IDS[:, :10], attention_mask=mask[:, :10], cache=cache)
    found = model(IDS[:, 10:], attention_mask=mask, cache=cache)
    kept = [logits[mask[:, 10:].flatten().bool()] for logits in found.router_logits]
    expected = torch.stack([torch.logsumexp(logits, -1).square() for logits in kept]).mean()
    torch.testing.assert_close(found.z_loss, expected, **FP32)


@torch.no_grad()
@each_head
def test_every_head_returns_what_the_memory_and_the_router_did(name):
    head, fields, _ = HEADS[name]
    model = tiny_model(head, **fields)
    found = model(IDS, output_memory_gates=True, output_memory_residual_norms=True, output_router_logits=True)
    base = model.model(IDS, output_memory_gates=True, output_memory_residual_norms=True, output_router_logits=True)
    for field in ("memory_gates", "memory_residual_norms", "router_logits"):
        assert all(torch.equal(a, b) for a, b in zip(found[field], base[field], strict=True))
    assert found.aux_loss > 0 and found.z_loss > 0
    plain = model(IDS)
    assert plain.memory_gates is plain.router_logits is plain.aux_loss is plain.z_loss is None


def test_a_collator_that_hides_bases_behind_other_tokens_is_named(caplog):
    tokenizer, model = GengramTokenizer(), tiny_model(GengramForMaskedLM).train()
    examples = [{"input_ids": tokenizer("ACGTTGCANA" * 40)["input_ids"]} for _ in range(4)]
    torch.manual_seed(0)
    for collator in (
        DataCollatorForGenomeModeling(tokenizer, mask_probability=0.3),
        DataCollatorForLanguageModeling(tokenizer, random_replace_prob=0.0),
    ):
        model(**collator(examples))
        assert not caplog.messages
    model(**DataCollatorForLanguageModeling(tokenizer)(examples))
    (message,) = caplog.messages
    assert "DataCollatorForGenomeModeling" in message
