import copy
import doctest
import itertools
import random

import pytest
import torch
from effects_oracle import Oracle, random_sequence, random_variant, reversed_complement, windows
from tiny_models import tiny_model
from tiny_tokenizers import one_per_base
from tolerances import LOG_LIKELIHOOD_BF16, LOG_LIKELIHOOD_FP32, SAME_FP32
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramTokenizer, MotifMemoryConfig, attach_memory
from gengram.inference import base_tokens, window_effects
from gengram.inference import variant_effects as variant_effects_module
from gengram.inference.causal_effects import CausalEffects
from gengram.inference.effects import SCORES, Change
from gengram.inference.variant_effects import variant_effects
from gengram.inference.window_effects import WindowEffects
from gengram.motif_memory.ways.kept_fold import memories_of
from gengram.sequences import genome as genome_module
from gengram.sequences import variants as variants_module
from gengram.sequences.genome import genome_of
from gengram.sequences.variants import REASONS, SCORED, Variant
from gengram.support.errors import InputError

SIZES = dict(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
NUMBERS = ("llr", "jsd", "embedding_distance", "memory_change")


def unit_gain(model, seed: int = 0):
    """Random weights with which every token matters to every later one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                fan_in = 1 if "emb" in name else weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def substitution(window: str, place: int, base: str) -> Change:
    """A window with another base at one place."""
    return Change(window, window[:place] + base + window[place + 1 :], place)


def grafted(model, strength: float = 1.0):
    """The model with memories of random weights, which begin with none of the effect of a trained one."""
    config = MotifMemoryConfig(ngram_sizes=(1, 2, 3, 4), embedding_dim=8, window=9)
    attach_memory(model, config, layers=[0, 1], tokenizer=GengramTokenizer())
    for memory in memories_of(model):
        unit_gain(memory)
        memory.value_proj.weight.data *= strength
    return model.eval()


MODELS = {
    "Gengram": lambda: tiny_model(GengramForCausalLM, vocab_size=16, num_local_experts=0),
    "Gengram with experts": lambda: tiny_model(GengramForCausalLM, vocab_size=16),
    "Llama": lambda: unit_gain(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))),
    "Mixtral": lambda: unit_gain(
        MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    ),
    "Mistral, a window of 24": lambda: unit_gain(
        MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=24))
    ),
    "GPT-NeoX": lambda: unit_gain(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))),
    "grafted Llama": lambda: grafted(unit_gain(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))),
    "Mamba": lambda: unit_gain(MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=2))),
}


def oracle_of(model, tokenizer=None, before=()) -> Oracle:
    tokenizer = tokenizer or GengramTokenizer()
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # grouped products have no kernel for float64
    return Oracle(exact, {letter: tokenizer.get_vocab()[letter] for letter in "ACGTN"}, before)


def check(model, tokenizer, oracle: Oracle, cases, tolerance=LOG_LIKELIHOOD_FP32, **options) -> WindowEffects:
    """Effects of (sequence, variant, length), each group of a sequence and a length at once, beside the oracle."""
    scores = SCORES if oracle.memories else SCORES[:3]
    effects = WindowEffects(model, tokenizer, scores, **options)
    for (sequence, length), group in itertools.groupby(cases, key=lambda case: (case[0], case[2])):
        variants = [Variant("x", *variant) for _, variant, _ in group]
        found = list(variant_effects(effects, genome_of({"x": sequence}), variants, length))
        assert [effect.variant for effect in found] == variants
        for effect in found:
            assert effect.status == SCORED
            expected = oracle.both_strands(sequence, *effect.variant[1:], length)
            for strand, numbers in zip(effect.effects, expected, strict=True):
                for name, number in numbers.items():
                    assert getattr(strand, name) == pytest.approx(number, abs=tolerance, nan_ok=True), (effect, name)
            mean = (expected[0]["llr"] + expected[1]["llr"]) / 2
            assert effect.effects.mean("llr") == pytest.approx(mean, abs=tolerance)
    return effects


def random_cases(count: int, seed: int, length: int = 150):
    generator = random.Random(seed)
    for group in range(count // 10):
        sequence = random_sequence(generator.choice([length, length, 20, 3]), seed=100 * seed + group)
        context = generator.choice([2, 3, 24, 33, 64, 64, 64])
        yield from ((sequence, random_variant(sequence, generator), context) for _ in range(10))


@pytest.mark.parametrize("name", MODELS)
def test_effects_are_those_of_whole_windows_one_by_one(name):
    model = MODELS[name]()
    effects = check(model, GengramTokenizer(), oracle_of(model), random_cases(10 if "experts" in name else 30, seed=1))
    assert effects._effects.reader.can_continue == (name != "Mamba")


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("Gengram", 1500), ("Llama", 1000), ("GPT-NeoX", 300), ("Mixtral", 300)])
def test_effects_of_many_random_variants(name, count):
    model = MODELS[name]()
    check(model, GengramTokenizer(), oracle_of(model), random_cases(count, seed=2))


def test_a_token_in_front_of_every_sequence():
    tokenizer = one_per_base("NTGCA", "[CLS] $A [SEP]")
    model = MODELS["Llama"]()
    check(model, tokenizer, oracle_of(model, tokenizer, before=(1,)), random_cases(40, seed=3))


def test_alleles_at_one_place_and_equal_windows():
    model = MODELS["Gengram"]()
    sequence = random_sequence(90, seed=4).upper().replace("N", "A")
    places = [5, 40, 41, 44, 89]
    variants = [(place, sequence[place], base) for place in places for base in "ACGTN" if base != sequence[place]]
    variants += variants[:7]
    variants += [(40, sequence[40:44], "A"), (40, sequence[40:44], "TT"), (40, sequence[40], "AAA")]
    for length in (48, 200):  # windows of their own, and the whole sequence
        check(model, GengramTokenizer(), oracle_of(model), [(sequence, v, length) for v in variants if v[1] != v[2]])


@pytest.mark.parametrize("tokens_per_pass", [1, 300])
def test_numbers_do_not_depend_on_the_batch_nor_on_the_order(tokens_per_pass):
    model, sequence = MODELS["Gengram"](), random_sequence(400, seed=5)
    generator = random.Random(5)
    variants = [Variant("x", *random_variant(sequence, generator)) for _ in range(30)]
    genome = genome_of({"x": sequence})
    effects = WindowEffects(model, GengramTokenizer(), SCORES, tokens_per_pass=tokens_per_pass)
    found = {e.variant: e for e in variant_effects(effects, genome, variants, 40)}
    generator.shuffle(variants)
    for shuffled in variant_effects(WindowEffects(model, GengramTokenizer(), SCORES), genome, variants, 40):
        alone = next(variant_effects(effects, genome, [shuffled.variant], 40))
        for other in (found[shuffled.variant], alone):
            for one, two in zip(shuffled.effects, other.effects, strict=True):
                assert list(one) == pytest.approx(list(two), abs=SAME_FP32, nan_ok=True)


@pytest.mark.parametrize(
    "name", ["Gengram", "grafted Llama", "Mixtral", "Mistral, a window of 24", "GPT-NeoX", "Mamba"]
)
def test_windows_of_many_lengths_are_read_side_by_side(name, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(CausalEffects, "_fills_up", property(lambda self: self.reader.can_continue))
    model, generator = MODELS[name](), random.Random(6)
    sequences = [random_sequence(generator.randint(2, 130), seed=700 + n).upper().replace("N", "A") for n in range(40)]
    changes = []
    for number, sequence in enumerate(sequences):
        place = generator.randrange(len(sequence)) if number % 2 else len(sequence) // 2
        other = generator.choice("ACGT".replace(sequence[place], ""))
        changes.append(substitution(sequence, place, other))
    oracle = oracle_of(model)
    scores = SCORES if oracle.memories else SCORES[:3]
    effects = WindowEffects(model, GengramTokenizer(), scores)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = list(effects.of(changes))
    if effects._effects.reader.can_continue:
        assert len(passes) < 1.5 * len(changes)  # one by one: 4, or 2 where a window begins with the change
    for change, effect in zip(changes, found, strict=True):
        variant = (change.start, change.reference[change.start], change.alternative[change.start])
        for strand, numbers in zip(effect, oracle.both_strands(change.reference, *variant, 500), strict=True):
            for number, value in numbers.items():
                assert getattr(strand, number) == pytest.approx(value, abs=LOG_LIKELIHOOD_FP32, nan_ok=True)


@pytest.mark.parametrize("dtype, strength", [(torch.float32, 0.0), (torch.bfloat16, 0.03), (torch.bfloat16, 0.3)])
def test_a_window_of_a_weak_graft_with_changes_at_several_places(dtype, strength):
    """Its memory changes little, so that a trial would not notice a state that is shared by mistake."""
    model = grafted(MODELS["Llama"](), strength).to(dtype)
    window = random_sequence(128, seed=8).upper().replace("N", "A")
    changes = [
        substitution(window, place, other) for place in (20, 60, 90) for other in "ACGT".replace(window[place], "")
    ]
    effects = WindowEffects(model, GengramTokenizer(), ("llr",))
    together = [effect.mean("llr") for effect in effects.of(changes)]
    assert effects._effects.reader.can_continue
    alone = [next(effects.of([change])).mean("llr") for change in changes]
    assert together == pytest.approx(alone, abs=LOG_LIKELIHOOD_FP32 if dtype == torch.float32 else LOG_LIKELIHOOD_BF16)


def test_a_pad_that_the_model_does_not_know_is_not_read(monkeypatch):
    monkeypatch.setattr(CausalEffects, "_fills_up", property(lambda self: self.reader.can_continue))
    tokenizer = one_per_base("NTGCA", "$A")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = unit_gain(LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": tokenizer.pad_token_id})))
    sequences = ["ACGTTGCATA", "ACGTTGCATAG"]
    changes = [substitution(sequence, 5, "A") for sequence in sequences]
    effects = WindowEffects(model, tokenizer, ("llr",))
    alone = [next(effects.of([change])).mean("llr") for change in changes]
    assert [effect.mean("llr") for effect in effects.of(changes)] == pytest.approx(alone, abs=LOG_LIKELIHOOD_FP32)


@pytest.mark.parametrize("length", [15, 16, 31, 47])
def test_equal_windows_of_any_length(length):
    window = random_sequence(length, seed=9).upper().replace("N", "A")
    other = substitution(window, 3, "A" if window[3] != "A" else "C")
    effects = WindowEffects(MODELS["Gengram"](), GengramTokenizer(), SCORES)
    equal, _ = effects.of([Change(window, window, length - 2, 9, 4), other])
    assert [strand.llr for strand in equal] == [0, 0]


def test_hidden_states_that_cannot_be_seen_are_refused():
    sizes = dict(vocab_size=16, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    model = unit_gain(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)))
    effects = WindowEffects(model, GengramTokenizer(), ("llr", "embedding"))
    with pytest.raises(ValueError, match="OPTForCausalLM, which does not show its last hidden states"):
        list(effects.of([substitution("ACGTACGT", 4, "C")]))


@pytest.mark.parametrize("strand", ["forward", "reverse"])
def test_one_strand(strand):
    model, sequence = MODELS["Llama"](), random_sequence(100, seed=6)
    generator = random.Random(6)
    variants = [Variant("x", *random_variant(sequence, generator)) for _ in range(10)]
    both, one = (
        list(
            variant_effects(
                WindowEffects(model, GengramTokenizer(), ("llr", "jsd"), strands),
                genome_of({"x": sequence}),
                variants,
                48,
            )
        )
        for strands in ("both", strand)
    )
    for a, b in zip(both, one, strict=True):
        expected = getattr(a.effects, strand)
        assert list(getattr(b.effects, strand))[:2] == pytest.approx(list(expected)[:2], abs=SAME_FP32, nan_ok=True)
        assert b.effects.mean("llr") == getattr(b.effects, strand).llr
        assert [name for name in ("forward", "reverse") if getattr(b.effects, name) is not None] == [strand]


# ---- masked models


def masked_llr(model, ids: dict[str, int], mask: int, before: str, after: str) -> float:
    """log P(alternative) - log P(reference) over the bases that differ, masked together, in float64."""
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    counted = [place for place in changed if before[place] != "N" and after[place] != "N"]
    tokens = [mask if place in changed else ids[letter] for place, letter in enumerate(before)]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(chances[place, ids[after[place]]] - chances[place, ids[before[place]]]) for place in counted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: unit_gain(BertForMaskedLM(BertConfig(**SIZES))),
        lambda: tiny_model(GengramForMaskedLM, vocab_size=16, num_local_experts=0),
    ],
)
def test_masked_models_score_substitutions_at_the_masked_bases(make):
    model, sequence = make(), random_sequence(150, seed=7)
    ids = {letter: GengramTokenizer().get_vocab()[letter] for letter in "ACGTN"}
    exact, mask = copy.deepcopy(model).double(), GengramTokenizer().mask_token_id
    generator, oracle = random.Random(7), oracle_of(model)
    variants = [Variant("x", *random_variant(sequence, generator)) for _ in range(40)]
    has_memory = isinstance(model, GengramForMaskedLM)
    scores = ("llr", "embedding", "memory") if has_memory else ("llr", "jsd", "embedding")
    effects = WindowEffects(model, GengramTokenizer(), scores, tokens_per_pass=400)
    seen = set()
    for found in variant_effects(effects, genome_of({"x": sequence}), variants, 32):
        _, start, reference, alternative = found.variant
        seen.add(found.status)
        if len(reference) != len(alternative):
            assert (found.status, found.effects) == ("needs_causal_model", None)
            continue
        before, after, _ = windows(sequence, start, reference, alternative, 32)
        pairs = [(before, after), (reversed_complement(before), reversed_complement(after))]
        distances = oracle.both_strands(sequence, start, reference, alternative, 32)
        for strand, (one, two), distance in zip(found.effects, pairs, distances, strict=True):
            assert strand.llr == pytest.approx(masked_llr(exact, ids, mask, one, two), abs=LOG_LIKELIHOOD_FP32)
            assert strand.jsd != strand.jsd
            for name in ("embedding_distance", *(["memory_change"] if has_memory else [])):
                assert getattr(strand, name) == pytest.approx(distance[name], abs=LOG_LIKELIHOOD_FP32)
    assert seen == {SCORED, "needs_causal_model"}


# ---- what is not scored, and what is refused


def test_what_cannot_be_scored_comes_back_with_its_reason_in_order():
    genome = genome_of({"chr1": "ACGTNACGTACGTACGTACGT" * 3, "chr2": "AC-TACGTACGTACGT"})
    cases = [
        (Variant("chr1", 5, "A", "C"), SCORED),
        (Variant("chr1", 5, "A", "*"), "spanning_deletion"),
        (Variant("1", 5, "A", "G"), SCORED),
        (Variant("chr1", 5, "A", "<DEL>"), "symbolic_allele"),
        (Variant("chr1", 5, "A", "NAN"), "missing_allele"),
        (Variant("chr1", 5, "A", "C,T"), "several_alleles"),
        (Variant("chr1", 4, "N", "C"), "n_at_site"),
        (Variant("chr1", 5, "C", "T"), "ref_mismatch"),
        (Variant("chr1", 63, "A", "T"), "beyond_contig"),
        (Variant("chr7", 5, "A", "T"), "no_such_contig"),
        (Variant("chr2", 4, "A", "T"), "foreign_letters"),
        (Variant("chr2", 12, "A", "T"), SCORED),
        (Variant("chr1", 5, "a", "acgt"), SCORED),
    ]
    effects = WindowEffects(MODELS["Llama"](), GengramTokenizer())
    found = list(variant_effects(effects, genome, iter([variant for variant, _ in cases]), 8))
    assert [(effect.variant, effect.status) for effect in found] == cases
    assert all((effect.effects is None) == (effect.status != SCORED) for effect in found)
    assert {effect.status for effect in found} - {SCORED} <= REASONS.keys()
    assert list(variant_effects(effects, genome, [], 8)) == []


def test_another_assembly_stops_the_run():
    effects = WindowEffects(MODELS["Llama"](), GengramTokenizer())
    variants = [Variant("x", place, "A", "C") for place in range(40)]
    with pytest.raises(InputError, match="another assembly"):
        list(variant_effects(effects, genome_of({"x": "G" * 100}), variants, 8))


@pytest.mark.parametrize("context", [1, 0, -128])
def test_a_context_has_two_bases_at_least(context):
    effects = WindowEffects(MODELS["Llama"](), GengramTokenizer())
    with pytest.raises(ValueError, match=f"expected a context of 2 bases or more, got {context}"):
        list(variant_effects(effects, genome_of({"x": "ACGT"}), [], context))


def test_a_context_that_the_model_cannot_read_is_refused():
    model = unit_gain(LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=100)))
    effects = WindowEffects(model, one_per_base("NTGCA", "[CLS] $A"))
    with pytest.raises(ValueError, match="expected at most 99 bases, which the model can read, got 100"):
        list(variant_effects(effects, genome_of({"x": "ACGT"}), [], 100))


def test_arguments_that_make_no_sense():
    model = MODELS["Llama"]()
    with pytest.raises(ValueError, match="expected scores of"):
        WindowEffects(model, GengramTokenizer(), ["loss"])
    with pytest.raises(ValueError, match="strands of"):
        WindowEffects(model, GengramTokenizer(), strands="plus")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no motif memory"):
        WindowEffects(model, GengramTokenizer(), ["memory"])
    with pytest.raises(ValueError, match="windows of one length, got 4 and 5 letters"):
        list(WindowEffects(model, GengramTokenizer()).of([Change("ACGT", "ACGTA", 0)]))


def test_a_model_is_left_as_it_was():
    model = MODELS["Gengram"]()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    list(WindowEffects(model, GengramTokenizer(), SCORES).of([Change("ACGTACGT", "ACGAACGT", 3)] * 3))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(memory.kept_fold.fold is None for memory in oracle_of(model).memories)


@pytest.mark.parametrize(
    "module", [base_tokens, window_effects, variant_effects_module, genome_module, variants_module]
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("sequence, start, reference, alternative", [("A", 0, "A", "C"), ("ACGT", 0, "ACGT", "A")])
def test_a_window_of_one_base_is_no_score_of_zero(sequence, start, reference, alternative):
    model = WindowEffects(MODELS["Gengram"](), GengramTokenizer())
    variant = Variant("chr1", start, reference, alternative)
    (found,) = variant_effects(model, genome_of({"chr1": sequence}), [variant], context=16)
    assert found.status == "too_short" in REASONS and found.effects is None
