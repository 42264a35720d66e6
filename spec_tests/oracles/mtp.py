"""The oracle's multi-token prediction (R section 2.2, eqs 21-25), one depth after the other.

Depth k reads the previous hidden at i and the embedding of token i+k, and predicts token i+k+1, for
i < S - k.
"""

import numpy as np

from .attention import linear, rms_norm, rotations
from .model import Notes, cross_entropy, decoder_layer, float64, forward, head_name, times, visible_keys


def mtp_forward(config, weights, tokens, depth, hidden="post_norm", concat="embedding_first"):
    """Taps fwd/mtp1/... to fwd/mtp{depth}/..., from the hidden before or after the final norm."""
    taps = forward(config, weights, tokens)
    last = f"fwd/L{config['num_hidden_layers'] - 1}/resid"
    start = taps["fwd/final_norm" if hidden == "post_norm" else last]
    return mtp_from_hidden(config, weights, tokens, start, depth, concat)


def mtp_from_hidden(config, weights, tokens, hidden, depth, concat="embedding_first"):
    """The same from a given hidden (B, S, D), held constant."""
    weights, notes, tokens = float64(weights), Notes(), np.asarray(tokens)
    previous = [list(rows) for rows in np.asarray(hidden, np.float64)]
    for k in range(1, depth + 1):
        previous = _depth(config, weights, tokens, previous, k, concat, notes)
    return notes.arrays()


def _depth(config, weights, tokens, previous, k, concat, notes):
    layer, unit, length = config["num_hidden_layers"] + k - 1, f"fwd/mtp{k}", tokens.shape[1] - k
    at, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
    xs = []
    for b, row in enumerate(tokens):
        note = notes.at(unit, b)
        xs.append([_enter(weights, at, eps, previous[b][i], int(row[i + k]), concat, note, i) for i in range(length)])
    turns = [rotations(config, i) for i in range(length)]  # a constant shift of positions changes no score
    batch = len(xs)
    ys = decoder_layer(
        config,
        weights,
        layer,
        xs,
        [turns] * batch,
        [visible_keys(length, None, None)] * batch,
        notes,
        unit,
    )
    head, out = weights[head_name(config)], []
    for b, sequence in enumerate(ys):
        out.append([rms_norm(y, weights[at + "shared_head.norm.weight"], eps) for y in sequence])
        for i, h in enumerate(out[b]):
            notes.put(f"{unit}/norm", (b, i), h)
            notes.put(f"{unit}/logits", (b, i), times(head, h))
    return out


def _enter(weights, at, eps, hidden, token, concat, note, i):
    """eh_proj [enorm(emb) ; hnorm(hidden)], as all released weights; R eq 21: hidden first."""
    embedding = weights["model.embed_tokens.weight"][token]
    e, h = (
        rms_norm(embedding, weights[at + "enorm.weight"], eps),
        rms_norm(hidden, weights[at + "hnorm.weight"], eps),
    )
    both = np.concatenate([e, h] if concat == "embedding_first" else [h, e])
    x = linear(weights, at + "eh_proj", both)
    for tap, value in (
        ("hidden", hidden),
        ("emb", embedding),
        ("enorm", e),
        ("hnorm", h),
        ("cat", both),
        ("proj", x),
    ):
        note(tap, value, i)
    return x


def mtp_losses(taps, labels, depth, mean="terms"):
    """[L^1, ..., L^depth]: depth k's cross-entropy of position i against labels[i+k+1].

    mean="terms" divides by the labels there are (-100 left out), "length" by S - 1, which is the T
    of R eq 24 (without -100).
    """
    labels, losses = np.asarray(labels), []
    for k in range(1, depth + 1):
        average = cross_entropy(taps[f"fwd/mtp{k}/logits"], labels[:, k:])
        longest = labels.shape[1] - 1
        losses.append(average if mean == "terms" else average * (longest - k) / longest)
    return losses


def mtp_loss(config, weights, tokens, labels, depth, factor=0.3, hidden="post_norm", concat="embedding_first"):
    """factor times the mean over depths of each depth's mean cross-entropy (R eq 25)."""
    taps = mtp_forward(config, weights, tokens, depth, hidden, concat)
    return factor * sum(mtp_losses(taps, labels, depth)) / depth
