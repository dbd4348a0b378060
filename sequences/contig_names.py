"""Names of contigs, which differ between sources: with or without `chr`, M or MT."""

_MITOCHONDRIA = {"M": "MT", "MT": "M"}


def other_names(name: str) -> list[str]:
    """Names that mean the same contig in other sources' files, the name itself among them."""
    bare = name[3:] if name[:3].lower() == "chr" else name
    return [prefix + word for word in (bare, _MITOCHONDRIA.get(bare, bare)) for prefix in ("", "chr")]


def same_contig(one: str, other: str) -> bool:
    """Whether two names mean the same contig.

    Example:

    >>> same_contig("chr9", "9"), same_contig("chrM", "MT"), same_contig("9", "X")
    (True, True, False)
    """
    return one == other or other in other_names(one)
