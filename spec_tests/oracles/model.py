"""A second DeepSeek-V3, written naively: float64, one number at a time, from weights to taps.

It exists to disagree with the specification when the specification is wrong, so it shares no code
with it and is written in the opposite style: plain loops over sequences, tokens, heads, channels,
groups and experts, and numpy for nothing but 1-D dot products. `spec_tests/golden` anchors it in
recorded runs of transformers 5.23.0 and of DeepSeek's own code. Sources: the technical report (R),
DeepSeek's inference/model.py, and transformers' modeling_deepseek_v3.py and _v2.py.
"""

import math

import numpy as np

from .attention import mla, rms_norm, rotations
from .moe import mixture, swiglu


class Notes:
    """What the forward pass saw: tap -> {index: value}, turned into arrays at the end."""

    def __init__(self):
        self.cells = {}

    def at(self, unit, b):
        """The note-taker of one sequence: note(tap, value, *further indices)."""

        def note(tap, value, *index):
            self.put(f"{unit}/{tap}", (b, *index), value)

        return note

    def put(self, tap, index, value):
        self.cells.setdefault(tap, {})[index] = value

    def arrays(self):
        """Every tap as one array, leading axes the indices it was noted under."""
        return {tap: _stack(cells) for tap, cells in self.cells.items()}


def _stack(cells):
    indices = list(cells)
    shape = [1 + max(index[axis] for index in indices) for axis in range(len(indices[0]))]
    first = np.asarray(cells[indices[0]])
    out = np.full((*shape, *first.shape), -1 if first.dtype.kind == "i" else np.nan, first.dtype)
    for index, value in cells.items():
        out[index] = value
    return out


def forward(config, weights, tokens, positions=None, valid=None, documents=None):
    """All taps of one forward pass: {tap: float64 or int array}.

    tokens, positions, valid, documents are (B, S) int. positions default to 0..S-1; valid is 1 for
    real tokens (padded keys are invisible); documents are ids between which nothing attends. A
    query that sees no key at all (padding) attends to nothing and gets a zero context.
    """
    weights, notes = float64(weights), Notes()
    tokens = np.asarray(tokens)
    turns, visible, xs = _inputs(config, weights, tokens, positions, valid, documents, notes)
    for layer in range(config["num_hidden_layers"]):
        xs = decoder_layer(config, weights, layer, xs, turns, visible, notes, f"fwd/L{layer}")
    head = weights[head_name(config)]
    for b, sequence in enumerate(xs):
        for s, x in enumerate(sequence):
            h = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
            notes.put("fwd/final_norm", (b, s), h)
            notes.put("fwd/logits", (b, s), times(head, h))
    return notes.arrays()


def float64(weights):
    """The same weights as float64 arrays."""
    return {name: np.asarray(w, np.float64) for name, w in weights.items()}


def times(matrix, x):
    """y[o] = sum_i W[o, i] x[i], one output channel after the other."""
    return np.array([float(np.dot(row, x)) for row in matrix])


def head_name(config):
    return "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"


def _inputs(config, weights, tokens, positions, valid, documents, notes):
    """Rotations, visibility and embeddings of every token, noted as rope_tables, mask and embed."""
    count, length = tokens.shape
    if positions is None:
        positions = [list(range(length)) for _ in range(count)]
    turns, visible, xs = [], [], []
    for b in range(count):
        turns.append([rotations(config, int(p)) for p in positions[b]])
        visible.append(
            visible_keys(
                length,
                None if valid is None else valid[b],
                None if documents is None else documents[b],
            )
        )
        xs.append([weights["model.embed_tokens.weight"][int(t)] for t in tokens[b]])
        for s in range(length):
            notes.put("fwd/embed", (b, s), xs[b][s])
            notes.put(
                "fwd/mask",
                (b, 0, s),
                np.array([0.0 if seen else -math.inf for seen in visible[b][s]]),
            )
            for i, turn in enumerate(turns[b][s]):
                notes.put("fwd/mla.rope_tables", (0, b, s, i), turn.real)
                notes.put("fwd/mla.rope_tables", (1, b, s, i), turn.imag)
    return turns, visible, xs


def visible_keys(length, valid, documents):
    """visible[s][t]: may query s see key t? No future, no padding, no other document."""
    table = [[False] * length for _ in range(length)]
    for s in range(length):
        for t in range(s + 1):
            real = valid is None or bool(valid[t])
            same = documents is None or documents[s] == documents[t]
            table[s][t] = real and same
    return table


def is_mixture(config, layer):
    """Is the FFN of this layer (from 0; MTP layers count on) a mixture of experts?"""
    past_dense = layer >= (config.get("first_k_dense_replace") or 0)
    return past_dense and layer % (config.get("moe_layer_freq") or 1) == 0


def decoder_layer(config, weights, layer, xs, turns, visible, notes, unit):
    """x + MLA(norm(x)), then x + FFN(norm(x)), for a batch of sequences of vectors."""
    at, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
    middle, normed = [], []
    for b, sequence in enumerate(xs):
        note = notes.at(unit, b)
        before = [rms_norm(x, weights[at + "input_layernorm.weight"], eps) for x in sequence]
        attended = mla(config, weights, at + "self_attn.", before, turns[b], visible[b], note)
        middle.append([x + y for x, y in zip(sequence, attended, strict=True)])
        normed.append([rms_norm(x, weights[at + "post_attention_layernorm.weight"], eps) for x in middle[b]])
        for s in range(len(sequence)):
            note("attn_norm", before[s], s)
            note("attn_out", attended[s], s)
            note("resid_mid", middle[b][s], s)
            note("ffn_norm", normed[b][s], s)
    return _feed_forward(config, weights, layer, middle, normed, notes, unit)


def _feed_forward(config, weights, layer, middle, normed, notes, unit):
    at = f"model.layers.{layer}.mlp."
    if is_mixture(config, layer):
        out = mixture(config, weights, at, normed, notes, unit)
    else:
        out = [
            [swiglu(weights, at, x, notes.at(unit, b), "mlp", s) for s, x in enumerate(sequence)]
            for b, sequence in enumerate(normed)
        ]
    result = []
    for b, sequence in enumerate(middle):
        result.append([x + y for x, y in zip(sequence, out[b], strict=True)])
        for s in range(len(sequence)):
            notes.put(f"{unit}/ffn_out", (b, s), out[b][s])
            notes.put(f"{unit}/resid", (b, s), result[b][s])
    return result


def cross_entropy(logits, labels, shift=1):
    """Mean of -log softmax(logits[:, i])[labels[:, i + shift]], labels of -100 left out."""
    terms = []
    for rows, wanted in zip(np.asarray(logits, np.float64), np.asarray(labels), strict=True):
        for i in range(len(wanted) - shift):
            if wanted[i + shift] != -100:
                terms.append(_surprise(rows[i], int(wanted[i + shift])))
    return math.fsum(terms) / len(terms)


def _surprise(row, label):
    top = max(row)
    return top + math.log(math.fsum(math.exp(z - top) for z in row)) - row[label]


def loss(config, weights, tokens, labels):
    """Mean cross-entropy of logits[:, :-1] against labels[:, 1:], labels of -100 left out."""
    return cross_entropy(forward(config, weights, tokens)["fwd/logits"], labels)
