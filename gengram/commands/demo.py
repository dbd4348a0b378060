"""`gengram demo`: the whole way from a Megatron checkpoint to results, on what the package brings."""

import argparse
import contextlib
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELP = "convert a bundled checkpoint, and use the default model"
DEMO_DATA = Path(__file__).parents[1] / "demo_data"
LONGEST = 1024  # the default model's context, in bases
MOST_RECORDS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram demo`."""
    parser.add_argument("--fasta", type=Path, help="sequences to use, plain or gzip; bundled ones by default")
    parser.add_argument("--output", type=Path, help="keep the converted folder here; by default it is temporary")


def run(arguments: argparse.Namespace) -> int:
    """Convert the bundled checkpoint, and use the default model on the sequences.

    Raises:
        ValueError, OSError: if the FASTA file cannot be used, or the folder holds something.
    """
    from ..sequences.fasta import read_fasta

    source = read_fasta(arguments.fasta or DEMO_DATA / "synthetic.fa")
    records = [(name, sequence[:LONGEST]) for name, sequence in itertools.islice(source, MOST_RECORDS) if sequence]
    if not records:
        raise ValueError(f"{arguments.fasta}: expected at least one record with a sequence")
    with tempfile.TemporaryDirectory() as temporary, _quiet_loading():
        demonstrate(records, arguments.output or Path(temporary) / "gengram-tiny")
    return 0


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the library's progress bars and load reports; the base model would report the head it leaves out."""
    from transformers import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def demonstrate(records: list[tuple[str, str]], folder: Path) -> None:
    """Convert the bundled checkpoint into `folder`; then embed, score, fill and generate with the default model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import DEFAULT_MODEL
    from ..conversion_scripts.convert_megatron_to_hf import convert_to_hf
    from ..inference.likelihood import log_likelihoods, next_token_log_probabilities
    from ..inference.pooling import pool
    from ..sequences.alphabet import BASES

    print("1. Convert a Megatron checkpoint (gengram convert to-hf), here a tiny one with random weights")
    report = convert_to_hf(DEMO_DATA / "tiny_checkpoint", folder, progress=False)
    print(_indented(report.summary()))

    print("\n2. Load it (AutoModelForCausalLM.from_pretrained) and compare with the authors' code")
    converted: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = load_file(DEMO_DATA / "reference_logits.safetensors")
    with torch.no_grad():
        logits = converted(reference["input_ids"]).logits
    difference = (logits - reference["logits"]).abs().max()
    print(f"   {type(converted).__name__}, memory layers {converted.config.memory_layers}")
    print(f"   largest difference from the logits of the authors' code: {difference:.1e}")

    print("\n3. Load gengram-mini (gengram.DEFAULT_MODEL), a small model trained on human and vertebrate DNA")
    model: Any = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    names, sequences = zip(*records, strict=True)
    batch = tokenizer(list(sequences), padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    print(f"   {model.num_parameters():,} parameters, context {model.config.max_position_embeddings} bases")

    print("\n4. Embed (output_hidden_states): mean over the bases of each sequence")
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_memory_gates=True)
    hidden = outputs.hidden_states[-1]  # (batch, length, hidden)
    means = pool(hidden, mask, "mean")
    for name, length, mean in zip(names, mask.sum(1).tolist(), means, strict=True):
        start = ", ".join(f"{value:+.3f}" for value in mean[:4])
        print(f"   {name}: {length} bases -> {len(mean)} numbers [{start}, ...]")

    print("\n5. Score: bits per base, given the bases before it (2 is chance; less is more like genomes)")
    picked = next_token_log_probabilities(outputs.logits, batch["input_ids"])  # (batch, length - 1)
    bits = -(picked * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp_min(1) / math.log(2)
    gates = torch.stack(outputs.memory_gates).mean(0)  # (batch, length)
    for name, score, gate, row in zip(names, bits.tolist(), gates, mask.bool(), strict=True):
        print(f"   {name}: {score:.3f}; memory gates open by {gate[row].mean():.2f} on average")

    place = len(sequences[0]) // 2
    print(f"\n6. Fill base {place} (from 0) of {names[0]}: how likely the whole sequence is with each base there")
    filled = [sequences[0][:place] + base + sequences[0][place + 1 :] for base in BASES]
    chances = torch.tensor(log_likelihoods(model, tokenizer, filled)).softmax(0).tolist()
    listed = ", ".join(f"{base} {chance:.2f}" for base, chance in zip(BASES, chances, strict=True))
    print(f"   it is {sequences[0][place]}; predicted: {listed}")

    print("\n7. Generate 40 bases (model.generate, greedy)")
    prompt = tokenizer(sequences[0][:60], return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=40)
    print(f"   {sequences[0][:60]}\n   + {tokenizer.decode(generated[0, prompt['input_ids'].shape[1] :])}")
    print("\nDone. Next: gengram convert to-hf YOUR_CHECKPOINT OUTPUT, or gengram bench MODEL --suite SUITE")


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
