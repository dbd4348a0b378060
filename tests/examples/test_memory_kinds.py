"""The arms that only the comparison has, beside what defines them."""

import itertools
import json
import shutil
import sys

import memory_oracle
import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, load_example
from tolerances import CHANGED, MEMORY_FP32, SAME_FP32

from gengram import GengramTokenizer, MotifMemoryConfig
from gengram.motif_memory import letter_codes, plan_ngrams

LETTERS = (0, 1, 2, 3, 4)
CONFIG = MotifMemoryConfig(ngram_sizes=(1, 2, 3), embedding_dim=4, window=7, conv_kernel=3, conv_dilation=2)
HIDDEN, REACH = 12, 6 + 4  # of window and convolution
COMPLEMENT = dict(zip("ACGTN", "TGCAN", strict=True))


@pytest.fixture(scope="module")
def kinds():
    return load_example("pretraining/memory_kinds.py")


def made(kinds, name, seed=0):
    torch.manual_seed(seed)
    memory = kinds.KINDS[name](CONFIG, HIDDEN)
    for weight in memory.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ids = torch.randint(5, (1, 40))
    ids[0, 23] = 9  # no letter
    return memory, ids, torch.randn(1, 40, HIDDEN)


def plan_of(ids):
    return plan_ngrams(letter_codes(ids, LETTERS), CONFIG)


def with_convolution(value, taps):
    """The value and its causal, dilated convolution, by PyTorch's."""
    padded = torch.nn.functional.pad(value.T, (4, 0))
    mixed = torch.nn.functional.conv1d(padded, taps, groups=HIDDEN, dilation=2).T
    return value + mixed * mixed.sigmoid()


def found_rows(memory, ids, index, size, row_of=None):
    """Rows of the n-grams in the window of each position, by loops."""
    tokens = ids[0].tolist()
    for t in range(len(tokens)):
        grams = [tokens[i - size + 1 : i + 1] for i in range(t - 7 + size, t + 1) if i - size + 1 >= 0]
        grams = [sum(letter * 5**place for place, letter in enumerate(gram[::-1])) for gram in grams if 9 not in gram]
        yield memory.embeddings[index].weight[grams if row_of is None else row_of[grams]]


@torch.no_grad()
def test_without_a_gate_the_value_itself_is_added(kinds):
    memory, ids, hidden = made(kinds, "no gate")
    tables = [table.weight for table in memory.embeddings]
    features = memory_oracle.window_features(ids[0].tolist(), tables, (1, 2, 3), 7, LETTERS)
    expected = with_convolution(features @ memory.value_proj.weight.T, memory.short_conv.conv.weight)
    torch.testing.assert_close(memory(hidden, plan_of(ids)).residual[0], expected, rtol=0, atol=MEMORY_FP32)
    assert not any("key" in name or "norm" in name for name, _ in memory.named_parameters())


@torch.no_grad()
def test_the_largest_row_is_taken_column_by_column(kinds):
    memory, ids, _ = made(kinds, "largest row")
    features = memory.features(plan_of(ids))[0]
    for index, size in enumerate(CONFIG.ngram_sizes):
        rows = list(found_rows(memory, ids, index, size))
        expected = torch.stack([row.amax(0) if len(row) else torch.zeros(4) for row in rows])
        assert torch.equal(features[:, 4 * index : 4 * index + 4], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hashed", "both strands"])
def test_shared_rows_are_averaged_like_others(kinds, name, monkeypatch):
    monkeypatch.setattr(kinds, "BUCKETS", 31)
    memory, ids, _ = made(kinds, name)
    features = memory.features(plan_of(ids))[0]
    for index, size in enumerate(CONFIG.ngram_sizes):
        rows = found_rows(memory, ids, index, size, memory.row_of(size))
        expected = torch.stack([row.mean(0) if len(row) else torch.zeros(4) for row in rows])
        torch.testing.assert_close(features[:, 4 * index : 4 * index + 4], expected, rtol=0, atol=MEMORY_FP32)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_word_and_its_reverse_complement_share_a_row_and_no_others_do(kinds, size):
    words = ["".join(word) for word in itertools.product("ACGTN", repeat=size)]
    row_of = kinds.BothStrandsMemory.row_of(size).tolist()
    by_word = {word: row_of[sum("ACGTN".index(x) * 5**i for i, x in enumerate(word[::-1]))] for word in words}
    pairs = {frozenset((word, "".join(COMPLEMENT[x] for x in word[::-1]))) for word in words}
    assert len(set(by_word.values())) == len(pairs) == max(by_word.values()) + 1
    assert all(len({by_word[word] for word in pair}) == 1 for pair in pairs)


def test_hashed_rows_are_spread_over_all_buckets(kinds):
    rows = kinds.HashedMemory.row_of(6)
    counts = torch.bincount(rows)
    assert len(counts) == kinds.BUCKETS and counts.min() > 0
    assert counts.max() < 3 * len(rows) / kinds.BUCKETS
    assert torch.equal(kinds.HashedMemory.row_of(4), torch.arange(5**4))


def test_the_convolution_twin_reaches_as_far_back_as_the_memory_and_reads_no_letters(kinds):
    memory, ids, hidden = made(kinds, "convolution twin")
    hidden.requires_grad_()
    residual = memory(hidden, plan_of(ids)).residual
    residual[0, 30].sum().backward()
    touched = hidden.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(30 - REACH, 31))
    assert torch.equal(memory(hidden, plan_of(ids.flip(1))).residual, residual)


@pytest.fixture(scope="module")
def compare():
    return load_example("pretraining/compare.py")


def test_the_convolution_twin_has_as_many_parameters_as_a_token_uses_of_the_memory(compare):
    plan = json.loads((EXAMPLES / "pretraining/comparisons/arms.json").read_text())
    base = {**plan["base"], **plan["architectures"]["dense, GQA"]}
    found = {arm: compare.parameters({**base, **changes}) for arm, changes in plan["arms"].items()}
    (_, memory), (total, twin), (none, _) = (found[arm] for arm in ("memory", "convolution twin", "baseline"))
    assert total == twin
    assert abs(twin - memory) < 0.01 * (memory - none)


@pytest.mark.parametrize(
    "path", sorted((EXAMPLES / "pretraining/comparisons").glob("*.json")), ids=lambda path: path.stem
)
def test_the_arms_of_a_plan_are_different_models_that_can_be_made(path, compare):
    plan = json.loads(path.read_text())
    runs = [run for run in compare.planned_runs(plan) if run["seed"] == plan["seeds"][0]]
    models = {json.dumps(run["fields"], sort_keys=True): compare.parameters(run["fields"]) for run in runs}
    variants = plan.get("ablations", {"variants": []})["variants"]
    assert len(models) == len(runs) == len(plan["architectures"]) * len(plan["arms"]) + len(variants)
    assert "memory" in plan["arms"]  # what differences are taken from
    assert plan.get("tuning_seed") not in plan["seeds"]
    assert plan.get("tuning_split") != plan["training"]["validation_split"]


TINY = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
TINY |= dict(num_key_value_heads=1, max_position_embeddings=64, memory_layers=[1], memory_embedding_dim=4)
MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=2)
ARMS = {
    **{
        kind: {"memory_kind": kind}
        for kind in ("no gate", "largest row", "hashed", "both strands", "convolution twin")
    },
    "MLA": {"host": "DeepseekV3", "first_k_dense_replace": 3, **MLA},
    "GQA": {"host": "Llama"},
    "k 4 to 6": {"memory_ngram_sizes": [4, 5, 6]},
}


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_no_arm_sees_later_bases(kinds, arm):
    torch.manual_seed(0)
    is_hosted = "host" in ARMS[arm]
    model = kinds.new_model({**TINY, **ARMS[arm]} | ({} if is_hosted else {"num_local_experts": 0})).eval()
    memory = next(module for name, module in model.named_modules() if name.endswith("motif_memory"))
    for weight in memory.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ids = GengramTokenizer()(["ACGTTGCATATAAAGGCCATTACGGATTACAGGCATGAGCCACC"], return_tensors="pt")["input_ids"]
    changed = ids.clone()
    changed[0, 30:] = ids[0, 30:].flip(0)
    changed[0, 30] = ids[0, 2]
    assert changed[0, 30] != ids[0, 30]
    before, after = model(ids).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:30], after[:30], rtol=0, atol=SAME_FP32)
    assert (before[30] - after[30]).abs().max() > CHANGED


def test_what_a_router_does_is_read_of_hosts_of_others_too(kinds):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    fields = {**TINY, "host": "Mixtral", **experts}
    model, ids = kinds.new_model(fields), torch.randint(5, 9, (2, 12), generator=torch.Generator().manual_seed(0))
    found = load_example("pretraining/pretrain.py").router_statistics(model(ids, labels=ids), model.config)
    shares = found["router_tokens_per_expert"]
    assert shares.shape == (TINY["num_hidden_layers"], 4) and np.allclose(shares.sum(1), 1)
    assert found["router_load_balancing_loss"] >= 1 and "router_z_loss" not in found


def test_plans_train_every_arm_with_every_rate_and_then_the_best(compare, tmp_path, monkeypatch):
    """The losses are made up: what is asked for, in which order, and what is chosen."""
    asked = []
    best = {"baseline": 1.0, "memory": 2.4}

    def train(run, dataset, output, keeps_model):
        assert not keeps_model
        asked.append(run)
        result = {**run, "bits_per_base": abs(run["learning_rate"] - best[run["arm"]]) + run["seed"], "parameters": 1}
        result |= {"parameters_used_per_token": 1, "trained_tokens": 1, "log": [{"step": 1}]}
        (output / f"{compare.run_name(run)}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare, "train", train)
    plan = {"base": {"intermediate_size": 1}, "architectures": {"one": {}}, "arms": {"baseline": {}, "memory": {}}}
    plan |= {"seeds": [1, 2], "learning_rates": [1.0, 2.0, 3.0], "tuning_seed": 9, "tuning_split": "validation"}
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "training": {}}))
    words = ["--plan", tmp_path / "plan.json", "--output", tmp_path / "out", "--report", tmp_path / "report.json"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words), "--dataset", "somewhere"])
    compare.main()
    tuned = [run for run in asked if "split" in run]
    assert asked[: len(tuned)] == tuned and {run["seed"] for run in tuned} == {9} and len(tuned) == 6
    chosen = [(run["arm"], run["seed"], run["learning_rate"]) for run in asked[6:]]
    assert chosen == [("baseline", 1, 1.0), ("memory", 1, 2.0), ("baseline", 2, 1.0), ("memory", 2, 2.0)]
    found = json.loads((tmp_path / "report.json").read_text())
    assert [row["learning_rate"] for row in found["rows"]] == [1.0, 2.0] and len(found["tuning"]) == 6
    assert np.isclose(found["rows"][0]["minus_memory"], -0.4)
    compare.main()
    assert len(asked) == 10
    shutil.rmtree(tmp_path / "out")  # the report has what was in it
    compare.main()
    assert len(asked) == 10 and json.loads((tmp_path / "report.json").read_text()) == found

    plan["learning_rates"].append(2.5)  # better than what the memory's runs have had; the baseline's stay
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "training": {}}))
    compare.main()
    again = [(run["arm"], run["seed"], run["learning_rate"]) for run in asked[10:]]
    tuned = [("baseline", 9, 2.5), ("memory", 9, 2.5)]
    assert again == [*tuned, ("memory", 1, 2.5), ("memory", 2, 2.5)]
    found = json.loads((tmp_path / "report.json").read_text())
    assert [row["learning_rate"] for row in found["rows"]] == [1.0, 2.5]
    assert np.isclose(found["rows"][0]["minus_memory"], -0.1)

    (tmp_path / "plan.json").write_text(json.dumps({**plan, "training": {"max_steps": 9}}))
    compare.main()
    assert len(asked) == 14 + 12, "longer runs are other runs"


def test_a_run_of_another_plan_is_not_continued(compare, tmp_path, monkeypatch):
    run = {"architecture": "one", "arm": "memory", "seed": 1, "fields": {}, "training": {}, "learning_rate": 1.0}
    left = tmp_path / "work" / compare.run_name(run) / "checkpoint-50"
    monkeypatch.setattr(compare, "HERE", tmp_path)  # without a `pretrain.py`: it fails
    for rate, continued in ((1.0, False), (1.0, True), (2.0, False)):
        left.mkdir(parents=True, exist_ok=True)
        (left / "trainer_state.json").write_text("{}")
        with pytest.raises(RuntimeError, match="one--memory--1 failed"):
            compare.train(run | {"learning_rate": rate}, "somewhere", tmp_path)
        assert left.exists() == continued
