"""Attaching: the same numbers as Gengram, letters by brute force, layers found or named, and what is refused."""

import json
import math

import pytest
import torch
from graft_hosts import ALL, CONFIG, PAIRS, SINGLE, SIX_MERS, VOCABULARIES, grafted, random_ids
from tolerances import RANDOM_MEMORY_FP64, SAME_FP32
from transformers import MixtralConfig, MixtralForCausalLM

from gengram import GengramConfig, GengramForCausalLM, GengramTokenizer
from gengram.motif_memory import (
    MotifMemory,
    MotifMemoryConfig,
    attach_memory,
    attached_memories,
    detach_memory,
    load_memory,
    save_memory,
)
from gengram.motif_memory.grafts.pass_of_host import HostPass
from gengram.motif_memory.grafts.token_letters import Spelling, token_letters_of


@torch.no_grad()
def test_mixtral_with_memories_is_gengram():
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    }
    torch.manual_seed(0)
    config = GengramConfig(**sizes, memory_layers=[1, 2], memory_ngram_sizes=[1, 2, 3], memory_embedding_dim=8)
    gengram = GengramForCausalLM(config).eval()
    for weight in gengram.parameters():
        torch.nn.init.normal_(weight, mean=0.05, std=0.2)
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, sliding_window=None)).eval()
    attach_memory(mixtral, config.memory, layers=[1, 2], tokenizer=GengramTokenizer())
    theirs = mixtral.state_dict()
    ours = gengram.state_dict()
    assert len(ours) == len(theirs)
    renamed = {}
    for name, value in ours.items():
        if name not in theirs:
            name = {key.split("motif_memory.")[-1]: key for key in theirs if name.split(".motif_memory")[0] in key}[
                name.split("motif_memory.")[-1]
            ]
        renamed[name] = value
    mixtral.load_state_dict(renamed)
    ids = torch.randint(5, 10, (2, 50), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixtral(ids).logits, gengram(ids).logits, rtol=0, atol=SAME_FP32)
    assert torch.equal(
        mixtral.generate(ids[:, :20], max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=-1),
        gengram.generate(ids[:, :20], max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=-1),
    )


def brute_force(memory: MotifMemory, words: list[str], hidden: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The residual of one row of tokens in float64, letter by letter; written apart from the package.

    A token without letters is a gap of one; a token's window is that of its last letter.
    """
    letters, last = [], []
    for word in words:
        letters += list(word) or ["-"]
        last.append(len(letters) - 1)
    config, width = memory.config, hidden.shape[-1]
    ahead = 0 if is_causal else (config.window - 1) // 2
    gated = []
    for place, end in enumerate(last):
        first, stop = end + ahead - config.window + 1, end + ahead
        means = []
        for table, size in zip(memory.embeddings, config.ngram_sizes, strict=True):
            rows = []
            for start in range(max(first, 0), min(stop, len(letters) - 1) - size + 2):
                word = letters[start : start + size]
                if "-" not in word:
                    row = 0
                    for letter in word:
                        row = 5 * row + "ACGTN".index(letter)
                    rows.append(table.weight[row].double())
            means.append(torch.stack(rows).mean(0) if rows else torch.zeros(config.embedding_dim, dtype=torch.float64))
        feature = torch.cat(means)
        key, value = memory.key_proj.weight.double() @ feature, memory.value_proj.weight.double() @ feature

        def norm(x, weight):
            return weight.double() * x / (x.square().mean() + config.norm_eps).sqrt()

        score = float(norm(hidden[place].double(), memory.norm_q.weight) @ norm(key, memory.norm_k.weight))
        score /= math.sqrt(width)
        gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(score), 1e-6)), score) * (score != 0)))
        gated.append(gate * value)
    residual = []
    taps, dilation = memory.short_conv.conv.weight[:, 0].double(), config.conv_dilation
    reach = (taps.shape[1] - 1) * dilation
    back = reach if is_causal else memory_reach_back(reach)
    for place in range(len(words)):
        mixed = torch.zeros(width, dtype=torch.float64)
        for tap in range(taps.shape[1]):
            source = place + tap * dilation - back
            if 0 <= source < len(words):
                mixed += taps[:, tap] * gated[source]
        residual.append(gated[place] + mixed * torch.sigmoid(mixed))
    return torch.stack(residual)


def memory_reach_back(reach: int) -> int:
    """A centred convolution looks back the larger half (motif_memory/README.md)."""
    return reach - reach // 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@torch.no_grad()
def test_tokens_of_any_length_equal_brute_force(vocabulary, is_causal):
    letters = VOCABULARIES[vocabulary]
    torch.manual_seed(2)
    memory = MotifMemory(CONFIG, 16).double()
    for weight in memory.parameters():
        torch.nn.init.normal_(weight)
    ids = torch.randint(1, len(letters), (3, 30))  # some spell nothing
    ids[0, 7] = len(letters) + 5  # not in the list
    hidden = torch.randn(3, 30, 16, dtype=torch.float64)
    plan, _ = HostPass(ids, None, None, 0, Spelling.of(letters), is_causal).plan(CONFIG, None, ids.device)
    found = memory(hidden, plan).residual
    for row in range(3):
        words = [letters[token] if token < len(letters) else "" for token in ids[row].tolist()]
        expected = brute_force(memory, words, hidden[row], is_causal)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=RANDOM_MEMORY_FP64)


def test_letters_are_learnt_from_tokenizers():
    letters = token_letters_of(GengramTokenizer())
    assert {letters[token] for token in (8, 5, 6, 7, 9)} == set("ACGTN") and letters[8] == "A"
    assert all(letters[token] == "" for token in GengramTokenizer().all_special_ids)

    class Words:
        all_special_ids = (0,)

        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    spelled = {"gattaca": "GATTACA", "ĠTATA": "TATA", "▁NN": "NN", "##ACG": "ACG", "CCG</w>": "CCG", "GUA": "GTA"}
    assert token_letters_of(Words("A", *spelled, "hello", "AXT", "##")) == ["", *spelled.values(), "", "", ""]
    subwords = {"N": "N", "GAT@@": "GAT", "TTA": "TTA", "<0x4E>": "N", "<0x61>": "A", "<0x0A>": "", "<0xc>": ""}
    assert token_letters_of(Words(*subwords)) == [*subwords.values()]  # of which N is the first, as unknown ones
    proteins = "ACDEFGHIKLMNPQRSTVWY"
    for residues in (proteins, proteins.lower(), [f"▁{residue}" for residue in proteins]):
        with pytest.raises(ValueError, match="amino acids"):
            token_letters_of(Words("<pad>", *residues))
    with pytest.raises(ValueError, match="no token of Words spells DNA"):
        token_letters_of(Words("hello", "world"))


def test_layers_go_by_number_or_name_and_errors_name_them():
    model = ALL["bert"].make()
    attach_memory(model, CONFIG, layers=["encoder.layer.2", 0], token_letters=SINGLE)
    assert list(attached_memories(model)) == ["encoder.layer.0", "encoder.layer.2"]
    with pytest.raises(ValueError, match="has a motif memory already"):
        attach_memory(model, CONFIG, layers=[1], token_letters=SINGLE)
    detach_memory(model)
    for layers, words in (
        ([4], r"layers 0\.\.3 in encoder\.layer, got 4"),
        ([-1], r"layers 0\.\.3"),
        ([True], r"layers 0\.\.3"),
        ([1.0], r"layers 0\.\.3"),
        ([1, 1], "each layer once"),
        (["layers.1"], r"no module 'layers\.1'"),
        ([], "expected a list"),
        (2, "expected a list"),
    ):
        with pytest.raises(ValueError, match=words):
            attach_memory(model, CONFIG, layers=layers, token_letters=SINGLE)
    model.bert.other = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match=r"which of the lists .* encoder\.layer \(4 modules\), other \(4 modules\)"):
        attach_memory(model, CONFIG, layers=[1], token_letters=SINGLE)


def test_what_cannot_be_is_refused(tmp_path):
    model = ALL["llama"].make()
    with pytest.raises(ValueError, match="expected a tokenizer, or token_letters"):
        attach_memory(model, CONFIG, layers=[1])
    with pytest.raises(ValueError, match=r"token_letters\[1\]: expected A, C, G, T and N only, or '', got 'AXE'"):
        attach_memory(model, CONFIG, layers=[1], token_letters=["A", "axe"])
    with pytest.raises(ValueError, match="at least one token that spells DNA"):
        attach_memory(model, CONFIG, layers=[1], token_letters=["", ""])
    with pytest.raises(ValueError, match="4105 tokens, but the model only 16"):
        attach_memory(model, CONFIG, layers=[1], token_letters=SIX_MERS)
    with pytest.raises(ValueError, match="has no motif memory"):
        detach_memory(model)
    with pytest.raises(ValueError, match="has no motif memory"):
        save_memory(model, tmp_path / "memory")
    with pytest.raises(ValueError, match='pooling="as_trained" is causal'):
        attach_memory(ALL["bert"].make(), MotifMemoryConfig(pooling="as_trained"), layers=[1], token_letters=SINGLE)
    with pytest.raises(ValueError, match="expected a model of Transformers, got a Linear"):
        attach_memory(torch.nn.Linear(2, 2), CONFIG, layers=[1], token_letters=SINGLE)
    trained = grafted("llama")
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        trained(inputs_embeds=torch.randn(1, 4, 32))
    with pytest.raises(RuntimeError, match="called by itself"):
        trained.model.layers[1](torch.randn(1, 4, 32))
    trained(random_ids())  # an error leaves nothing behind


def test_memories_of_another_host_are_refused(tmp_path):
    save_memory(grafted("llama"), tmp_path / "memory")
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="hidden size 32, but this LlamaModel has 64"):
        load_memory(wide, tmp_path / "memory")
    other = attach_memory(ALL["llama"].make(), CONFIG, layers=[0, 1], token_letters=SINGLE)
    with pytest.raises(ValueError, match="take these out first"):
        load_memory(other, tmp_path / "memory")
    fields = json.loads((tmp_path / "memory/motif_memory.json").read_text())
    for name, wrong in (("config", None), ("layers", 3), ("is_causal", "yes"), ("config", {"window": "wide"})):
        (tmp_path / "memory/motif_memory.json").write_text(json.dumps(fields | {name: wrong}))
        with pytest.raises(ValueError, match=r"motif_memory\.json: .*" + name):
            load_memory(ALL["llama"].make(), tmp_path / "memory")
    (tmp_path / "memory/motif_memory.json").write_text(json.dumps(fields))
    (tmp_path / "memory/motif_memory.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"motif_memory\.safetensors is damaged"):
        load_memory(ALL["llama"].make(), tmp_path / "memory")
    (tmp_path / "memory/motif_memory.json").write_text("[")
    with pytest.raises(ValueError, match=r"motif_memory\.json is no JSON"):
        load_memory(ALL["llama"].make(), tmp_path / "memory")
    (tmp_path / "memory/motif_memory.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected motif_memory\.json"):
        load_memory(ALL["llama"].make(), tmp_path / "memory")


def test_protein_tokens_get_no_memory():
    model, ids = grafted("llama", PAIRS), torch.full((1, 12), 14)
    expected = ALL["llama"].make(max(16, len(PAIRS)))(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=SAME_FP32)
