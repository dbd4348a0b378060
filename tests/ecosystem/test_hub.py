"""Saved and pushed folders: with this package, without it (a separate environment), in shards, off and on devices."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from huggingface_hub import HfApi
from saved_sources import SAVED_SOURCES
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32, SAME_MODEL_FP32
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    modeling_utils,
    pipeline,
)
from transformers.utils import hub

from gengram import (
    GengramConfig,
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramTokenizer,
)

HEADS = {
    GengramModel: AutoModel,
    GengramForCausalLM: AutoModelForCausalLM,
    GengramForMaskedLM: AutoModelForMaskedLM,
    GengramForSequenceClassification: AutoModelForSequenceClassification,
    GengramForTokenClassification: AutoModelForTokenClassification,
}
HUB_REPOSITORY = "someone/gengram-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = "ACG[MASK]TNacguRX"  # as in use_without_package.py
IDS = random_ids(2, 30)
SAME = dict(rtol=0, atol=SAME_FP32)

each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


@torch.no_grad()
def first_output(model) -> torch.Tensor:
    return model(IDS)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder per head, with a tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    for head in HEADS:
        tiny_model(head).save_pretrained(root / head.__name__)
        GengramTokenizer().save_pretrained(root / head.__name__)
    torch.save(IDS, root / "input_ids.pt")
    return root


# Where the package is not installed


@pytest.fixture(scope="module")
def without_package(folders, tmp_path_factory) -> SimpleNamespace:
    """What use_without_package.py did in a virtual environment with everything installed here except gengram.

    Its packages are links to the ones here; `.pth` files, through which an editable install works, are left out.
    """
    root = tmp_path_factory.mktemp("without_package")
    venv.create(root / "env", symlinks=True, with_pip=False)
    (site_packages,) = (root / "env").glob("lib/python*/site-packages")
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(installed).iterdir():
            if "gengram" not in entry.name.lower() and entry.suffix != ".pth":
                (site_packages / entry.name).symlink_to(entry)

    # the cache as it is after a download from the Hub
    repository = root / "hf" / "hub" / f"models--{HUB_REPOSITORY.replace('/', '--')}"
    shutil.copytree(folders / "GengramForCausalLM", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)

    (root / "out").mkdir()
    script = Path(__file__).with_name("use_without_package.py")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [root / "env" / "bin" / "python", script, folders, HUB_REPOSITORY, root / "out"],
        env=kept | {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(
        report=json.loads((root / "out" / "report.json").read_text()),
        outputs=torch.load(root / "out" / "outputs.pt"),
        saved=root / "out",
    )


def test_the_separate_environment_has_no_gengram(without_package):
    assert without_package.report["gengram is installed"] is False


@each_head
def test_remote_code_gives_the_same_numbers(head, folders, without_package):
    notes = without_package.report[head.__name__]
    assert notes["config"].startswith("transformers_modules.")
    assert notes["model"].startswith("transformers_modules.") and notes["model"].endswith(f".{head.__name__}")
    expected = first_output(head.from_pretrained(folders / head.__name__))
    torch.testing.assert_close(without_package.outputs[f"{head.__name__} loaded"], expected, **SAME)
    assert without_package.outputs[f"{head.__name__} from config"].shape == expected.shape


@each_head
def test_saved_again_from_remote_code_loads_everywhere(head, folders, without_package):
    expected = first_output(head.from_pretrained(folders / head.__name__))
    torch.testing.assert_close(without_package.outputs[f"{head.__name__} saved again"], expected, **SAME)
    saved = without_package.saved / head.__name__
    assert {path.name for path in saved.glob("*.py")} == SAVED_SOURCES
    for name in SAVED_SOURCES:
        assert (saved / name).read_text() == (folders / head.__name__ / name).read_text()
    model = HEADS[head].from_pretrained(saved)  # here, without trust
    assert type(model) is head
    torch.testing.assert_close(first_output(model), expected, **SAME)


@each_head
def test_tokenizer_needs_no_trust(head, without_package):
    notes = without_package.report[head.__name__]
    expected = GengramTokenizer()(TEXT)["input_ids"]
    assert notes["ids, trust None"] == notes["ids, trust False"] == notes["ids, trust True"] == expected
    assert notes["decoded"] == "ACGTN"
    for tokenizer_class in (AutoTokenizer, GengramTokenizer):
        tokenizer = tokenizer_class.from_pretrained(without_package.saved / head.__name__)
        assert tokenizer(TEXT)["input_ids"] == expected


def test_remote_code_generates_with_and_without_cache(folders, without_package):
    outputs = without_package.outputs
    assert torch.equal(outputs["generated"], outputs["generated without cache"])
    model = GengramForCausalLM.from_pretrained(folders / "GengramForCausalLM")
    others = [token for token in range(128) if token not in (8, 5, 6, 7)]
    ours = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, suppress_tokens=others)
    assert torch.equal(outputs["generated"], ours) and ours.shape[1] == 42


@pytest.mark.parametrize(
    "head, task",
    [
        (GengramModel, "feature-extraction"),
        (GengramForMaskedLM, "fill-mask"),
        (GengramForSequenceClassification, "text-classification"),
        (GengramForTokenClassification, "token-classification"),
    ],
)
def test_pipelines_with_remote_code(head, task, folders, without_package):
    pipe = pipeline(task, model=str(folders / head.__name__))
    ours = pipe("ACG[MASK]TTG", targets=list("ACGT")) if task == "fill-mask" else pipe("ACGTTG")
    theirs = without_package.report[head.__name__]["pipeline"]
    if task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), **SAME)
        return
    assert len(theirs) == len(ours)
    for their, our in zip(theirs, ours, strict=True):
        assert their == our | {"score": pytest.approx(float(our["score"]), abs=SAME_FP32)}


def test_text_generation_pipeline_with_remote_code(without_package):
    ((result),) = without_package.report["GengramForCausalLM"]["pipeline"]
    assert len(result["generated_text"]) == 18 and set(result["generated_text"]) <= set("ACGT")


def test_repository_on_the_hub_without_package(folders, without_package):
    expected = first_output(GengramForCausalLM.from_pretrained(folders / "GengramForCausalLM"))
    assert f".{COMMIT}." in without_package.report["hub model"]
    torch.testing.assert_close(without_package.outputs["hub"], expected, **SAME)
    assert without_package.report["hub ids"] == GengramTokenizer()(TEXT)["input_ids"]
    saved = without_package.saved / "from hub"
    assert {path.name for path in saved.glob("*.py")} == SAVED_SOURCES
    torch.testing.assert_close(first_output(AutoModelForCausalLM.from_pretrained(saved)), expected, **SAME)


# Where it is


@each_head
@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_its_own_classes_are_used(head, folders, trust):
    folder = folders / head.__name__
    model = HEADS[head].from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is head
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is GengramConfig
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)) is GengramTokenizer


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """A Hub that takes commits: every uploaded file lands in the returned folder."""

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            target = tmp_path / "hub" / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    card = SimpleNamespace(save=lambda path: Path(path).write_text(""))
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: card)
    return tmp_path / "hub"


@each_head
def test_push_to_hub_uploads_weights_and_source(head, hub_server, folders):
    model = head.from_pretrained(folders / head.__name__)
    model.push_to_hub("someone/pushed")
    GengramTokenizer().push_to_hub("someone/pushed")
    pushed = hub_server / "someone" / "pushed"
    assert {path.name for path in folders.joinpath(head.__name__).iterdir()} <= {
        path.name for path in pushed.iterdir()
    }
    assert SAVED_SOURCES <= {path.name for path in pushed.iterdir()}
    torch.testing.assert_close(first_output(HEADS[head].from_pretrained(pushed)), first_output(model), **SAME)
    assert type(AutoTokenizer.from_pretrained(pushed)) is GengramTokenizer


def test_saving_with_push_uploads_weights_and_source(hub_server, tmp_path):
    """The library uploads what is newer than its own list of the folder, so the order of steps matters here."""
    model = tiny_model(GengramForCausalLM)
    for _ in range(2):  # into a new folder, and over an old one
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/pushed")
        pushed = hub_server / "someone" / "pushed"
        assert {path.name for path in pushed.iterdir()} == {path.name for path in (tmp_path / "saved").iterdir()}
        assert SAVED_SOURCES <= {path.name for path in pushed.iterdir()}
        shutil.rmtree(pushed)


def test_registering_for_auto_classes_does_no_harm(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(GengramConfig, "_auto_class", None)  # put back afterwards
    GengramConfig.register_for_auto_class()
    for head, auto_class in HEADS.items():
        head.register_for_auto_class(auto_class.__name__)
    tiny_model(GengramForCausalLM).save_pretrained(tmp_path)
    before = folders / "GengramForCausalLM"
    for name in SAVED_SOURCES | {"config.json", "model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (before / name).read_bytes()


@each_head
def test_shards(head, tmp_path):
    model = tiny_model(head)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert SAVED_SOURCES <= {path.name for path in tmp_path.iterdir()}
    torch.testing.assert_close(first_output(HEADS[head].from_pretrained(tmp_path)), first_output(model), **SAME)


# Loading on devices and in dtypes


def memory_of(model, share: float) -> int:
    return int(share * sum(p.numel() * p.element_size() for p in model.parameters()))


@each_head
def test_device_maps(head, folders, tmp_path):
    folder, model = folders / head.__name__, tiny_model(head)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = HEADS[head].from_pretrained(folder, device_map=device_map)
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
        torch.testing.assert_close(first_output(loaded), first_output(model), **SAME)


@each_head
def test_disk_offload(head, folders, tmp_path):
    """Half of the model does not fit and comes from the disk, layer by layer, through accelerate's hooks."""
    folder, model = folders / head.__name__, tiny_model(head)
    loaded = HEADS[head].from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory_of(model, 0.6)}, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} <= {str(device) for device in loaded.hf_device_map.values()}
    assert {p.device.type for p in loaded.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(first_output(loaded), first_output(model), **SAME)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_everything_offloaded(where, tmp_path):
    """Every leaf module's weights are absent until it is called: no module may read another one's."""
    model = tiny_model(GengramForCausalLM)
    expected, generated = first_output(model), model.generate(IDS, max_new_tokens=5, do_sample=False)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    torch.testing.assert_close(first_output(model), expected, **SAME)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)


@each_head
def test_empty_weights_then_a_checkpoint(head, folders):
    folder, model = folders / head.__name__, tiny_model(head)
    with init_empty_weights():
        empty = HEADS[head].from_config(AutoConfig.from_pretrained(folder))
    assert type(empty) is head and {p.device.type for p in empty.parameters()} == {"meta"}
    filled = load_checkpoint_and_dispatch(empty, str(folder), device_map="auto").eval()
    torch.testing.assert_close(first_output(filled), first_output(model), **SAME)


@each_head
def test_dtypes_of_loading(head, folders, tmp_path):
    folder = folders / head.__name__
    expected = first_output(head.from_pretrained(folder))
    double = HEADS[head].from_pretrained(folder, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert first_output(double).dtype == torch.float64
    torch.testing.assert_close(first_output(double).float(), expected, rtol=0, atol=SAME_MODEL_FP32)

    half = HEADS[head].from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert first_output(half).dtype == torch.bfloat16 and first_output(half).isfinite().all()
    half.save_pretrained(tmp_path)
    again = HEADS[head].from_pretrained(tmp_path)  # "auto" is the default: what the file holds
    assert again.dtype == HEADS[head].from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert torch.equal(first_output(again), first_output(half))


# What else Python and PyTorch do with a model


@each_head
def test_copies(head, tmp_path):
    model = tiny_model(head)
    torch.save(model, tmp_path / "model.pt")
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert type(twin) is head and twin.config == model.config
        assert torch.equal(first_output(twin), first_output(model))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("head", [GengramForCausalLM, GengramForMaskedLM])
@pytest.mark.parametrize("size", [140, 16])
def test_resized_vocabulary(head, size, tmp_path):
    model = tiny_model(head)
    kept = min(size, 128)
    expected = first_output(model)[..., :kept]
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings == size
    torch.testing.assert_close(first_output(model)[..., :kept], expected, **SAME)
    model.save_pretrained(tmp_path)
    again = HEADS[head].from_pretrained(tmp_path)
    assert again(IDS, labels=IDS).loss == model(IDS, labels=IDS).loss
    added = torch.full_like(IDS, size - 1)
    assert torch.equal(again(added).logits, model(added).logits)
