"""What the known bugs of a cache, of training and of FP8 compute is what their titles say: formulas and loops of their own."""

import math

import ml_dtypes
import numpy as np
import pytest

from refimpl.layers.fp8 import EXACT, POWER_OF_TWO, Fp8

from .test_corpus_formulas import check, random, softmax

B, S, T, H, N, R, V, C = 2, 3, 7, 2, 6, 4, 5, 8
"""Sequences, new tokens, all tokens, heads, channels of q and k without and with rotation, of v, of the latent."""


def cached():
    """Attention of what is cached and of what is new, each by itself; then their mean, weighted by e^lse or 2^lse."""
    seen = np.tri(S, T, T - S, dtype=bool)
    s = random(B, H, S, T) + np.where(seen, 0, -np.inf)
    kv, latent = random(B, T, H, N + V), random(B, T, C)
    parts = [s[..., : T - S], s[..., T - S :]]
    lse = [np.log(np.exp(part).sum(axis=-1)) for part in parts]
    for id, base in (("A18", math.e ** (1 / math.log(2))), ("A18b", 2.0)):
        # lse to base 2 is lse / ln 2, taken e to the power of
        weights = [base**x / (base ** lse[0] + base ** lse[1]) for x in lse]
        p = np.concatenate([softmax(part) * w[..., None] for part, w in zip(parts, weights, strict=True)], axis=-1)
        whole = softmax(s)
        yield id, (whole, kv), {"v_dim": V}, np.einsum("bhst,bthd->bshd", p, kv[..., N:])
        yield f"{id}-absorbed", (whole, latent), {}, np.einsum("bhst,btc->bshc", p, latent)
        alone = softmax(random(B, H, S, S))  # nothing is cached: nothing is merged
        yield id, (alone, kv[:, :S]), {"v_dim": V}, np.einsum("bhst,bthd->bshd", alone, kv[:, :S, :, N:])
    q, turned, k = random(B, S, H, N + R), random(B, S, H, R), random(B, T, R)
    mask, new = np.where(seen, 0, -np.inf)[None, None], np.where(seen & (np.arange(T) >= T - S), 0, -np.inf)
    dots = np.einsum("bshd,bthd->bhst", q[..., :N], kv[..., :N]) + np.einsum("bshr,btr->bhst", turned, k)
    yield "A20", (q, turned, kv, k, mask), {"scale": 0.5}, dots * 0.5 + new
    q = random(B, S, H, C)
    dots = np.einsum("bshc,btc->bhst", q, latent) + np.einsum("bshr,btr->bhst", turned, k)
    yield "A20-absorbed", (q, turned, latent, k, mask), {"scale": 0.5}, dots * 0.5 + new


def losses():
    """The balance loss by loops: alpha E / (K S) times each expert's tokens times its mean share, the sequences' mean."""
    z = random(B, S, 6)
    s, ids = 1 / (1 + np.exp(-z)), np.array([[[0, 1], [0, 2], [0, 1]], [[3, 5], [3, 4], [5, 3]]])
    best = np.argsort(-s, axis=-1)[..., :2]

    def balance(share, chosen, most=99):
        total = 0.0
        for b, e in np.ndindex(B, 6):
            total += min((chosen[b] == e).sum(), most) * 6 / (2 * S) * share[b, :, e].mean()
        return 0.01 * total / B

    static, ours = {"k": 2, "alpha": 0.01}, s / s.sum(axis=-1, keepdims=True)
    for routed, chosen in ((ids, ids), (None, best)):
        yield "L01", (s, routed), static, balance(softmax(z), chosen)
        yield "L02", (s, routed), static, balance(s, chosen)
        yield "L03", (s, routed), static, balance(ours, chosen, most=1)  # a mean load of 6 / 6
        yield "L04", (s, routed), static, 0.0
        yield "L06", (s, routed), static, balance(ours, chosen) * B
    yield "L05", (ids,), {"n_experts": 7}, np.array([6, 4, 2, 6, 2, 4, 0])
    yield "L06b", (1.0, (2.0, 4.0), (0.5, 0.25)), {"mtp_weight": 0.1}, 1 + 0.1 * 3 + 2 * 0.75
    bias, load, static = random(6), [0, 1, 2, 3, 4, 8], {"gamma": 0.1, "zero_sum": False}
    for id, moved in {
        "L07": [0, 0, 0, 0, 0, 0],
        "L07b": [-0.1, -0.1, -0.1, 0, 0.1, 0.1],
        "L07c": [0.3, 0.2, 0.1, 0, -0.1, -0.5],
        "L07d": [0.3 / 3, 0.2 / 3, 0.1 / 3, 0, -0.1 / 3, -0.5 / 3],
    }.items():
        yield id, (bias, np.array(load)), static, bias + moved
    yield "L07b", (bias, np.array(load)), {"gamma": 0.1, "zero_sum": True}, bias + np.array([-5, -5, -5, 1, 7, 7]) / 60
    labels, logits = np.array([[1, 4, 0, 2, 3, 5], [3, 3, 5, 1, 2, 0]]), random(B, 5, 6)
    lost = -np.log(softmax(logits))
    for id, by, last in (("T05", -1, None), ("T05b", 1, labels[:, 0])):
        target = np.stack([labels[:, i + by] if i + by < 6 else last for i in range(2, 6)], axis=1)
        picked = [lost[b, i, target[b, i]] for b, i in np.ndindex(B, 4)]
        yield id, (logits, labels), {"depth": 1, "mean": "valid"}, sum(picked) / 8
        yield id, (logits, labels), {"depth": 1, "mean": "length"}, sum(picked) / 10


STEP = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.02, "decay": 0.1, "steps": 3}


def adamw(w, m, v, o):
    """R 4.2, with every part to be changed."""
    first, second = m / (1 - o["beta1"] ** o["steps"]), v / (1 - o["beta2"] ** o["steps"])
    return w - o["lr"] * (o["decay"] * w + first / (np.sqrt(second) + o["eps"]))


def steps():
    w, m, v = random(C, N), random(C, N) / 9, random(C, N) ** 2 / 9
    one, two = 1 - 0.9**3, 1 - 0.95**3
    kept = w * (1 - 0.1 * 0.1)
    for id, other in {
        "O01": kept - 0.1 * m / one / np.sqrt(v / two + 0.02),
        "O01b": kept - 0.1 * m / one * math.sqrt(two) / (np.sqrt(v) + 0.02),
        "O03": adamw(w, m, v, STEP | {"decay": 0}),
        "O03c": w * (1 - 0.1) - 0.1 * m / one / (np.sqrt(v / two) + 0.02),
        "O04": kept - 0.1 * m / (np.sqrt(v) + 0.02),
        "O04b": kept - 0.1 * m / (np.sqrt(v / two) + 0.02),
        "O04c": adamw(w, m, v, STEP | {"steps": 4}),
        "O04d": adamw(w, m, v, STEP | {"steps": 2}),
        "O09": adamw(w.astype(ml_dtypes.bfloat16).astype(float), m, v, STEP),
    }.items():
        yield id, (w, m, v), STEP, other
    yield "O03b", (w, m, v), STEP | {"decay": 0.0}, adamw(w, m, v, STEP)
    yield "O03b", (w, m, v), STEP | {"decay": 0.3}, adamw(w, m, v, STEP | {"decay": 0.3})
    yield "O03c", (w, m, v), STEP | {"lr": 0.0}, w
    yield "O03/optim.step", (w, m, v), STEP, adamw(w, m, v, STEP | {"decay": 0})
    yield "O02/optim.step", (w, m, v), STEP, adamw(w, m, v, STEP | {"decay": 0})
    yield "O08/optim.step", (w, m, v), STEP, adamw(w, m, v, STEP | {"beta2": 0.999})
    yield "O08", (w, v), {"beta": 0.95}, 0.999 * v + 0.001 * w**2
    yield "O08", (w, None), {"beta": 0.95}, 0.001 * w**2


def bits_of_bfloat16(x):
    """Towards 0, by division."""
    out = np.zeros(x.shape)
    for at, v in np.ndenumerate(x):
        ulp = 2.0 ** (math.frexp(float(np.float32(v)))[1] - 8)
        out[at] = math.trunc(float(np.float32(v)) / ulp) * ulp
    return out


def gradients():
    g, before, master = random(C, N), random(C, N, 1)[..., 0], random(N, C).T
    own, more = math.sqrt(sum(x * x for x in g.ravel())), 12.0
    for norm, by in ((more, 2 / (more + 1e-6)), (0.5, 1)):
        yield "O02", (g, norm), {"max_norm": 2.0, "reads": (master,)}, g * by + 0.1 * master
    yield "O02", (g, more), {"max_norm": None, "reads": (master,)}, g + 0.1 * master
    yield "O05", (g, more), {"max_norm": 2.0}, g * 2 / (own + 1e-6)
    yield "O05", (g / 9, more), {"max_norm": 2.0}, g / 9
    yield "O05b", (g, more), {"max_norm": 2.0}, g
    yield "O05c", (g, 0.5), {"max_norm": 2.0}, g * 2 / (0.5 + 1e-6)
    yield "O05c", (g, more), {"max_norm": 2.0}, g * 2 / (more + 1e-6)
    yield "O05c", (g, more), {"max_norm": None}, g
    norms = [math.sqrt(sum(x * x for x in a.ravel())) for a in (g, before, master)]
    yield "O06", (g, before, master), {}, sum(norms)
    yield "O06b", (g, before - 9, master), {}, max(abs(before - 9).ravel())
    yield "O06b", (g, before[:0]), {}, max(abs(g).ravel())
    yield "O06c", (g, before, master), {}, norms[0]
    yield "O06c", (g, before, master, g), {}, math.hypot(norms[0], norms[1])
    small, one = np.full(1000, 2e-4, np.float32), np.ones(1, np.float32)
    yield "O06d", (one, small), {}, 1.0  # each square is less than half of one's last place
    yield "O06d", (small, one), {}, math.sqrt(1 + 1000 * 2e-4**2)
    yield "O07", (g, before), {"beta": 0.9}, bits_of_bfloat16(0.9 * before + 0.1 * g)
    yield "O07/optim.exp_avg_sq", (g, before**2), {"beta": 0.9}, bits_of_bfloat16(0.9 * before**2 + 0.1 * g * g)


EXACTLY = {"how": Fp8(inputs=EXACT), "lead": 2}


def codes():
    """Two tiles and a ragged one of every row; a tile of zeros. By loops, in real numbers."""
    x = random(B, S, 300)
    x[1, 1, 128:256] = 0
    tiles = [(0, 128), (128, 256), (256, 300)]
    exact = np.stack([np.maximum(abs(x[..., a:b]).max(axis=-1), 1e-4) / 448 for a, b in tiles], axis=-1)

    def divided(s):
        q = np.concatenate([x[..., a:b] / s[..., i : i + 1] for i, (a, b) in enumerate(tiles)], axis=-1)
        return np.clip(q, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float)

    power = 2.0 ** np.ceil(np.log2(exact))
    down = 2.0 ** np.floor(np.log2(exact))
    nearest = np.where(exact / down >= 1.5, power, down)
    dead = divided(power)
    dead[1, 1, 128:256] = np.nan
    static = {"how": Fp8(inputs=POWER_OF_TWO), "lead": 2}
    yield "F08", (x, power), static, dead
    yield "F09", (x, power), static, divided(exact)
    yield "F13", (x,), static, nearest
    yield "F13b", (x,), static, down
    assert not np.array_equal(nearest, down) and not np.array_equal(nearest, power)
    yield "F13", (x,), EXACTLY, exact
    yield "F13b", (x,), EXACTLY, exact


def readings():
    """y = (codes times the scales that are read) w, with w one for which FP8 has no rounding."""
    q = random(B, S, 300).astype(ml_dtypes.float8_e4m3fn).astype(float)
    s, w = 2.0 ** np.arange(B * S * 3).reshape(B, S, 3) / 100, np.zeros((5, 300))
    for i in range(5):
        w[i, [i, 128 + i, 256 + i]] = (
            (448, 448, 448) if i else (448, -448, 448)
        )  # every block's largest: no scale rounds
    flat = s.ravel()
    by_tile, by_token, exponent, last = (np.zeros((B * S, 3)) for _ in range(4))
    for n, g in np.ndindex(B * S, 3):
        by_tile[n, g] = flat[g * B * S + n]  # written (N, G), read as (G, N)
        exponent[n, g] = 2.0 ** math.floor(math.log2(s.reshape(-1, 3)[n, g]))
        last[n, g] = s.reshape(-1, 3)[n, min(g, 1)]
        by_token.ravel()[g * B * S + n] = s.reshape(-1, 3)[n, g]  # written (G, N), read as (N, G)
    for id, read in (("F12", by_tile), ("F12b", by_token), ("F11", exponent), ("F16", last)):
        spread = np.repeat(read.reshape(B, S, 3), 128, axis=-1)[..., :300]
        for at in ("mla.q_a", "mla.kv_a", "mlp.gate", "shared.up"):
            yield f"{id}-{at}", (q, s, w), EXACTLY, np.einsum("bsd,fd->bsf", q * spread, w)
    for width in (100, 256):  # one tile that is not whole has none before it; whole tiles are all read
        part, some, v = q[..., :width], s[..., : -(-width // 128)], w[:, :width]
        spread = np.repeat(some, 128, axis=-1)[..., :width]
        yield "F16-mla.q_a", (part, some, v), EXACTLY, np.einsum("bsd,fd->bsf", part * spread, v)


PARTS = (cached, losses, steps, gradients, codes, readings)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_known_bug_of_a_step_computes_what_its_title_says(part):
    """Catches a bug of the corpus that is another one: a candidate with the real one would not be recognised."""
    check(part)
