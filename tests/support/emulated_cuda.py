"""The CUDA kernels' thread bodies on the host: `csrc/cuda/kernels.cu` compiled by a C++ compiler, grid and all.

`EmulatedKernels` has the operators of `torch.ops.gengram_native` with the same arguments, for tensors on the CPU.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _structure(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_Tokens = _structure("Tokens", *_fields(_P, "grams runs top behind ahead exists"), *_fields(_L, "batch tokens length"))
_Windows = _structure("Windows", *_fields(_I, "window largest last"), ("sizes", ctypes.c_uint32))
_Tables = _structure(
    "Tables",
    ("rows", _P),
    ("type", _I),
    *_fields(_L, "top_rows row_stride slab_stride slab_width"),
    ("scale", _F),
)
_Source = _structure("Source", *_fields(_P, "tables key value"), ("type", _I))
_Layer = _structure(
    "Layer",
    ("hidden", _L),
    *_fields(_P, "norm_weight conv_weight"),
    *_fields(_L, "taps dilation reach_back"),
    ("eps", _F),
)
_COMMON = [("tokens", _Tokens), ("windows", _Windows)]
_Forward = _structure(
    "ForwardArguments",
    *_COMMON,
    ("source", _Source),
    ("layer", _Layer),
    ("hidden_states", _P),
    ("type", _I),
    *_fields(_P, "history residual gate gated"),
    ("kept", _L),
)
_Backward = _structure(
    "BackwardArguments",
    *_COMMON,
    ("source", _Source),
    ("layer", _Layer),
    *_fields(_P, "grad_residual hidden_states grad_gate"),
    ("type", _I),
    *_fields(_P, "grad_hidden grad_rows grad_key grad_value grad_norm grad_conv"),
)
_Features = _structure(
    "FeatureArguments",
    *_COMMON,
    ("sizes", _P),
    *_fields(_L, "tables width"),
    ("rows", _P),
    ("type", _I),
    *_fields(_P, "features grad_features grad_rows"),
)


def compile_emulation() -> ctypes.CDLL:
    """The library, compiled now unless this machine has done so before for the same sources."""
    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cu"))
    content = b"".join(path.read_bytes() for path in files)
    name = f"gengram-emulation-{os.getuid()}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / name
            command = [COMPILER, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC"]
            subprocess.run([*command, str(SOURCES / "cuda" / "kernels.cu"), "-o", str(output)], check=True)
            partial = library.with_suffix(f".{os.getpid()}")
            shutil.copy2(output, partial)
            partial.rename(library)
    loaded = ctypes.CDLL(str(library))
    for function in ("plan_bytes", "forward_bytes", "row_entries", "backward_bytes", "features_backward_bytes"):
        getattr(loaded, f"gengram_cuda_{function}").restype = _L
    return loaded


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _memory(count: int) -> Tensor:
    return torch.full((count,), 0xFF, dtype=torch.uint8)  # as floats: not a number


class EmulatedKernels:
    """The operators of `torch.ops.gengram_native`, by the CUDA kernels, on the CPU."""

    def __init__(self) -> None:
        self.library = compile_emulation()

    def _call(self, name: str, *arguments: object) -> int:
        return getattr(self.library, f"gengram_cuda_{name}")(*arguments)

    def ngram_plan(self, codes: Tensor, behind: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
        batch, tokens = codes.shape
        codes = codes.contiguous()
        behind = None if behind is None else behind.contiguous()
        grams, runs = (torch.empty(codes.shape, dtype=torch.int32) for _ in range(2))
        space = _memory(self._call("plan_bytes", _L(batch), _L(tokens)))
        assert not self._call(
            "plan", *map(_P, (_pointer(codes), _pointer(behind))), _L(batch), _L(tokens), _I(largest),
            *map(_P, (_pointer(grams), _pointer(runs), _pointer(space), None)),
        )  # fmt: skip
        return grams, runs

    def _tokens(self, keep: list, grams, runs, top, behind, ahead, exists, length):
        tensors = [None if x is None else x.contiguous() for x in (grams, runs, top, behind, ahead, exists)]
        keep += tensors
        return _Tokens(*map(_pointer, tensors), grams.shape[0], grams.shape[1], length)

    @staticmethod
    def _windows(sizes, window, last):
        return _Windows(window, max(sizes), last, sum(1 << n for n in set(sizes)))

    @staticmethod
    def _layer(keep: list, norm_weight, conv_weight, eps, dilation, reach_back):
        taps = None if conv_weight is None else conv_weight.t().contiguous()
        keep += [taps, norm_weight]
        count = 0 if taps is None else taps.shape[0]
        return _Layer(
            len(norm_weight), _pointer(norm_weight), _pointer(taps), count, dilation, reach_back, eps
        ), count and (count - 1) * dilation

    @staticmethod
    def _tables(keep: list, rows, sizes, scale):
        largest = max(sizes)
        others = sum(5**n for n in range(1, largest)) + (5 ** (largest - 1) if largest > 1 else 0)
        tables = _Tables(
            _pointer(rows), _TYPES[rows.dtype], rows.shape[1] - others, rows.stride(1), rows.stride(0), rows.shape[2],
            scale,
        )  # fmt: skip
        keep += [rows, tables]
        return _Source(ctypes.addressof(tables), None, None, 0)

    @staticmethod
    def _given(keep: list, key, value, like):
        if key.dtype != like.dtype:
            key, value = key.float(), value.float()
        key, value = key.contiguous(), value.contiguous()
        keep += [key, value]
        return _Source(None, _pointer(key), _pointer(value), _TYPES[key.dtype])

    def _forward(self, keep, tokens, windows, source, layer, reach, hidden_states, history):
        batch, length, hidden = hidden_states.shape
        hidden_states = hidden_states.contiguous()
        history = None if history is None else history.float().contiguous()
        residual = torch.empty_like(hidden_states)
        gate, gated = torch.empty(batch, length), torch.empty(batch, min(length, reach), hidden)
        arguments = _Forward(
            tokens, windows, source, layer, _pointer(hidden_states), _TYPES[hidden_states.dtype], _pointer(history),
            _pointer(residual), _pointer(gate), _pointer(gated), gated.shape[1],
        )  # fmt: skip
        for output in (residual, gate, gated):
            output.fill_(float("nan"))
        if batch and length:
            space = _memory(self._call("forward_bytes", ctypes.byref(arguments)))
            assert not self._call("forward", ctypes.byref(arguments), _P(_pointer(space)), None)
        return residual, gate, gated

    def _backward(self, keep, tokens, windows, source, layer, grad_residual, grad_gate, hidden_states, rows, taps):
        hidden_states = hidden_states.contiguous()
        grad_residual = grad_residual.to(hidden_states.dtype).contiguous()
        grad_gate = None if grad_gate is None else grad_gate.float().contiguous()
        grad_hidden, grad_norm = torch.empty_like(hidden_states), torch.zeros(hidden_states.shape[-1])
        grad_conv = torch.zeros(taps, hidden_states.shape[-1]) if taps else None
        grad_rows = None if rows is None else torch.zeros(rows.shape)
        grad_key, grad_value = (torch.empty(hidden_states.shape) if rows is None else None for _ in range(2))
        arguments = _Backward(
            tokens, windows, source, layer, _pointer(grad_residual), _pointer(hidden_states), _pointer(grad_gate),
            _TYPES[hidden_states.dtype],
            *map(_pointer, (grad_hidden, grad_rows, grad_key, grad_value, grad_norm, grad_conv)),
        )  # fmt: skip
        if hidden_states.numel():
            order = keys = None
            if rows is not None:
                keys = torch.empty(self._call("row_entries", ctypes.byref(arguments)), dtype=torch.int32)
                assert not self._call("row_keys", ctypes.byref(arguments), _P(_pointer(keys)), None)
                keys, order = keys.sort(stable=True)
            space = _memory(self._call("backward_bytes", ctypes.byref(arguments)))
            pointers = map(_P, map(_pointer, (keys, order, space)))
            assert not self._call("backward", ctypes.byref(arguments), *pointers, None)
        conv = torch.zeros(0) if grad_conv is None else grad_conv.t().contiguous()
        return grad_hidden, grad_rows, grad_key, grad_value, grad_norm, conv

    def folded_memory(
        self, hidden_states, rows, grams, runs, top, behind, ahead, exists, norm_weight, conv_weight, history, sizes,
        window, last, scale, eps, dilation, reach_back,
    ):  # fmt: skip
        keep: list = []
        tokens = self._tokens(keep, grams, runs, top, behind, ahead, exists, hidden_states.shape[1])
        layer, reach = self._layer(keep, norm_weight, conv_weight, eps, dilation, reach_back)
        source = self._tables(keep, rows, sizes, scale)
        return self._forward(
            keep, tokens, self._windows(sizes, window, last), source, layer, reach, hidden_states, history
        )

    def folded_memory_backward(
        self, grad_residual, grad_gate, hidden_states, rows, grams, runs, top, behind, ahead, exists, norm_weight,
        conv_weight, history, sizes, window, last, scale, eps, dilation, reach_back,
    ):  # fmt: skip
        keep: list = []
        rows = rows.float()
        tokens = self._tokens(keep, grams, runs, top, behind, ahead, exists, hidden_states.shape[1])
        layer, _ = self._layer(keep, norm_weight, conv_weight, eps, dilation, reach_back)
        grads = self._backward(
            keep, tokens, self._windows(sizes, window, last), self._tables(keep, rows, sizes, scale), layer,
            grad_residual, grad_gate, hidden_states, rows, 0 if conv_weight is None else conv_weight.shape[1],
        )  # fmt: skip
        return grads[0], grads[1], grads[4], grads[5]

    def _no_grams(self, hidden_states):
        return torch.zeros(hidden_states.shape[:2], dtype=torch.int32)

    def gated_memory(
        self, hidden_states, key, value, exists, behind, ahead, norm_weight, conv_weight, history, eps, dilation,
        reach_back,
    ):  # fmt: skip
        keep: list = []
        none = self._no_grams(hidden_states)
        tokens = self._tokens(keep, none, none, None, behind, ahead, exists, hidden_states.shape[1])
        layer, reach = self._layer(keep, norm_weight, conv_weight, eps, dilation, reach_back)
        source = self._given(keep, key, value, hidden_states)
        return self._forward(keep, tokens, _Windows(1, 1, 0, 2), source, layer, reach, hidden_states, history)

    def gated_memory_backward(
        self, grad_residual, grad_gate, hidden_states, key, value, exists, behind, ahead, norm_weight, conv_weight,
        history, eps, dilation, reach_back,
    ):  # fmt: skip
        keep: list = []
        none = self._no_grams(hidden_states)
        tokens = self._tokens(keep, none, none, None, behind, ahead, exists, hidden_states.shape[1])
        layer, _ = self._layer(keep, norm_weight, conv_weight, eps, dilation, reach_back)
        source = self._given(keep, key, value, hidden_states)
        grads = self._backward(
            keep, tokens, _Windows(1, 1, 0, 2), source, layer, grad_residual, grad_gate, hidden_states, None,
            0 if conv_weight is None else conv_weight.shape[1],
        )  # fmt: skip
        return grads[0], grads[2].to(key.dtype), grads[3].to(value.dtype), grads[4], grads[5]

    def _features(self, keep, tables, grams, runs, behind, ahead, sizes, window, last, length, width, dtype):
        numbers = (_I * len(sizes))(*sizes)
        pointers = (_P * len(sizes))(*map(_pointer, tables))
        keep += [numbers, pointers]
        return _Features(
            self._tokens(keep, grams, runs, None, behind, ahead, None, length), self._windows(sizes, window, last),
            ctypes.addressof(numbers), len(sizes), width, ctypes.addressof(pointers), _TYPES[dtype], None, None, None,
        )  # fmt: skip

    def window_features(self, tables, grams, runs, behind, ahead, sizes, window, last, length):
        keep: list = []
        tables = [table.contiguous() for table in tables]
        width = tables[0].shape[1]
        out = torch.full((grams.shape[0], length, len(sizes) * width), float("nan"), dtype=tables[0].dtype)
        arguments = self._features(
            keep, tables, grams, runs, behind, ahead, sizes, window, last, length, width, out.dtype
        )
        arguments.features = _pointer(out)
        if out.numel():
            assert not self._call("features", ctypes.byref(arguments), None)
        return out

    def window_features_backward(self, grad, grams, runs, behind, ahead, sizes, window, last):
        keep: list = []
        grad = grad.contiguous()
        width = grad.shape[2] // len(sizes)
        out = [torch.zeros(5**n, width) for n in sizes]
        arguments = self._features(
            keep, out, grams, runs, behind, ahead, sizes, window, last, grad.shape[1], width, grad.dtype
        )
        arguments.grad_features, arguments.grad_rows = _pointer(grad), arguments.rows
        for table in range(len(sizes)):
            if not grad.numel():
                break
            keys = torch.empty(grams.numel(), dtype=torch.int32)
            assert not self._call("table_keys", ctypes.byref(arguments), _L(table), _P(_pointer(keys)), None)
            keys, order = keys.sort(stable=True)
            space = _memory(self._call("features_backward_bytes", ctypes.byref(arguments)))
            pointers = map(_P, map(_pointer, (keys, order, space)))
            assert not self._call("features_backward", ctypes.byref(arguments), _L(table), *pointers, None)
        return out
