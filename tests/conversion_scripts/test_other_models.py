"""Models with other hyper-parameters than any fixture: converted from either format, they equal a brute force."""

import random

import model_oracle
import pytest
import torch
from tolerances import BRUTE_FORCE_LOGITS_FP64
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf

SEEDS = range(12)


class Model:
    """The synthetic model of a seed: its hyper-parameters, its weights under the authors' names, and its arguments."""

    def __init__(self, seed: int, megatron):
        choose = random.Random(seed)
        groups = choose.choice([1, 2, 3])
        layers = choose.randint(1, 3)
        sizes = choose.sample([1, 2, 3, 4], choose.randint(1, 3))
        taps = choose.choice([0, 1, 2, 4])
        self.letters = choose.sample(range(3, 24), 5)
        self.base = choose.choice([100, 10000, 500000])
        self.eps = choose.choice([1e-6, 1e-5, 1e-2])
        self.dilation = choose.choice([None, 1, 3, 5])
        self.shape = megatron.Shape(
            layers=layers,
            hidden=choose.choice([6, 10, 16]),
            heads=groups * choose.choice([1, 2, 3]),
            groups=groups,
            head_dim=choose.choice([2, 4, 10]),
            experts=choose.choice([0, 2, 3, 5]),
            width=choose.choice([5, 8]),
            vocab=24,
            sizes=tuple(sizes),
            dim=choose.choice([1, 3, 4]),
            taps=taps,
            active=tuple(layer for layer in range(1, layers + 1) if choose.random() < 0.7),
            window=max(sizes) + choose.choice([0, 1, 6]),
            tied=choose.random() < 0.3,
            pre_softmax=choose.random() < 0.3,
            prefix=choose.choice(["gengram", "engram_dna"]),
            dtype=torch.float32,
        )
        self.shape = megatron.replace(self.shape, top_k=choose.randint(1, max(self.shape.experts, 1)))
        self.weights = {
            name: value if value.dim() == 1 or "embedding" in name else value / value.shape[-1] ** 0.5
            for name, value in megatron.canonical(self.shape, seed).items()
        }
        prefix = self.shape.prefix
        self.args = megatron.args(
            self.shape,
            norm_epsilon=self.eps,
            rotary_base=self.base,
            **{f"{prefix}_token_ids": self.letters, f"{prefix}_short_conv_dilation": self.dilation},
        )
        self.tokens = [choose.choice(self.letters if choose.random() < 0.9 else range(24)) for _ in range(26)]

    def oracle(self, is_causal: bool) -> torch.Tensor:
        shape = self.shape
        return model_oracle.logits(
            self.tokens,
            self.weights,
            layers=shape.layers,
            heads=shape.heads,
            groups=shape.groups,
            head_dim=shape.head_dim,
            experts=shape.experts,
            top_k=shape.top_k,
            pre_softmax=shape.pre_softmax,
            eps=self.eps,
            base=self.base,
            memory_layers=shape.active,
            sizes=shape.sizes,
            window=shape.window,
            letters=self.letters,
            dilation=self.dilation or max(shape.sizes),
            is_causal=is_causal,
        )


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_converted_models_equal_the_brute_force(seed, tmp_path, megatron):
    model = Model(seed, megatron)
    if seed % 2:
        named = megatron.named_for(model.weights, model.shape, "local" if seed % 3 else "te")
        stages = (1, model.shape.layers - 1) if model.shape.layers > 1 else ()
        source = megatron.save_torch(tmp_path / "source", named, model.args, stages=stages)
    else:
        named = megatron.named_for(model.weights, model.shape, "te")
        tensors = megatron.stacked(named, model.shape, unstacked_layers=seed % 4 == 0)
        source = megatron.save_torch_dist(tmp_path / "source", tensors, model.args)
    convert_to_hf(source, tmp_path / "hf", progress=False)

    ids = torch.tensor([model.tokens])
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    torch.testing.assert_close(
        causal(ids).logits[0], model.oracle(is_causal=True), rtol=0, atol=BRUTE_FORCE_LOGITS_FP64
    )
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    torch.testing.assert_close(
        masked(ids).logits[0], model.oracle(is_causal=False), rtol=0, atol=BRUTE_FORCE_LOGITS_FP64
    )


def test_the_brute_force_notices_each_hyper_parameter(megatron):
    """Guards the test above: a change of any number that it varies moves the logits by far more than its tolerance."""
    model = Model(5, megatron)
    model.shape = megatron.replace(
        model.shape, layers=2, heads=4, groups=2, head_dim=4, experts=3, top_k=2, sizes=(2, 1), taps=3, active=(2,)
    )
    model.shape = megatron.replace(model.shape, prefix="gengram", window=5, tied=False, pre_softmax=False)
    model.weights = {
        name: value if value.dim() == 1 else value / value.shape[-1] ** 0.5
        for name, value in megatron.canonical(model.shape, 1).items()
    }
    model.eps, model.base, model.dilation = 1e-5, 10000, 2
    before = model.oracle(is_causal=True)
    for changes in (
        {"base": 20000},
        {"eps": 1e-2},
        {"dilation": 1},
        {"letters": model.letters[::-1]},
        {"shape": megatron.replace(model.shape, top_k=1)},
        {"shape": megatron.replace(model.shape, pre_softmax=True)},
        {"shape": megatron.replace(model.shape, window=4)},
    ):
        other = Model.__new__(Model)
        other.__dict__.update({**model.__dict__, **changes})
        assert (other.oracle(is_causal=True) - before).abs().max() > 1e3 * BRUTE_FORCE_LOGITS_FP64, changes
