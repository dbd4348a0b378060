"""The public names, the Auto classes, and the examples in docstrings and README."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import gengram
from gengram.configuration import configuration_gengram
from gengram.inference import base_tokens, explanation, one_hot
from gengram.modeling_gengram import modeling_gengram
from gengram.motif_memory import configuration_motif_memory, module, state
from gengram.tokenization import tokenization_gengram

MODULES = [configuration_gengram, modeling_gengram, tokenization_gengram, configuration_motif_memory, module, state]
MODULES += [base_tokens, explanation, one_hot]
ROOT = Path(__file__).resolve().parents[2]


def test_public_names():
    assert gengram.__all__ == [
        "DEFAULT_MODEL",
        "DEMO_DATA",
        "GengramConfig",
        "GengramForCausalLM",
        "GengramForMaskedLM",
        "GengramForSequenceClassification",
        "GengramForTokenClassification",
        "GengramModel",
        "GengramPreTrainedModel",
        "GengramQuantizationConfig",
        "GengramTokenizer",
        "MotifMemory",
        "MotifMemoryConfig",
        "OneHotModel",
        "__version__",
        "attach_memory",
        "attached_memories",
        "detach_memory",
        "explain_memory",
        "load_memory",
        "memory_path",
        "register",
        "save_memory",
    ]
    assert all(hasattr(gengram, name) for name in gengram.__all__)


def test_auto_classes_know_gengram_however_often_it_registers(tmp_path):
    gengram.register()
    config = transformers.AutoConfig.for_model("gengram", hidden_size=32, head_dim=8, num_hidden_layers=1)
    assert type(config) is gengram.GengramConfig
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = 4, 2, 16
    for auto, expected in {
        transformers.AutoModel: gengram.GengramModel,
        transformers.AutoModelForCausalLM: gengram.GengramForCausalLM,
        transformers.AutoModelForMaskedLM: gengram.GengramForMaskedLM,
        transformers.AutoModelForSequenceClassification: gengram.GengramForSequenceClassification,
        transformers.AutoModelForTokenClassification: gengram.GengramForTokenClassification,
    }.items():
        assert type(auto.from_config(config)) is expected


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_import_from_a_checkout_without_installation():
    code = "import sys, gengram, gengram.motif_memory.definition; print(gengram.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {[str(ROOT), *sys.path]!r}\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "gengram" / "__init__.py"


def test_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- code: use -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["embeddings"].shape == (2, 13, 192)
    assert set(names["continued"]) <= set("ACGTN") and len(names["continued"]) == 33
    assert len(names["features"][0]) == 8


def test_readme_names_every_folder():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name} - {".ci", ".github"}
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{folder}/` |" in readme for folder in folders)
