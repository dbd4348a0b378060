"""The motif memory by brute force: loops over positions and letters, float64, written apart from the code it judges.

It follows the prose of DESIGN.md section 1, not our operators: n-grams are found as slices of the token list, counted
and averaged one by one; the convolution is a double loop.
"""

import math

import torch


def window_features(tokens, tables, sizes, window, letters, centred=False, segments=None):
    """(length, sum of widths): concatenated mean embeddings of the n-grams inside each window."""
    length = len(tokens)
    digit = {token: value for value, token in enumerate(letters)}
    segments = [0] * length if segments is None else segments
    rows = []
    for t in range(length):
        right = (window - 1) // 2 if centred else 0
        low, high = t + right - window + 1, t + right
        parts = []
        for table, n in zip(tables, sizes, strict=True):
            found = []
            for start in range(low, high - n + 2):
                gram = range(start, start + n)
                if start < 0 or start + n > length:
                    continue
                if any(tokens[i] not in digit or segments[i] != segments[t] for i in gram):
                    continue
                index = 0
                for i in gram:  # the last letter is the least significant digit
                    index = index * 5 + digit[tokens[i]]
                found.append(table[index])
            parts.append(sum(found) / len(found) if found else torch.zeros(table.shape[1], dtype=table.dtype))
        rows.append(torch.cat(parts))
    return torch.stack(rows) if rows else torch.zeros(0, sum(t.shape[1] for t in tables), dtype=tables[0].dtype)


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def memory(hidden, tokens, weights, *, sizes, window, letters, dilation, eps=1e-5, centred=False, segments=None):
    """Residual (length, hidden) of one sequence.

    `weights` has the original's names: embeddings.{j}.weight, key_proj.weight, value_proj.weight, norm_q.weight,
    norm_k.weight and, if there is a convolution, short_conv.conv.weight (hidden, 1, taps).
    """
    tables = [weights[f"embeddings.{j}.weight"] for j in range(len(sizes))]
    features = window_features(tokens, tables, sizes, window, letters, centred, segments)
    key = features @ weights["key_proj.weight"].T
    value = features @ weights["value_proj.weight"].T
    query = rms_norm(hidden, weights["norm_q.weight"], eps)
    key = rms_norm(key, weights["norm_k.weight"], eps)
    g = (query * key).sum(-1) / math.sqrt(hidden.shape[-1])
    gate = 1 / (1 + torch.exp(-torch.sign(g) * torch.sqrt(torch.clamp(g.abs(), min=1e-6))))
    u = gate[:, None] * value
    if "short_conv.conv.weight" not in weights:
        return u
    conv = weights["short_conv.conv.weight"]
    taps = conv.shape[-1]
    move = (taps - 1) * dilation // 2 if centred else 0
    out = []
    for t in range(len(tokens)):
        mixed = torch.zeros_like(u[t])
        for i in range(taps):
            source = t + move - (taps - 1 - i) * dilation
            if 0 <= source < len(tokens) and (segments is None or segments[source] == segments[t]):
                mixed = mixed + conv[:, 0, i] * u[source]
        out.append(u[t] + mixed / (1 + torch.exp(-mixed)))
    return torch.stack(out) if out else u
