"""`gengram export`: what the file is made of equals the model's own way; and the file itself, in ONNX Runtime."""

import re

import numpy as np
import pytest
import torch
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from source_tree import ROOT
from tiny_models import random_ids, tiny_model
from tolerances import SAME_FP32

from gengram import (
    GengramForCausalLM,
    GengramForMaskedLM,
    GengramForSequenceClassification,
    GengramForTokenClassification,
    GengramModel,
    GengramQuantizationConfig,
    GengramTokenizer,
)
from gengram.cli import main
from gengram.inference import onnx_export
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
    (tmp_path / "large.onnx.data").touch()  # weights of an earlier file
    assert main(["export", str(tiny_folder), str(tmp_path / "large.onnx")]) == 1
    assert "large.onnx.data exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "head, shape",
    [
        (GengramForSequenceClassification, (2, 3)),
        (GengramForTokenClassification, (2, 10, 3)),
        (GengramForMaskedLM, (2, 10, 128)),
        (GengramModel, (2, 10, 32)),
    ],
)
def test_a_model_is_exported_with_its_head(head, shape, tmp_path, monkeypatch):
    tiny_model(head, num_labels=3).save_pretrained(tmp_path / "model")
    GengramTokenizer().save_pretrained(tmp_path / "model")
    given = []
    monkeypatch.setattr(onnx_export, "export_onnx", lambda loaded, *rest: given.append(loaded.model) or 0.0)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out.onnx")]) == 0
    (model,) = given
    ids = random_ids(2, 10)
    assert type(model) is head and onnx_export._Outputs(model)(ids, torch.ones_like(ids)).shape == shape

    class Session:
        """Gives the model's numbers, one of them changed by a little."""

        def run(self, names, inputs):
            outputs = onnx_export._Outputs(model)(*(torch.from_numpy(given) for given in inputs.values()))
            outputs[0, -1] += 0.25
            return [outputs.detach().numpy()]

    assert onnx_export._difference(Session(), model, 48) == pytest.approx(0.25, abs=SAME_FP32)


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="this PyTorch exports it for one length only")
def test_a_classifier_is_exported_for_any_batch_and_length(monkeypatch):
    sizes = dict(num_local_experts=0, num_hidden_layers=1, memory_layers=[0])
    model = tiny_model(GengramForSequenceClassification, **sizes).eval()
    monkeypatch.setattr(torch.onnx, "export", lambda exported, *rest, **named: (exported.module(), named))
    exported, named = onnx_export._program(model, 48)
    ids = random_ids(3, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(exported(ids, mask), expected, rtol=0, atol=SAME_FP32)
    assert named["output_names"] == ["logits"]


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


@pytest.mark.slow
@pytest.mark.parametrize("head", [GengramForSequenceClassification, GengramForTokenClassification])
def test_a_file_of_a_classifier_gives_its_numbers(head, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model(head, num_labels=3).eval()
    model.save_pretrained(tmp_path)
    GengramTokenizer().save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), str(tmp_path / "out.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    ids = random_ids(3, 21)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 15:] = 0, 0  # padded on the left, and on the right
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    real = mask.bool().numpy() if head is GengramForTokenClassification else slice(None)
    assert np.abs(found - expected)[real].max() < 1e-4


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
