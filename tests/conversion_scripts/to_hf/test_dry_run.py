"""The plan says what a conversion does; a dry run writes nothing; JSON for scripts."""

import json
from math import prod

import pytest

from gengram.conversion_scripts.convert_megatron_to_hf import convert_to_hf, main, plan_conversion


@pytest.mark.parametrize("source", ["small_torch", "small_torch_dist"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_plan_is_what_the_conversion_does(source, dtype, tmp_path, request):
    made = request.getfixturevalue(source)
    plan = plan_conversion(made.root, tmp_path / "out", dtype, "1500")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    report = convert_to_hf(made.root, tmp_path / "out", dtype, "1500", progress=False)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {weight.name: weight.file for weight in plan.weights} == index["weight_map"]
    assert plan.bytes_written == report.nbytes == index["metadata"]["total_size"]
    assert plan.bytes_written == sum(plan.files.values()) == sum(weight.bytes for weight in plan.weights)
    assert (plan.parameters, plan.dtype, plan.dropped) == (report.parameters, report.dtype, report.dropped)
    for weight in plan.weights:
        entry = record["weights"][weight.name]
        assert [source.name for source in weight.sources] == entry["sources"]
        assert list(weight.shape) == entry["shape"] == list(made.expected[weight.name].shape)
        for source in weight.sources:
            assert source.bytes == 2 * prod(source.shape) and source.dtype == "bfloat16"
            assert source.files and all((made.folder / file).is_file() for file in source.files)
    sources = {source.name: source.bytes for weight in plan.weights for source in weight.sources}
    assert plan.bytes_read == sum(sources.values()) and set(sources) == set(record["source"]["tensors"])


def test_dry_run(small_torch, tmp_path, capsys):
    command = [str(small_torch.root), str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for name in small_torch.expected:
        assert f"  {name} {list(small_torch.expected[name].shape)} " in text
    assert "<- decoder.layers.2.mlp.experts.linear_fc1.weight0 [20, 12] bfloat16 in mp_rank_00_001/model_op" in text
    assert "decoder.layers.1.gengram.norm_q.weight: memory of a layer where it is not active (dead weights)" in text
    assert "Nothing was written." in text and [path.name for path in tmp_path.iterdir()] == ["source"]

    assert main([*command, "--json", "--dtype", "float32"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["dtype"] == "float32" and plan["bytes_written"] == 2 * plan["bytes_read"]
    assert {entry["name"] for entry in plan["dropped"]} >= {"decoder.layers.1.gengram.norm_q.weight"}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(FileExistsError, match="exists already"):
        plan_conversion(small_torch.root, tmp_path)


def test_json_and_quiet(small_torch, tmp_path, capsys):
    assert main([str(small_torch.root), str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == "" and report["output"] == str(tmp_path / "a") and report["iteration"] == 123
    assert report["tensors"] == len(small_torch.expected) and report["dropped"][0]["reason"]

    assert main([str(small_torch.root), str(tmp_path / "a"), "--json"]) == 1
    captured = capsys.readouterr()
    assert "exists already" in json.loads(captured.out)["error"] and captured.err.startswith("error: ")

    assert main([str(small_torch.root), str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([str(small_torch.root), str(tmp_path / "c")]) == 0
    captured = capsys.readouterr()
    assert "tensors" in captured.err and "B/s" in captured.err and "Kept" in captured.out
