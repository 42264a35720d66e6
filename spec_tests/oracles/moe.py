"""The oracle's feed-forward: SwiGLU, the router one token at a time, experts one by one, and the
balancing rules.

Sources: R section 2.1.2 (eqs 12-20), transformers 5.23.0 modeling_deepseek_v3 and
modeling_deepseek_v2, DeepSeek inference/model.py; the tie rule (lower index) is that of DeepSeek's
TileKernels top2_sum_gate.
"""

import math

import numpy as np

from .attention import linear, softmax


def sigmoid(z):
    """1 / (1 + e^-z) without overflow."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def swiglu(weights, at, x, note, name, *index):
    """W_down (silu(W_gate x) * W_up x), intermediates noted as NAME.gate, NAME.up, NAME.act."""
    gate, up = linear(weights, at + "gate_proj", x), linear(weights, at + "up_proj", x)
    act = np.array([float(g) * sigmoid(float(g)) * float(u) for g, u in zip(gate, up, strict=True)])
    for tap, value in (("gate", gate), ("up", up), ("act", act)):
        note(f"{name}.{tap}", value, *index)
    return linear(weights, at + "down_proj", act)


def best(values, candidates, count):
    """The `count` candidates of largest value, ascending; ties go to the lower index."""
    return sorted(sorted(candidates, key=lambda i: (-values[i], i))[:count])


def route(config, weights, at, x, note, s):
    """(experts, weights) of one token, experts ascending (R eqs 12-16, group-limited)."""
    logits = linear(weights, at + "gate", x)
    if config.get("scoring_func", "sigmoid") == "sigmoid":
        scores = [sigmoid(float(z)) for z in logits]
    else:
        scores = softmax([float(z) for z in logits])
    bias = weights.get(at + "gate.e_score_correction_bias")
    choice = [v + (0.0 if bias is None else float(bias[e])) for e, v in enumerate(scores)]
    allowed = _allowed(config, choice, note, s)
    experts = best(choice, allowed, config["num_experts_per_tok"])
    shares = [scores[e] for e in experts]
    if config.get("norm_topk_prob", True):
        total = math.fsum(shares) + 1e-20
        shares = [v / total for v in shares]
    shares = [v * config.get("routed_scaling_factor", 1.0) for v in shares]
    for tap, value in (
        ("logits", logits),
        ("scores", scores),
        ("choice", choice),
        ("ids", experts),
        ("weights", shares),
    ):
        note("router." + tap, np.array(value), s)
    return experts, shares


def _allowed(config, choice, note, s):
    """Experts of the best groups: V3 ranks groups by their two best experts, V2 by the best."""
    count, method = config.get("n_group") or 1, config.get("topk_method", "noaux_tc")
    if count == 1 or method == "greedy":
        return list(range(len(choice)))
    size = len(choice) // count
    ranks = []
    for g in range(count):
        ordered = sorted(choice[g * size : (g + 1) * size], reverse=True)
        ranks.append(math.fsum(ordered[:2]) if method == "noaux_tc" else ordered[0])
    groups = best(ranks, range(count), config["topk_group"])
    note("router.group_scores", np.array(ranks), s)
    note("router.groups", np.array(groups), s)
    return [e for e in range(len(choice)) if e // size in groups]


def mixture(config, weights, at, xs, notes, unit):
    """sum_k weight_k expert_k(x), plus the shared expert (weight 1, not scaled)."""
    dispatched, out = [], []
    for b, sequence in enumerate(xs):
        note, rows = notes.at(unit, b), []
        for s, x in enumerate(sequence):
            routed = np.zeros(len(x))
            for expert, share in zip(*route(config, weights, at, x, note, s), strict=True):
                routed += share * _expert(weights, at, expert, x, dispatched, (b, s))
            note("moe.routed", routed, s)
            rows.append(routed + _shared(config, weights, at, x, note, s))
        out.append(rows)
    for row, (_, _, seen) in enumerate(sorted(dispatched, key=lambda item: item[:2])):
        for tap, value in seen.items():
            notes.put(f"{unit}/{tap}", (row,), value)
    return out


def _expert(weights, at, expert, x, dispatched, token):
    """One expert on one token; moe.rows and its company list these by expert, then token."""
    seen = {"moe.rows": x}
    y = swiglu(weights, f"{at}experts.{expert}.", x, lambda tap, value: seen.__setitem__(tap, value), "moe")
    seen["moe.down"] = y
    dispatched.append((expert, token, seen))
    return y


def _shared(config, weights, at, x, note, s):
    if not config.get("n_shared_experts"):
        return np.zeros(len(x))
    y = swiglu(weights, at + "shared_experts.", x, note, "shared", s)
    note("moe.shared", y, s)
    return y


def seq_balance_loss(scores, k, alpha):
    """alpha sum_i f_i P_i (R eqs 17-20); scores (S, E), or (B, S, E) for the mean over sequences.

    f_i counts the unbiased, ungrouped top-k of the scores; P_i is the mean over tokens of the
    scores normalised over all experts.
    """
    if np.ndim(scores) == 3:
        return math.fsum(seq_balance_loss(one, k, alpha) for one in scores) / len(scores)
    length, experts = np.shape(scores)
    chosen, share = [0] * experts, [0.0] * experts
    for row in scores:
        for e in best(row, range(experts), k):
            chosen[e] += 1
        total = math.fsum(row)
        for e in range(experts):
            share[e] += float(row[e]) / total
    terms = [experts / (k * length) * chosen[e] * share[e] / length for e in range(experts)]
    return alpha * math.fsum(terms)


def bias_update(bias, counts, gamma):
    """b_i + gamma below the mean load, - gamma above, unchanged if equal (R section 2.1.2)."""
    mean, new = sum(int(c) for c in counts) / len(counts), []
    for b, c in zip(bias, counts, strict=True):
        new.append(float(b) + (gamma if c < mean else -gamma if c > mean else 0.0))
    return np.array(new)
