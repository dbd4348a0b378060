"""Dtypes by name: PyTorch's names, as records and configurations have them, and those of safetensors."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {**DTYPES, "int8": torch.int8, "uint8": torch.uint8}  # the last two: quantised weights
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without the library's: `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
