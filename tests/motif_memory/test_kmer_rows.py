"""Rows of the tables by k-mer: read, replaced, forgotten; what was computed in advance follows, and so do files."""

import pytest
import torch
from graft_hosts import SINGLE, grafted
from graft_hosts import random_ids as random_tokens
from tiny_models import LETTERS, random_ids, tiny_model
from tolerances import CHANGED, SAME_FP32
from transformers import AutoModelForCausalLM

from gengram import GengramForCausalLM, GengramModel, attached_memories, load_memory, save_memory
from gengram.inference.knock_out import knocked_out
from gengram.motif_memory import fold_memory, folded_inference
from gengram.motif_memory.ways import kept_fold


@pytest.fixture(autouse=True)
def eager_folds(monkeypatch):
    """The worst case for staleness: a fold is made at once and used in every pass."""
    monkeypatch.setattr(kept_fold, "tokens_to_repay", lambda weights, plan: 0)
    monkeypatch.setattr(kept_fold, "tokens_to_check", lambda weights, plan: 0)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[LETTERS["ACGTN".index(letter)] for letter in text]])


def test_a_row_is_the_one_that_its_letters_look_up():
    """The first letter counts most: of the brute force's base-5 digits."""
    model = tiny_model(GengramForCausalLM)
    memory = model.memory[2]
    assert list(model.memory) == [0, 2] and memory is model.model.layers[2].motif_memory
    assert torch.equal(memory["TAC"], memory.embeddings[2].weight[3 * 25 + 0 * 5 + 1])
    assert torch.equal(memory["ga"], memory.embeddings[1].weight[2 * 5])
    assert torch.equal(memory["N"], memory.embeddings[0].weight[4])
    read = memory["TAC"]
    read += 1  # a copy
    assert not torch.equal(memory["TAC"], read)


@torch.no_grad()
def test_an_edit_changes_positions_whose_window_holds_the_kmer_and_no_others():
    model = tiny_model(GengramForCausalLM, memory_layers=[2], memory_conv_kernel=0)
    ids = ids_of("AAAAGGGGCCCCTACGGGGAAAACCCC")
    place, gates = 12, dict(output_memory_residual_norms=True)
    before = model(ids, **gates).memory_residual_norms[0]
    model.memory[2]["TAC"] = 0
    after = model(ids, **gates).memory_residual_norms[0]
    changed = (before != after)[0].nonzero()[:, 0].tolist()
    window = model.config.memory_window
    assert changed == list(range(place + 2, place + window))


@pytest.mark.parametrize("prepare", ["nothing", "fold", "block"])
@torch.no_grad()
def test_folded_tables_follow_an_edit(prepare):
    model, ids = tiny_model(GengramForCausalLM), random_ids(2, 60, non_letters=0)
    before = model(ids).logits  # makes tables
    expected = tiny_model(GengramForCausalLM)
    for layer in (0, 2):
        expected.model.layers[layer].motif_memory.embeddings[2].weight[3 * 25 + 1] *= -2
    expected = expected(ids).logits

    def edit():
        for memory in model.memory.values():
            memory["TAC"] = memory["TAC"] * -2

    if prepare == "block":  # whoever changes weights inside it is told so, but never given old numbers
        with pytest.raises(RuntimeError, match="were changed inside"), folded_inference(model):
            model(ids)
            edit()
            found = model(ids).logits
    else:
        if prepare == "fold":
            fold_memory(model)
        edit()
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME_FP32)
    assert (found - before).abs().max() > CHANGED


@torch.no_grad()
def test_edits_are_saved_with_the_model(tmp_path):
    model = tiny_model(GengramForCausalLM)
    model.memory[0]["AC"] = torch.arange(6.0)
    model.memory[0]["AG"] += 1
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.memory[0]["AC"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(loaded.memory[0]["AG"], tiny_model(GengramForCausalLM).memory[0]["AG"] + 1)
    assert isinstance(tiny_model(GengramModel).memory[0]["A"], torch.Tensor)


@torch.no_grad()
def test_attached_memories_are_edited_in_the_same_way(tmp_path):
    model = grafted("llama")
    ids = torch.tensor([[SINGLE.index(letter) for letter in "GGTACGCA"]])
    before = model(ids).logits
    memories = attached_memories(model)
    memories["layers.1"]["TAC"] = 0
    assert (memories["layers.1"]["TAC"] == 0).all() and (memories["layers.3"]["TAC"] != 0).all()
    assert (model(ids).logits - before).abs().max() > CHANGED
    save_memory(model, tmp_path / "memory")
    again = load_memory(grafted("llama"), tmp_path / "memory")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("make", [lambda: tiny_model(GengramForCausalLM), lambda: grafted("llama", trained=True)])
@torch.no_grad()
def test_a_knock_out_ends_with_its_block_also_after_an_error(make):
    model, ids = make(), random_tokens(SINGLE)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    output = model(ids).logits
    with pytest.raises(ZeroDivisionError), knocked_out(model, ["tac"], reverse_complements=True) as words:
        assert words == ["TAC", "GTA"]
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert changed == {name for name in before if name.endswith("motif_memory.embeddings.2.weight")}
        1 / 0  # noqa: B018
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.equal(model(ids).logits, output)


@pytest.mark.parametrize(
    ("kmer", "message"),
    [
        ("TATAAA", r"a size that the memory has \(1, 2, 3\), got 'TATAAA' with 6 letters"),
        ("TAX", "letters A, C, G, T and N, got 'TAX'"),
        ("", "letters A, C, G, T and N"),
    ],
)
def test_what_is_no_kmer_of_the_memory_is_refused(kmer, message):
    model = tiny_model(GengramForCausalLM)
    with pytest.raises(ValueError, match=message):
        model.memory[0][kmer]
    with pytest.raises(ValueError, match=message), knocked_out(model, [kmer]):
        pass
    with pytest.raises(TypeError, match="expected a k-mer"):
        model.memory[0][3]
    with pytest.raises(TypeError, match="cannot be iterated"):
        list(model.memory[0])
    with pytest.raises(ValueError, match=r"TAC: expected a number or \(6,\), got \(2,\)"):
        model.memory[0]["TAC"] = [1.0, 2.0]
    with (
        pytest.raises(ValueError, match="no motif memory"),
        knocked_out(tiny_model(GengramForCausalLM, memory_layers=[]), ["A"]),
    ):
        pass
