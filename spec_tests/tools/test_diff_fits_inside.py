"""What is fitted where it does not lie at the surface: numbers inside a stage, formulas, what is read in a tap's place, rows."""

import fnmatch

import numpy as np
import pytest

from refimpl.diff import render
from refimpl.layers import STAGES
from refimpl.layers.stage import Patch, tap_name

from .test_diff_fits import ENGINE, judged, times, titles
from .test_diff_partial import case

FN = {name: stage.fn for name, stage in STAGES.items()}
LATE = "where there is none: those of the sequence beside"


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def sink(s):
    """A softmax that may attend to nothing: one more key, whose score is 0 and value nothing."""
    return softmax(np.concatenate([s, 0 * s[..., :1]], axis=-1))[..., :-1]


def by(name, at, change):
    """A stage with one argument changed."""
    return Patch(name, lambda *a, **k: FN[name](*a[:at], change(a[at]), *a[at + 1 :], **k))


def of(name, change):
    """A stage whose output is changed."""
    return Patch(name, lambda *a, **k: change(FN[name](*a, **k)))


def chosen(formula):
    """Weights that are a formula of the chosen experts' scores and of all."""
    return Patch("router.weights", lambda s, ids, **k: formula(np.take_along_axis(s, ids, -1), s).astype(s.dtype))


def flat(y):
    """Every token's entry that of the token before, all sequences in one row."""
    b, s = y.shape[:2]
    out = np.empty_like(y)
    for i in range(b * s):
        out[i // s, i % s] = y[(i - 1) // s, (i - 1) % s] if i else y[-1, -1]
    return out


class Kept:
    """An observer: what stages gave, by tap, and one stage that is handed it; innermost of all."""

    def __init__(self, name, fn):
        self.name, self.fn, self.seen = name, fn, {}

    def __call__(self, stage, run, /, *args, **static):
        tap = tap_name(stage)
        out = self.fn(self.seen, tap, *args, **static) if stage.name == self.name else run(*args, **static)
        self.seen[tap] = out
        return out


def latent(seen, tap, c, w, **k):
    return FN["mla.kv_b"](seen["fwd/L0/mla.c_kv"] if "/L1/" in tap else c, w, **k)


def shared(name):
    return Kept(name, lambda seen, tap, x, w, b=None: FN[name](seen[tap.rpartition("/")[0] + "/attn_out"], w))


def rms(y):
    return (y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6)).astype(y.dtype)


def other_gain(x, w, *, eps):
    return FN["final_norm"](x, np.asarray(case().weights()["model.layers.1.input_layernorm.weight"], x.dtype), eps=eps)


def mirrored(name):
    """b cos - a sin where b cos + a sin is meant."""

    def fn(x, table, *, interleaved):
        y = FN[name](x, table, interleaved=interleaved)
        width = y.shape[-1]
        a, b = x[..., -width:][..., 0::2], x[..., -width:][..., 1::2]
        cos, sin = table if y.ndim == 3 else table[:, :, :, None]
        return np.stack([a * cos - b * sin, b * cos - a * sin], axis=-1).reshape(y.shape)

    return Patch(name, fn)


def places(change):
    return Patch("mla.rope_tables", lambda p, **k: FN["mla.rope_tables"](change(p), **k))


def next_matrices(name):
    return Patch(name, lambda x, ids, *ws: FN[name](x, ids, *ws[1:], ws[0]))


def dropped(p):
    keep = np.random.default_rng(4).random(p.shape) < 0.75
    return (p * keep / np.float32(0.75)).astype(p.dtype)


def sixth(p):
    return np.where(p == 5, 3, p)


TABLE = {
    "temperature": (
        by("router.scores", 0, lambda z: z / 3),
        "router.logits are 0.3333* times what they should be in router.scores",
    ),
    "sink": (Patch("mla.probs", sink), "the softmax of attention has 1 too much in its denominator"),
    "sum of weights": (
        Patch("router.weights", lambda *a, eps, **k: FN["router.weights"](*a, eps=0.05, **k)),
        "the sum that routing weights are divided by has 0.05 too much",
    ),
    "up clamped": (by("mlp.act", 1, lambda u: np.clip(u, -0.7, 0.7)), "up is clamped to +-0.7"),
    "gate clamped": (by("mlp.act", 0, lambda g: np.minimum(g, 0.4)), "gate is clamped to 0.4 at most"),
    "quick": (
        Patch("mlp.act", lambda g, u: (g * sigmoid(1.5 * g) * u).astype(g.dtype)),
        "SiLU is x sigmoid(1.5 x)",
    ),
    "uniform": (chosen(lambda s, _: 0 * s + 0.625), "router.weights are 0.625 for all experts"),
    "softmax of scores": (
        chosen(lambda s, _: 2.5 * softmax(s)),
        "router.weights are 2.5 x softmax of the chosen experts' scores",
    ),
    "softmax of logits": (
        chosen(lambda s, _: softmax(np.log(s / (1 - s)))),
        "router.weights are softmax of the chosen experts' logits",
    ),
    "squares": (
        chosen(lambda s, _: 2.5 * s**2 / (s**2).sum(-1, keepdims=True)),
        "router.weights are 2.5 x the squares of the chosen experts' scores, by their sum",
    ),
    "weights squared": (by("moe.routed", 2, np.square), "the routing weights are applied twice"),
    "next slot": (
        by("moe.routed", 2, lambda w: np.roll(w, -1, -1)),
        "moe.routed reads router.weights with its slots one early",
    ),
    "keys in pairs": (
        [by(n, at, lambda kv: np.repeat(kv[:, :, ::2], 2, axis=2)) for n, at in (("mla.scores", 2), ("mla.ctx", 1))],
        "mla.kv_b is read with the first one's numbers in every 2 heads",
    ),
    "heads last": (
        [
            by(n, at, lambda kv: kv.reshape(*kv.shape[:2], kv.shape[3], -1).swapaxes(2, 3))
            for n, at in (("mla.scores", 2), ("mla.ctx", 1))
        ],
        "mla.kv_b is read with heads and channels cut the other way round",
    ),
    "k normed": (of("mla.k_rope", rms), "mla.k_rope has its rows divided by their root mean square"),
    "norm again": (
        by("logits", 0, lambda x: FN["final_norm"](x, np.asarray(case().weights()["model.norm.weight"]), eps=1e-6)),
        "logits reads final_norm applied twice",
    ),
    "another gain": (Patch("final_norm", other_gain), "final_norm has the weight of L1/attn_norm"),
    "another layer": (Kept("mla.kv_b", latent), "mla.kv_b reads L0/mla.c_kv instead of mla.c_kv"),
    "reads behind": (shared("router.logits"), "router.logits reads attn_out instead of ffn_norm"),
    "choice late": (
        [of("router.ids", flat)],
        f"router.ids is that of the token before ({LATE})",
    ),
    "rows late": (by("moe.rows", 0, flat), f"moe.rows reads ffn_norm of the token before ({LATE})"),
    "one sequence": (of("mla.k_rope", lambda k: k[:1] + 0 * k), "mla.k_rope: sequences are taken from 0, 0"),
    "mirrored": (
        [mirrored("mla.q_rope"), mirrored("mla.k_rope")],
        "pairs (a, b) are rotated to (a cos - b sin, - a sin + b cos)",
    ),
    "no positions": (places(lambda p: 0 * p), "all positions are 0"),
    "one position": (places(sixth), "position of token 5: 3 instead of 5"),
    "down matrices": (
        next_matrices("moe.down"),
        "experts' matrices: experts are those of their neighbour behind (around the end)",
    ),
    "bias": (of("attn_out", lambda y: y + np.float32(0.05)), "attn_out has 0.05 added to every number"),
    "bias of each": (
        of("mla.q_a", lambda y: (y + np.linspace(1, 2, 24)).astype(y.dtype)),
        "mla.q_a has a vector too much, the same for every token: 1, 1.04, *",
    ),
    "dropout": (of("mla.probs", dropped), "dropout: 0.25 of mla.probs's numbers are 0, the others are divided by 0.75"),
    "gated": (
        Patch("moe.out", lambda r, s: (r + sigmoid(s.mean(axis=-1, keepdims=True)) * s).astype(r.dtype)),
        "moe.shared is multiplied by a number of every token's own in ffn_out",
    ),
    "rows": (
        of("attn_out", lambda y: (y * (1 + y[..., :1] ** 2)).astype(y.dtype)),
        "attn_out is multiplied by a number of every token's own",
    ),
}
"""What is wrong -> the patches, and how it is named where every tap was recorded."""
FINE = ("reads behind",)
"""Read before it was rounded: no other tap holds its numbers to float32's digits, to which a router is held."""
ALWAYS = ("sink", "softmax of scores", "keys in pairs", "another layer", "one position", "gated", "rows late")
BEHIND = {
    "temperature": "",
    "sink": "",
    "capped": (
        of("mla.scores", lambda s: np.where(np.isfinite(s), 4 * np.tanh(s / 4), s).astype(s.dtype)),
        "mla.scores is capped at 4",
    ),
    "keys in pairs": "",
    "heads last": "",
    "k normed": "",
    "one position": "",
    "nope alone": (by("mla.scores", 1, lambda q: 0 * q), "mla.scores is q k of nope channels alone"),
    "down matrices": (
        next_matrices("moe.down"),
        "experts' down matrices are those of their neighbour behind (around the end)",
    ),
    "inner": ([shared("shared.gate"), shared("shared.up")], "shared.* read attn_out instead of ffn_norm"),
}
"""What is named from an engine's taps, if the words are others than with all."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in TABLE])
def test_what_lies_inside_is_named(name):
    """Catches a mistake that is placed and not named, or named for another that gives nearly its numbers."""
    patches, title = TABLE[name]
    (said,) = titles(judged(patches))
    assert fnmatch.fnmatchcase(said, title), said


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TABLE if n not in FINE])
def test_it_is_named_in_bfloat16_too(name):
    """Catches a number that only float32 tells."""
    patches, title = TABLE[name]
    (said,) = titles(judged(patches, "bf16"))
    assert fnmatch.fnmatchcase(said, title), said


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "keys in pairs" else pytest.mark.slow) for n in BEHIND]
)
def test_it_is_named_from_an_engine_s_taps(name):
    """Catches fits that see a stage only where its own tap was recorded."""
    patches, title = BEHIND[name] or TABLE[name]
    (said,) = titles(judged(patches, taps=[f"*/{t}" for t in ENGINE]))
    assert fnmatch.fnmatchcase(said, title), said


@pytest.mark.parametrize(
    "patch",
    [
        of("mla.probs", lambda p: (p * (1 + 0.3 * np.sin(np.arange(p.shape[-1])))).astype(p.dtype)),
        pytest.param(of("router.weights", lambda w: (w + 0.3 * np.sin(9 * w)).astype(w.dtype)), marks=pytest.mark.slow),
        pytest.param(of("mlp.act", lambda y: (np.abs(y) ** 1.2).astype(y.dtype)), marks=pytest.mark.slow),
        pytest.param(times("attn_out", np.random.default_rng(0).uniform(0.5, 2, (2, 24, 48))), marks=pytest.mark.slow),
        pytest.param(of("mla.scores", lambda s: s + np.float32(0.4) * np.sin(s)), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("taps", [("*",), tuple(f"*/{t}" for t in ENGINE)], ids=["all", "engine"])
def test_what_is_none_of_these_has_no_name(patch, taps):
    """Catches one number that comes near to what has none in it: a cap for a sine, a temperature for a power."""
    judgement, causes = judged(patch, taps=taps)
    assert judgement.culprits and causes == [], render(judgement)
