"""The whole model by brute force: one sequence, float64, loops over positions, heads and experts.

Written from the prose of DESIGN.md section 1 and apart from the code it judges, on weights as the authors name and lay
them out (Megatron's local specification, "canonical"): what is wrong in a conversion is wrong here too. Two steps are
taken in float32 because the authors take them so: the angles of the rotary embedding and the softmax over experts.
"""

import math

import torch
from memory_oracle import memory, rms_norm


def silu(x):
    return x / (1 + torch.exp(-x))


def rotate(vector, position, base):
    """Rotary embedding of one head at one position: pairs are half a head apart."""
    half = vector.shape[0] // 2
    rotated = torch.empty_like(vector)
    for i in range(half):
        frequency = 1 / base ** (torch.tensor(2 * i, dtype=torch.float32) / (2 * half))
        angle = position * frequency
        cos, sin = torch.cos(angle).double(), torch.sin(angle).double()
        rotated[i] = vector[i] * cos - vector[half + i] * sin
        rotated[half + i] = vector[half + i] * cos + vector[i] * sin
    return rotated


def attention(x, qkv, projection, *, heads, groups, head_dim, base, is_causal):
    """(length, hidden). `qkv` holds, group after group, the rows of its queries, its key, its value."""
    length, per_group = x.shape[0], heads // groups
    per_head = []
    for group in range(groups):
        start = group * (per_group + 2) * head_dim
        block = qkv[start : start + (per_group + 2) * head_dim]
        key, value = block[per_group * head_dim :].split(head_dim)
        keys = [rotate(key @ x[t], t, base) for t in range(length)]
        values = [value @ x[t] for t in range(length)]
        for head in range(per_group):
            query = block[head * head_dim : (head + 1) * head_dim]
            rows = []
            for t in range(length):
                q = rotate(query @ x[t], t, base)
                seen = range(t + 1) if is_causal else range(length)
                scores = torch.stack([q @ keys[s] for s in seen]) / math.sqrt(head_dim)
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                rows.append(sum(w * values[s] for w, s in zip(weights, seen, strict=True)))
            per_head.append(torch.stack(rows))
    return torch.cat(per_head, dim=-1) @ projection.T


def swiglu(x, fc1, fc2):
    """`fc1` holds the rows of the gate, then those of the other branch."""
    gate, up = fc1.chunk(2)
    return fc2 @ (silu(gate @ x) * (up @ x))


def mixture(x, weights, *, top_k, pre_softmax):
    """Each token's `top_k` best experts, weighted by a softmax over them (or over all, if `pre_softmax`)."""
    router = weights["router.weight"]
    out = []
    for token in x:
        scores = router @ token
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:top_k]
        share = torch.softmax((scores if pre_softmax else scores[best]).float(), dim=0).double()
        total = torch.zeros_like(token)
        for rank, expert in enumerate(best):
            name = f"experts.local_experts.{expert}"
            result = swiglu(token, weights[f"{name}.linear_fc1.weight"], weights[f"{name}.linear_fc2.weight"])
            total = total + share[expert if pre_softmax else rank] * result
        out.append(total)
    return torch.stack(out)


def below(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def logits(
    tokens,
    weights,
    *,
    layers,
    heads,
    groups,
    head_dim,
    experts,
    top_k,
    pre_softmax,
    eps,
    base,
    memory_layers,
    sizes,
    window,
    letters,
    dilation,
    is_causal=True,
):
    """(length, vocabulary) of one list of tokens. `memory_layers` counts from 1, `experts` 0 is a dense model."""
    weights = {name: value.double() for name, value in weights.items()}
    embedding = weights["embedding.word_embeddings.weight"]
    h = embedding[torch.tensor(tokens)]
    for i in range(layers):
        layer = below(weights, f"decoder.layers.{i}.")
        if i + 1 in memory_layers:
            h = h + memory(
                h,
                tokens,
                below(layer, "gengram."),
                sizes=sizes,
                window=window,
                letters=letters,
                dilation=dilation,
                centred=not is_causal,
            )
        h = h + attention(
            rms_norm(h, layer["input_layernorm.weight"], eps),
            layer["self_attention.linear_qkv.weight"],
            layer["self_attention.linear_proj.weight"],
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            base=base,
            is_causal=is_causal,
        )
        x = rms_norm(h, layer["pre_mlp_layernorm.weight"], eps)
        feed_forward = below(layer, "mlp.")
        if experts:
            h = h + mixture(x, feed_forward, top_k=top_k, pre_softmax=pre_softmax)
        else:
            fc1, fc2 = feed_forward["linear_fc1.weight"], feed_forward["linear_fc2.weight"]
            h = h + torch.stack([swiglu(token, fc1, fc2) for token in x])
    h = rms_norm(h, weights["decoder.final_layernorm.weight"], eps)
    return h @ weights.get("output_layer.weight", embedding).T
