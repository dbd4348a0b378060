"""The pickle reader: data comes out, nothing is run, hostile input ends in a clear error."""

import collections
import functools
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gengram.conversion_scripts.megatron.safe_pickle import ForeignName, ForeignObject, load_pickle
from gengram.support.errors import ConversionError, shortened


def load(data):
    return load_pickle(data, "test.pkl")


PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**40, -(2**70), 1.5, float("inf"), True, False, None],
    "text": ["", "a", "ä€", "x" * 300, b"", b"abc", b"y" * 300],
    "nested": {"tuple": (1, (2, 3), (), (4, 5, 6, 7)), "list": [[], [1]], "dict": {(1, "a"): {}, 2: 3, None: 4}},
}
PLAIN["shared"] = PLAIN["nested"]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_out_as_it_went_in(protocol):
    data = pickle.dumps(PLAIN, protocol)
    result = load(data)
    assert result == PLAIN
    assert result["shared"] is result["nested"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_data(protocol):
    ordered = collections.OrderedDict(a=1)
    ordered._metadata = {"version": 1}
    value = {
        "ordered": ordered,
        "set": {7},
        "frozen": frozenset({8}),
        "bytes": bytearray(b"ab"),
        "size": torch.Size([2]),
    }
    result = load(pickle.dumps(value, protocol))
    assert result["ordered"] == {"a": 1} and type(result["ordered"]) is dict
    assert list(result["set"]) == [7] and list(result["frozen"]) == [8]
    assert result["bytes"] == b"ab" and result["size"] == (2,)
    assert load(pickle.dumps(torch.bfloat16, protocol)) is torch.bfloat16


def test_a_circular_list():
    circle = []
    circle.append(circle)
    result = load(pickle.dumps(circle))
    assert result[0] is result
    assert "..." in shortened(result)


def test_objects_of_foreign_classes_are_records():
    data = b"\x80\x02cforeign.package\nThing\n)\x81}X\x05\x00\x00\x00valueK\x03sb."
    result = load(data)
    assert isinstance(result, ForeignObject) and result.kind == ForeignName("foreign.package", "Thing")
    assert result.get("value") == 3 and result.get("other", 5) == 5
    assert "foreign" not in sys.modules
    assert repr(result) == "<foreign.package.Thing object>"


def test_enum_members_of_megatron_are_records():
    result = load(b"\x80\x02cmegatron.core.enums\nModelType\nK\x01\x85R.")
    assert result.arguments == (1,) and str(result.kind) == "megatron.core.enums.ModelType"
    with pytest.raises(ConversionError, match=r"refused to call 'foreign\.enums\.Kind'"):
        load(b"\x80\x02cforeign.enums\nKind\nK\x01\x85R.")
    with pytest.raises(ConversionError, match=r"refused to call 'megatron\.training\.run'"):
        load(b"\x80\x02cmegatron.training\nrun\nK\x01K\x02\x86R.")


def test_numpy_arrays_and_random_states_are_records():
    result = load(pickle.dumps({"state": np.random.RandomState(0).get_state(), "scalar": np.float64(1)}, 2))
    assert isinstance(result["state"][1], ForeignObject)


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    r"posix\.system|nt\.system": lambda mark: Attack(os.system, f"touch {mark}"),
    r"builtin(s|__)\.eval": lambda mark: Attack(eval, f"open({mark!r}, 'w')"),
    r"builtin(s|__)\.exec": lambda mark: Attack(exec, f"open({mark!r}, 'w')"),
    r"builtin(s|__)\.getattr": lambda mark: Attack(getattr, "text", "upper"),
    r"builtin(s|__)\.__import__": lambda mark: Attack(__import__, "antigravity"),
    r"io\.open": lambda mark: Attack(open, mark, "w"),
    r"(subprocess|commands)\.Popen": lambda mark: Attack(subprocess.Popen, ["touch", mark]),
    r"(subprocess|commands)\.check_output": lambda mark: Attack(subprocess.check_output, ["touch", mark]),
    r"functools\.partial": lambda mark: Attack(functools.partial, print),
    r"importlib\.import_module": lambda mark: Attack(__import__("importlib").import_module, "os"),
    r"shutil\.rmtree": lambda mark: Attack(__import__("shutil").rmtree, mark),
    r"pickle\.loads": lambda mark: Attack(pickle.loads, b""),
    r"torch\.serialization\.load": lambda mark: Attack(torch.load, mark),
    r"torch\.hub\.load": lambda mark: Attack(torch.hub.load, mark, "model"),
    r"numpy.*\.load": lambda mark: Attack(np.load, mark),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_that_run_code_are_refused_by_name(name, protocol, tmp_path):
    mark = str(tmp_path / "mark")
    for wrap in (lambda x: x, lambda x: {"args": [x]}, lambda x: collections.OrderedDict(a=x)):
        data = pickle.dumps(wrap(ATTACKS[name](mark)), protocol)
        with pytest.raises(ConversionError, match=name):
            load(data)
    assert not os.path.exists(mark)


RAW_ATTACKS = {
    b"cos\nsystem\n(S'true'\ntR.": "os.system|not allowed",
    b"(S'true'\nios\nsystem\n.": "not allowed",
    b"(cposix\nsystem\nS'true'\no.": "posix.system",
    b"\x80\x02\x82\x01.": "not allowed",
    b"Pstorage\n.": "not allowed",
    b"\x80\x02K\x01Q.": "without storages",
    b"\x80\x04\x8c\x0ctorch.Tensor\x8c\x0b__reduce_ex\x93)R.": "refused to call",
    b"\x80\x02cmegatron.core\nos.system\nX\x04\x00\x00\x00true\x85R.": None,
    b"\x80\x02ccollections\nOrderedDict\n)\x81cposix\nsystem\nb.": "posix.system",
    b"\x80\x02csubprocess\nPopen\n)\x81.": "subprocess.Popen",
    b"\x80\x02c__main__\nThing\n)\x81.": "__main__.Thing",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))NNtR.": "needs a storage",
    b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cforeign\nf\nN)NtR.": "refused to call",
    b"\x80\x02K\x01K\x01R.": "which is not a class",
    b"\x80\x02K\x01)\x81.": "which is not a class",
    b"\x80\x05\x97.": "not allowed",
    b"\x80\x09.": "protocol 9",
}


@pytest.mark.parametrize("data", RAW_ATTACKS, ids=range(len(RAW_ATTACKS)))
def test_raw_attacks(data):
    if RAW_ATTACKS[data] is None:  # a record without any call
        assert isinstance(load(data), ForeignObject)
    else:
        with pytest.raises(ConversionError, match=RAW_ATTACKS[data]):
            load(data)


def bombs():
    key = b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    yield "hash of shared tuples", b"\x80\x02}" + key[2:] + b"K\x01s."
    yield "text longer than the file", b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a."
    yield "bytes longer than the file", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a."
    yield "bytearray longer than the file", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a."
    yield "frame longer than the file", b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"."
    yield "negative length", b"\x80\x02\x8b" + struct.pack("<i", -5) + b"."
    yield "many digits", b"L" + b"9" * 4090 + b"L\n0" * 3
    big = b"(" + b"K\x01" * 20000 + b"l"
    yield (
        "copies of a list",
        b"\x80\x02" + big + b"q\x000" + b"ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00\x85R" * 20000 + b".",
    )
    sets = b"\x80\x02" + b"X" + struct.pack("<I", 100000) + b"a" * 100000 + b"q\x000c_codecs\nencode\nq\x010"
    yield "copies of a text", sets + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 20000 + b"."
    sizes = b"(" + b"K\x01" * 2000 + b"t"
    yield "sizes", b"\x80\x02ctorch\nSize\n" + sizes + b"\x85R."


@pytest.mark.parametrize("data", [data for _, data in bombs()], ids=[name for name, _ in bombs()])
def test_bombs_end_soon_in_an_error(data):
    started = time.monotonic()
    with pytest.raises(ConversionError):
        load(data)
    assert time.monotonic() - started < 5


def test_deep_and_sparse_data_is_only_data():
    depth = 200_000
    result = load(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert shortened(result)
    assert load(b"\x80\x02K\x07r" + struct.pack("<I", 2**32 - 1) + b".") == 7  # a memo with one distant entry
    shared = b"\x80\x02]q\x00" + b"".join(
        b"(h" + bytes([i]) + b"h" + bytes([i]) + b"lq" + bytes([i + 1]) for i in range(100)
    )
    assert shortened(load(shared + b"."))


def test_every_truncation_is_an_error():
    data = pickle.dumps(PLAIN, 4)
    for length in range(len(data)):
        with pytest.raises(ConversionError):
            load(data[:length])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_damaged_bytes_give_data_or_an_error(protocol):
    random.seed(protocol)
    data = bytearray(pickle.dumps({"a": PLAIN, "b": collections.OrderedDict(x=torch.Size([1]))}, protocol))
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(random.randint(1, 4)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        try:
            shortened(load(bytes(broken)))
        except ConversionError as error:
            assert len(str(error)) < 2000


def test_the_table_of_instructions_agrees_with_the_standard_library():
    from gengram.conversion_scripts.megatron.safe_pickle import _INSTRUCTIONS

    known = {ord(op.code): op.name for op in pickletools.opcodes}
    assert set(_INSTRUCTIONS) <= set(known)
    refused = {name for code, name in known.items() if code not in _INSTRUCTIONS}
    assert refused == {
        *("INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "STRING"),
    }
