"""Pipelines of Transformers for DNA: `pipeline("dna-variant-effect")`, `"dna-embedding"` and `"dna-fill-mask"`.

`gengram.auto` tells Transformers of them when `gengram` is imported, and imports this module when one is made.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, Pipeline

from ..motif_memory.ways.kept_fold import memories_of
from ..sequences.gaps import find_gaps
from ..sequences.genome import Genome, genome_of, open_genome
from ..sequences.variants import ReferenceCheck, Variant
from ..support.default_model import DEFAULT_MODEL
from ..support.errors import InputError, shortened
from .effects import NUMBERS, SCORES
from .embeddings import SequenceEncoder
from .filling import DEFAULT_CONTEXT, DEFAULT_JOINT, GapFiller, check_fill_options, gap_windows, with_bases
from .loaded_model import HEADS, LoadedModel, head_of, load_config, load_whole, where_it_is
from .variant_effects import effects_of_checked
from .window_effects import WindowEffects

DEFAULT_VARIANT_CONTEXT = 512  # bases, if the model reads so many
BATCH_SIZE = 64  # inputs that are computed together, unless the user says otherwise


class AutoBody:
    """Loads a model without its head."""

    @classmethod
    def from_pretrained(cls, name: str, **loading: Any) -> Any:
        """The model; arguments as those of the library's Auto classes."""
        return load_whole(AutoModel, name, **loading)


class AutoLanguageModel:
    """Loads a model with the head that it was saved with, causal or masked."""

    @classmethod
    def from_pretrained(cls, name: str, **loading: Any) -> Any:
        """The model; arguments as those of the library's Auto classes."""
        head = head_of(load_config(name, **where_it_is(loading))) or "causal"
        return load_whole(HEADS[head], name, **loading)


class DnaPipeline(Pipeline):
    """What the pipelines have in common: which inputs they take, and how these are put together.

    An input, or a list, a dataset or a generator of inputs. One gives its result, a list a list, and anything else an
    iterator, whose results come as they are asked for, `batch_size` at a time. Results do not depend on the batches.
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    options: tuple[str, ...] = ()  # what can be given to `pipeline(...)` or with the inputs
    _of_batch: Callable[..., Iterator[Any]]  # of inputs, and of the options by name

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.model.eval()
        self._made: dict[Any, Any] = {}

    def __call__(
        self,
        inputs: Any,
        *arguments: Any,
        num_workers: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Results of the inputs; `num_workers` is for other pipelines."""
        if isinstance(inputs, str | Mapping):
            return next(self._results([inputs], 1, options))
        results = self._results(inputs, batch_size or self._batch_size or BATCH_SIZE, options)
        return list(results) if isinstance(inputs, list | tuple) else results

    def _results(self, inputs: Iterable[Any], batch_size: int, options: dict[str, Any]) -> Iterator[Any]:
        options = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        items = map(self.preprocess, inputs)
        while batch := list(itertools.islice(items, batch_size)):
            with self.device_placement(), torch.inference_mode():
                found = self._forward(batch, **options)
            yield from map(self.postprocess, found)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = [name for name in given if name not in self.options]
        if unknown:
            raise TypeError(f"{self.task}: expected some of {', '.join(self.options)}, got {', '.join(unknown)}.")
        return {}, given, {}

    def preprocess(self, input_: Any, **_: Any) -> Any:
        """What is read of an input: a sequence, or the value of `sequence` in a dictionary."""
        sequence = input_.get("sequence") if isinstance(input_, Mapping) else input_
        if not isinstance(sequence, str):
            raise InputError(f'{self.task}: expected a sequence or {{"sequence": ...}}, got {shortened(input_)}.')
        return sequence

    def _forward(self, input_tensors: Any, **options: Any) -> Any:
        return list(self._of_batch(input_tensors, **options))

    def postprocess(self, model_outputs: Any, **_: Any) -> Any:
        """A result as it is."""
        return model_outputs

    def _once(self, make: Callable[..., Any], **options: Any) -> Any:
        """What `make` makes with these options, made once."""
        key = (make, *sorted(options.items()))
        if key not in self._made:
            self._made[key] = make(**options)
        return self._made[key]


class DnaEmbeddingPipeline(DnaPipeline):
    """`"dna-embedding"`: a sequence, or `{"sequence": ...}`, gives a vector (hidden,), or (bases, hidden), float32.

    Options: `layer`, `pooling` and `strands` as those of `SequenceEncoder.vectors`; `context` and `overlap`.
    """

    options = ("layer", "pooling", "strands", "context", "overlap")

    def _of_batch(
        self,
        batch: list[str],
        layer: int = -1,
        pooling: str = "mean",
        strands: str = "both",
        context: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[np.ndarray]:
        encoder = self._once(self._encoder, context=context, overlap=overlap)
        yield from encoder.vectors(batch, layer, pooling, strands)

    def _encoder(self, context: int | None, overlap: int | None) -> SequenceEncoder:
        loaded = LoadedModel(self.model.base_model, self.tokenizer)
        return SequenceEncoder(loaded, context=context, overlap=overlap)


class DnaFillMaskPipeline(DnaPipeline):
    """`"dna-fill-mask"`: a sequence with N, `?` or `[MASK]` gives `{"sequence": filled, "gaps": [...]}`.

    Each gap is a dictionary with start (from 0), base, p_A, p_C, p_G, p_T and status, as the table of `gengram fill`,
    whose options these are: `strands`, `context`, `joint`, `nearest`, `longest_run`, `with_codes` and
    `least_probability`.
    """

    options = ("strands", "context", "joint", "nearest", "longest_run", "with_codes", "least_probability")

    def _of_batch(
        self,
        batch: list[str],
        strands: str = "both",
        context: int | None = None,
        joint: int = DEFAULT_JOINT,
        nearest: bool = False,
        longest_run: int = 16,
        with_codes: bool = False,
        least_probability: float = 0.0,
    ) -> Iterator[dict[str, Any]]:
        filler = self._once(self._filler, strands=strands)
        most = min(filler.longest, DEFAULT_CONTEXT) if context is None else context
        check_fill_options(most, joint, longest_run, least_probability)
        filler.check_length(most)
        sequences = [find_gaps(text, longest_run, with_codes) for text in batch]
        windows = [
            list(gap_windows(each.letters, each.gaps, most, None if filler.is_masked else joint)) for each in sequences
        ]
        found = filler.fill(list(itertools.chain.from_iterable(windows)), nearest, least_probability)
        for sequence, own in zip(sequences, windows, strict=True):
            gaps = list(itertools.chain.from_iterable(itertools.islice(found, len(own))))
            filled = with_bases(sequence.letters, ((gap.place, gap.base, gap.status) for gap in gaps))
            yield {"sequence": filled, "gaps": [gap.row() for gap in gaps]}

    def _filler(self, strands: str) -> GapFiller:
        return GapFiller(self.model, self.tokenizer, strands)


class DnaVariantEffectPipeline(DnaPipeline):
    """`"dna-variant-effect"`: a variant gives the numbers of `gengram score`, and its status.

    A variant is `{"sequence": ..., "start": ..., "ref": ..., "alt": ...}`, start from 0; or, with the option `fasta`,
    `{"chrom": ..., "pos": ..., "ref": ..., "alt": ...}`, pos from 1 as in VCF. The result is a dictionary of llr,
    llr_forward, llr_reverse, jsd, embedding_distance and memory_change, None where there is no number, and status:
    `scored`, or why not.

    Options: `fasta`, the genome's file; `context`, bases of a window; `scores`, some of `SCORES`; `strands`.
    """

    options = ("fasta", "context", "scores", "strands")

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """A variant with all it needs."""
        for names in (("sequence", "start", "ref", "alt"), ("chrom", "pos", "ref", "alt")):
            if isinstance(input_, Mapping) and all(name in input_ for name in names):
                return self._checked({name: input_[name] for name in names})
        raise InputError(
            f"{self.task}: expected a dictionary with sequence, start (from 0), ref and alt, or with chrom, pos (from "
            f"1), ref and alt; got {shortened(input_)}."
        )

    def _checked(self, variant: dict[str, Any]) -> dict[str, Any]:
        """A variant of text and whole numbers; an allele that is None or NaN, as of a table, is missing."""
        for name, value in variant.items():
            is_missing = value is None or (isinstance(value, float) and math.isnan(value))
            if name in ("ref", "alt") and is_missing:
                variant[name] = ""
            elif name in ("start", "pos") and isinstance(value, numbers.Integral) and not isinstance(value, bool):
                variant[name] = int(value)
            elif name in ("start", "pos") or not isinstance(value, str):
                kind = "a whole number" if name in ("start", "pos") else "text"
                raise InputError(f"{self.task}: expected {name} as {kind}, got {shortened(value)}.")
        return variant

    def _of_batch(
        self,
        batch: list[dict[str, Any]],
        fasta: str | Path | None = None,
        context: int | None = None,
        scores: Iterable[str] | None = None,
        strands: str = "both",
    ) -> Iterator[dict[str, Any]]:
        scores = tuple(scores) if scores is not None else self._all_scores()
        effects = self._once(self._effects, scores=scores, strands=strands)
        context = min(DEFAULT_VARIANT_CONTEXT, effects.longest) if context is None else context
        genome, variants = self._variants(batch, fasta)
        check = ReferenceCheck(genome)
        checked = [(variant, check.status(variant)) for variant in variants]
        for _, status, found in effects_of_checked(effects, genome, checked, context):
            values = dict.fromkeys(NUMBERS) if found is None else found.numbers()
            yield {**values, "status": status}

    def _effects(self, scores: tuple[str, ...], strands: str) -> WindowEffects:
        return WindowEffects(self.model, self.tokenizer, scores, strands)

    def _all_scores(self) -> tuple[str, ...]:
        return tuple(name for name in SCORES if name != "memory" or memories_of(self.model))

    def _variants(self, batch: list[dict[str, Any]], fasta: str | Path | None) -> tuple[Genome, list[Variant]]:
        """The variants, and the genome or the sequences that they are of."""
        is_of_genome = ["chrom" in each for each in batch]
        places: Iterable[tuple[str, int]]
        if not any(is_of_genome):
            sequences = {f"input {number}": each["sequence"] for number, each in enumerate(batch)}
            places = zip(sequences, (each["start"] for each in batch), strict=True)
            genome = genome_of(sequences, "the sequence")
        elif fasta is None or not all(is_of_genome):
            raise InputError(f"{self.task}: give the genome as fasta=..., and only variants of it.")
        else:
            places = ((each["chrom"], each["pos"] - 1) for each in batch)
            genome = self._once(open_genome, path=fasta)
        alleles = ((each["ref"], each["alt"]) for each in batch)
        return genome, [Variant(*place, *pair) for place, pair in zip(places, alleles, strict=True)]


# What Transformers' registry of pipelines holds for each task.
TASKS: dict[str, dict[str, Any]] = {
    task: {"impl": pipeline, "pt": (loader,), "default": {"model": (DEFAULT_MODEL, None)}, "type": "text"}
    for task, pipeline, loader in (
        ("dna-embedding", DnaEmbeddingPipeline, AutoBody),
        ("dna-fill-mask", DnaFillMaskPipeline, AutoLanguageModel),
        ("dna-variant-effect", DnaVariantEffectPipeline, AutoLanguageModel),
    )
}
