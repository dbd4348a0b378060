"""`import gengram` makes the Auto classes know Gengram: in every order of imports, in workers and in threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

EVERYTHING_IS_REGISTERED = """
import sys
import gengram
import transformers
config = transformers.AutoConfig.for_model(
    "gengram", hidden_size=32, head_dim=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=16,
)
assert type(config) is gengram.GengramConfig is transformers.CONFIG_MAPPING["gengram"]
assert "gengram" in transformers.CONFIG_MAPPING.keys() and len(transformers.MODEL_MAPPING) > 100
for auto, expected in {
    transformers.AutoModel: gengram.GengramModel,
    transformers.AutoModelForCausalLM: gengram.GengramForCausalLM,
    transformers.AutoModelForMaskedLM: gengram.GengramForMaskedLM,
    transformers.AutoModelForSequenceClassification: gengram.GengramForSequenceClassification,
    transformers.AutoModelForTokenClassification: gengram.GengramForTokenClassification,
}.items():
    assert type(auto.from_config(config)) is expected
    assert expected in auto._model_mapping._extra_content.values()
assert type(transformers.AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL)) is gengram.GengramTokenizer
tasks = {"dna-embedding", "dna-fill-mask", "dna-variant-effect"}
assert tasks < set(transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks())
assert not any(type(finder).__module__ == "gengram.auto" for finder in sys.meta_path)
"""

ORDERS = [
    "import gengram",
    "import transformers; import gengram",
    "from transformers import AutoTokenizer, pipeline; import gengram",
    "import gengram; from transformers import AutoModel, AutoTokenizer, pipeline",
    # Our modules stand on these, and each imports an Auto class before it has run itself.
    "import gengram; import transformers.models.mixtral.modeling_mixtral",
    "import gengram; from transformers import Trainer",
]
MORE_ORDERS = [
    "from transformers import AutoConfig; import gengram",
    "import transformers.models.auto; import gengram",
    "import gengram.modeling_gengram.modeling_gengram",
    "from gengram.configuration import GengramConfig",
    "import gengram; import transformers.models.mixtral.configuration_mixtral",
    "import gengram; import transformers.modeling_layers",
    "import transformers.pipelines; import gengram",
    "import gengram; import transformers.pipelines",
]


def run(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a new process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("imports", [*ORDERS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_ORDERS)])
def test_in_every_order_of_imports(imports):
    run(imports + "\n" + EVERYTHING_IS_REGISTERED)


def test_pipeline_knows_the_default_model():
    code = """
import gengram
from transformers import pipeline
generate = pipeline("text-generation", model=gengram.DEFAULT_MODEL, device="cpu")
assert type(generate.model) is gengram.GengramForCausalLM and type(generate.tokenizer) is gengram.GengramTokenizer
"""
    run(code)


def test_import_is_light_and_auto_classes_of_others_stay_so():
    code = """
import sys
import gengram
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import AutoConfig, BertConfig
assert type(AutoConfig.for_model("bert")) is BertConfig
assert "gengram.configuration" not in sys.modules
import transformers.models.auto.modeling_auto, transformers.models.auto.tokenization_auto
assert "gengram.modeling_gengram" not in sys.modules
assert type(transformers.MODEL_MAPPING[BertConfig]) is type and BertConfig in transformers.TOKENIZER_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
_, task, _ = PIPELINE_REGISTRY.check_task("dna-embedding")
assert "gengram.inference" not in sys.modules
assert task["impl"].__name__ == "DnaEmbeddingPipeline" and "gengram.inference.pipelines" in sys.modules
"""
    run(code)


@pytest.mark.parametrize("imported_first", ["", "from transformers import AutoModel"])
def test_spawned_workers(imported_first, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
{imported_first}

def names(config, tokenizer, model):
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    import transformers
    assert type(AutoModelForMaskedLM.from_config(config)).__name__ == "GengramForMaskedLM"
    assert type(AutoTokenizer.from_pretrained(tokenizer.name_or_path)) is type(tokenizer)
    assert type(transformers.AutoConfig.for_model("gengram")) is type(model.config) is type(config)
    return "known"

if __name__ == "__main__":
    import multiprocessing
    import gengram
    config = gengram.GengramConfig(hidden_size=32, head_dim=8, num_hidden_layers=1, num_attention_heads=4,
                                   num_key_value_heads=2, intermediate_size=16)
    tokenizer = gengram.GengramTokenizer.from_pretrained(gengram.DEFAULT_MODEL)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(names, (config, tokenizer, gengram.GengramModel(config))))
""")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0 and done.stdout == "known\n", done.stderr


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_threads_that_import_at_once(seed):
    """Transformers itself cannot be imported by several threads at once, its Auto classes can."""
    code = """
import random, sys, threading, time, transformers
random.seed(sys.argv[1])
sys.setswitchinterval(random.choice([1e-5, 5e-3]))

def our_class():
    import gengram
    assert gengram.GengramForCausalLM

def our_module():
    import gengram.modeling_gengram.modeling_gengram

def auto_model():
    from transformers import AutoConfig, AutoModelForCausalLM
    import gengram
    config = AutoConfig.from_pretrained(gengram.DEFAULT_MODEL)
    assert type(AutoModelForCausalLM.from_config(config)) is gengram.GengramForCausalLM

def auto_tokenizer():
    from transformers import AutoTokenizer
    import gengram
    assert type(AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL)) is gengram.GengramTokenizer

def pipelines():
    import gengram.tokenization
    from transformers import pipeline

failed = []
def run(function):
    time.sleep(random.random() / 5)
    try:
        function()
    except BaseException as error:
        failed.append((function.__name__, error))

functions = [our_class, our_module, auto_model, auto_tokenizer, pipelines]
threads = [threading.Thread(target=run, args=(function,)) for function in functions]
random.shuffle(threads)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""
    run(code + EVERYTHING_IS_REGISTERED, str(seed))


def test_what_is_registered_by_hand_wins_until_register_is_called():
    code = """
import gengram
from transformers import AutoConfig, AutoModel, MODEL_MAPPING
class Other(gengram.GengramModel):
    pass
AutoModel.register(gengram.GengramConfig, Other, exist_ok=True)
assert MODEL_MAPPING[gengram.GengramConfig] is Other
gengram.register()
assert MODEL_MAPPING[gengram.GengramConfig] is gengram.GengramModel
"""
    run(code + EVERYTHING_IS_REGISTERED)


def test_mappings_can_be_copied_before_they_are_read():
    code = """
import copy, pickle
import gengram
from transformers import MODEL_MAPPING, TOKENIZER_MAPPING
for copied in (copy.deepcopy(MODEL_MAPPING), pickle.loads(pickle.dumps(TOKENIZER_MAPPING))):
    assert gengram.GengramConfig in copied
"""
    run(code + EVERYTHING_IS_REGISTERED)


def test_an_error_while_a_class_is_loaded_is_raised_and_the_next_try_works():
    code = """
import sys
import gengram
from transformers import AutoModel
config = gengram.GengramConfig(hidden_size=32, head_dim=8, num_hidden_layers=1, num_attention_heads=4,
                               num_key_value_heads=2, intermediate_size=16)
sys.modules["gengram.modeling_gengram"] = None
for _ in range(2):
    try:
        AutoModel.from_config(config)
    except ImportError as error:
        assert "gengram.modeling_gengram" in str(error)
    else:
        raise AssertionError
del sys.modules["gengram.modeling_gengram"]
"""
    run(code + EVERYTHING_IS_REGISTERED)


def test_the_finder_is_no_hindrance_to_others():
    code = """
import importlib.util, inspect, sys
before = list(sys.meta_path)
import gengram
assert sys.meta_path[1:] == before
spec = importlib.util.find_spec("transformers.models.auto.modeling_auto")  # looked for, not imported
assert "class AutoModel" in spec.loader.get_source(spec.name) and spec.has_location
assert importlib.util.find_spec("transformers.models.auto.no_such_module") is None

class Recorder:
    seen = []
    def find_spec(self, name, path=None, target=None):  # placed before ours, and asks all finders
        if name.endswith("configuration_auto") and name not in self.seen:
            self.seen.append(name)
            return importlib.util.find_spec(name)

sys.meta_path.insert(0, Recorder())
from transformers import AutoModel
module = sys.modules[AutoModel.__module__]
assert type(module.__loader__) is type(module.__spec__.loader) is type(sys.modules["transformers"].__spec__.loader)
assert "class AutoModel" in inspect.getsource(module)
assert Recorder.seen == ["transformers.models.auto.configuration_auto"]
sys.meta_path.pop(0)
"""
    run(code + EVERYTHING_IS_REGISTERED)
