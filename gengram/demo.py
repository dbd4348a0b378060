"""`gengram demo`: the whole way from a Megatron checkpoint to results, on a tiny bundled model."""

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, logging

from .conversion_scripts.convert_megatron_to_hf import convert_to_hf
from .data_preparation.fasta import read_fasta

DEMO_DATA = Path(__file__).parent / "demo_data"
LONGEST = 512  # the tiny model's context, in bases
MOST_RECORDS = 8


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram demo`."""
    parser.add_argument("--fasta", type=Path, help="sequences to use, plain or gzip; bundled ones by default")
    parser.add_argument("--output", type=Path, help="keep the converted folder here; by default it is temporary")


def run_demo(arguments: argparse.Namespace) -> int:
    """Run `gengram demo`; returns the exit code."""
    try:
        records = [
            (name, sequence[:LONGEST])
            for name, sequence in itertools.islice(
                read_fasta(arguments.fasta or DEMO_DATA / "synthetic.fa"), MOST_RECORDS
            )
            if sequence
        ]
        if not records:
            raise ValueError(f"{arguments.fasta}: expected at least one record with a sequence")
        with tempfile.TemporaryDirectory() as temporary, _quiet_loading():
            demonstrate(records, arguments.output or Path(temporary) / "gengram-tiny")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the library's progress bars and load reports; the base model would report the head it leaves out."""
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
    """Convert the bundled checkpoint into `folder`, then embed, score, fill and generate on `records`."""
    print(
        "Gengram demo. The bundled model is tiny and has RANDOM weights: it shows the way, its results mean nothing."
    )

    print("\n1. Convert a Megatron checkpoint (gengram convert to-hf)")
    report = convert_to_hf(DEMO_DATA / "tiny_checkpoint", folder, progress=False)
    print(_indented(report.summary()))

    print("\n2. Load it (AutoModelForCausalLM.from_pretrained) and compare with the authors' code")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = load_file(DEMO_DATA / "reference_logits.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    print(
        f"   {type(model).__name__}, {model.num_parameters():,} parameters, memory layers {model.config.memory_layers}"
    )
    print(
        f"   largest difference from the logits of the authors' code: {(logits - reference['logits']).abs().max():.1e}"
    )

    names, sequences = zip(*records, strict=True)
    batch = tokenizer(list(sequences), padding=True, return_tensors="pt")
    mask = batch["attention_mask"]

    print("\n3. Embed (AutoModel): mean over the bases of each sequence")
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = encoder(**batch).last_hidden_state  # (batch, length, hidden)
    means = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    for name, length, mean in zip(names, mask.sum(1).tolist(), means, strict=True):
        start = ", ".join(f"{value:+.3f}" for value in mean[:4])
        print(f"   {name}: {length} bases -> {len(mean)} numbers [{start}, ...]")

    print(
        "\n4. Score: mean log-likelihood per base, given the bases before it (nats; chance is -1.39 for four letters)"
    )
    with torch.no_grad():
        outputs = model(**batch, output_memory_gates=True)
    log_probabilities = outputs.logits[:, :-1].log_softmax(-1)
    picked = log_probabilities.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)  # (batch, length - 1)
    scores = (picked * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp_min(1)
    gates = torch.stack(outputs.memory_gates).mean(0)  # (batch, length)
    for name, score, gate, row in zip(names, scores.tolist(), gates, mask.bool(), strict=True):
        print(f"   {name}: {score:.3f}; memory gates open by {gate[row].mean():.2f} on average")

    print("\n5. Fill a masked base (AutoModelForMaskedLM; these weights were trained to predict the NEXT base)")
    filler = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    place = len(sequences[0]) // 2
    masked = sequences[0][:place] + tokenizer.mask_token + sequences[0][place + 1 :]
    with torch.no_grad():
        at_mask = filler(**tokenizer(masked, return_tensors="pt")).logits[0, place]
    letters = tokenizer.nucleotide_ids[:4]
    chances = at_mask[letters].softmax(-1).tolist()
    listed = ", ".join(f"{base} {chance:.2f}" for base, chance in zip("ACGT", chances, strict=True))
    print(f"   {names[0]}, base {place} (from 0) is {sequences[0][place]}; predicted: {listed}")

    print("\n6. Generate 40 bases (model.generate, greedy)")
    prompt = tokenizer(sequences[0][:60], return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=40)
    print(f"   {sequences[0][:60]}\n   + {tokenizer.decode(generated[0, 60:])}")
    print("\nDone. Next: gengram convert to-hf YOUR_CHECKPOINT OUTPUT")


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
