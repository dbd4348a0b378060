"""`gengram export`: what the file is made of equals the model's own way; and the file itself, in ONNX Runtime."""

import re

import numpy as np
import pytest
import torch
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from source_tree import ROOT
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32

from gengram import GengramForCausalLM, GengramForMaskedLM, GengramModel, GengramQuantizationConfig
from gengram.cli import main
from gengram.inference.loaded_model import LoadedModel, load_model
from gengram.inference.onnx_export import _first_state, _RowsAndRuns, dense_experts, export_onnx
from gengram.motif_memory.definition import ngram_rows_and_runs
from gengram.support.errors import InputError


def test_experts_by_products_over_all_are_the_experts():
    model = tiny_model(GengramForCausalLM).eval()
    ids = random_ids(2, 30)
    with torch.no_grad():
        expected = model(ids).logits
        with dense_experts(model):
            assert sum("forward" in vars(module) for module in model.modules()) == 4  # of each layer
            found = model(ids).logits
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME_FP32)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100])
def test_runs_without_cummax_are_the_runs(length):
    codes = torch.randint(0, 6, (3, length), generator=torch.Generator().manual_seed(length))
    codes[1] = 1  # a run that is as long as the text
    behind = torch.arange(length, dtype=torch.int32).remainder(17).expand_as(codes)
    for own in (None, behind):
        for found, expected in zip(_RowsAndRuns(100)(codes, 6, own), ngram_rows_and_runs(codes, 6, own), strict=True):
            assert torch.equal(found, expected)


def test_what_cannot_be_exported_is_refused(tiny_folder, tmp_path, capsys):  # noqa: F811
    assert main(["export", str(tiny_folder), str(tmp_path / "out.pt")]) == 1
    assert "expected a name of the file that ends in .onnx" in capsys.readouterr().err
    (tmp_path / "there.onnx").touch()
    assert main(["export", str(tiny_folder), str(tmp_path / "there.onnx")]) == 1
    assert "exists already" in capsys.readouterr().err
    for name, message in (
        ("out.pt", "ends in .onnx"),
        ("there.onnx", "exists already"),
    ):  # before it looks for a model
        assert main(["export", "no/such/model", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    small = GengramForCausalLM.from_pretrained(
        tiny_folder, quantization_config=GengramQuantizationConfig(experts="int8")
    )
    with pytest.raises(InputError, match=r"float32, got one in .* or quantised"):
        export_onnx(LoadedModel(small, None), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.slow
def test_a_file_gives_the_models_numbers(tiny_folder, tmp_path, capsys):  # noqa: F811
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(tiny_folder), str(tmp_path / "out.onnx")]) == 0
    assert "differ from the model's by" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    assert [output.name for output in session.get_outputs()] == ["logits"]
    loaded = load_model(str(tiny_folder), "causal", device="cpu")
    for batch, length in ((1, 48), (5, 2), (2, 31)):
        ids = random_ids(batch, length)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, attention_mask=mask).logits.numpy()
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert np.abs(found - expected).max() < 1e-4


def documented_generation():
    """The block of docs/running.md that generates with ONNX Runtime."""
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
def test_a_file_with_state_generates_as_the_model_does(experts, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model(GengramForCausalLM, num_local_experts=experts, num_hidden_layers=2, memory_layers=[1])
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "model", "model.onnx", "--with-state"]) == 0
    names = {}
    exec(documented_generation(), names)
    ids = torch.from_numpy(names["ids"])
    expected = model.generate(
        ids[:, :4], max_new_tokens=40, do_sample=False, suppress_tokens=[*range(5), *range(9, 128)]
    )
    assert torch.equal(ids, expected)

    session = onnxruntime.InferenceSession("model.onnx")
    ids = random_ids(3, 60)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    state = {name: value.numpy() for name, value in _first_state(model, 3).items()}
    assert list(state) == [entry.name for entry in session.get_inputs()][1:]
    for part in (slice(0, 20), *(slice(place, place + 1) for place in range(20, 60))):
        found, *after = session.run(None, {"input_ids": ids[:, part].numpy(), **state})
        state = dict(zip(state, after, strict=True))
        assert np.abs(found - logits[:, part]).max() < 1e-4


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        (GengramModel, {}, "that predict the next base"),
        (GengramForMaskedLM, {}, "that predict the next base"),
        (GengramForCausalLM, {"memory_pooling": "as_trained"}, "as_trained.* has a state that is not written"),
    ],
)
def test_a_state_that_cannot_be_written_is_refused(head, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_onnx(LoadedModel(tiny_model(head, **changes), None), tmp_path / "out.onnx", with_state=True)
