"""A model of DNA as a function of one-hot sequences, for tools of explanation and design."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..motif_memory.definition import at_least_float32
from ..sequences.alphabet import BASES
from .base_tokens import BaseTokens
from .loaded_model import context_length
from .pooling import POOLINGS, pool
from .soft_letters import soft_letters

OUTPUTS = ("log_likelihood", "bases", "classes", "embedding")
STRANDS = ("forward", "reverse", "both")
# By a part of the model's name; hidden states if none fits.
_OUTPUT_OF_HEAD = {
    "CausalLM": "log_likelihood",
    "LMHeadModel": "log_likelihood",
    "MaskedLM": "bases",
    "Classification": "classes",
}


class OneHotModel(nn.Module):
    """A model that reads one-hot sequences (batch, 4, length) and is differentiable in them, the memory included.

    The rows of a sequence are A, C, G and T; a column of zeros is N. Any other column `x` is read as a mixture: A, C,
    G and T with the weights `x`, and N with the rest, `1 - sum(x)`. Mixtures go through the input embedding, and
    through the k-mers of a motif memory, as the function that is linear in every column and equal to the lookup where
    all columns are one-hot. So the gradient is that of one function everywhere, and integrated gradients add up.

    Args:
        model: of Transformers, with single bases as tokens; it is put in `eval()` mode.
        tokenizer: its tokenizer.
        output: what is returned.
            `"log_likelihood"` (batch, 1): the sum over the bases of log P(base | bases before it), in nats, by a
            causal model. The first base counts only if the tokenizer puts a token in front of it; N does not count.
            `"bases"` (batch, 4, length): log P of A, C, G and T at each place, given what is before it (causal) or
            around it (masked); log 1/4 where there is no prediction.
            `"classes"`: logits of a classifier, (batch, classes), or (batch, classes, length) if it labels bases.
            `"embedding"` (batch, hidden): hidden states of `layer`, pooled.
            By default, what the model's head is for.
        start, stop: the part of the sequence that `"log_likelihood"` sums over and `"embedding"` pools, 0-based and
            half-open; all of it by default.
        layer: of `"embedding"`: 0 is the input embedding, -1 the last.
        pooling: of `"embedding"`: `"mean"`, `"max"`, `"last"` or `"centre"`.
        strands: `"forward"` reads the sequence as it is given, `"reverse"` its reverse complement, `"both"` returns
            the mean of the two. Outputs for each base stay in the order of the sequence as it is given.

    Raises:
        ValueError: if the model's tokens are not single bases, or its head does not give this output.

    Example:

    >>> import gengram, torch
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained(gengram.DEFAULT_MODEL)
    >>> one_hot = gengram.OneHotModel(model, AutoTokenizer.from_pretrained(gengram.DEFAULT_MODEL))
    >>> sequences = torch.eye(4)[torch.randint(4, (2, 50))].transpose(1, 2)  # (batch, 4, length)
    >>> one_hot(sequences.requires_grad_()).shape
    torch.Size([2, 1])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        output: str | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        layer: int = -1,
        pooling: str = "mean",
        strands: str = "forward",
    ):
        super().__init__()
        kind = type(model).__name__
        output = output or next((output for part, output in _OUTPUT_OF_HEAD.items() if part in kind), "embedding")
        for name, value, allowed in (
            ("output", output, OUTPUTS),
            ("strands", strands, STRANDS),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected {', '.join(allowed)}, got {value!r}.")
        self.is_masked = "MaskedLM" in kind
        if output == "log_likelihood" and self.is_masked:
            raise ValueError(f'a masked model, {kind}, has no likelihood of whole sequences; ask for output="bases".')
        self.model = model
        self.tokens = BaseTokens.of(tokenizer)
        self.context = context_length(model.config, tokenizer) - len(self.tokens.before) - len(self.tokens.after)
        self.output, self.strands = output, strands
        self.start, self.stop, self.layer, self.pooling = start, stop, layer, pooling
        self.eval()

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """The output for one-hot sequences or mixtures (batch, 4, length) of any dtype, in at least float32.

        Raises:
            ValueError: if the shape is another, a sequence is longer than the model's context, or the model's head
                does not give the output.
        """
        if sequences.dim() != 3 or sequences.shape[1] != len(BASES) or not 0 < sequences.shape[2] <= self.context:
            raise ValueError(
                f"expected one-hot sequences of (batch, 4, length) with 1 to {self.context:,} bases, the most that "
                f"the model reads at once; got {tuple(sequences.shape)}."
            )
        sequences = sequences.to(at_least_float32(sequences.dtype))
        strands = {"forward": (False,), "reverse": (True,), "both": (False, True)}[self.strands]
        return torch.stack([self._of_strand(sequences, is_reverse) for is_reverse in strands]).mean(0)

    def _of_strand(self, sequences: torch.Tensor, is_reverse: bool) -> torch.Tensor:
        length, first = sequences.shape[2], len(self.tokens.before)
        start, stop = self._part(length)
        outputs = self._outputs(sequences.flip(1, 2) if is_reverse else sequences)
        if self.output == "embedding":
            if is_reverse:
                start, stop = length - stop, length - start
            hidden = self._layer(outputs)[:, first + start : first + stop]
            return pool(hidden, torch.ones(hidden.shape[:2], device=hidden.device), self.pooling)
        if self.output == "classes":
            logits = self._logits(outputs, self.model.config.num_labels)
            if logits.dim() == 2:
                return logits  # (batch, classes)
            logits = logits[:, first : first + length].transpose(1, 2)
            return logits.flip(2) if is_reverse else logits  # (batch, classes, length)
        unpredicted = 0.0 if self.output == "log_likelihood" else -math.log(len(BASES))
        found = self._log_probabilities(outputs, unpredicted)[:, :, first : first + length]
        found = found.flip(1, 2) if is_reverse else found  # (batch, 4, length)
        if self.output == "bases":
            return found
        return (sequences * found)[:, :, start:stop].sum((1, 2)).unsqueeze(1)

    def _outputs(self, sequences: torch.Tensor) -> Any:
        """What the model makes of sequences; by its plain tokens where these are certain and no gradient is asked."""
        rest = 1 - sequences.sum(1, keepdim=True)
        letters = torch.cat([sequences, rest], dim=1).transpose(1, 2)  # (batch, length, 5)
        tokens = self.tokens
        ids = torch.tensor([*tokens.bases, tokens.other], device=letters.device)[letters.argmax(-1)]
        around = [ids.new_tensor(each).expand(len(ids), -1) for each in (tokens.before, tokens.after)]
        arguments: dict[str, Any] = {"input_ids": torch.cat([around[0], ids, around[1]], dim=1)}
        if self.output == "embedding":
            arguments["output_hidden_states"] = True
        needs_gradient = torch.is_grad_enabled() and letters.requires_grad
        if not needs_gradient and bool(((letters == 0) | (letters == 1)).all()):
            return self.model(**arguments)
        with soft_letters(self.model, letters, tokens):
            return self.model(**arguments)

    def _part(self, length: int) -> tuple[int, int]:
        stop = length if self.stop is None else self.stop
        if not 0 <= self.start < stop <= length:
            raise ValueError(f"expected 0 <= start < stop <= {length} (the length), got {self.start} and {stop}.")
        return self.start, stop

    def _layer(self, outputs: Any) -> torch.Tensor:
        layers = outputs.hidden_states
        if not -len(layers) <= self.layer < len(layers):
            raise ValueError(f"layer: expected 0 to {len(layers) - 1}, or -1 for the last, got {self.layer}.")
        return _wide(layers[self.layer])

    def _logits(self, outputs: Any, width: int | None) -> torch.Tensor:
        logits = getattr(outputs, "logits", None)
        if logits is None or (width is not None and logits.shape[-1] != width):
            raise ValueError(f'the head of {type(self.model).__name__} does not give output="{self.output}".')
        return _wide(logits)

    def _log_probabilities(self, outputs: Any, unpredicted: float) -> torch.Tensor:
        """log P of A, C, G and T at each token: (batch, 4, tokens)."""
        logits = self._logits(outputs, None)
        found = logits.log_softmax(-1)[..., list(self.tokens.bases)].transpose(1, 2)
        return found if self.is_masked else F.pad(found[..., :-1], (1, 0), value=unpredicted)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(at_least_float32(x.dtype))
