"""The job of `gengram score`: variants in, the effect of each out."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...motif_memory.ways.kept_fold import memories_of
from ...sequences.variant_files import read_variants
from ...sequences.variants import ReferenceCheck, Variant
from ..effects import SCORES
from ..loaded_model import head_of
from ..memory_use import fast_memory
from ..variant_effects import VariantEffect, effects_of_checked
from ..window_effects import WindowEffects
from .job import JobChunk, ModelOptions
from .regions import GenomeJob, RegionFilter, inputs_of_beds, regions_of
from .score_outputs import OUTPUTS, beside_scores, check_fits_vcf, score_table, write_scores
from .tables import check_table_output

DEFAULT_CONTEXT = 512
_ALLELES_PER_CHUNK = 256

# The number of a record, one of its alternative alleles, and what is known of it before a model is asked.
_Checked = tuple[int, Variant, str]


@dataclass
class ScoreJob(GenomeJob):
    """Effects of all variants of a file.

    Args:
        variants: VCF, BCF or a table: see `read_variants`.
        fasta: the genome.
        output: its name says the format, one of `OUTPUTS`.
        model: which model, and how it is used.
        context: bases of the window around a variant.
        scores: names of `SCORES`; by default all that the model has.
        regions, beds: see `texts_and_beds`: only variants whose first base lies in them; without any, all.

    Raises:
        ValueError: if the output's name says no format, or a score or the context makes no sense.
    """

    variants: Path
    fasta: Path
    output: Path
    model: ModelOptions
    context: int = DEFAULT_CONTEXT
    scores: tuple[str, ...] | None = None
    regions: tuple[str, ...] = ()
    beds: tuple[Path, ...] = ()
    name: str = field(default="score", init=False)
    unit: str = field(default="variant", init=False)
    inputs: Mapping[str, Path] = field(init=False)  # the files that decide the result
    counts: Counter[str] = field(default_factory=Counter, init=False)  # of what was written, by status
    left_out: int = field(default=0, init=False)  # records of the whole file outside the regions

    def __post_init__(self) -> None:
        check_table_output(self.output, OUTPUTS)
        self.inputs = {"variants": self.variants, "fasta": self.fasta, **inputs_of_beds(self.beds)}
        if self.context < 2:
            raise ValueError(f"--context: expected 2 bases or more, got {self.context}.")
        unknown = [name for name in self.scores or () if name not in SCORES]
        if unknown or self.scores == ():
            raise ValueError(f"--scores: expected some of {', '.join(SCORES)}, got {', '.join(self.scores or ())!r}.")

    def settings(self) -> dict[str, Any]:
        """The job's own options that decide the result."""
        scores = None if self.scores is None else list(self.scores)
        return {"context": self.context, "scores": scores, "regions": list(self.regions)}

    def chunks(self) -> Iterator[JobChunk]:
        """Alleles with what is known of them before the model is asked; all those of a record are in one chunk.

        Raises:
            InputError: if the input cannot be read, or does not fit the genome.
        """
        check = ReferenceCheck(self.genome)
        content: list[_Checked] = []
        file = read_variants(self.variants)
        becomes_vcf = not file.is_vcf and self.output.suffix not in (".tsv", ".parquet")
        is_wanted, left_out = self._filter(), 0
        for number, record in enumerate(file):
            if becomes_vcf:
                check_fits_vcf(record)
            if not is_wanted(record.contig, record.start):
                left_out += 1
                continue
            if not record.alternatives:
                content.append((number, Variant(record.contig, record.start, record.reference, "."), "no_alt"))
            content += ((number, variant, check.status(variant)) for variant in record.variants())
            if len(content) >= _ALLELES_PER_CHUNK:
                yield JobChunk(len(content), content)
                content = []
        if content:
            yield JobChunk(len(content), content)
        check.finish()
        self.left_out = left_out  # here, since later readings stop where a run has nothing more to compute

    def _filter(self) -> Callable[[str, int], bool]:
        if not (self.regions or self.beds):
            return lambda contig, position: True
        return RegionFilter(self.genome, regions_of(self.genome, self.regions, self.beds))

    def worker(self, device: str | None) -> "ScoreWorker":
        """Load the model, and open the genome."""
        return ScoreWorker(self, device)

    def beside(self, output: Path) -> list[Path]:
        """An index of VCF, or the record of a TSV."""
        return beside_scores(output)

    def write(self, results: Iterable[pa.Table], output: Path, record: dict[str, Any]) -> None:
        """Write the scores, and count them."""
        self.counts.clear()
        write_scores(self._counted(results), output, record, read_variants(self.variants), self.genome)

    def _counted(self, results: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in results:
            self.counts.update(table["status"].to_pylist())
            yield table


class ScoreWorker:
    """Computes chunks of a `ScoreJob`.

    Args:
        job: the job.
        device: where the model runs.
    """

    def __init__(self, job: ScoreJob, device: str | None):
        head = head_of(job.model.load_config()) or "causal"
        loaded = job.model.load(head, device)
        has_memory = bool(memories_of(loaded.model))
        scores = job.scores or tuple(name for name in SCORES if name != "memory" or has_memory)
        self._effects = WindowEffects(
            loaded.model,
            loaded.tokenizer,
            scores,
            job.model.strands,
            is_masked=head == "masked",
            tokens_per_pass=job.model.batch_tokens,
        )
        try:
            self._effects.check_length(job.context)
        except ValueError as error:
            raise ValueError(f"--context: {error}") from None
        self._genome, self._context = job.genome, job.context
        self._fast = contextlib.ExitStack()  # as long as this object
        self._fast.enter_context(fast_memory(loaded.model))
        self.advance: Callable[[int], Any] | None = None  # called with the number of variants that are done

    def __call__(self, content: list[_Checked]) -> pa.Table:
        """The scores of a chunk: rows of `RESULTS`."""
        return score_table(zip((number for number, *_ in content), self._found(content), strict=True))

    def _found(self, content: list[_Checked]) -> Iterator[VariantEffect]:
        checked = ((variant, status) for _, variant, status in content)
        for effect in effects_of_checked(self._effects, self._genome, checked, self._context):
            yield effect
            if self.advance is not None:
                self.advance(1)
