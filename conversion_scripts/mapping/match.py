"""Which tensors of one checkpoint make which tensors of the model, by the table of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from ...configuration.configuration_gengram import GengramConfig
from ...support.errors import ConversionError, quoted
from .weight_table import Entry, expand


@dataclass(frozen=True)
class Move:
    """One Megatron tensor of a checkpoint and where its values go."""

    source: str
    entry: Entry


@dataclass
class Output:
    """A Hugging Face tensor and the parts that make it, in order along its first axis."""

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[Move, int]] = field(default_factory=list)  # the move, which of its targets


@dataclass
class WeightPlan:
    """What a conversion does: outputs in the order of writing, and what is left out."""

    outputs: list[Output]
    dropped: list[Move]

    @property
    def moves(self) -> list[Move]:
        """Each tensor that is read, once."""
        seen: dict[str, Move] = {}
        for output in self.outputs:
            for move, _ in output.parts:
                seen.setdefault(move.source, move)
        return list(seen.values())


def match(shapes: Mapping[str, tuple[int, ...]], config: GengramConfig) -> WeightPlan:
    """Compares a checkpoint's names and shapes with the table, as sets in both directions.

    Args:
        shapes: Shape of each tensor by its Megatron name, with global layer numbers.
        config: The model that the checkpoint's arguments describe.

    Raises:
        ConversionError: if a tensor is missing, unknown, there under two names, or of the wrong shape; the message has
            up to ten names with the nearest match.
    """
    # Before the table is expanded: a hostile configuration must not decide how large it gets.
    repeated = max(config.num_local_experts, 1) + len(config.memory_ngram_sizes)
    if config.num_hidden_layers * repeated > 100 * len(shapes):
        raise ConversionError(
            f"the checkpoint has {len(shapes)} tensors, too few for {config.num_hidden_layers} layers with "
            f"{config.num_local_experts} experts (args.num_layers, args.num_experts); tensors are missing"
        )
    entries = expand(config)
    known = {name for entry in entries for name in entry.megatron}
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise ConversionError(
            f"the checkpoint has {len(unknown)} tensors that the model does not: {quoted(unknown, sorted(known))}; "
            "its arguments do not describe them, or the model is of another kind"
        )
    moves, missing = [], []
    for entry in entries:
        found = [name for name in entry.megatron if name in shapes]
        if len(found) > 1:
            raise ConversionError(f"the checkpoint has the same tensor under two names: {quoted(found)}")
        if found:
            moves.append(Move(found[0], entry))
        else:
            missing.append(entry)
    wrong = [move for move in moves if tuple(shapes[move.source]) != move.entry.shape]
    if wrong:
        details = "; ".join(
            f"{move.source}: expected {move.entry.shape}, got {tuple(shapes[move.source])}" for move in wrong[:10]
        )
        more = f" (and {len(wrong) - 10} more)" if len(wrong) > 10 else ""
        raise ConversionError(
            f"tensors do not have the shapes that the checkpoint's arguments describe: {details}{more}"
        )
    outputs = _outputs(moves)
    absent = [entry for entry in missing if not entry.optional and not _is_made(entry, outputs)]
    if absent:
        names = [entry.megatron[0] for entry in absent]
        raise ConversionError(
            f"the checkpoint lacks {len(names)} tensors that the model needs: {quoted(names, sorted(shapes))}"
        )
    return WeightPlan(list(outputs.values()), [move for move in moves if not move.entry.targets])


def _outputs(moves: Sequence[Move]) -> dict[str, Output]:
    outputs: dict[str, Output] = {}
    for move in moves:
        for which, target in enumerate(move.entry.targets):
            output = outputs.setdefault(target.name, Output(target.name, target.shape))
            taken = [part.entry.targets[i].index for part, i in output.parts]
            if target.index in taken or (taken and None in (*taken, target.index)):
                raise ConversionError(
                    f"two tensors of the checkpoint make {target.name}: "
                    f"{quoted([part.source for part, _ in output.parts[:1]] + [move.source])}"
                )
            output.parts.append((move, which))
    for output in outputs.values():
        first, which = output.parts[0]
        if first.entry.targets[which].index is not None:
            output.shape = (len(output.parts), *first.entry.targets[which].shape)
    return outputs


def _is_made(entry: Entry, outputs: Mapping[str, Output]) -> bool:
    """Whether other tensors make what an absent one would: whole stacked tensors instead of their slices."""
    for target in entry.targets:
        output = outputs.get(target.name)
        if output is None:
            return False
        first, which = output.parts[0]
        if first.entry.targets[which].index is not None:
            return False
    return bool(entry.targets)


def parameters(plan: WeightPlan) -> int:
    """Numbers in the converted model."""
    return sum(prod(output.shape) for output in plan.outputs)
