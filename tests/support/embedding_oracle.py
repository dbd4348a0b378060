"""Embeddings by brute force: every window alone, through the tokenizer, and every base looked up by itself."""

import numpy as np
import torch

from gengram.sequences.alphabet import reverse_complement


def best_windows(length, context, overlap, both_sides):
    """For every base the window (start, end) that shows the model most, by looking at all windows."""
    starts = []
    while not starts or starts[-1] + context < length:
        starts.append(min(len(starts) * (context - overlap), max(0, length - context)))
    windows = [(start, min(start + context, length)) for start in starts]
    found = []
    for base in range(length):
        holding = [window for window in windows if window[0] <= base < window[1]]
        if both_sides:
            found.append(min(holding, key=lambda window: abs((window[0] + window[1] - 1) / 2 - base)))
        else:
            found.append(max(holding, key=lambda window: base - window[0]))
    return found


def base_vectors(model, tokenizer, text, layer, context, overlap, both_sides=False, before=0):
    """A vector of each base of a sequence as it is read: (length, hidden) float64.

    `before` is the number of tokens that the tokenizer puts in front of a sequence.
    """
    states = {}
    vectors = []
    for base, (start, end) in enumerate(best_windows(len(text), context, overlap, both_sides)):
        if (start, end) not in states:
            batch = tokenizer(text[start:end].upper(), return_tensors="pt")
            with torch.no_grad():
                outputs = model(input_ids=batch["input_ids"], output_hidden_states=True)
            states[start, end] = outputs.hidden_states[layer][0].double().numpy()
        vectors.append(states[start, end][before + base - start])
    return np.array(vectors)


def strand_vectors(model, tokenizer, text, strands, *arguments, **named):
    """The vectors of each strand that is read, in its own order."""
    read = {"both": "+-", "forward": "+", "reverse": "-"}[strands]
    texts = [text if strand == "+" else reverse_complement(text) for strand in read]
    return [base_vectors(model, tokenizer, own, *arguments, **named) for own in texts]


def pooled(vectors, pooling):
    """(length, hidden) -> (hidden,)"""
    if pooling == "mean":
        return vectors.mean(0)
    if pooling == "max":
        return vectors.max(0)
    return vectors[{"last": len(vectors) - 1, "centre": (len(vectors) - 1) // 2}[pooling]]


def embedding(model, tokenizer, text, pooling, strands, *arguments, **named):
    """A vector of a sequence, or for the pooling `none` one of each base in its own order; the mean of the strands."""
    found = strand_vectors(model, tokenizer, text, strands, *arguments, **named)
    if pooling != "none":
        return np.mean([pooled(vectors, pooling) for vectors in found], axis=0)
    if strands != "forward":
        found[-1] = found[-1][::-1]
    return np.mean(found, axis=0)
