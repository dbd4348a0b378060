"""Numbers that a model must not give: NaN and infinity, of damaged weights or where its dtype does not suffice."""

from typing import Any

import numpy as np


def check_finite(numbers: Any, model: Any) -> None:
    """Refuse NaN and infinity.

    Args:
        numbers: array of any shape.
        model: whose numbers they are.

    Raises:
        ValueError: if there are any; the message names the model and says what to do.
    """
    if np.isfinite(numbers).all():
        return
    name, dtype = getattr(model, "name_or_path", "") or type(model).__name__, str(model.dtype).removeprefix("torch.")
    hint = "are its weights damaged?" if dtype in ("float32", "float64") else "try float32 (--dtype float32)."
    raise ValueError(f"{name} gives NaN or infinity in {dtype}; {hint}")
