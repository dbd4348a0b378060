"""Progress bars."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    name: str | None,
    unit: str,
    total: int | None = None,
    over: Iterable[Any] | None = None,
    shown: bool | None = None,
    initial: int = 0,
) -> Any:
    """A bar on stderr: for `with` and `bar.update(count)`, or to be looped over if `over` is given.

    Args:
        name: what is written in front of it; without a name there is no bar, unless `shown` says so.
        unit: what is counted. Bytes (`B`) and bases (`bp`) are written as kB, Mbp and so on.
        total: how many there will be, if that is known.
        over: what the bar loops over.
        shown: whether there is a bar.
        initial: how many were done before; the rate does not count them.
    """
    is_shown = name is not None if shown is None else shown
    return tqdm(
        over,
        desc=name,
        unit=unit,
        total=total,
        unit_scale=unit in ("B", "bp"),
        disable=not is_shown,
        initial=initial,
    )
