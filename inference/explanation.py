"""Which k-mers made this: shares of every k-mer that a memory read in a gate, a residual, a prediction or a class.

`kmer_shares` says what is exact, and which rule keeps the sum where it is not.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..motif_memory import MotifMemory
from ..motif_memory.grafts.attach import attached_memories, base_model_of
from ..motif_memory.grafts.layer import GRAFT
from ..motif_memory.kmer_rows import LETTERS
from ..motif_memory.ways.kept_fold import memories_of
from ..sequences.alphabet import BASES
from ..support.errors import InputError, quoted
from .kmer_shares import LN_RULE, KmerGrid, WorkedOut, shares_of_gate_logit, shares_of_output, work_out
from .logit_lens import base_contrasts, last_norm, through_norm
from .offloaded import input_device

TARGETS = ("gate_logit", "residual_norm", "base:A", "base:C", "base:G", "base:T", "base:actual", "class:NAME")
PATH_RULE = "integrated gradients from a silent memory (Sundararajan et al. 2017)"

Layer = int | str


@dataclass(frozen=True)
class Explanation:
    """Shares of every k-mer in a target.

    Args:
        target: what is explained.
        layer: of the memory.
        rules: what is held where the target is not linear in the k-mers.
        sizes: of the k-mers.
        digits: (batch, letters), the letters: 0 to 4 for A, C, G, T and N.
        last: (batch, length), the last letter of each position.
        grid: the shares.
        total: (batch, length) float64, what the shares of each position sum to, computed without them.
        effect: (batch,), of a class through all layers: by how much the memory moves its logit, which the sum of
            `total` approaches; else None.
    """

    target: str
    layer: Layer
    rules: tuple[str, ...]
    sizes: tuple[int, ...]
    digits: np.ndarray
    last: np.ndarray
    grid: KmerGrid
    total: torch.Tensor
    effect: torch.Tensor | None = None

    @property
    def table(self) -> pa.Table:
        """A row for each k-mer of each position: `sequence, position, start, kmer, contribution`.

        `position` is of the token, `start` of the k-mer's first letter, both from 0; `sequence` is the row of the
        batch. Where a token is a base, both count the same.
        """
        sequence, position, size, end = self.places()
        starts = end - np.array(self.sizes)[size] + 1
        return pa.table(
            {
                "sequence": pa.array(sequence, pa.int32()),
                "position": pa.array(position, pa.int32()),
                "start": pa.array(starts, pa.int32()),
                "kmer": self._spelled(sequence, size, end),
                "contribution": self.grid.shares[self.grid.is_there].cpu().numpy(),
            }
        )

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each share in the order of `table`: sequence, position, number of the size, and where the k-mer ends."""
        sequence, position, size, column = np.nonzero(self.grid.is_there.cpu().numpy())
        return sequence, position, size, self.last[sequence, position] + column - self.grid.back

    def by_base(self, positions: Any = None) -> np.ndarray:
        """Shares of letters, each k-mer's in equal parts to its letters: (batch, letters).

        Args:
            positions: bool (batch, length): which positions count; all by default.
        """
        found = np.zeros((self.digits.shape[0], self.digits.shape[1] + 1))
        sequence, position, size, end = self.places()
        lengths = np.array(self.sizes)[size]
        parts = self.grid.shares[self.grid.is_there].cpu().numpy() / lengths
        if positions is not None:
            parts = parts * np.asarray(positions)[sequence, position]
        np.add.at(found, (sequence, end - lengths + 1), parts)
        np.add.at(found, (sequence, end + 1), -parts)
        return found.cumsum(1)[:, :-1]

    def _spelled(self, sequence: np.ndarray, size: np.ndarray, end: np.ndarray) -> pa.Array:
        letters = np.frombuffer(LETTERS.encode(), dtype=np.uint8)[self.digits]
        found = np.empty(len(end), dtype=f"S{max(self.sizes)}")
        for index, length in enumerate(self.sizes):
            chosen = size == index
            if chosen.any():
                words = np.lib.stride_tricks.sliding_window_view(letters, length, axis=1)
                picked = words[sequence[chosen], end[chosen] - length + 1]
                found[chosen] = np.ascontiguousarray(picked).view(f"S{length}")[:, 0]
        return pa.array(found.astype(f"U{max(self.sizes)}"), pa.string())


def explain_memory(
    model: Any,
    input_ids: Any,
    *,
    layer: Layer | None = None,
    target: str | torch.Tensor = "gate_logit",
    through_layers: bool = False,
    steps: int = 8,
    **inputs: Any,
) -> Explanation:
    """The share of every k-mer of the memory's windows in a target; shares sum to `total` at every position.

    | target | what it is at a position |
    |---|---|
    | `"gate_logit"` | g, from which the gate opens |
    | `"residual_norm"` | Euclidean norm of what the memory added, as its projection on its own direction |
    | `"base:A"`, C, G or T | what the memory added to the base's log-odds, mean against the other three, by the lens |
    | `"base:actual"` | the same of the base that follows (causal models) or that is there (masked ones) |
    | `"class:NAME"` | what the memory added to the logit of a class, by the lens, or `through_layers` |
    | a tensor | product of what the memory added with a direction (hidden,) or (batch, length, hidden) |

    Args:
        model: with memories, Gengram's own or attached, in `eval()` mode.
        input_ids: (batch, length), or (length,).
        layer: number of the layer whose memory it is, from 0, or the name of a host's layer; not needed if there is
            one memory only.
        target: see above; classes by name or number.
        through_layers: of a class: not by the lens, but along all layers behind the memory, by integrated gradients
            from a silent memory to that which is there.
        steps: nodes of this integral.
        inputs: further arguments of the model, such as `attention_mask`.

    Raises:
        ValueError: if there is no such layer or target, the model is in training mode, or adapters hide its weights.

    Example:

    >>> import gengram
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL).eval()
    >>> tokenizer = AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL)
    >>> found = gengram.explain_memory(model, tokenizer("GGCTATAAAAGG")["input_ids"], target="base:actual")
    >>> found.table.column_names
    ['sequence', 'position', 'start', 'kmer', 'contribution']
    """
    return explain_targets(model, input_ids, [target], layer, through_layers, steps, **inputs)[0]


def explain_targets(
    model: Any,
    input_ids: Any,
    targets: Sequence[str | torch.Tensor],
    layer: Layer | None = None,
    through_layers: bool = False,
    steps: int = 8,
    **inputs: Any,
) -> list[Explanation]:
    """`explain_memory` of several targets, for which the layers in front of the memory are computed once.

    Raises:
        ValueError: as `explain_memory` does.
    """
    layer, call = _call(model, input_ids, layer, inputs)
    for target in targets:
        if through_layers and not (isinstance(target, str) and target.startswith("class:")):
            raise ValueError(f'through_layers: expected a target "class:NAME", got {target!r}.')
    found = call.work_out()
    return [_explained(call, found, layer, target, through_layers, steps) for target in targets]


def residual_norms(
    model: Any, input_ids: Any, *, layer: Layer | None = None, has_window: bool = True, **inputs: Any
) -> torch.Tensor:
    """Euclidean norm of what a memory adds at each position, (batch, length) float64.

    Args:
        model: as for `explain_memory`, as are `input_ids`, `layer` and `inputs`.
        input_ids: the sequences.
        layer: of the memory.
        has_window: if not, the memory reads the k-mers that end at the position alone, one of each size, in place of
            the means over its window. It was not trained for that, so compare places, and not sizes.
        inputs: further arguments of the model.

    Raises:
        ValueError: as `explain_memory` does.
    """
    return _call(model, input_ids, layer, inputs)[1].work_out(has_window).residual.norm(dim=-1)


def _call(model: Any, input_ids: Any, layer: Layer | None, inputs: dict[str, Any]) -> tuple[Layer, "_Call"]:
    if model.training:
        raise ValueError("expected a model in eval() mode: dropout and jitter would be explained, too.")
    layer, memory = memory_at(model, layer)
    input_ids = torch.as_tensor(input_ids, device=input_device(model))
    input_ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    return layer, _Call(model, memory, {"input_ids": input_ids, **inputs})


def _explained(
    call: "_Call", found: WorkedOut, layer: Layer, target: str | torch.Tensor, through_layers: bool, steps: int
) -> Explanation:
    model, effect, rules = call.model, None, found.rules
    if isinstance(target, torch.Tensor):
        direction = target.to(found.residual)
    elif target == "gate_logit":
        return _explanation(target, layer, (LN_RULE,), found, shares_of_gate_logit(found), found.logit)
    elif target == "residual_norm":
        direction = torch.nn.functional.normalize(found.residual, dim=-1)
    elif target.startswith("base:"):
        direction, rules = _direction_of_base(model, found, target), (*rules, LN_RULE)
    elif target.startswith("class:") and through_layers:
        direction, effect = call.mean_gradient(found.residual, _class_number(model, target), steps)
        rules = (*rules, PATH_RULE)
    elif target.startswith("class:"):
        behind = call.gradient_behind(last_norm(model), _class_number(model, target))
        seen = found.hidden_states + found.residual
        direction, rules = through_norm(last_norm(model), seen, behind), (*rules, LN_RULE)
    else:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, or a direction, got {target!r}.")
    name = target if isinstance(target, str) else "direction"
    total = (direction * found.residual).sum(-1)
    return _explanation(name, layer, rules, found, shares_of_output(found, direction), total, effect)


def memories_by_layer(model: Any) -> dict[Layer, MotifMemory]:
    """The memories of a model by their layers, in order: numbers in Gengram models, names in others."""
    if getattr(_base(model), GRAFT, None) is not None:
        return {name: memory for name, memory in attached_memories(model).items()}
    return {memory.layer_idx: memory for memory in memories_of(model)}


def memory_at(model: Any, layer: Layer | None) -> tuple[Layer, MotifMemory]:
    """A memory and its layer: a number in Gengram models, a name in others.

    Raises:
        ValueError: if the model has no memory there.
    """
    named = memories_by_layer(model)
    if isinstance(layer, int) and layer not in named:
        layer = next((name for name in named if str(name).split(".")[-1] == str(layer)), layer)
    if not named:
        raise InputError(f"{type(model).__name__} has no motif memory.")
    if layer is None and len(named) == 1:
        layer = next(iter(named))
    if layer not in named:
        raise InputError(f"layer: expected one with a memory ({quoted(map(str, named))}), got {layer!r}.")
    return layer, named[layer]


def _base(model: Any) -> Any:
    try:
        return base_model_of(model)
    except ValueError:  # a bare module
        return model


def _explanation(
    target: str,
    layer: Layer,
    rules: tuple[str, ...],
    found: WorkedOut,
    grid: KmerGrid,
    total: torch.Tensor,
    effect: torch.Tensor | None = None,
) -> Explanation:
    digits = (found.letters.grams % 5).cpu().numpy()
    sizes, last = tuple(found.letters.ngram_sizes), found.last.cpu().numpy()
    return Explanation(target, layer, rules, sizes, digits, last, grid, total, effect)


def _direction_of_base(model: Any, found: WorkedOut, target: str) -> torch.Tensor:
    contrasts = base_contrasts(model, _base_ids(model)).to(found.residual.device)
    name = target.removeprefix("base:")
    seen = found.hidden_states + found.residual
    if name in BASES and len(name) == 1:
        return through_norm(last_norm(model), seen, contrasts[BASES.index(name)])
    if name != "actual":
        raise ValueError(f"target: expected base:A, base:C, base:G, base:T or base:actual, got {target!r}.")
    digits = (found.letters.grams % 5).masked_fill(found.letters.runs == 0, len(BASES))
    if digits.shape != found.last.shape:
        raise InputError("base:actual needs a tokenizer of single bases; ask for base:A, base:C, base:G or base:T.")
    if found.tokens.is_causal:  # each position predicts the next, if that is not the first of another sequence
        behind = found.tokens.behind_current()
        if behind is not None:
            digits = digits.masked_fill(behind == 0, len(BASES))
        digits = torch.nn.functional.pad(digits[:, 1:], (0, 1), value=len(BASES))
    by_digit = torch.cat([contrasts, torch.zeros_like(contrasts[:1])])  # nothing of what is no base
    return through_norm(last_norm(model), seen, by_digit[digits.long().clamp_max(len(BASES))])


def _base_ids(model: Any) -> list[int]:
    """Token ids of A, C, G and T."""
    graft = getattr(_base(model), GRAFT, None)
    if graft is None:
        return list(model.config.memory_token_ids[: len(BASES)])
    missing = set(BASES) - set(graft.token_letters)
    if missing:
        raise InputError(f"the tokens of this model spell no single {', '.join(sorted(missing))}.")
    return [graft.token_letters.index(base) for base in BASES]


def _class_number(model: Any, target: str) -> int:
    """The number of a class by its name or number.

    Raises:
        InputError: if the model has no such class.
    """
    name = target.removeprefix("class:")
    labels = {str(label): int(number) for number, label in (model.config.id2label or {}).items()}
    if not any(part in type(model).__name__ for part in ("Classification", "PeftModel")):
        raise InputError(f"target {target!r}: {type(model).__name__} is no classifier.")
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < model.config.num_labels:
        return int(name)
    raise InputError(f"target: expected class: and one of {quoted(labels)}, or its number from 0, got {target!r}.")


class _MemoryReachedError(Exception):
    """Ends a pass once the memory has been given what it reads."""


@dataclass(frozen=True)
class _Call:
    """A model, one of its memories, and what the model is called with."""

    model: Any
    memory: MotifMemory
    inputs: dict[str, Any]

    @torch.no_grad()
    def work_out(self, has_window: bool = True) -> WorkedOut:
        """The memory's pass; layers behind it are not computed."""
        seen: list[Any] = []

        def stop(_memory: Any, arguments: tuple[Any, ...]) -> None:
            seen.extend(arguments[:2])
            raise _MemoryReachedError

        with _hooked(self.memory.register_forward_pre_hook(stop)), contextlib.suppress(_MemoryReachedError):
            self._run()
        hidden_states, plan = seen
        return work_out(self.memory, hidden_states, plan, has_window)

    def gradient_behind(self, norm: torch.nn.Module, label: int) -> torch.Tensor:
        """Gradient of a class's logit by the last norm's output, (batch, length, hidden): the head's direction."""
        outputs: list[torch.Tensor] = []

        def cut(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            outputs.append(output.detach().requires_grad_())
            return outputs[0]

        with _hooked(norm.register_forward_hook(cut)), _without_gradients(self.model):
            logits = self._run().logits[..., label]
            (gradient,) = torch.autograd.grad(logits.sum(), outputs)
        return gradient

    def mean_gradient(self, residual: torch.Tensor, label: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean gradient of a class's logit by the memory's output, on the way from 0 to it; and what it does in all.

        The mean is by Gauss and Legendre's quadrature. Returns (batch, length, hidden) and (batch,).
        """
        if steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {steps}.")
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(residual)
        with _without_gradients(self.model):
            for node, weight in zip(nodes, weights, strict=True):
                part, logits = self._with_residual(residual * float(node + 1) / 2, label)
                (gradient,) = torch.autograd.grad(logits.sum(), part)
                total += gradient.double() * float(weight) / 2
            with torch.no_grad():
                effect = self._with_residual(residual, label)[1] - self._with_residual(residual * 0, label)[1]
        return total, effect.double()

    def _with_residual(self, residual: torch.Tensor, label: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A class's logits (batch,) where the memory adds this, and this."""
        parts: list[torch.Tensor] = []

        def replace(_memory: Any, _inputs: Any, output: Any) -> Any:
            part = residual.to(output.residual.dtype).detach()
            parts.append(part.requires_grad_(torch.is_grad_enabled()))
            return output._replace(residual=part)

        with _hooked(self.memory.register_forward_hook(replace)):
            logits = self._run().logits[..., label]
        return parts[0], logits

    def _run(self) -> Any:
        """The model's outputs, without a cache."""
        config = self.model.config.get_text_config()
        before = config.use_cache if hasattr(config, "use_cache") else None
        try:
            if before is not None:
                config.use_cache = False
            return self.model(**self.inputs)
        finally:
            if before is not None:
                config.use_cache = before


@contextlib.contextmanager
def _hooked(hook: Any) -> Iterator[None]:
    """A block at whose end a hook is removed."""
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    """A block in which a model's weights get no gradients, so that only what is asked for is kept."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)
