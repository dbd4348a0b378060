"""`gengram verify`: checks a converted folder against its record, its source and itself.

1. Every tensor on disk has the bytes that the conversion wrote, and so have the tokenizer's files and the code.
2. `config.json` describes the model of the recorded arguments.
3. Taken back through the table, the tensors are the source's: their hashes are those recorded when it was read.
4. If the source is there, it still has these hashes, and arguments that describe this model.
5. Two loads of the folder give the same weights, those on disk, and a forward pass is finite.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_gengram import GengramConfig
from ..modeling_gengram.modeling_gengram import GengramForCausalLM
from ..support.errors import ConversionError, quoted, shortened
from ..support.lfs_pointer import POINTER_BYTES, refuse_lfs_pointer
from ..support.printable import printable
from .files.conversion_record import ConversionRecord, file_digests, needed_record
from .files.file_facts import check_unchanged, facts_in
from .files.hf_folder import RECORD, StoredTensor, read_config, stored_tensors
from .files.tensor_memory import reused_memory
from .files.weight_hash import WeightHash, tensor_bytes, tensor_digest, weight_digest
from .mapping.arguments import config_from_args, differing_fields
from .mapping.match import Move, WeightPlan, match
from .mapping.quantized import Kinds, quantization_of, quantized, scale_name, stored_specs
from .mapping.weight_table import TABLE_VERSION
from .megatron.checkpoint import MegatronCheckpoint
from .megatron.open_checkpoint import open_checkpoint


@dataclass
class VerificationReport:
    """What was checked, in the order of checking; a failed check raises instead."""

    output: Path
    checks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The report in a few lines for people."""
        lines = [f"ok: {check}" for check in self.checks] + [f"not checked: {reason}" for reason in self.skipped]
        return "\n".join([*lines, f"{self.output} is verified."])


@reused_memory()
def verify_conversion(output: str | Path, source: str | Path | None = None, load: bool = True) -> VerificationReport:
    """Checks the folder that a conversion wrote.

    Args:
        output: The folder, with its `conversion.json`.
        source: The Megatron checkpoint, a folder or on the Hub; `None` takes the recorded folder if it is still there.
        load: Whether to load the model twice and run it; needs memory for one copy.

    Raises:
        ConversionError: at the first check that fails; the message names up to ten tensors.
    """
    output = Path(output)
    if not output.is_dir():
        raise ConversionError(f"{output} is not a folder; expected the output of `gengram convert to-hf`")
    facts = facts_in(output)
    _refuse_pointers(output)
    record = _read_record(output)
    report = VerificationReport(output)
    tensors = stored_tensors(output)
    _check_against_record(output, record, tensors)
    report.checks.append(f"{len(tensors)} tensors on disk have the recorded names, shapes, dtypes and hashes")
    _check_other_files(output, record, report)
    _check_config(output, record, report)
    _check_round_trip(output, record, tensors, report)
    _check_source(output, record, source, report)
    if load:
        _check_loading(output, record)
        report.checks.append("two loads are identical and equal the files; a forward pass is finite")
    else:
        report.skipped.append("loading, as asked")
    check_unchanged(output, facts, facts)
    return report


def _read_record(output: Path) -> ConversionRecord:
    record = needed_record(output)
    if record.table_version != TABLE_VERSION:
        raise ConversionError(
            f"{output / RECORD} was written with version {shortened(record.table_version)} of the weight table, this "
            f"is version {TABLE_VERSION}; convert again, or verify with the version of gengram that it names"
        )
    return record


def _refuse_pointers(output: Path) -> None:
    """No file of the folder is a Git LFS pointer, those included that are not read here, as the tokenizer's."""
    for path in sorted(output.iterdir()):
        if path.is_file() and path.stat().st_size < POINTER_BYTES:
            refuse_lfs_pointer(path.read_bytes(), str(path), ConversionError)


def _check_against_record(output: Path, record: ConversionRecord, tensors: dict[str, StoredTensor]) -> None:
    weights = record.weights
    missing = [name for name in weights if name not in tensors]
    extra = [name for name in tensors if name not in weights]
    if missing or extra:
        parts = [f"missing {quoted(missing, list(tensors))}"] if missing else []
        parts += [f"not in {RECORD} {quoted(extra, list(weights))}"] if extra else []
        raise ConversionError(f"{output}: the weights are not those of the conversion: {'; '.join(parts)}")
    wrong = []
    for name, tensor in tensors.items():
        expected = weights[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ConversionError(
                f"{tensor.path}: {shortened(name)} must be {expected.dtype} of shape {expected.shape}, got "
                f"{tensor.dtype} of shape {tensor.shape}"
            )
        if weight_digest(tensor.shape, tensor.dtype, tensor.pieces()) != expected.sha256:
            wrong.append(name)
    if wrong:
        raise ConversionError(
            f"{output}: the bytes of {len(wrong)} tensors are not those that were written: {quoted(wrong)}; the disk "
            "or a copy is damaged: convert again"
        )


def _check_other_files(output: Path, record: ConversionRecord, report: VerificationReport) -> None:
    """The tokenizer, the code and the defaults of generation are those that were written."""
    if not record.files:
        report.skipped.append(f"the tokenizer and the code, whose hashes {RECORD} does not have (of an older version)")
        return
    found = file_digests(output, record.files)
    missing = [name for name in record.files if name not in found]
    if missing:
        raise ConversionError(f"{output}: missing {quoted(missing)}; fetch the folder or convert again")
    changed = [name for name, digest in found.items() if digest != record.files[name]]
    if changed:
        raise ConversionError(
            f"{output}: {quoted(changed)} are not as the conversion wrote them: they do not have the hashes in "
            f"{RECORD}; fetch the folder or convert again"
        )
    report.checks.append(f"{len(found)} other files, of tokenizer and code, have the recorded hashes")


def _check_config(output: Path, record: ConversionRecord, report: VerificationReport) -> None:
    if not record.args:
        report.skipped.append(f"config.json with the arguments of the source, which {RECORD} does not have")
        return
    _refuse_another_model(output, config_from_args(record.args), f"the arguments in {RECORD}")
    report.checks.append("config.json describes the model of the recorded arguments")


def _refuse_another_model(output: Path, expected: GengramConfig, of: str) -> None:
    config = read_config(output)
    names = differing_fields(config, expected, all_fields=True)
    names += ["architectures"] if config.architectures != expected.architectures else []
    if names:
        differing = [
            f"{name} is {shortened(getattr(config, name))}, not {shortened(getattr(expected, name))}" for name in names
        ]
        raise ConversionError(
            f"{output / 'config.json'} describes another model than {of}: {'; '.join(differing[:10])}; undo the "
            "change, or convert again"
        )


def _check_round_trip(
    output: Path, record: ConversionRecord, tensors: dict[str, StoredTensor], report: VerificationReport
) -> None:
    sources = record.sources
    config = read_config(output)
    kinds = quantization_of(config)
    plan = match({name: entry.shape for name, entry in sources.items()}, config)
    names = {spec.name for spec in stored_specs(plan.outputs, kinds, torch.float32)}
    if names != set(tensors):
        raise ConversionError(
            f"{output}: config.json describes other weights than the folder has: "
            f"{quoted(sorted(names ^ set(tensors)))}"
        )
    wrong, narrowed, rounded = [], 0, 0
    for move in plan.moves:
        if kinds.of(move.entry.targets[0].name) is not None:
            rounded += 1
            continue
        dtype = sources[move.source].dtype
        parts = list(_targets(move, tensors))
        if torch.promote_types(parts[0].dtype, dtype) != parts[0].dtype:
            narrowed += 1
        elif tensor_digest([move.entry.layout.to_megatron(parts).to(dtype)]) != sources[move.source].sha256:
            wrong.append(move.source)
    if wrong:
        raise ConversionError(
            f"{output}: {len(wrong)} tensors are not the source's when taken back: {quoted(wrong)}; the conversion is "
            "wrong, please report it"
        )
    if narrowed:
        report.skipped.append(f"the way back of {narrowed} tensors, which were rounded to a smaller dtype")
    if rounded:
        report.skipped.append(f"the way back of {rounded} tensors, which were quantised ({kinds.in_words()})")
    if narrowed + rounded < len(plan.moves):
        report.checks.append(
            f"{len(plan.moves) - narrowed - rounded} tensors taken back through the table have the source's hashes"
        )


def _targets(move: Move, tensors: dict[str, StoredTensor]) -> Iterator[torch.Tensor]:
    for target in move.entry.targets:
        yield tensors[target.name].read(target.index)


def _check_source(
    output: Path, record: ConversionRecord, source: str | Path | None, report: VerificationReport
) -> None:
    recorded = record.source
    if source is None:
        if recorded is not None and recorded.startswith("hf://"):
            report.skipped.append(f"the source on the Hub (--source {recorded} fetches it once more and compares)")
            return
        if recorded is None or not Path(recorded).is_dir():
            report.skipped.append(
                f"the source, which is no longer at {shortened(recorded)} (--source names another place)"
            )
            return
        source = recorded
    checkpoint = open_checkpoint(source)
    expected = record.sources
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ConversionError(f"{source} lacks {quoted(missing, list(checkpoint.tensors))}; it is another checkpoint")
    wrong = [
        name for name, entry in expected.items() if tensor_digest([checkpoint.tensors[name].read()]) != entry.sha256
    ]
    expected_config = config_from_args(checkpoint.args)
    config = read_config(output)
    kinds = quantization_of(config)
    plan = match({name: entry.shape for name, entry in expected.items()}, config)
    stale = [] if wrong else _wrongly_quantized(checkpoint, plan, record, kinds)
    checkpoint.check_unchanged()
    if wrong:
        raise ConversionError(
            f"{source}: {len(wrong)} tensors differ from those that were converted: {quoted(wrong)}; it is another "
            "checkpoint, or was changed since"
        )
    _refuse_another_model(output, expected_config, f"the arguments of {source}")
    report.checks.append(f"{len(expected)} tensors of {source} have the recorded hashes, its arguments this model")
    if stale:
        raise ConversionError(
            f"{output}: {len(stale)} tensors are not what quantising the source gives: {quoted(stale)}; convert again"
        )
    if any(kinds):
        report.checks.append(f"quantising it again ({kinds.in_words()}) gives the tensors on disk")


def _wrongly_quantized(
    checkpoint: MegatronCheckpoint, plan: WeightPlan, record: ConversionRecord, kinds: Kinds
) -> list[str]:
    """Tensors that are not what quantising the source gives."""
    wrong = []
    for output in plan.outputs:
        kind = kinds.of(output.name)
        if kind is None:
            continue
        names = (output.name, scale_name(output.name))
        recorded = [record.weights[name] for name in names]
        digests = [WeightHash(entry.shape, entry.dtype) for entry in recorded]
        for move, which in output.parts:
            weight = move.entry.layout.to_hf(checkpoint.tensors[move.source].read())[which]
            for part, digest in zip(quantized(output.name, weight, kind, recorded[1].dtype), digests, strict=True):
                digest.update(tensor_bytes(part))
        wrong += [
            name for name, d, entry in zip(names, digests, recorded, strict=True) if d.hexdigest() != entry.sha256
        ]
    return wrong


def _check_loading(output: Path, record: ConversionRecord) -> None:
    first = _loaded_digests(output, record, run=True)
    second = _loaded_digests(output, record, run=False)
    differing = [name for name in first if first[name] != second[name]]
    if differing:
        raise ConversionError(f"{output}: two loads differ in {quoted(differing)}; please report it")
    wrong = [name for name, entry in record.weights.items() if first.get(name) != entry.sha256]
    if wrong:
        raise ConversionError(f"{output}: loaded weights differ from the files in {quoted(wrong)}; please report it")


def _loaded_digests(output: Path, record: ConversionRecord, run: bool) -> dict[str, str]:
    """Hashes of the weights of one load, in the dtypes of the files."""
    # Grouped matrix products ask for widths that not every small model has; the loop over experts takes all.
    try:
        loaded: Any = GengramForCausalLM.from_pretrained(
            output, dtype="auto", experts_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # of any kind: what config.json asks for beside the model is up to Transformers
        words = printable(" ".join(str(error).split()) or type(error).__name__, most=600)
        raise ConversionError(f"{output}: the model cannot be loaded: {words}") from None
    model, notes = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes.get(kind):
            raise ConversionError(f"{output}: loading reports {kind}: {quoted(sorted(map(str, notes[kind])))}")
    weights = record.weights
    loaded_weights = {name.replace(".qweight", ".weight"): tensor for name, tensor in model.state_dict().items()}
    digests = {
        name: weight_digest(tuple(tensor.shape), weights[name].dtype, [tensor])
        for name, tensor in loaded_weights.items()
        if name in weights
    }
    if run:
        _check_forward(output, model.eval())
    del model
    gc.collect()
    return digests


def _check_forward(output: Path, model: GengramForCausalLM) -> None:
    letters = model.config.memory_token_ids
    length = min(model.config.max_position_embeddings, 2 * model.config.memory_window, 128)
    ids = torch.tensor([[letters[(i * i + i // 3) % 4] for i in range(length)]])  # (1, length)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ConversionError(f"{output}: the model's logits are not finite; the weights are damaged")
