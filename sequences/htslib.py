"""pysam, the optional library that reads indexed FASTA, VCF and BCF: loaded when first needed, and kept quiet."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..support.errors import MissingExtraError


def load_pysam() -> Any:
    """The module.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import pysam
    except ImportError as error:
        raise MissingExtraError('genomes and VCF are read by pysam: pip install "gengram[genomics]"') from error
    return pysam


@contextlib.contextmanager
def quiet_pysam() -> Iterator[Any]:
    """The module, whose C library writes no messages of its own to stderr inside the block.

    Raises:
        MissingExtraError: if it is not installed.
    """
    pysam = load_pysam()
    verbosity = pysam.set_verbosity(0)
    try:
        yield pysam
    finally:
        pysam.set_verbosity(verbosity)
