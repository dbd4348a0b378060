"""Which version of a package runs here."""

import importlib.metadata


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed, as gengram in a bare checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
