"""Reads the data of a pickle without running anything that the pickle asks for.

A pickle is a program for a small stack machine; the standard machine imports the names it meets and calls them. This
machine knows the same instructions and imports nothing. What a name becomes is decided here, in two tables:

- `_VALUES`: names that stand for a value (`torch.bfloat16`).
- `_CONSTRUCTORS`: names that may be "called"; each is replaced by a function of ours that builds plain data.

Policy for all other names, so that an attack is refused by name while a foreign class is only data:

- a name of the standard library or of the builtins (`posix.system`, `builtins.eval`) is refused where it is met;
- a class of another package becomes a `ForeignObject`, a record of its name, arguments and state, if the pickle builds
  it as an object (NEWOBJ, BUILD), which involves no call of the file's choosing;
- a call (REDUCE) outside `_CONSTRUCTORS` is refused, except enum members of Megatron, Transformer Engine and PyTorch's
  checkpoint package, `Class(value)` with one number or string, which also become a `ForeignObject`;
- instructions of pickle protocol 0 and 1 that call (INST, OBJ), the extension registry (EXT1..4) and out-of-band
  buffers are refused.

Memory and time are bounded by the length of the pickle (`MAX_PICKLE_BYTES`, `MAX_OPERATIONS`): no declared size is
believed before that many bytes are there, nothing recurses, only flat keys are hashed, and what constructors copy is
counted.
"""

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...support.errors import ConversionError, shortened

MAX_PICKLE_BYTES = 128 * 2**20
MAX_OPERATIONS = 32_000_000

_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 uint16 uint32 uint64 "
    "bool complex64 complex128"
).split()


@dataclass(frozen=True)
class ForeignName:
    """A class or function that the file names; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class ForeignObject:
    """An object of a foreign class as inert data: which class, with which arguments, in which state."""

    kind: ForeignName
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)  # of list- and dict-like classes

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name` of the object's recorded state."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:  # not its contents: they may be deep, shared or circular
        return f"<{self.kind} object>"


@dataclass(frozen=True, eq=False, repr=False)
class StorageReference:
    """Where the elements of a tensor lie; `place` is what `persistent_load` needs to read them."""

    key: str
    dtype: torch.dtype
    length: int  # elements
    place: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class TensorReference:
    """A tensor that has not been read: a strided view of a storage, offsets and strides in elements."""

    storage: StorageReference
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def __repr__(self) -> str:
        return f"<tensor of shape {self.shape}>"


STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise ConversionError(f"a tensor's sizes must be a tuple of at most 64 integers, got {shortened(values)}")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise ConversionError(
                f"a tensor's sizes and strides must be non-negative integers, got {shortened(value)}"
            )
    return tuple(values)


def _tensor(storage, offset, size, stride, *_ignored) -> TensorReference:
    if not isinstance(storage, StorageReference):
        raise ConversionError(f"a tensor needs a storage, got {shortened(storage)}")
    shape, strides = _sizes(size), _sizes(stride)
    (start,) = _sizes((offset,))
    if len(shape) != len(strides):
        raise ConversionError(f"a tensor of shape {shape} cannot have strides {strides}")
    elements, last = 1, start
    for extent, step in zip(shape, strides, strict=True):
        elements *= extent
        last += max(extent - 1, 0) * step
    if elements and (last >= storage.length or elements > storage.length):
        raise ConversionError(
            f"a tensor of shape {shape}, strides {strides} and offset {start} lies outside its storage of "
            f"{storage.length} elements"
        )
    return TensorReference(storage, start, shape, strides)


def _tensor_of_type(function, _kind, arguments, *_state) -> Any:
    if function not in (ForeignName("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_tensor")):
        raise ConversionError(f"refused to call {shortened(function)} for a tensor of a subclass")
    return _tensor(*arguments)


def _parameter(data, *_ignored) -> Any:
    return data


def _mapping(pairs=()) -> dict:
    result = {}
    for key, value in pairs:
        result[_key(key)] = value
    return result


def _latin1(text="", encoding="latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ConversionError(f"bytes must be spelled in latin1, got {shortened(encoding)}")
    return text.encode("latin1")


def _items(values=()) -> list | tuple:
    if not isinstance(values, list | tuple):
        raise ConversionError(f"a set must be spelled as a list, got {shortened(values)}")
    return values


def _record(module: str, name: str) -> Callable[..., ForeignObject]:
    return lambda *arguments: ForeignObject(ForeignName(module, name), arguments)


_VALUES: dict[tuple[str, str], Any] = {("torch", name): getattr(torch, name) for name in _DTYPES}

_CONSTRUCTORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _mapping,
    ("torch", "Size"): _sizes,
    ("torch", "device"): _record("torch", "device"),
    ("torch.serialization", "_get_layout"): _record("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("_codecs", "encode"): _latin1,
    ("signal", "Signals"): _record("signal", "Signals"),
    ("argparse", "Namespace"): _record("argparse", "Namespace"),
    ("_io", "BytesIO"): _record("_io", "BytesIO"),
    ("io", "BytesIO"): _record("io", "BytesIO"),
}
for _module in ("builtins", "__builtin__"):
    _CONSTRUCTORS |= {
        (_module, "set"): _items,
        (_module, "frozenset"): _items,
        (_module, "bytearray"): _latin1,
        (_module, "bytes"): _latin1,
        (_module, "complex"): _record("builtins", "complex"),
        (_module, "slice"): _record("builtins", "slice"),
        (_module, "range"): _record("builtins", "range"),
    }
for _name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    for _module in ("pathlib", "pathlib._local"):
        _CONSTRUCTORS[(_module, _name)] = _record("pathlib", _name)
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    for _name in ("_reconstruct", "scalar"):
        _CONSTRUCTORS[(_module, _name)] = _record("numpy", _name)
_CONSTRUCTORS[("numpy", "dtype")] = _record("numpy", "dtype")

_ENUM_PACKAGES = ("megatron.", "transformer_engine.", "torch.distributed.checkpoint.")
_REFUSED_PACKAGES = frozenset(sys.stdlib_module_names) | {
    *("__builtin__", "__main__", "copy_reg", "commands", "exceptions", "cPickle", "nt", "posix", "distutils", "imp"),
    *("pip", "setuptools", "pkg_resources", "_pytest", "IPython", "dill", "cloudpickle", "joblib"),
}
_FLAT = (str, int, float, bool, bytes, type(None), torch.dtype, ForeignName, ForeignObject)


def _key(key: Any) -> Any:
    # Tuples do not cache their hash: nested shared ones would take exponential time.
    if isinstance(key, _FLAT) or (type(key) is tuple and len(key) <= 64 and all(isinstance(k, _FLAT) for k in key)):
        return key
    raise ConversionError(f"a dictionary key must be a string, a number or a flat tuple of such, got {shortened(key)}")


def load_pickle(data: bytes, source: str, persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """The data that a pickle describes: numbers, strings, bytes, lists (sets too), tuples, dicts, tensor references
    and `ForeignObject`s.

    Args:
        data: The whole pickle.
        source: Where it comes from, for messages.
        persistent_load: Resolves the persistent ids of `torch.save`; without it they are refused.

    Raises:
        ConversionError: if the pickle asks to run something (the message names it), is malformed or is too large.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ConversionError(
            f"{source}: the pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read, and a checkpoint of "
            "this model needs far fewer"
        )
    try:
        return _Machine(data, persistent_load).run()
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise ConversionError(
            f"{source}: not a readable pickle ({type(error).__name__}: {shortened(str(error))}); the file is damaged "
            "or not a checkpoint"
        ) from None


class _Machine:
    """The stack machine; one method per instruction, named as in the standard library's `pickletools`."""

    def __init__(self, data: bytes, persistent_load: Callable[[Any], Any] | None):
        self.data = data
        self.position = 0
        self.persistent_load = persistent_load
        self.stack: list = []
        self.outer: list[list] = []  # stacks set aside by MARK
        self.memo: dict[int, Any] = {}
        self.finished = False
        self.copied = 0

    def run(self) -> Any:
        data, instructions = self.data, _INSTRUCTIONS
        for _ in range(MAX_OPERATIONS):
            if self.position >= len(data):
                raise ConversionError("the pickle ends before its STOP instruction; the file is truncated")
            code = data[self.position]
            self.position += 1
            instruction = instructions.get(code)
            if instruction is None:
                raise ConversionError(f"instruction {bytes([code])!r} of the pickle is not allowed or does not exist")
            instruction(self)
            if self.finished:
                return self.stack.pop()
        raise ConversionError(f"the pickle has more than {MAX_OPERATIONS} instructions")

    # Reading

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ConversionError("the pickle declares more bytes than it has; the file is truncated or damaged")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, encoding: str = "utf-8") -> str:
        end = self.data.find(b"\n", self.position, self.position + 4096)
        if end < 0:
            raise ConversionError("a line of the pickle does not end")
        return self.take(end + 1 - self.position)[:-1].decode(encoding)

    def to_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    # Constants

    def push_bytes(self, layout: str) -> None:
        self.stack.append(self.take(self.number(layout)))

    def push_text(self, layout: str) -> None:
        self.stack.append(self.take(self.number(layout)).decode("utf-8", "surrogatepass"))

    def push_latin1(self, layout: str) -> None:
        self.stack.append(self.take(self.number(layout)).decode("latin1"))

    def push_long(self, layout: str) -> None:
        self.stack.append(int.from_bytes(self.take(self.number(layout)), "little", signed=True))

    def decimal(self) -> None:
        text = self.line()
        self.stack.append(text == "01" if text in ("00", "01") else int(text.rstrip("L")))

    def decimal_float(self) -> None:
        self.stack.append(float(self.line()))

    def proto(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise ConversionError(f"pickle protocol {version} is newer than this reader (5)")

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.position:
            raise ConversionError("the pickle declares a frame longer than the file; the file is truncated or damaged")

    def stop(self) -> None:
        self.finished = True

    # Stack and memo

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def get(self, layout: str) -> None:
        self.stack.append(self.memo[self.number(layout)])

    def put(self, layout: str) -> None:
        self.memo[self.number(layout)] = self.stack[-1]

    def get_text(self) -> None:
        self.stack.append(self.memo[int(self.line())])

    def put_text(self) -> None:
        self.memo[int(self.line())] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # Containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ConversionError("the pickle takes more values than it has")
        split = len(self.stack) - count
        self.stack[split:] = [tuple(self.stack[split:])]

    def tuple_to_mark(self) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def list_to_mark(self) -> None:
        items = self.to_mark()
        self.stack.append(items)

    def dict_to_mark(self) -> None:
        items = self.to_mark()
        self.stack.append(_mapping(zip(items[::2], items[1::2], strict=True)))

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, ForeignObject):  # list-like foreign objects
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise ConversionError(f"the pickle appends to {shortened(target)}")

    def append(self) -> None:
        item = self.stack.pop()
        self.extend([item])

    def appends(self) -> None:
        self.extend(self.to_mark())

    def update(self, items: list) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, ForeignObject):  # dict-like foreign objects
            target.items.extend(pairs)
        elif type(target) is dict:
            target.update(_mapping(pairs))
        else:
            raise ConversionError(f"the pickle sets items of {shortened(target)}")

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.update([key, value])

    def set_items(self) -> None:
        self.update(self.to_mark())

    # Names, calls and objects

    def push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ConversionError("the pickle names a class by something that is not a string")
        if (module, name) in _VALUES:
            self.stack.append(_VALUES[module, name])
            return
        if module.split(".")[0] in _REFUSED_PACKAGES and (module, name) not in _CONSTRUCTORS:
            raise ConversionError(
                f"refused to unpickle {shortened(f'{module}.{name}')}: a checkpoint holds data and has no use for it. "
                "The file tries to run code, or was not written by Megatron; nothing of it was run. Do not open it "
                "with other tools."
            )
        self.stack.append(ForeignName(module, name))

    def name(self) -> None:
        module = self.line()
        self.push_name(module, self.line())

    def stack_name(self) -> None:
        name = self.stack.pop()
        self.push_name(self.stack.pop(), name)

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, ForeignName) or type(arguments) is not tuple:
            raise ConversionError(f"the pickle calls {shortened(function)}, which is not a class")
        constructor = _CONSTRUCTORS.get((function.module, function.name))
        if constructor is not None:
            # A memoised value can be copied again by every few bytes of a pickle.
            self.copied += sum(len(a) for a in arguments if isinstance(a, str | list | tuple))
            if self.copied > 4 * len(self.data) + 2**16:
                raise ConversionError("the pickle copies more data than it has; it is malicious")
            self.stack.append(constructor(*arguments))
        elif (
            function.module.startswith(_ENUM_PACKAGES) and len(arguments) == 1 and isinstance(arguments[0], int | str)
        ):
            self.stack.append(ForeignObject(function, arguments))
        else:
            raise ConversionError(
                f"refused to call {shortened(str(function))} while unpickling: it is not among the constructors of "
                "plain data that a Megatron checkpoint needs. The file tries to run code, or was not written by "
                "Megatron; nothing of it was run."
            )

    def new_object(self) -> None:
        arguments = self.stack.pop()
        self.push_object(self.stack.pop(), arguments)

    def new_object_with_keywords(self) -> None:
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        self.push_object(self.stack.pop(), (arguments, keywords))

    def push_object(self, kind: Any, arguments: Any) -> None:
        if not isinstance(kind, ForeignName) or type(arguments) is not tuple:
            raise ConversionError(f"the pickle builds an object of {shortened(kind)}, which is not a class")
        if (kind.module, kind.name) == ("collections", "OrderedDict"):
            self.stack.append({})
        else:
            self.stack.append(ForeignObject(kind, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, ForeignObject):
            target.state = state
        elif type(target) is not dict and not isinstance(target, TensorReference):
            raise ConversionError(f"the pickle sets the state of {shortened(target)}")
        # What remains are attributes of dictionaries (`state_dict._metadata`) and of tensors: not weights.

    def persistent(self) -> None:
        if self.persistent_load is None:
            raise ConversionError("the pickle refers to a storage, but comes without storages")
        self.stack.append(self.persistent_load(self.stack.pop()))


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): instruction
    for code, instruction in {
        "\x80": _Machine.proto,
        "\x95": _Machine.frame,
        ".": _Machine.stop,
        "(": _Machine.mark,
        "0": _Machine.pop,
        "1": lambda m: m.to_mark() and None,
        "2": _Machine.duplicate,
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "I": _Machine.decimal,
        "L": _Machine.decimal,
        "F": _Machine.decimal_float,
        "J": lambda m: m.stack.append(m.number("<i")),
        "K": lambda m: m.stack.append(m.number("<B")),
        "M": lambda m: m.stack.append(m.number("<H")),
        "G": lambda m: m.stack.append(m.number(">d")),
        "\x8a": lambda m: m.push_long("<B"),
        "\x8b": lambda m: m.push_long("<i"),
        "V": lambda m: m.stack.append(m.line("raw-unicode-escape")),
        "X": lambda m: m.push_text("<I"),
        "\x8c": lambda m: m.push_text("<B"),
        "\x8d": lambda m: m.push_text("<Q"),
        "U": lambda m: m.push_latin1("<B"),
        "T": lambda m: m.push_latin1("<i"),
        "B": lambda m: m.push_bytes("<I"),
        "C": lambda m: m.push_bytes("<B"),
        "\x8e": lambda m: m.push_bytes("<Q"),
        "\x96": lambda m: m.push_bytes("<Q"),
        "]": lambda m: m.stack.append([]),
        "\x8f": lambda m: m.stack.append([]),
        ")": _push(()),
        "}": lambda m: m.stack.append({}),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "t": _Machine.tuple_to_mark,
        "l": _Machine.list_to_mark,
        "\x91": _Machine.list_to_mark,
        "d": _Machine.dict_to_mark,
        "a": _Machine.append,
        "e": _Machine.appends,
        "\x90": _Machine.appends,
        "s": _Machine.set_item,
        "u": _Machine.set_items,
        "g": _Machine.get_text,
        "h": lambda m: m.get("<B"),
        "j": lambda m: m.get("<I"),
        "p": _Machine.put_text,
        "q": lambda m: m.put("<B"),
        "r": lambda m: m.put("<I"),
        "\x94": _Machine.memoize,
        "c": _Machine.name,
        "\x93": _Machine.stack_name,
        "R": _Machine.reduce,
        "\x81": _Machine.new_object,
        "\x92": _Machine.new_object_with_keywords,
        "b": _Machine.build,
        "Q": _Machine.persistent,
    }.items()
}
