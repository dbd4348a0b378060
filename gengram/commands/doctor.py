"""`gengram doctor`: what runs here, and why."""

import argparse
import json
import platform
from typing import Any

from .._version import __version__
from ..support.versions import installed_version

HELP = "say what runs here: versions, devices, native kernels"
_PACKAGES = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "datasets", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def _why_not_on_a_gpu() -> str:
    """Why the memory cannot run natively on a GPU here; empty if it can."""
    import torch

    from ..motif_memory.ways.native import status

    library = status()
    if not library.available:
        return library.reason
    if library.has_cuda and not torch.cuda.is_available():
        return "the kernels are built but PyTorch finds no GPU"
    return library.cuda_reason


def examine() -> dict[str, Any]:
    """Versions, devices, and which kernels the memory uses."""
    import torch

    from ..motif_memory.ways.choose import forced_path
    from ..motif_memory.ways.native import status

    library, forced = status(), forced_path()
    return {
        "gengram": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed_version(package) for package in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native_kernels": {
            "available": library.available,
            "reason": library.reason or None,
            "library": str(library.path) if library.path else None,
            "instruction_set": library.capability or None,
            "cuda": library.has_cuda,
            "cuda_reason": _why_not_on_a_gpu() or None,
        },
        "memory_path": {"algorithm": forced.algorithm, "kernels": forced.kernels},
    }


def run(arguments: argparse.Namespace) -> int:
    """Print what `examine` finds."""
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    native, path = found.pop("native_kernels"), found.pop("memory_path")
    for name, value in found.items():
        if name == "cuda_devices":
            value = ", ".join(value) or "none"
        print(f"{name:16} {value if value is not None else 'not installed'}")
    kernels = f"yes, {native['instruction_set']}" if native["available"] else f"no: {native['reason']}"
    print(f"{'native kernels':16} {kernels}")
    if native["available"]:
        print(f"{'':16} from {native['library']}")
    print(f"{'on a GPU':16} {'yes' if native['cuda_reason'] is None else 'no: ' + native['cuda_reason']}")
    print(
        f"{'memory':16} algorithm {path['algorithm']}, kernels {path['kernels']} "
        "(GENGRAM_MEMORY_ALGORITHM, GENGRAM_MEMORY_KERNELS, gengram.memory_path)"
    )
    return 0
