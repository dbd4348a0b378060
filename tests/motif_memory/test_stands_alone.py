"""`motif_memory/` copied alone, where only PyTorch can be imported, computes the authors' outputs."""

import shutil
import subprocess
import sys
from pathlib import Path

import memory_oracle
import pytest
import torch
from shared_files import fixture_json, fixture_tensors, needs_fixtures
from tolerances import MEMORY_FP64

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib.abc, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "gengram", "huggingface_hub", "safetensors", "datasets"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
from motif_memory import MotifMemory, MotifMemoryConfig, letter_codes, plan_ngrams

given = torch.load(sys.argv[1])
config = MotifMemoryConfig(**given["config"])
outputs = {}
for name, (ids, hidden_states) in given["cases"].items():
    memory = MotifMemory(config, hidden_states.shape[-1]).to(hidden_states.dtype)
    memory.load_state_dict({key: given["weights"][key].to(hidden_states.dtype) for key in memory.state_dict()})
    with torch.no_grad():
        outputs[name] = memory(hidden_states, plan_ngrams(letter_codes(ids, given["letters"]), config)).residual
torch.save(outputs, sys.argv[2])
"""


def run_alone(folder: Path, config: dict, letters: list[int], weights: dict, cases: dict) -> dict[str, torch.Tensor]:
    shutil.copytree(ROOT / "motif_memory", folder / "motif_memory", ignore=shutil.ignore_patterns("_native*", "__py*"))
    torch.save(dict(config=config, letters=letters, weights=weights, cases=cases), folder / "given.pt")
    command = [sys.executable, "-c", SCRIPT, "given.pt", "outputs.pt"]
    subprocess.run(command, cwd=folder, check=True, env={"PATH": ""}, timeout=300)
    return torch.load(folder / "outputs.pt")


@needs_fixtures
@pytest.mark.parametrize("variant", ["w21_conv", "w21_noconv"])
def test_the_folder_alone_computes_the_authors_outputs(variant, tmp_path):
    folder = "module_gengram"
    kwargs = fixture_json(folder, "index.json")["variants"][variant]["kwargs"]
    config = dict(
        ngram_sizes=kwargs["ngram_sizes"],
        embedding_dim=kwargs["embed_dim_per_ngram"],
        window=kwargs["window_size"],
        conv_kernel=kwargs["short_conv_kernel_size"] if kwargs["use_short_conv"] else 0,
        conv_dilation=kwargs["short_conv_dilation"],
    )
    outputs = fixture_tensors(folder, f"out_{variant}.safetensors")
    inputs = fixture_tensors(folder, "inputs.safetensors")
    names = sorted({name.split("/")[0] for name in outputs})
    cases = {
        name: (inputs[f"{name}/input_ids"], inputs[f"{name}/hidden_states"].transpose(0, 1).double()) for name in names
    }
    weights = fixture_tensors(folder, "weights.safetensors")
    ours = run_alone(tmp_path, config, kwargs["dna_token_ids"], weights, cases)
    assert names
    for name in names:
        expected = outputs[f"{name}/out_fp64"].transpose(0, 1)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=MEMORY_FP64, msg=lambda m, n=name: f"{n}: {m}")


def test_the_folder_alone_equals_brute_force(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes, width, hidden, letters = [1, 2, 3], 4, 8, [8, 5, 6, 7, 9]
    config = dict(ngram_sizes=sizes, embedding_dim=width, window=9, conv_kernel=4, conv_dilation=3)
    shapes = {f"embeddings.{i}.weight": (5**n, width) for i, n in enumerate(sizes)}
    shapes |= {name: (hidden, 3 * width) for name in ("key_proj.weight", "value_proj.weight")}
    shapes |= {"norm_q.weight": (hidden,), "norm_k.weight": (hidden,), "short_conv.conv.weight": (hidden, 1, 4)}
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    ids = torch.tensor([*letters, 3])[torch.randint(6, (1, 40), generator=generator)]
    states = torch.randn(1, 40, hidden, generator=generator, dtype=torch.float64)
    ours = run_alone(tmp_path, config, letters, weights, {"one": (ids, states)})["one"][0]
    truth = memory_oracle.memory(
        states[0], ids[0].tolist(), weights, sizes=sizes, window=9, letters=letters, dilation=3
    )
    torch.testing.assert_close(ours, truth, rtol=0, atol=MEMORY_FP64)
