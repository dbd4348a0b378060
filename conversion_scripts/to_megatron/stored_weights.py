"""Reads the weights of a Hugging Face folder as Megatron's tensors; each is compared with its recorded hash."""

import hashlib
from collections.abc import Mapping
from functools import partial

import torch

from ...support.errors import ConversionError
from ...support.printable import printable
from ..files.conversion_record import RecordedTensor
from ..files.hf_folder import RECORD, StoredTensor
from ..files.weight_hash import WeightHash, tensor_bytes, weight_digest
from ..mapping.weight_table import Entry
from ..megatron.torch_archive import LazyTensor


class StoredWeights:
    """The weights of a folder.

    Args:
        stored: Its tensors, by name.
        recorded: Their hashes in the record of the conversion that wrote them; empty without one.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], recorded: Mapping[str, RecordedTensor]):
        self._stored = stored
        self._recorded = recorded
        self._slices: dict[str, dict[int, str]] = {}

    @property
    def unchecked(self) -> list[str]:
        """The tensors that have no recorded hash."""
        return [name for name in self._stored if name not in self._recorded]

    def lazy(self, entry: Entry, dtype: torch.dtype) -> LazyTensor:
        """The tensor of a checkpoint that a row of the table makes of the folder's; zeros if it makes none."""
        if not entry.targets:
            return LazyTensor(entry.shape, dtype, partial(torch.zeros, entry.shape, dtype=dtype))
        return LazyTensor(entry.shape, dtype, partial(self._made, entry, dtype))

    def _made(self, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        parts = [self.read(target.name, target.index) for target in entry.targets]
        return entry.layout.to_megatron(parts).to(dtype).contiguous()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor, or its slice at `index` along the first axis.

        Raises:
            ConversionError: if its bytes do not have the recorded hash, which for slices is known when all were read.
        """
        tensor = self._stored[name].read(index)
        recorded = self._recorded.get(name)
        if recorded is not None:
            found = self._digest(name, index, tensor)
            if found not in ("", recorded.sha256):
                raise ConversionError(
                    f"{printable(self._stored[name].path)}: the bytes of {name} are not those that the conversion "
                    f"wrote: they do not have the hash in {RECORD}. The file is damaged: fetch it or convert again. "
                    f"If the weights were changed on purpose, as by training, delete {RECORD}, which does not "
                    "describe them"
                )
        return tensor

    def _digest(self, name: str, index: int | None, tensor: torch.Tensor) -> str:
        """The `WeightHash` of a tensor; of a slice nothing, until all slices were read."""
        shape, dtype = self._stored[name].shape, self._stored[name].dtype
        if index is None:
            return weight_digest(shape, dtype, [tensor])
        slices = self._slices.setdefault(name, {})
        slices[index] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if len(slices) < shape[0]:
            return ""
        whole = WeightHash(shape, dtype)
        for number in range(shape[0]):
            whole.add(slices[number])
        return whole.hexdigest()
