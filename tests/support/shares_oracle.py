"""Shares of k-mers by brute force: loops over positions, taps and k-mers in float64, written apart from the code.

It follows the rules in words: gate, root mean squares and sigmoid(c) are held at the values that they have.
"""

import math

import torch
from memory_oracle import rms_norm, window_features


def kmers_in_window(tokens, sizes, window, letters, position, centred=False, segments=None):
    """(number of the size, start) of the k-mers that a position's window holds."""
    segments = [0] * len(tokens) if segments is None else segments
    right = (window - 1) // 2 if centred else 0
    found = []
    for index, size in enumerate(sizes):
        for start in range(position + right - window + 1, position + right - size + 2):
            places = range(start, start + size)
            if start < 0 or start + size > len(tokens):
                continue
            if all(tokens[place] in letters and segments[place] == segments[position] for place in places):
                found.append((index, start))
    return found


def row_of(tokens, letters, start, size):
    """Row of a k-mer in its table: its letters are base-5 digits, the first the most significant."""
    return sum(letters.index(tokens[start + place]) * 5 ** (size - 1 - place) for place in range(size))


def projected(tokens, weights, sizes, window, letters, position, which, **options):
    """What each k-mer of a window adds to key or value of a position: {(number of the size, start): (hidden,)}."""
    held = kmers_in_window(tokens, sizes, window, letters, position, **options)
    result = {}
    for index, start in held:
        table = weights[f"embeddings.{index}.weight"]
        width = table.shape[1]
        part = weights[f"{which}_proj.weight"][:, index * width : (index + 1) * width]
        count = sum(other == index for other, _ in held)
        result[index, start] = part @ table[row_of(tokens, letters, start, sizes[index])] / count
    return result


def shares_of(hidden, tokens, weights, target, *, sizes, window, letters, dilation, eps, centred=False, segments=None):
    """{(position, number of the size, start): share} of one sequence.

    `target` is "gate_logit", or directions (length, hidden) of the output.
    """
    options = {"centred": centred, "segments": segments}
    tables = [weights[f"embeddings.{index}.weight"] for index in range(len(sizes))]
    features = window_features(tokens, tables, sizes, window, letters, centred, segments)
    key, value = features @ weights["key_proj.weight"].T, features @ weights["value_proj.weight"].T
    query = rms_norm(hidden, weights["norm_q.weight"], eps)
    size = hidden.shape[-1]
    logit = (query * rms_norm(key, weights["norm_k.weight"], eps)).sum(-1) / math.sqrt(size)
    gate = [1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(g), 1e-6)), g))) for g in logit.tolist()]
    found = {}

    def add(position, source, direction, which, factor):
        parts = projected(tokens, weights, sizes, window, letters, source, which, **options)
        for (index, start), vector in parts.items():
            place = (position, index, start)
            found[place] = found.get(place, 0.0) + factor * float(direction @ vector)

    if isinstance(target, str):
        for position in range(len(tokens)):
            scale = math.sqrt(float(key[position].square().mean()) + eps) * math.sqrt(size)
            add(position, position, query[position] * weights["norm_k.weight"] / scale, "key", 1.0)
        return found
    taps = weights.get("short_conv.conv.weight")
    for position in range(len(tokens)):
        add(position, position, target[position], "value", gate[position])
        if taps is None:
            continue
        count = taps.shape[-1]
        move = (count - 1) * dilation // 2 if centred else 0
        sources = []
        for tap in range(count):
            source = position + move - (count - 1 - tap) * dilation
            if 0 <= source < len(tokens) and (segments is None or segments[source] == segments[position]):
                sources.append((source, taps[:, 0, tap]))
        mixed = sum((gate[s] * tap * value[s] for s, tap in sources), torch.zeros(size, dtype=torch.float64))
        for source, tap in sources:
            direction = target[position] / (1 + torch.exp(-mixed)) * tap
            add(position, source, direction, "value", gate[source])
    return found
