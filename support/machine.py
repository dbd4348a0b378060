"""What a result was measured on."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .versions import installed_version


def describe_machine() -> dict[str, Any]:
    """Processor, threads, GPUs, versions, and of a checkout its commit and whether it has uncommitted changes."""
    processor, cpu_info = platform.processor(), Path("/proc/cpuinfo")
    if cpu_info.exists():
        lines = cpu_info.read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    commit = _git("rev-parse", "HEAD")
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in ("gengram", "torch", "transformers", "datasets")},
        "commit": commit or None,
        "has_uncommitted_changes": bool(commit and _git("status", "--porcelain")),
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
