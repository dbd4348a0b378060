"""gengram-mini, the model that ships with the package."""

import json
from pathlib import Path

import torch
from datasets import load_dataset
from shared_files import DATA, needs_data
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gengram
from gengram.data_preparation import WindowOptions, prepare_genome_dataset, read_fasta
from gengram.evaluation.likelihood import bits_of_examples

FOLDER = Path(gengram.DEFAULT_MODEL)


def load():
    return AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL).eval()


def test_it_loads_in_float32_twice_the_same_and_is_small():
    one, two = load(), load()
    assert type(one) is gengram.GengramForCausalLM and one.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert AutoTokenizer.from_pretrained(FOLDER).model_max_length == one.config.max_position_embeddings == 1024


def test_its_record_and_its_script_agree():
    script = Path(__file__).resolve().parents[2] / "examples" / "pretraining" / "gengram-mini.json"
    config = AutoConfig.from_pretrained(FOLDER)
    assert all(getattr(config, name) == value for name, value in json.loads(script.read_text()).items())
    stages = json.loads((FOLDER / "training.json").read_text())
    tokens = sum(stage["trained_tokens"] for stage in stages)
    assert f"{tokens / 1e6:.1f} M tokens" in (FOLDER / "README.md").read_text()


def test_it_generates_bases():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    generated = load().generate(**tokenizer("ACGTTGACCA", return_tensors="pt"), max_new_tokens=30, do_sample=True)
    assert generated.shape == (1, 40) and set(tokenizer.decode(generated[0])) <= set("ACGTN")


@needs_data
def test_it_has_learned_what_a_held_out_chromosome_is_like(tmp_path):
    name, sequence = next(read_fasta(DATA / "genome_human" / "raw" / "chr9_1-1000000.GRCh38.fa.gz"))
    (tmp_path / "part.fa").write_text(f">{name}\n{sequence[500_000:530_000]}\n")
    prepare_genome_dataset([tmp_path / "part.fa"], tmp_path / "data", WindowOptions(1024, packed=True), progress=False)
    data = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["train"]
    bits, bases = bits_of_examples(load(), data)
    assert bits.sum() / bases.sum() < 1.95
