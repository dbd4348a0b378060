"""Effects of variants by brute force: whole windows, one at a time, in float64, without caches and batches."""

import math
import random

import torch

COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def random_sequence(length: int, seed: int) -> str:
    """Bases, with a few runs of N, some of them in lower case."""
    generator = random.Random(seed)
    letters = generator.choices("ACGTacgt", k=length)
    for _ in range(length // 80):
        start = generator.randrange(length)
        letters[start : start + generator.randint(1, 4)] = "N" * len(letters[start : start + generator.randint(1, 4)])
    return "".join(letters[:length])


def random_variant(sequence: str, generator: random.Random, longest: int = 6) -> tuple[int, str, str]:
    """A substitution, insertion, deletion or both, often at an end of the sequence: start, reference, alternative."""
    while True:
        start = generator.choice(
            [generator.randrange(len(sequence)), min(generator.randrange(4), len(sequence) - 1), len(sequence) - 1]
        )
        kind = generator.choice(["snv", "snv", "mnv", "insertion", "deletion", "anchored", "both"])
        length = {"snv": 1, "insertion": 1}.get(kind, generator.randint(1, longest))
        reference = sequence[start : start + length]
        other = "".join(generator.choices("ACGTacgtN", k=generator.randint(1, longest)))
        if kind in ("snv", "mnv"):
            alternative = "".join(generator.choices("ACGT", k=len(reference)))
        elif kind == "insertion":
            alternative = reference + other
        elif kind == "deletion":
            alternative = other[:1]
        else:
            alternative = reference[0] if kind == "anchored" else other
        is_cell = alternative.upper() in ("NA", "NAN")  # which stand for an empty cell of a table
        if "N" not in reference and not is_cell and reference.upper() != alternative.upper():
            return start, reference, alternative


def windows(sequence: str, start: int, reference: str, alternative: str, length: int) -> tuple[str, str, int]:
    """Both windows in upper case, and where the alleles begin, by DESIGN.md, section 9."""
    deleted = max(0, len(reference) - len(alternative))
    length = min(length, len(sequence) - deleted)
    left = min(max(start - length // 2, 0), len(sequence) - length - deleted)
    edited = sequence[:start] + alternative + sequence[start + len(reference) :]
    return sequence[left : left + length].upper(), edited[left : left + length].upper(), start - left


def reversed_complement(window: str) -> str:
    """The other strand, letter by letter."""
    return "".join(COMPLEMENT[letter] for letter in reversed(window))


class Oracle:
    """Numbers of a causal model in float64.

    Args:
        model: a causal model in float64.
        ids: of the tokens, by letter.
        before: ids in front of every window.
    """

    def __init__(self, model, ids: dict[str, int], before: tuple[int, ...] = ()):
        self.model, self.ids, self.before = model.eval(), ids, before
        self.memories = [m for m in model.modules() if type(m).__name__ == "MotifMemory"]
        self._known: dict[str, tuple] = {}

    @torch.no_grad()
    def read(self, window: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """log P (length, vocabulary) after each letter, last hidden states, and what each memory added."""
        if window not in self._known:
            residuals: list[torch.Tensor] = []
            hooks = [m.register_forward_hook(lambda _m, _i, o: residuals.append(o.residual[0])) for m in self.memories]
            ids = torch.tensor([[*self.before, *(self.ids[letter] for letter in window)]])
            outputs = self.model(input_ids=ids, output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            skip = len(self.before)
            self._known[window] = (
                outputs.logits[0, skip:].double().log_softmax(-1),
                outputs.hidden_states[-1][0, skip:].double(),
                [residual[skip:].double() for residual in residuals],
            )
        return self._known[window]

    def log_likelihoods(self, window: str) -> list[float]:
        """log P(base | letters before it) of all bases but the first letter; N is none."""
        chances = self.read(window)[0]
        places = [place for place in range(1, len(window)) if window[place] in "ACGT"]
        return [float(chances[place - 1, self.ids[window[place]]]) for place in places]

    def llr(self, reference: str, alternative: str) -> float:
        """log P(alternative) - log P(reference), of equally many bases: the last ones of either do not count."""
        one, two = self.log_likelihoods(reference), self.log_likelihoods(alternative)
        count = min(len(one), len(two))
        return sum(two[:count]) - sum(one[:count])

    def effect(self, reference: str, alternative: str, last_reference: int, last_alternative: int) -> dict[str, float]:
        """The numbers of one strand; `last_...` are the places of the alleles' last bases."""
        (p, h, m), (q, g, n) = self.read(reference), self.read(alternative)
        places = [
            (last_reference + step, last_alternative + step)
            for step in range(len(reference))
            if max(last_reference, last_alternative) + step < len(reference)
        ]
        found = {"llr": self.llr(reference, alternative)}
        if not places:
            return found | dict.fromkeys(("jsd", "embedding_distance", "memory_change"), math.nan)
        jsd = 0.0
        for a, b in places:
            one = [math.exp(float(p[a, self.ids[base]])) for base in "ACGT"]
            two = [math.exp(float(q[b, self.ids[base]])) for base in "ACGT"]
            for x, y in zip(one, two, strict=True):
                x, y = x / sum(one), y / sum(two)
                jsd += x * math.log(2 * x / (x + y)) / 2 + y * math.log(2 * y / (x + y)) / 2
        window = (g.mean(0) - h.mean(0)).norm() ** 2
        allele = (g[places[0][1]] - h[places[0][0]]).norm() ** 2
        found |= {"jsd": jsd, "embedding_distance": float(window + allele) ** 0.5}
        norms = [
            sum(float((after[b] - before[a]).square().sum()) for a, b in places) ** 0.5
            for before, after in zip(m, n, strict=True)
        ]
        return found | ({"memory_change": sum(norms) / len(norms)} if norms else {})

    def both_strands(
        self, sequence: str, start: int, reference: str, alternative: str, length: int
    ) -> list[dict[str, float]]:
        """The numbers of a variant on the forward and on the reverse strand."""
        before, after, index = windows(sequence, start, reference, alternative, length)
        last = len(before) - index - 1
        return [
            self.effect(before, after, index + len(reference) - 1, index + len(alternative) - 1),
            self.effect(reversed_complement(before), reversed_complement(after), last, last),
        ]
