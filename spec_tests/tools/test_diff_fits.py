"""What is in no catalogue and named all the same: orders, shifts, factors, settings, other arrays read, fitted and replayed."""

import dataclasses
import fnmatch

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.diff import Case, Trace, diagnose, render
from refimpl.diff.fits import words
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS, STAGES
from refimpl.layers.router import top_k
from refimpl.layers.stage import Patch, tap_name
from refimpl.record import new_case, trace_case

from .test_diff_partial import case, recording

FN = {name: stage.fn for name, stage in STAGES.items()}
NOPE = 12
ENGINE = (
    *("attn_norm", "ffn_norm", "final_norm", "mla.q", "mla.c_kv", "mla.q_rope", "mla.k_rope", "mla.ctx", "attn_out"),
    *("resid_mid", "resid", "router.logits", "router.weights", "router.ids", "moe.routed", "moe.shared", "ffn_out"),
    "logits",
)
"""What an engine with fused kernels shows."""


class Reading:
    """A stage that is handed what its unit's taps held before: an observer, innermost of all."""

    def __init__(self, name, fn):
        self.name, self.fn, self.seen = name, fn, {}

    def __call__(self, stage, run, /, *args, **static):
        unit = tap_name(stage).rpartition("/")[0]
        out = self.fn(self.stream(unit), *args, **static) if stage.name == self.name else run(*args, **static)
        self.seen[tap_name(stage)] = out
        return out

    def stream(self, unit):
        layer = int(unit[-1]) if unit[-1:].isdigit() else 0
        return self.seen.get(f"fwd/L{layer - 1}/resid" if layer else "fwd/embed")


def rows(name, change):
    """A stage whose weight's rows, head by head (H, rows, columns), are changed."""

    def fn(x, w, *, n_heads):
        return FN[name](x, change(w.reshape(n_heads, -1, w.shape[-1])).reshape(w.shape), n_heads=n_heads)

    return Patch(name, fn)


def weight(name, change):
    return Patch(name, lambda x, w, *rest, **k: FN[name](x, np.ascontiguousarray(change(w)), *rest, **k))


def setting(name, **values):
    return Patch(name, lambda *a, **k: FN[name](*a, **k | values))


def times(name, by):
    return Patch(name, lambda *a, **k: FN[name](*a, **k) * np.float32(by))


def experts(order):
    """Expert e with the matrices of expert order[e], where experts are not looked at by their number."""
    return [
        Patch(n, lambda x, ids, *ws, n=n: FN[n](x, ids, *[ws[i] for i in order]))
        for n in ("moe.gate", "moe.up", "moe.down")
    ]


def late(name, at=0):
    """A stage with one argument a token late; the first token has the last one's."""

    def fn(*a, **k):
        return FN[name](*a[:at], np.concatenate([a[at][:, -1:], a[at][:, :-1]], axis=1), *a[at + 1 :], **k)

    return Patch(name, fn)


def slots(down, ids, w):
    w = np.array(w)
    w[..., -1] = 0
    return FN["moe.routed"](down, ids, w)


def crowded(down, ids, w):
    """Nobody takes more than 12 tokens; who comes later is dropped."""
    w, taken = np.array(w), dict.fromkeys(range(16), 0)
    for at in np.ndindex(ids.shape):
        taken[ids[at]] += 1
        w[at] = w[at] if taken[ids[at]] <= 12 else 0
    return FN["moe.routed"](down, ids, w)


def window(*a, **k):
    s = FN["mla.scores"](*a, **k)
    for q, t in np.ndindex(s.shape[-2:]):
        s[..., q, t] = -np.inf if q - t > 7 else s[..., q, t]
    return s


def tied(x, w):
    embedding = np.asarray(case().weights()["model.embed_tokens.weight"], x.dtype)
    return FN["logits"](x, embedding)


def swapped(a, b, n=16):
    order = list(range(n))
    order[a], order[b] = b, a
    return order


TABLE = {
    "v before k": (
        rows("mla.kv_b", lambda w: np.concatenate([w[:, NOPE:], w[:, :NOPE]], 1)),
        "*channels 12-21 stand before channels 0-11",
    ),
    "keys, then values": (
        rows("mla.kv_b", lambda w: np.concatenate([w[:, :NOPE].reshape(-1, 20), w[:, NOPE:].reshape(-1, 20)])),
        "mla.kv_b: first 12 channels of all heads stand before the others of all heads",
    ),
    "q rotated first": (
        rows("mla.q", lambda w: np.roll(w, -NOPE, 1)),
        "mla.q: channels 12-19 stand before channels 0-11",
    ),
    "q in halves": (
        rows("mla.q", lambda w: np.concatenate([w[:, :NOPE], w[:, NOPE::2], w[:, NOPE + 1 :: 2]], 1)),
        "mla.q: of channels 12-19, even channels stand before odd ones",
    ),
    "kv_a rotated first": (
        weight("mla.kv_a", lambda w: np.roll(w, 8, 0)),
        "mla.kv_a: channels 20-27 stand before channels 0-19",
    ),
    "heads reversed": (rows("mla.q", lambda w: w[::-1]), "mla.q: heads are in reverse order"),
    "heads reversed late": (
        Patch("attn_out", lambda o, w, b=None: FN["attn_out"](o[:, :, ::-1], w, b)),
        "attn_out reads mla.ctx with its heads in reverse order",
    ),
    "heads merged": (
        Patch("attn_out", lambda o, w, b=None: FN["attn_out"](o.swapaxes(2, 3).reshape(o.shape), w, b)),
        "attn_out reads mla.ctx with heads and channels laid out the other way round",
    ),
    "tokens merged": (
        Patch("attn_out", lambda o, w, b=None: FN["attn_out"](o.transpose(0, 2, 1, 3).reshape(o.shape), w, b)),
        "attn_out reads mla.ctx with heads and tokens laid out the other way round",
    ),
    "experts exchanged": (experts(swapped(2, 5)), "experts' matrices: experts 2 and 5 are exchanged"),
    "experts after": (experts([*range(1, 16), 0]), "experts' matrices: experts are those of their neighbour behind *"),
    "experts mixed": (
        experts(np.random.default_rng(3).permutation(16)),
        "experts' matrices: experts are in the order 11, 15, 9, *",
    ),
    "router rows": (
        weight("router.logits", lambda w: w[swapped(3, 9)]),
        "router.logits: experts 3 and 9 are exchanged",
    ),
    "biases reversed": (
        Patch("router.choice", lambda s, b: s + b[::-1]),
        "selection biases: experts are in reverse order",
    ),
    "bias twice": (Patch("router.choice", lambda s, b: s + b + b), "the selection bias counts 2 times"),
    "weights sorted": (
        Patch("moe.routed", lambda d, ids, w: FN["moe.routed"](d, ids, -np.sort(-w, -1))),
        "moe.routed reads router.weights with the largest slot first",
    ),
    "ids sorted": (
        Patch("router.weights", lambda s, ids, **k: FN["router.weights"](s, np.sort(ids, -1), **k)),
        "router.weights reads router.ids with the smallest slot first",
    ),
    "weights mixed": (
        Patch(
            "router.weights", lambda *a, **k: np.random.default_rng(5).permuted(FN["router.weights"](*a, **k), axis=-1)
        ),
        "each token's routing weights are right, and in another order than its experts",
    ),
    "an expert less": (
        Patch("router.ids", lambda a, kept, *, k, **s: FN["router.ids"](a, kept, k=k - 1, **s)),
        "experts chosen by every token: 3 instead of 4",
    ),
    "an expert more": (
        Patch("router.ids", lambda a, kept, *, k, **s: FN["router.ids"](a, kept, k=k + 1, **s)),
        "experts chosen by every token: 5 instead of 4",
    ),
    "last slot": (Patch("moe.routed", slots), "moe.routed adds up otherwise: slot 3 of 4 does not count"),
    "capacity": (Patch("moe.routed", crowded), "experts take 12 tokens at most, the others are dropped"),
    "a group more": (
        Patch("router.groups", lambda a, *, topk_group: top_k(a, topk_group + 1)),
        "groups kept: 3 instead of 2",
    ),
    "best three": (
        setting("router.group_scores", best=3),
        "experts of a group that count for its score: 3 instead of 2",
    ),
    "tied": (Patch("logits", tied), "logits has the weight of embed (tied)"),
    "capped": (Patch("logits", lambda x, w: 5 * np.tanh(FN["logits"](x, w) / 5)), "logits is capped at 5"),
    "window": (Patch("mla.scores", window), "keys more than 7 places back are masked"),
    "theta": (setting("mla.rope_tables", theta=5e5), "RoPE's theta is 500000"),
    "odd theta": (setting("mla.rope_tables", theta=12345.0), "RoPE's theta is 12345"),
    "yarn": (
        Patch(
            "mla.rope_tables",
            lambda p, *, yarn, **k: FN["mla.rope_tables"](p, yarn=dataclasses.replace(yarn, factor=16.0), **k),
        ),
        "RoPE's factor is 16",
    ),
    "positions": (
        Patch("mla.rope_tables", lambda p, **k: FN["mla.rope_tables"](p - 2, **k)),
        "positions are 2 too small",
    ),
    "positions doubled": (
        Patch("mla.rope_tables", lambda p, **k: FN["mla.rope_tables"](p * 2, **k)),
        "positions are multiplied by 2",
    ),
    "shared halved": (times("moe.shared", 0.5), "moe.shared is 0.5 times what it should be"),
    "branch": (Patch("resid", lambda x, y: x + np.float32(0.22) * y), "resid is resid_mid + 0.22 x ffn_out"),
    "embedding": (times("embed", 12), "embed is 12 times what it should be"),
    "softmax scale": (
        Patch("mla.scores", lambda *a, scale: FN["mla.scores"](*a, scale=scale * 0.3)),
        "the softmax scale is 0.3 times what it should be",
    ),
    "rotated scores": (
        Patch("mla.scores", lambda q, r, *a, **k: FN["mla.scores"](q, 2 * r, *a, **k)),
        "mla.scores is q k of nope channels + 2 x q k of rotated ones",
    ),
    "parallel": (
        Reading("resid", lambda stream, x, y: stream + y),
        "resid reads the stream before attention instead of resid_mid",
    ),
    "residual twice": (
        Reading("resid", lambda stream, x, y: x + y + stream),
        "resid is resid_mid + ffn_out + the stream before attention",
    ),
    "eps": (setting("attn_norm", eps=3e-4), "the norms' eps is 0.0003"),
    "eps of all": (
        [setting(n, eps=2e-3) for n in ("attn_norm", "ffn_norm", "mla.q_a_norm", "mla.c_kv")],
        "the norms' eps is 0.002",
    ),
    "norm twice": (
        Patch("ffn_norm", lambda x, w, *, eps: FN["ffn_norm"](FN["ffn_norm"](x, w, eps=eps), w, eps=eps)),
        "ffn_norm is applied twice",
    ),
    "transposed": (weight("attn_out", lambda w: w.T.reshape(w.shape)), "attn_out's weight is read transposed"),
    "token late": (
        late("mla.kv_b"),
        "mla.kv_b is that of the token before (where there is none: those around the end)",
    ),
    "branch late": (
        late("resid", 1),
        "resid reads ffn_out of the token before (where there is none: those around the end)",
    ),
}
"""What is wrong -> the patches, and how it is named where every tap was recorded."""
ALWAYS = (
    "v before k",
    "heads merged",
    "experts exchanged",
    "an expert less",
    "odd theta",
    "parallel",
    "tied",
    "residual twice",
)
EVERY = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in TABLE]
BEHIND = (
    "experts exchanged",
    "last slot",
    "window",
    "softmax scale",
    "eps of all",
    "theta",
    "an expert less",
    "embedding",
)
"""Named from what an engine shows as well, which is behind the stage that is wrong."""
FINE = ("eps", "eps of all")
"""Too small for bfloat16."""


def judged(patches, precision="float32", taps=("*",)):
    listed = patches if isinstance(patches, list) else [patches]
    with np.errstate(all="ignore"):
        found = judge(case(), trace_case(case(), precision=precision, patches=listed, taps=taps))
        return found, found.causes


def titles(found):
    """What is said of all that is blamed; an assertion if something is left."""
    judgement, causes = found
    assert {t for d in causes for t in d.taps} == {f.tap for f in judgement.culprits}, render(judgement)
    return [d.said for d in causes]


@pytest.mark.parametrize("name", EVERY)
def test_what_no_catalogue_has_is_named(name):
    """Catches a mistake that is placed and not named, named by another of the same numbers, or layer by layer."""
    patches, title = TABLE[name]
    (said,) = titles(judged(patches))
    assert fnmatch.fnmatch(said, title), said


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TABLE if n not in FINE])
def test_it_is_named_in_bfloat16_too(name):
    """Catches a fit that takes float32's digits for granted."""
    patches, title = TABLE[name]
    (said,) = titles(judged(patches, "bf16"))
    assert fnmatch.fnmatch(said, title), said


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == BEHIND[0] else pytest.mark.slow) for n in BEHIND])
def test_it_is_named_from_an_engine_s_taps(name):
    """Catches fits that only see the stage that was recorded, not those it was computed through."""
    patches, title = TABLE[name]
    (said,) = titles(judged(patches, taps=[f"*/{t}" for t in ENGINE]))
    assert fnmatch.fnmatch(said, title), said


def test_experts_that_no_token_chose_are_moved_with_the_others(tmp_path):
    """Catches `taken from 1, 2, 3, 3, 5` for experts that are all one further, where no token shows some."""
    few = Case.read(new_case(tmp_path / "few", PRESETS["tiny"], seed=1, length=5))
    trace = trace_case(few, patches=experts([*range(1, 16), 0]), taps=[f"*/{t}" for t in ENGINE])
    assert len(np.unique(trace.taps["fwd/L1/router.ids"])) < 16
    judgement = judge(few, trace)
    (said,) = titles((judgement, judgement.causes))
    assert "experts are those of their neighbour behind (around the end)" in said


def test_a_fit_leaves_right_taps_right():
    """Catches positions blamed for a q that alone is turned too far: k is turned by the same tables, and right."""

    def further(q, table, **k):
        angle = np.arctan2(table[1], table[0])
        angle = angle + 2 * angle[:, 1:2]  # that of position 1
        return FN["mla.q_rope"](q, np.stack([np.cos(angle), np.sin(angle)]).astype(q.dtype), **k)

    (said,) = titles(judged(Patch("mla.q_rope", further), taps=[f"*/{t}" for t in ENGINE]))
    assert said == "q is rotated by positions that are 2 too large"


def test_a_number_has_the_digits_that_the_taps_tell():
    """Catches 12000 for a theta of 12345: behind a rotation in bfloat16 that is within what is allowed, but 12300 is nearer."""
    patch, _ = TABLE["odd theta"]
    assert titles(judged(patch, "bf16", [f"*/{t}" for t in ENGINE])) == ["RoPE's theta is 12300"]


def noise(y):
    return (y * (1 + 0.2 * np.random.default_rng(y.size).normal(size=y.shape))).astype(y.dtype)


def wave(y):
    return (y * (1 + 0.5 * np.sin(np.arange(y.shape[-1])))).astype(y.dtype)


def bent(y):
    return np.where(np.isfinite(y), y * np.abs(y) ** 0.3, y).astype(y.dtype)


NONSENSE = [
    pytest.param(
        name, change, precision, marks=() if (name, precision) in (("attn_out", "float32"),) else pytest.mark.slow
    )
    for name in (
        "attn_norm",
        "mla.q",
        "mla.k_rope",
        "mla.kv_b",
        "mla.scores",
        "mla.ctx",
        "attn_out",
        "router.logits",
        "moe.routed",
        "resid",
        "logits",
    )
    for change in (noise, wave, bent)
    for precision in ("float32", "bf16")
]


@pytest.mark.parametrize(("name", "change", "precision"), NONSENSE)
def test_nonsense_has_no_name(name, change, precision):
    """Catches a fit with so much freedom, or so little to fit, that it explains what has no explanation."""
    patch = Patch(name, lambda *a, **k: change(FN[name](*a, **k)))
    for taps in (["*"], [f"*/{t}" for t in ENGINE]):
        judgement, causes = judged(patch, precision, taps)
        assert judgement.culprits and causes == [], render(judgement)


def test_what_conforms_is_not_fitted(monkeypatch):
    """Catches fits that cost something where nothing is wrong, or where the catalogue has the mistake."""

    def never(*_):
        raise AssertionError("fitted")

    monkeypatch.setattr(diagnose, "fitted", never)
    for name in ("hf-float32", "hf-bug"):
        assert bool(judge(case(), recording(name)).causes) == (name == "hf-bug")


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([3, 2, 1, 0], "heads are in reverse order"),
        ([0, 2, 1, 3], "heads 1 and 2 are exchanged"),
        ([1, 2, 3, 4, 0], "heads are those of their neighbour behind (around the end)"),
        ([3, 4, 5, 6, 0, 1, 2], "heads 3-6 stand before heads 0-2"),
        ([0, 3, 1, 4, 2, 5], "heads of two halves stand in pairs"),
        ([0, 2, 4, 1, 3, 5], "even heads stand before odd ones"),
        ([0, 3, 6, 1, 4, 7, 2, 5, 8], "heads are transposed, 3 x 3 where 3 x 3 is meant"),
        ([0, 1, 2, 4, 6, 3, 5, 7], "of heads 2-7, even heads stand before odd ones"),
        ([0, -1, 2], "head 1 is 0"),
        ([0, -1, -1], "heads 1, 2 are 0"),
        ([0, 0, 2], "heads are taken from 0, 0, 2"),
        ([2, 0, 3, 1, 4], "heads are in the order 2, 0, 3, 1, 4"),
    ],
)
def test_orders_in_words(order, said):
    """Catches an order said wrongly, or by its numbers where it has a name."""
    assert words.order_in_words(np.array(order), "heads") == said


def test_numbers_that_models_multiply_by_are_said():
    """Catches a factor printed to nine digits that is one over mscale squared."""
    c = case().config
    v = float(1 / (0.1 * np.log(40) + 1) ** 2)
    assert "0.5337 (1 / mscale squared)" in [said for _, said in words.likely(v * 1.0005, c)]
    assert next(words.likely(0.25, c))[1] == "0.2" and "0.25" in [s for _, s in words.likely(0.25, c)]


def test_a_trace_that_cannot_be_fitted_says_nothing():
    """Catches a traceback where the blamed tap is a part, or holds no numbers."""
    trace = recording("hf-float32")
    bad = {t: np.full_like(a, np.nan) if t.endswith("mla.q") else a for t, a in trace.taps.items()}
    judgement = judge(case(), Trace(trace.header, bad))
    assert judgement.exit_code == 1 and judgement.causes == []
    with pytest.raises(SpecError):
        judge(case(), Trace(dataclasses.replace(trace.header, tokens=[[1]]), trace.taps))
