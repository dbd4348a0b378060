"""A model as an ONNX file, made of ONNX's own operations and compared with the model in ONNX Runtime."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ..motif_memory import memory_path
from ..motif_memory.definition import grams_of
from ..support.errors import InputError, MissingExtraError
from ..support.whole_output import check_output_is_free
from ..support.work_folder import work_folder
from .loaded_model import LoadedModel

ALLOWED = 1e-4  # by which a number of the file may differ from the model's
_MOST_BYTES = 2**31 - 2**20  # of a file; weights of a larger model lie beside it
_EXAMPLE, _OTHERS = (2, 40), ((3, 57), (1, 7))  # batch and length


def export_onnx(loaded: LoadedModel, output: str | Path, with_state: bool = False) -> float:
    """Write a model as ONNX: `input_ids` and `attention_mask` (batch, length) in, the `logits` of its head out.

    The `output` of a model without a head are its last hidden states.

    With state, to generate: `input_ids` and a state in, `logits` and the state after these tokens out, one output
    (`new.NAME`) for each input of the state in the same order. Zeros, with no positions of keys and values, are the
    state before the first token. There is no mask: rows of a batch have the same length.

    Batch and length are free, from 2 bases to what the model reads. Experts are all computed for every token, and
    those not chosen weigh nothing, since ONNX knows no products of groups; that takes experts / chosen times as long.

    Args:
        loaded: the model, in float32 on the CPU.
        output: ends in `.onnx`; weights of more than 2 GB lie in `OUTPUT.data` beside it.
        with_state: whether tokens can be given in parts.

    Returns:
        By how much numbers of the file differ at most from the model's, of random sequences, some padded in front.

    Raises:
        InputError: if the model is quantised or not in float32, has no state that can be written, the name does not
            end in `.onnx`, or the file's numbers differ by more than 1e-4.
        MissingExtraError: if a library of the extra `onnx` is not installed.
        FileExistsError: if the output exists.
        OSError: if it cannot be written.
    """
    output = Path(output)
    check_output(output)
    model = loaded.model
    if getattr(model, "hf_quantizer", None) is not None or model.dtype != torch.float32:
        raise InputError(f"ONNX is written of models in float32, got one in {model.dtype} or quantised.")
    if with_state:
        _check_state(model)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (PyTorch's exporter needs it)
    except ImportError as error:
        raise MissingExtraError(f"gengram export needs {error.name}: pip install 'gengram[onnx]'") from error
    longest = min(loaded.context, 1 << 17)
    program = _program_with_state(model, longest) if with_state else _program(model, longest)
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > _MOST_BYTES
    with work_folder(output, restart=True) as folder:
        program.save(str(folder / output.name), external_data=is_large)
        session = onnxruntime.InferenceSession(str(folder / output.name), providers=["CPUExecutionProvider"])
        apart = (_difference_with_state if with_state else _difference)(session, model, longest)
        if not apart <= ALLOWED:
            raise InputError(f"{output} was not written: its numbers differ from the model's by {apart:.1e}.")
        for file in sorted(folder.iterdir(), reverse=True):  # the weights beside it first
            os.replace(file, output.with_name(file.name))
    return apart


def check_output(output: Path) -> None:
    """Refuse a name that no ONNX file can be written to; asked before a large model is loaded.

    Raises:
        InputError: if the name does not end in `.onnx`.
        FileExistsError: if there is such a file, or one that weights beside it would have the name of.
    """
    if output.suffix != ".onnx":
        raise InputError(f"expected a name of the file that ends in .onnx, got {output.name!r}.")
    check_output_is_free(output)
    check_output_is_free(output.with_name(f"{output.name}.data"))


class _Outputs(nn.Module):
    """A model as a function of ids and mask alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


def _program(model: Any, longest: int) -> Any:
    """What PyTorch's exporter makes of the model."""
    batch, length = _dimensions(longest)
    example = (torch.full(_EXAMPLE, _base(model)), torch.ones(_EXAMPLE, dtype=torch.int64))
    name = "output" if model.base_model is model else "logits"
    sizes = {0: batch, 1: length}
    return _exported(model, _Outputs(model), example, (sizes, sizes), longest, {"output_names": [name]})


def _dimensions(longest: int) -> tuple[Any, Any]:
    return torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=longest)


def _exported(
    model: Any, function: nn.Module, example: tuple[Any, ...], shapes: Any, longest: int, names: dict[str, Any]
) -> Any:
    with _attention(model, "eager"), dense_experts(model), memory_path("token_major", "torch"), _silent():
        exported = torch.export.export(function, example, dynamic_shapes=shapes, strict=False)
        if any("gengram" in str(node.target) for node in exported.graph.nodes):
            table = torch.export.default_decompositions()
            table[torch.ops.gengram.ngram_rows_and_runs.default] = _RowsAndRuns(longest)
            exported = exported.run_decompositions(table)
        return torch.onnx.export(exported, (), dynamo=True, verbose=False, **names)


# ---- with the state of generation: keys and values of each layer, past letters, past inputs of each convolution

_STATES = {
    "conv_inputs": "conv_inputs.{}",
    "letter_codes": "letters",
}  # of a memory, by their names in its configuration


def _check_state(model: Any) -> None:
    config = model.config
    if config.model_type != "gengram" or not hasattr(model, "lm_head") or not config.is_causal:
        raise InputError("a state is written of Gengram models that predict the next base; export this one without.")
    if not set(config.memory.states) <= set(_STATES):
        raise InputError('memory_pooling="as_trained" has a state that is not written; export the model without.')


def _first_state(model: Any, batch: int, past: int = 0) -> dict[str, Tensor]:
    """Zeros by name: the state before the first token, for `past` of 0."""
    config, memory = model.config, model.config.memory
    state = {}
    for layer in range(config.num_hidden_layers):
        for name in ("keys", "values"):
            state[f"{name}.{layer}"] = torch.zeros(batch, config.num_key_value_heads, past, config.head_dim)
    for layer in config.memory_layers:
        if "letter_codes" in memory.states:  # the same in all layers
            state["letters"] = torch.zeros(batch, memory.context, dtype=torch.int64)
        if "conv_inputs" in memory.states:
            state[f"conv_inputs.{layer}"] = torch.zeros(batch, config.hidden_size, memory.conv_context)
    return state


class _Step(nn.Module):
    """A model as a function of ids and a state by name; gives logits and the state after."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.model.config
        cache: Any = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(state[f"keys.{layer}"], state[f"values.{layer}"], layer)
        places = [
            (layer, index, _STATES[name].format(layer))
            for layer in config.memory_layers
            for index, name in enumerate(config.memory.states)
        ]
        for layer, index, name in places:
            kept = state[name].unsqueeze(1) if name == "letters" else state[name]
            cache.update_conv_state(kept, layer, state_idx=index, conv_kernel_size=kept.shape[-1])
        logits = self.model(input_ids=input_ids, cache=cache, use_cache=True).logits
        after = {}
        for layer in range(config.num_hidden_layers):
            after[f"keys.{layer}"], after[f"values.{layer}"] = cache.layers[layer].keys, cache.layers[layer].values
        for layer, index, name in places:
            kept = cache.layers[layer].conv_states[index]
            after[name] = kept.squeeze(1) if name == "letters" else kept
        return logits, {name: after[name] for name in state}


def _program_with_state(model: Any, longest: int) -> Any:
    batch, length = _dimensions(longest)
    past = torch.export.Dim("past", min=2, max=longest)
    rows, positions = 2, 7
    state = _first_state(model, rows, positions)
    shapes = {name: {0: batch, 2: past} if name.startswith(("keys", "values")) else {0: batch} for name in state}
    example = (torch.full((rows, 5), _base(model)), state)
    names = {"input_names": ["input_ids", *state], "output_names": ["logits", *(f"new.{name}" for name in state)]}
    return _exported(model, _Step(model), example, ({0: batch, 1: length}, shapes), longest, names)


def _difference_with_state(session: Any, model: Any, longest: int) -> float:
    """By how much the file's numbers differ at most from those of the model with its own cache."""
    generator = torch.Generator().manual_seed(0)
    apart = 0.0
    for batch, lengths in ((2, (30, 1, 1, 1)), (1, (1, 1, 9, 1))):
        state = {name: value.numpy() for name, value in _first_state(model, batch).items()}
        cache = DynamicCache(config=model.config)
        for length in lengths:
            ids = _random_ids(model, batch, length, generator)
            with torch.no_grad():
                expected = model(input_ids=ids, cache=cache, use_cache=True).logits.numpy()
            found, *after = session.run(None, {"input_ids": ids.numpy(), **state})
            state = dict(zip(state, after, strict=True))
            apart = max(apart, float(np.abs(found - expected).max()))
    return apart


def _base(model: Any) -> int:
    """An id that any model has."""
    return min(5, int(model.config.get_text_config().vocab_size) - 1)


def _random_ids(model: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(min(5, vocabulary - 1), min(10, vocabulary), (batch, length), generator=generator)


@contextlib.contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of operations that are not in the model."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


@contextlib.contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """A block in which stacked experts (Mixtral's layout) compute by products over all experts."""
    stacks = [module for module in model.modules() if _is_stack(module)]
    for module in stacks:
        module.forward = _dense.__get__(module)
    try:
        yield
    finally:
        for module in stacks:
            del module.forward


def _is_stack(module: nn.Module) -> bool:
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights) and hasattr(module, "act_fn")


def _dense(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(tokens, hidden): all experts of every token, those that were not chosen with the weight 0."""
    experts = self.gate_up_proj.shape[0]
    none = hidden_states.new_zeros(hidden_states.shape[0], experts)
    weights = none.scatter(1, top_k_index, top_k_weights.to(hidden_states.dtype))
    gate, up = torch.einsum("th,eoh->eto", hidden_states, self.gate_up_proj).chunk(2, -1)
    out = torch.einsum("eti,ehi->eth", self.act_fn(gate) * up, self.down_proj)
    return torch.einsum("eth,te->th", out, weights)


class _RowsAndRuns:
    """`definition.ngram_rows_and_runs` without `cummax`, which ONNX lacks, for texts of at most `longest` letters."""

    def __init__(self, longest: int):
        self.longest = longest

    def __call__(
        self, codes: Tensor, largest: int, behind: Tensor | None = None, native: bool = False
    ) -> tuple[Tensor, Tensor]:
        places = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device).expand_as(codes)
        last_break = torch.where(codes > 0, -1, places)
        step = 1
        while step < self.longest:  # the largest of 1, 2, 4, ... places up to here
            earlier = F.pad(last_break, (step, 0), value=-1)[:, : codes.shape[1]]
            last_break, step = torch.maximum(last_break, earlier), 2 * step
        runs = places - last_break
        if behind is not None:
            runs = torch.minimum(runs, (behind + 1).clamp_min(0))
        return grams_of(codes, largest, behind), runs


def _difference(session: Any, model: Any, longest: int) -> float:
    """By how much the file's numbers differ from the model's at most."""
    generator = torch.Generator().manual_seed(0)
    apart = 0.0
    for batch, length in (_EXAMPLE, *_OTHERS):
        ids = _random_ids(model, batch, min(length, longest), generator)
        mask = torch.ones_like(ids)
        mask[0, : ids.shape[1] // 4] = 0
        with torch.no_grad():
            expected = _Outputs(model)(ids, mask).numpy()
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        differences = np.abs(found - expected)
        of_each_token = differences.ndim == 3  # logits of classes are (batch, classes)
        apart = max(apart, float((differences[mask.numpy() == 1] if of_each_token else differences).max()))
    return apart
