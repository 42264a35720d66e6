"""What a known bug of the router, of experts and around them computes is what its title says: a formula of each, from the title."""

import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

from .test_corpus_formulas import B, C, S, check, random, softmax


def router():
    """Six experts, two chosen in no order, a bias that is no bfloat16 number."""
    z, bias = random(B, S, 6), random(6) / 7
    s, ids = 1 / (1 + np.exp(-z)), np.argsort(random(B, S, 6, 1)[..., 0], axis=-1)[..., :2]
    chosen = np.zeros((B, S, 2))
    for b, i, k in np.ndindex(B, S, 2):
        chosen[b, i, k] = s[b, i, ids[b, i, k]]
    total = chosen.sum(axis=-1, keepdims=True)
    leaked = chosen + bias[ids]
    b32 = bias.astype(np.float32)
    back = ((chosen.astype(np.float32) + b32[ids]) - b32[ids]).astype(float)
    on = {"normalise": True, "eps": 1e-3, "scale": 1.5}
    off = on | {"normalise": False}
    for id, static, other in (
        ("R01", on, leaked / (leaked.sum(axis=-1, keepdims=True) + 1e-3) * 1.5),
        ("R07", on, chosen * 1.5),
        ("R07b", off, chosen / (total + 1e-3) * 1.5),
        ("R08", on, chosen / (total + 1e-3) * 1.5),
        ("R08", off, chosen),
        ("R09", on, chosen / (total + 1e-3) * 1.5**2),
        ("R10", on, chosen / (total + 1e-3)),
        ("R12", on, chosen / total * 1.5),
        ("R13", on, chosen / total * 1.5 + 1e-3),
        ("R13b", on, chosen / total * 1.5),
        ("R14", on, back / (back.sum(axis=-1, keepdims=True) + 1e-3) * 1.5),
        ("X04", on, chosen / (s.sum(axis=-1, keepdims=True) + 1e-3) * 1.5),
        ("X07", on, chosen / (total + 1e-3) * 2.5),
        ("X02", on, chosen[..., ::-1] / (total + 1e-3) * 1.5),
    ):
        yield id, (s, ids), static | ({"reads": (bias,)} if id in ("R01", "R14") else {}), other
    faint = s * np.array([1e-4, 1e-6])[:, None, None]
    few = np.take_along_axis(faint, ids, axis=-1)
    sums = [[max(few[b, t].sum(), 6.103515625e-5) for t in range(few.shape[1])] for b in range(len(few))]
    yield "R13b", (faint, ids), on, few / np.array(sums)[..., None] * 1.5
    yield "R13b", (faint, ids), off, few * 1.5
    yield "R04", (z,), {"func": "sigmoid"}, softmax(z)
    yield "R04b", (z,), {"func": "softmax"}, s
    low = np.array([[[-100.0, -89.0, 0.0, 88.0, 100.0]]])
    yield "R12b", (low,), {"func": "sigmoid"}, np.array([[[0, 0, 0.5, 1, 1]]])
    yield "R05", (s, bias), {}, s + bias.astype(bfloat16).astype(float)
    yield "R18", (s, bias), {}, s
    yield "X03", (s, bias), {}, s - bias
    yield "X44", (s, bias), {}, 1 / (1 + np.exp(-(z + bias)))
    x, w, before = random(B, S, C), random(6, C), random(B, S, C, 1)[..., 0]
    yield "X05", (x, w), {"reads": (before,)}, np.einsum("bsd,ed->bse", before, w)


def routed():
    ids = np.array([[[2, 0], [1, 2], [0, 1]]])
    weights, down = np.array([[[0.7, 0.3], [0.2, 0.9], [0.4, 0.5]]]), random(6, C)
    row = {(0, 0): 0, (0, 2): 1, (1, 1): 2, (1, 2): 3, (2, 0): 4, (2, 1): 5}  # (expert, token), in this order

    def out(weight):
        return np.array([[sum(weight(t, k) * down[row[ids[0, t, k], t]] for k in range(2)) for t in range(3)]])

    yield "R09b", (down, ids, weights), {}, 2.5 * out(lambda t, k: weights[0, t, k])
    yield "R09b", (down, ids, None), {}, 2.5 * out(lambda t, k: 1)
    yield "R20", (down, ids, weights), {}, out(lambda t, k: weights[0, t, k] if ids[0, t, k] == max(ids[0, t]) else 0)
    yield "R20", (down, ids, None), {}, out(lambda t, k: ids[0, t, k] == max(ids[0, t]))
    yield "X46", (down, ids, weights), {}, out(lambda t, k: weights[0, t, k] ** 2)
    yield "X01", (down, ids, weights), {}, out(lambda t, k: 1)
    yield "X45/moe.routed", (down, ids, weights), {}, out(lambda t, k: 1)
    x = random(1, 3, C)
    sent = [weights[0, t, list(ids[0, t]).index(e)] * x[0, t] for e, t in sorted(row, key=row.get)]
    yield "X45", (x, ids), {"n_experts": 3, "reads": (weights,)}, np.array(sent)


def choice():
    """Eight experts in four groups, of which two are kept; scores below 0 where a group is dropped, and a tie of groups."""
    a = np.array([[[-0.5, -0.6, -0.1, -0.2, 0.9, -2.0, -1.0, -1.0], [0.9, 0.1, 0.8, 0.2, 0.3, 0.4, 0.6, 0.5]]])
    kept = np.array([[[1, 0], [0, 1]]])
    groups = np.array([[[-1.1, -0.3, -1.1, -2.0], [1.0, 1.0, 0.7, 1.1]]])
    static = {"k": 2, "n_group": 4, "fill": -np.inf}
    yield "R02", (a, kept), static, np.array([[[4, 5], [0, 2]]])  # every 0 beats what is kept
    yield "R02", (a, None), static, np.array([[[4, 2], [0, 2]]])
    yield "R04c", (a, kept), static, np.array([[[4, 2], [0, 2]]])
    yield "X06", (a, kept), static | {"reads": (groups,)}, np.array([[[4, 2], [0, 2]]])
    yield "R03", (a,), {"n_group": 4, "best": 2}, np.array([[[-0.5, -0.1, 0.9, -1.0], [0.9, 0.8, 0.4, 0.6]]])
    yield "R15", (groups,), {"topk_group": 2}, np.array([[[0, 1], [0, 1]]])
    yield "R15c", (groups,), {"topk_group": 2}, np.array([[[3, 0], [2, 0]]])
    plain, chosen = np.array([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]]]), {"n_group": 4, "best": 2}
    yield "X08", (a,), chosen | {"reads": (plain,)}, np.array([[[0.3, 0.7, 1.1, 1.6]]])
    bias = np.array([0, 0, 0, 9.0, 0, 1.0, 0, 0])  # expert 5 comes to the front of its group, 3 is in none that is kept
    own = static | {"reads": (bias,)}
    yield "X08-seen", (plain, np.array([[[2, 3]]])), own, np.array([[[5, 7]]])
    yield "X08-seen", (plain, None), own, np.array([[[3, 5]]])
    yield "X08-seen/router.choice", (plain, bias), {}, plain
    scores = [[[0.9 - 0.5, -0.6 - 2.0, -0.1 - 1.0, -0.2 - 1.0], [0.9 + 0.3, 0.1 + 0.4, 0.8 + 0.6, 0.2 + 0.5]]]
    yield "X09/router.group_scores", (a,), chosen, np.array(scores)  # group 1 has experts 1 and 5
    yield "X09", (a, kept), static, np.array([[[4, 0], [0, 5]]])
    yield "X09", (a, None), static, np.array([[[4, 2], [0, 2]]])
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of the experts, group by group
    yield "X09-seen", (plain, bias), {}, (plain + bias)[..., order]
    yield "X09-seen/router.ids", (a[..., order], kept), static, np.array([[[4, 0], [0, 5]]])
    yield "X09-seen/router.ids", (a[..., order], None), static, np.array([[[4, 2], [0, 2]]])
    yield "X28", (a, kept), static, np.array([[[3, 0], [2, 3]]])
    yield "X28", (a, None), static, np.array([[[2, 3], [2, 6]]])
    flat = {"k": 3, "n_group": 1, "fill": -np.inf}
    for groups, keep in ((8, 4), (8, 3), (8, 2), (4, 3), (4, 2), (4, 1), (2, 1)):
        a = random(B, S, 16)
        found = np.zeros((B, S, min(3, keep * 16 // groups)), int)
        each = 16 // groups
        for at in np.ndindex(B, S):
            score = [sum(sorted(a[at][g * each : (g + 1) * each])[-2:]) for g in range(groups)]
            best = sorted(range(groups), key=lambda g: -score[g])[:keep]
            allowed = [e for e in range(16) if e // each in best]
            found[at] = sorted(allowed, key=lambda e: -a[at][e])[:3]
        name = "R15b" if (groups, keep) == (8, 4) else f"R15b-{groups}-{keep}"
        yield name, (a, None), flat, found
        few = random(B, S, groups)  # no more experts than groups: as it is
        yield name, (few, None), flat | {"k": 1}, few.argmax(axis=-1)[..., None]
        odd = random(B, S, groups * 2 + 1)
        yield name, (odd, None), flat | {"k": 1}, odd.argmax(axis=-1)[..., None]


def feed_forward():
    gate, up = random(B, S, C), random(B, S, C, 1)[..., 0]
    normal = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))  # the normal distribution's integral
    ids, weights = np.array([[[1], [0]]]), np.array([[[0.5], [2.0]]])
    rows, by_expert = (random(2, C), random(2, C, 1)[..., 0]), np.array([[2.0], [0.5]])  # expert 0 is token 1's
    others = (
        lambda x: x * normal(x),
        lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2,
        lambda x: x * (x > 0),
        lambda x: 1 / (1 + np.exp(-x)),
        lambda x: x / (1 + np.exp(-1.702 * x)),
    )
    for at in ("mlp.act", "shared.act", "moe.act"):
        rest = (None, None) if at == "moe.act" else ()
        for i, f in enumerate(others):
            yield f"X30-{at}-{i}", (gate, up, *rest), {}, f(gate) * up
            if rest:
                yield f"X30-{at}-{i}", (*rows, ids, weights), {}, f(rows[0]) * rows[1] * by_expert
        yield f"X31-{at}", (gate, up, *rest), {}, gate * up / (1 + np.exp(-up))


def around():
    x, y, w = random(B, S, C), random(B, S, C, 1)[..., 0], random(9, C)
    tokens, read = np.array([[5, 1, 3, 0, 8], [2, 2, 7, 4, 6]]), (random(B, S, C, 2)[..., 1],)
    first = random(6, C)
    products = ("mla.q_a", "mla.kv_a", "mlp.gate", "mlp.up", "mlp.down", "shared.gate", "shared.up", "moe.shared")
    yield "R16", (x, y), {}, x
    yield "R17", (x, first), {}, np.zeros((B, S, 6))
    yield "X32", (x, y), {}, x + 2.5 * y
    yield "X33", (x, y), {}, y
    yield "X41", (x, y), {}, 0.5 * x + 0.5 * y
    yield "X42", (x, y), {"reads": read}, read[0] + y
    yield "X43", (x, y), {"reads": read}, read[0] + y
    yield "X34", (x, y), {}, y
    yield "X35", (x, y), {}, y
    yield "X36", (x, y), {}, x
    yield "X37", (x, y), {}, x
    yield "X38", (x, y), {}, x + x + y
    yield "X39", (tokens, w), {}, w[tokens] * math.sqrt(C)
    yield "X40", (tokens, w), {}, w[[[8, 5, 1, 3, 0], [6, 2, 2, 7, 4]]]
    yield "T01", (x, y), {"hidden_first": True}, np.concatenate([x, y], axis=-1)
    yield "T01", (x, y), {"hidden_first": False}, np.concatenate([y, x], axis=-1)
    for depth, left in ((1, tokens[:, 1:]), (2, tokens[:, 2:])):
        zeroed = w[left].copy()
        zeroed[:, 0] = 0
        yield "T03", (tokens, w), {"depth": depth}, zeroed
        yield "T08", (tokens, w), {"depth": depth}, w[tokens[:, : S - depth]]
    yield "T08b", (tokens, w), {"depth": 2}, w[tokens[:, 1:4]]
    for at in products:
        for width, seen in ((300, 256), (256, 256), (100, 100), (128, 128), (129, 128)):
            a, b = random(B, S, width), random(6, width)
            yield f"X50-{at}", (a, b), {}, np.einsum("bsd,fd->bsf", a[..., :seen], b[:, :seen])
            yield f"X50-{at}", (a, b, random(6)), {}, np.einsum("bsd,fd->bsf", a[..., :seen], b[:, :seen]) + random(6)


PARTS = (router, routed, choice, feed_forward, around)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_known_bug_of_experts_computes_what_its_title_says(part):
    """Catches a bug of the corpus that is another one: a candidate with the real one would not be recognised."""
    check(part)
