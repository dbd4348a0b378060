"""Which version of a package runs here."""

import importlib.metadata


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if there is none, as of gengram in a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
