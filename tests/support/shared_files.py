"""Where the ground truth lies: `../shared` beside the checkout, or `GENGRAM_SHARED`; tests that need it are skipped
without it."""

import json
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GENGRAM_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FIXTURES = SHARED / "fixtures"
DATA = SHARED / "data"

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the authors' outputs (../shared/fixtures) are absent"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data (../shared/data) is absent")


def fixture_json(*parts: str):
    return json.loads(FIXTURES.joinpath(*parts).read_text())


def fixture_tensors(*parts: str) -> dict:
    import torch
    from safetensors.torch import load_file

    return load_file(FIXTURES.joinpath(*parts), device=str(torch.get_default_device()))
