"""Which version of a package runs here."""

import importlib.metadata

from .._version import __version__


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed. Of gengram itself, also in a bare checkout."""
    if package == "gengram":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
