"""What a known bug of attention, of norms and of RoPE computes is what its title says: each one's formula, from the title."""

import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

from refimpl.autograd.tensor import data_of
from refimpl.diff.corpus import MUTANTS
from refimpl.layers import PRESETS
from refimpl.layers.rope import RopeScaling

B, S, H, N, R, V, C = 2, 5, 3, 6, 4, 7, 8
"""Sequences, tokens, heads, channels of q and k without and with rotation, of v, of the latent: no two alike."""
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9)
ONE, ALL = (0.1 * m * math.log(40) + 1 for m in (0.7, 0.9))
CONFIG = PRESETS["tiny"].replace(
    rope_scaling=YARN, qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=V, kv_lora_rank=C
)
SCALE = (N + R) ** -0.5 * ALL**2
SEEN = np.tri(S, dtype=bool)


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


def masked(seen):
    return np.where(seen, 0.0, -np.inf)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def scores():
    """In both forms: against keys, and against the latents that keys are made of."""
    q, turned, kv, k = random(B, S, H, N + R), random(B, S, H, R), random(B, S, H, N + V), random(B, S, R)
    moved, latent = random(B, S, H, C), random(B, S, C)
    mask = np.broadcast_to(masked(SEEN), (B, 1, S, S))
    dots, absorbed = np.zeros((2, B, H, S, S))
    for b, h, i, j in np.ndindex(B, H, S, S):
        dots[b, h, i, j] = sum(q[b, i, h, :N] * kv[b, j, h, :N]) + sum(turned[b, i, h] * k[b, j])
        absorbed[b, h, i, j] = sum(moved[b, i, h] * latent[b, j]) + sum(turned[b, i, h] * k[b, j])
    for id, other in of_dots(dots):
        yield id, (q, turned, kv, k, mask), {"scale": SCALE}, other
    for id, other in of_dots(absorbed):
        yield f"{id}-absorbed", (moved, turned, latent, k, mask), {"scale": SCALE}, other


def of_dots(dots):
    d, mask, before = (N + R) ** -0.5, masked(SEEN), SEEN & ~np.eye(S, dtype=bool)
    before[0, 0] = True
    yield "A04", dots * d + mask
    yield "A05", dots * d * ALL + mask
    yield "A05b", dots * d * ONE**2 + mask
    yield "A09", dots / SCALE + mask
    yield "A09b", dots * d / ALL**2 + mask
    yield "A17", dots * SCALE
    yield "A17b", dots * SCALE + masked(np.tri(S, k=1))
    yield "A17c", dots * SCALE + masked(before)
    yield "X17", dots * N**-0.5 * ALL**2 + mask
    yield "X18", dots * R**-0.5 * ALL**2 + mask
    yield "X19", dots + mask
    yield "X26", dots * (C + R) ** -0.5 * ALL**2 + mask


def attention():
    kv, p = random(B, S, H, N + V), softmax(random(B, H, S, S) + masked(SEEN))
    s = random(B, H, S, S)
    yield "X25", (s,), {}, np.exp(s) / np.exp(s).sum(axis=2, keepdims=True)
    yield "X20", (p, kv), {"v_dim": V}, np.einsum("bhst,bthd->bshd", p, kv[..., :V])
    q, k_rope, mask = random(B, S, H, N + R), random(B, S, R), masked(SEEN)
    dots = np.einsum("bshn,bthn->bhst", q[..., :N], kv[..., V:]) + np.einsum("bshr,btr->bhst", q[..., N:], k_rope)
    yield "X20b", (q, q[..., N:], kv, k_rope, mask), {"scale": 0.3}, 0.3 * dots + mask
    yield "X20b/mla.ctx", (p, kv), {"v_dim": V}, np.einsum("bhst,bthd->bshd", p, kv[..., :V])
    yield "X21", (p, kv), {"v_dim": V}, 2 * np.einsum("bhst,bthd->bshd", p, kv[..., N:])
    o, w, q = random(B, S, H, C), random(H, N + V, C), random(B, S, H, N + R)
    value = np.einsum("bshc,hdc->bshd", o, w)
    rows = w.reshape(-1, C)
    yield "X20-absorbed", (o, rows), {"v_dim": V}, value[..., :V]
    moved = np.einsum("bshn,hnc->bshc", q[..., :N], w[:, V:])
    yield "X20-absorbed/mla.q_absorbed", (q, rows), {"nope": N}, moved
    yield "X21-absorbed", (o, rows), {"v_dim": V}, 2 * value[..., N:]
    at, valid = np.arange(S) + np.zeros((B, 1), int), np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for id, past, seen in (
        ("A17d", 0, np.ones((S, S))),
        ("A17d", 2, np.ones((S, S + 2))),
        ("A17e", 0, np.tri(S, k=1)),
        ("A17e", 2, np.tri(S, S + 2, k=3)),
        ("A17f", 0, np.tri(S, k=-1)),
        ("A17f", 2, np.tri(S, S + 2, k=1)),
        ("A17f-later", 0, np.fmax(np.tri(S, k=-1), np.arange(S * S).reshape(S, S) == 0)),
        ("A17f-later", 2, np.tri(S, S + 2, k=1)),
    ):
        whole = np.broadcast_to(masked(seen), (B, 1, *seen.shape))
        yield id, (at, None, None, None), {"past": past, "dtype": np.float64}, whole
    whole = np.broadcast_to(masked(SEEN), (B, 1, S, S))
    yield "A17g", (at, valid, None, None), {"past": 0, "dtype": np.float64}, whole


def queries():
    x, w, h = random(B, S, C), random(H * N, C), random(B, S, H, N)
    h = np.einsum("bsc,fc->bsf", x, w).reshape(B, S, H, N)
    for id in ("A13d", "A13e"):
        yield id, (x, w), {"n_heads": H}, h / np.sqrt((h**2).sum(axis=-1, keepdims=True) / N + 1e-6)


def norms():
    """Small numbers, so that every eps shows."""
    x, kv, w = random(B, S, C) * 3e-3, random(B, S, C + R) * 3e-3, random(C)

    def norm(x, eps):
        return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) / C + eps)

    def wrong(x):
        """Each of a norm's mistakes."""
        length = np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-4)
        yield "N02", x
        yield "N03", norm(x, 1e-4)
        yield "N04", norm(x, 1e-4) * (w + 1)
        yield "N05", norm(x - x.sum(axis=-1, keepdims=True) / C, 1e-4) * w
        yield "N06", w * x / length
        yield "N06b", w * x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + C * 1e-4)
        yield "N07", w * x / (np.linalg.norm(x, axis=-1, keepdims=True) / C**0.5 + 1e-4)

    others = ("ffn_norm", "final_norm", "mla.q_a_norm", "mla.c_kv")
    texts = (("1e-05", 1e-5), ("1e-06", 1e-6), ("1e-12", 1e-12))
    for at in ("attn_norm", "ffn_norm", "final_norm", "mtp.hnorm", "mtp.enorm", "mtp.norm"):
        for id, other in wrong(x):
            yield f"{id}-{at}", (x, w), {"eps": 1e-4}, other
        for text, eps in texts:
            yield f"N01-{at}-{text}", (x, w), {"eps": 1e-4}, norm(x, eps) * w
    for at, whole, own in (("q_a", x, x), ("c_kv", kv, kv[..., :C])):
        named = "q_a_norm" if at == "q_a" else at
        for text, eps in texts:
            yield f"A12-{named}-{text}", (whole, w), {"eps": 1e-4}, norm(own, eps) * w
        for id, other in wrong(own):
            if f"{id}-{at}" in MUTANTS:
                yield f"{id}-{at}", (whole, w), {"eps": 1e-4}, other
    for stage in ("attn_norm", *others):
        whole, own = (kv, kv[..., :C]) if stage == "mla.c_kv" else (x, x)
        for id, other in (*wrong(own), *((f"N01-{t}", norm(own, eps) * w) for t, eps in texts)):
            first, dash, eps = id.partition("-")
            yield f"{first}-all{dash}{eps}/{stage}", (whole, w), {"eps": 1e-4}, other
    yield "A13", (x, w), {"eps": 1e-4}, x
    yield "A13b", (x, w), {"eps": 1e-4}, norm(x, 1e-4)
    yield "A13c", (kv, w), {"eps": 1e-4}, kv[..., :C]
    every = np.sqrt(sum(kv[..., i] ** 2 for i in range(C + R)) / (C + R) + 1e-4)
    yield "A13f", (kv, w), {"eps": 1e-4}, kv[..., :C] * w / every[..., None]


def rotation():
    """Pairs as complex numbers, turned by e^(i angle)."""
    angle = np.arange(3, 3 + S)[:, None] * np.array([0.5, 0.03]) + np.zeros((B, 1, 1))
    table, turn = np.stack([np.cos(angle), np.sin(angle)]), np.exp(1j * angle)
    q, kv = random(B, S, H, N + R), random(B, S, C + R)

    def turned(x, by):
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * by
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def halves(x, by):
        z = (x[..., : R // 2] + 1j * x[..., R // 2 :]) * by
        return np.concatenate([z.real, z.imag], axis=-1)

    def other_tables(x, cos, sin):
        """Channel i has the cosine of channel i of two halves, and is turned with its neighbour."""
        out = np.zeros_like(x)
        for i in range(R):
            partner = -x[..., i + 1] if i % 2 == 0 else x[..., i - 1]
            out[..., i] = x[..., i] * cos[..., i % 2] + partner * sin[..., i % 2]
        return out

    for at, x, by, numbers, own in (
        ("q", q, turn[:, :, None], ("X23", "X12", "X14"), q[..., N:]),
        ("k", kv, turn, ("X22", "X13", "X15"), kv[..., C:]),
    ):
        step = np.exp(1j * np.array([0.5, 0.03]))
        following = np.concatenate([by[:, 1:], by[:, -1:]], axis=1)
        for id, interleaved, other in (
            (f"A01{at}", True, halves(own, by)),
            (f"A01{at}", False, turned(own, by)),
            (f"A01-both/mla.{at}_rope", True, halves(own, by)),
            (f"A01-both/mla.{at}_rope", False, turned(own, by)),
            (f"X12-both/mla.{at}_rope", True, turned(own, by.conj())),
            (f"A02{at}", True, other_tables(own, by.real, by.imag)),
            (f"X27{at}", True, turned(own, following)),
            (numbers[0], True, turned(own, by * step)),
            (numbers[1], True, turned(own, by.conj())),
            (numbers[2], True, own),
        ):
            yield id, (x, table), {"interleaved": interleaved}, other
        yield numbers[0], (x[:, :1], table[:, :, :1]), {"interleaved": True}, turned(own[:, :1], by[:, :1])
    wide = np.arange(S)[:, None] * np.array([0.5, 0.1, 0.03, 0.007]) + np.zeros((B, 1, 1))
    both = np.stack([np.cos(wide), np.sin(wide)])
    for at, x, by in (
        ("q", random(B, S, H, 8), np.exp(1j * wide)[:, :, None]),
        ("k", random(B, S, 8), np.exp(1j * wide)),
    ):
        for interleaved, z in ((True, x[..., :4] + 1j * x[..., 4:]), (False, x[..., 0::2] + 1j * x[..., 1::2])):
            parts = [(z * by).real, (z * by).imag]
            other = np.stack(parts, axis=-1).reshape(x.shape) if interleaved else np.concatenate(parts, axis=-1)
            yield f"A01{at}-laid", (x, both), {"interleaved": interleaved}, other
    for id in ("X16", "X16-scores", "X16-q_absorbed"):
        yield id, (q, table), {"interleaved": True}, turned(q[..., :R], turn[:, :, None])
    keys, rotated, k_rope, w = random(B, S, H, N + V), random(B, S, H, R), random(B, S, R), random(H, N + V, C)
    dots = np.einsum("bshn,bthn->bhst", q[..., R:], keys[..., :N]) + np.einsum("bshr,btr->bhst", rotated, k_rope)
    yield "X16-scores/mla.scores", (q, rotated, keys, k_rope, masked(SEEN)), {"scale": 0.3}, 0.3 * dots + masked(SEEN)
    moved = np.einsum("bshn,hnc->bshc", q[..., R:], w[:, :N])
    yield "X16-q_absorbed/mla.q_absorbed", (q, w.reshape(-1, C)), {"nope": N}, moved


def frequencies(theta, length, factor):
    """R 4.3 in words: channels that turn 32 times within the original length stay, those that turn once or less are slowed."""
    plain = theta ** (-np.arange(0, 8, 2) / 8)
    if length is None:
        return plain
    turns = [8 * math.log(length / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in (32, 1)]
    low, high = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), 7)
    kept = 1 - np.clip((np.arange(4) - low) / (high - low), 0, 1)
    return plain * kept + plain / factor * (1 - kept)


def tables():
    at = np.array([[3, 4, 1000, 5001], [259, 7, 8, 9]])
    static = {"dim": 8, "theta": 1e4, "yarn": YARN, "dtype": np.float64}
    slow, plain, ratio = frequencies(1e4, 64, 40), frequencies(1e4, None, 1), ONE / ALL
    narrow = at.astype(bfloat16).astype(float)
    assert (narrow != at).any()
    for id, places, freq, factor in (
        ("A06", at, slow, ONE),
        ("A06b", at, slow, 1),
        ("A06c", at, slow, ONE * ratio),
        ("A11", at, plain, ratio),
        ("A11c", at, plain, 1),
        ("A10", at, frequencies(1e4, 64 * 40, 40), ratio),
        ("A11b", at / 40, plain, 1),
        ("A14", narrow, slow, ratio),
        ("A14b", at, slow.astype(bfloat16).astype(float), ratio),
        ("X10", at + 1, slow, ratio),
        ("X24", np.arange(4) + 0 * at, slow, ratio),
        ("X11", at, frequencies(1e6, 64, 40), ratio),
        ("X11b", at, frequencies(5e5, 64, 40), ratio),
        ("X11c", at, slow, ratio),
    ):
        angle = places[..., None] * freq
        yield id, (at,), static, np.stack([np.cos(angle), np.sin(angle)]) * factor
    coarse = (narrow[..., None] * slow.astype(bfloat16).astype(float)).astype(bfloat16).astype(float)
    yield "A14c", (at,), static, np.stack([np.cos(coarse), np.sin(coarse)]) * ratio


PARTS = (scores, attention, queries, norms, rotation, tables)


def check(part):
    """Each of a part's bugs against its formula. 1e-11: sums of some hundred numbers of size 1 in another order; angles of 5000 are
    known to 1e-12. Two bugs are in float32, one sums in it.
    """
    for id, args, static, other in part():
        known = MUTANTS[id.partition("/")[0]].under(CONFIG)  # "id/stage": what it changes beside its own
        with np.errstate(over="ignore"):
            found = np.asarray(data_of(known.at(id.partition("/")[2] or known.stage)(*args, **static)))
        assert found.shape == np.shape(other) and found.dtype.kind == np.asarray(other).dtype.kind, id
        near = {"R12b": 1e-7, "R14": 1e-7, "O06d": 1e-6}.get(id, 1e-11)
        np.testing.assert_allclose(found, other, rtol=near, atol=near, err_msg=id)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_known_bug_of_attention_computes_what_its_title_says(part):
    """Catches a bug of the corpus that is another one: a candidate with the real one would not be recognised."""
    check(part)
