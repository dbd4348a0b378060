"""Mixtures of letters beside an enumeration of all k-mers, and of all sequences, in float64."""

import itertools

import memory_oracle
import pytest
import torch
from tiny_models import LETTERS, tiny_model
from tolerances import MEMORY_FP64, RANDOM_MEMORY_FP64

from gengram import GengramForCausalLM, GengramTokenizer
from gengram.inference import soft_letters as module
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.soft_letters import soft_letters, soft_rows


def mixtures(length: int, present: int, batch: int = 2) -> torch.Tensor:
    """(batch, length, 5): other letters at each place, `present` of them with weight."""
    generator = torch.Generator().manual_seed(present)
    weights = torch.rand(batch, length, 5, generator=generator, dtype=torch.float64) + 0.1
    place = torch.rand(batch, length, 5, generator=generator).argsort(-1)
    weights = weights.masked_fill(place >= present, 0)
    return weights / weights.sum(-1, keepdim=True)


def enumerated_rows(table: torch.Tensor, letters: torch.Tensor, size: int) -> torch.Tensor:
    """The definition: all 5**size k-mers, each with the product of its letters' weights."""
    result = []
    for row in letters:
        for end in range(size - 1, len(row)):
            total = 0
            for digits in itertools.product(range(5), repeat=size):
                weight, index = 1, 0
                for place, digit in zip(range(end - size + 1, end + 1), digits, strict=True):
                    weight, index = weight * row[place, digit], index * 5 + digit
                total = total + weight * table[index]
            result.append(total)
    return torch.stack(result).view(len(letters), -1, table.shape[1])


@pytest.mark.parametrize("most", [module._MOST_KMERS, 10])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("present", [1, 2, 4, 5])
def test_rows_and_their_gradient_against_an_enumeration(size, present, most, monkeypatch):
    monkeypatch.setattr(module, "_MOST_KMERS", most)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5**size, 3, generator=generator, dtype=torch.float64)
    ours, theirs = (mixtures(5, present).requires_grad_() for _ in range(2))
    found, expected = soft_rows(table, ours, size)[:, size - 1 :], enumerated_rows(table, theirs, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=MEMORY_FP64)
    pull = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (gradient,), (exact,) = (torch.autograd.grad((y * pull).sum(), x) for y, x in ((found, ours), (expected, theirs)))
    torch.testing.assert_close(gradient, exact, rtol=0, atol=MEMORY_FP64)
    with torch.no_grad():
        torch.testing.assert_close(soft_rows(table, ours, size)[:, size - 1 :], found.detach(), rtol=0, atol=0)


def test_certain_letters_are_looked_up_bit_for_bit():
    table = torch.randn(125, 4, generator=torch.Generator().manual_seed(0))
    digits = torch.randint(5, (2, 30), generator=torch.Generator().manual_seed(1))
    letters = torch.nn.functional.one_hot(digits, 5).float().requires_grad_()
    rows = digits[:, :-2] * 25 + digits[:, 1:-1] * 5 + digits[:, 2:]
    assert torch.equal(soft_rows(table, letters, 3)[:, 2:], table[rows])


def test_what_the_memory_reads_is_the_mean_over_all_sequences():
    """The window means of mixtures are those of all 5**4 sequences, each with its probability."""
    model = tiny_model(GengramForCausalLM).double()
    memory = model.model.layers[2].motif_memory
    tables = [table.weight for table in memory.embeddings]
    letters = mixtures(4, 5, batch=1)
    features = []
    handle = memory.key_proj.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    with torch.no_grad(), soft_letters(model, letters, BaseTokens.of(GengramTokenizer())):
        model(input_ids=torch.tensor([LETTERS[:4]]))
    handle.remove()
    expected = 0
    for digits in itertools.product(range(5), repeat=4):
        chance = torch.stack([letters[0, place, digit] for place, digit in enumerate(digits)]).prod()
        tokens = [LETTERS[digit] for digit in digits]
        expected = expected + chance * memory_oracle.window_features(tokens, tables, [1, 2, 3], 9, LETTERS).detach()
    torch.testing.assert_close(features[0][0], expected, rtol=0, atol=RANDOM_MEMORY_FP64)


def test_hooks_are_gone_after_the_block_and_after_an_error():
    model = tiny_model(GengramForCausalLM)
    tokens = BaseTokens.of(GengramTokenizer())
    hooks = lambda: sum(len(part._forward_hooks) for part in model.modules())  # noqa: E731
    with soft_letters(model, mixtures(4, 2).float(), tokens):
        assert hooks() == 1 + 2 * 3  # the input embedding, and three tables of two memories
    assert hooks() == 0
    with pytest.raises(RuntimeError), soft_letters(model, mixtures(4, 2).float(), tokens):
        raise RuntimeError
    assert hooks() == 0
