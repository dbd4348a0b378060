"""What a conversion can be asked for, each list once: for the commands' help and for the checks."""

OUTPUT_DTYPES = ("float32", "bfloat16")
QUANTISED = ("int8", "int4")
FETCH = ("auto", "ranges", "files")
FORMATS = ("torch_dist", "torch")
MEMORY_PREFIXES = ("gengram", "engram_dna")
