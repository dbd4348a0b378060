"""A model under evaluation, loaded when it is first asked."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..inference.embeddings import SequenceEncoder
from ..inference.loaded_model import LoadedModel, head_of, load_config, load_model
from ..support.errors import InputError


class EvaluatedModel:
    """A model under evaluation: its name, how it is loaded, and what has been computed with it.

    Args:
        name: model folder or Hub id.
        device, dtype: where and in which precision embeddings and likelihoods are computed.
        loading: further arguments of `from_pretrained`, as `revision` and `trust_remote_code`.
    """

    def __init__(self, name: str, device: str | None = None, dtype: torch.dtype = torch.float32, **loading: Any):
        self.name, self.dtype, self.loading = name, dtype, loading
        self.device = device
        self._embedded: dict[tuple[int, str, bool], dict[str, np.ndarray]] = {}

    @functools.cached_property
    def encoder(self) -> SequenceEncoder:
        """The model without a head."""
        return SequenceEncoder(self.name, dtype=self.dtype, device=self.device, **self.loading)

    @functools.cached_property
    def commit(self) -> str | None:
        """Of a model on the Hub, the commit that is loaded; None if that cannot be told."""
        try:
            config = load_config(self.name, **self.loading)
        except (OSError, ValueError):
            return None
        return getattr(config, "_commit_hash", None)

    @functools.cached_property
    def is_masked(self) -> bool:
        """Whether it predicts masked bases."""
        return head_of(load_config(self.name, **self.loading)) == "masked"

    @functools.cached_property
    def language_model(self) -> LoadedModel:
        """The model with the head that it was saved with, causal or masked."""
        head = "masked" if self.is_masked else "causal"
        return load_model(self.name, head, self.dtype, self.device, **self.loading)

    @property
    def causal(self) -> LoadedModel:
        """The causal language model.

        Raises:
            InputError: if it is a masked one, which has no likelihood of sequences.
        """
        if self.is_masked:
            raise InputError(f"{self.name} predicts masked bases from both sides, so it has no likelihoods.")
        return self.language_model

    def embed(
        self, sequences: Sequence[str], choices: Sequence[tuple[int, str]], both_strands: bool, progress: bool
    ) -> dict[tuple[int, str], np.ndarray]:
        """`SequenceEncoder.embed`, remembering what it has embedded until `forget`.

        Raises:
            InputError: if an embedding is not finite.
        """
        stores = {choice: self._embedded.setdefault((*choice, both_strands), {}) for choice in choices}
        missing = list(dict.fromkeys(s for s in sequences if any(s not in store for store in stores.values())))
        if missing:
            found = self.encoder.embed(missing, choices, both_strands, self.name if progress else None)
            for choice, vectors in found.items():
                if not np.isfinite(vectors).all():
                    raise InputError(
                        f"expected finite embeddings, got nan or infinity in layer {choice[0]} for "
                        f"{int((~np.isfinite(vectors)).any(1).sum())} of {len(missing)} sequences; try float32."
                    )
                stores[choice].update(zip(missing, vectors, strict=True))
        return {choice: np.stack([store[s] for s in sequences]) for choice, store in stores.items()}

    def forget(self) -> None:
        """Free the embeddings of a task."""
        self._embedded.clear()
