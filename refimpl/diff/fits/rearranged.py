"""Arguments, and outputs of inner stages, read in another arrangement: axes merged in the wrong order, halves exchanged, a matrix
transposed, weights sorted. There are few, so each is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import STAGES, Call

from ..corpus import Mutant
from ..corpus.norms import rms
from ..dims import TOKEN_AXES
from ..program import names
from .evidence import Evidence, guess, short, weights_of
from .moved import EDGES, late, late_in_words

Change = Callable[[Array], Array]
EXPERTS = ("moe.gate", "moe.up", "moe.down")
REGION = 22
"""Stages computed for a tap up to which each of them is suspected: a dense layer's, from stream to stream."""


def arguments(ev: Evidence) -> Iterator[Mutant]:
    """One argument in another arrangement, its kinds of weight all at once."""
    for call in suspects(ev):
        for i, name in sorted(enumerate(call.args), key=lambda one: _whole_numbers(ev, one[1])):
            known = call.stage in EXPERTS and i == 1
            if isinstance(name, str) and not name.startswith("w/") and not known and not only_reader(ev, name):
                beside = _readers(ev, call, name)
                for said, change in changes(ev.axes_of(name), ev):
                    fn = _reading(call, [i], change)
                    if beside:
                        also = {c.stage: _reading(c, [c.args.index(name)], change) for c in beside}
                        yield guess(f"{short(name)} is read with {said}", call.stage, fn, also)
                    yield guess(f"{call.of.tap} reads {short(name)} with {said}", call.stage, fn)
        at = [i for i, name in enumerate(call.args) if isinstance(name, str) and name.startswith("w/")]
        for said, change in MATRIX if at else ():
            yield guess(f"{call.of.tap}'s weight {said}", call.stage, _reading(call, at, change))


def tokens(ev: Evidence) -> Iterator[Mutant]:
    """One argument with every token's entry that of another token."""
    for call in [c for c in suspects(ev) if c.stage not in EXPERTS and ev.everywhere]:  # experts but count ids
        for i, name in enumerate(call.args):
            axes = ev.axes_of(name) if isinstance(name, str) else []
            for said, change in _moments(axes):
                if call is ev.call and not _moves(ev.args[i], change):
                    continue
                if not only_reader(ev, name):
                    yield guess(f"{call.of.tap} reads {short(name)} {said}", call.stage, _reading(call, [i], change))
                if name in ev.finding.region:
                    yield guess(
                        f"{ev.calls[name].of.tap} is that {said}",
                        ev.calls[name].stage,
                        _giving(ev.calls[name].stage, change),
                    )


def _moves(x: Array, change: Change) -> bool:
    """Whether half of the rows are others then: tokens that choose alike do not tell whose choice is read."""
    return bool((change(x) != x).any(axis=-1).mean() >= 0.5) if x.ndim > 2 else True


def only_reader(ev: Evidence, name: str) -> bool:
    """Whether a tap was computed for this one, and no other stage reads it: what it is read as, it is."""
    return name in ev.finding.region and sum([name in names(c.args) for c in ev.calls.values()]) == 1


def _whole_numbers(ev: Evidence, name: Any) -> bool:
    """Whether a tap holds choices, which are as good as in order if the weights are."""
    return isinstance(name, str) and name in ev.calls and ev.calls[name].of.compare in ("exact", "set")


def _readers(ev: Evidence, call: Call, name: str) -> list[Call]:
    """The other stages that read a tap and are blamed, or were computed for the tap at hand."""
    suspected = {*ev.blamed, *ev.finding.region}
    return [c for c in ev.calls.values() if name in c.args and c.tap in suspected and c.stage != call.stage]


def _moments(axes: Sequence[str]) -> Iterator[tuple[str, Change]]:
    """Tokens that are those before or behind."""
    axis = next((a for a, letter in enumerate(axes) if letter in TOKEN_AXES), None)
    for by in (1, -1) if axis is not None and axes[-1] != "T" else ():
        for edge in EDGES:
            yield late_in_words(by, edge), partial(late, axis=axis or 0, by=by, edge=edge)


def outputs(ev: Evidence) -> Iterator[Mutant]:
    """What a stage gives, in another arrangement."""
    for call in suspects(ev):
        for said, change in changes(call.of.shape.split(), ev):
            yield guess(f"{call.of.tap} has {said}", call.stage, _giving(call.stage, change))


def again(ev: Evidence) -> Iterator[Mutant]:
    """A stage that is applied twice, or not at all."""
    for call in suspects(ev):
        if call.stage != "router.choice":  # a bias that counts twice
            yield guess(f"{call.of.tap} is applied twice", call.stage, _twice(call.stage))
        for i, name in enumerate(call.args):
            if isinstance(name, str) and not name.startswith("w/"):
                yield guess(f"{call.of.tap} is {short(name)} as it is", call.stage, lambda *args, i=i, **_: args[i] * 1)
                if (made := ev.calls.get(name)) and name not in ev.finding.region and len(weights_of(made)) == 1:
                    (w,) = [ev.recorded.weights(n[2:], FLOAT64) for n in weights_of(made)]
                    more = partial(_once_more, made=made, w=w)
                    title = f"{call.of.tap} reads {short(name)} applied twice"
                    yield guess(title, call.stage, _reading(call, [i], more))


def suspects(ev: Evidence) -> list[Call]:
    """The stages computed for a tap, if they are few, its own first; else its own."""
    calls = {c.stage: c for c in reversed(ev.region)}
    return list(calls.values()) if len(calls) <= REGION else [ev.call]


def _reading(call: Call, at: Sequence[int], change: Change) -> Callable[..., Any]:
    def fn(*args: Any, **static: Any) -> Any:
        return STAGES[call.stage].fn(*[change(a) if i in at else a for i, a in enumerate(args)], **static)

    return fn


def _giving(name: str, change: Change) -> Callable[..., Any]:
    return lambda *args, **static: change(STAGES[name].fn(*args, **static))


def _twice(name: str) -> Callable[..., Any]:
    def fn(x: Any, *args: Any, **static: Any) -> Any:
        y = STAGES[name].fn(x, *args, **static)
        if y.shape != x.shape:
            raise ValueError("what it gives it does not take")
        return STAGES[name].fn(y, *args, **static)

    return fn


def _once_more(x: Array, made: Call, w: Array) -> Array:
    """A stage of one weight applied to what it gave."""
    out: Array = made.of.fn(x, w, **made.static)
    if out.shape != x.shape:
        raise ValueError("what it gives it does not take")
    return out


def _halves(x: Array) -> Array:
    return np.roll(x, x.shape[-1] // 2, axis=-1)


def _paired(x: Array) -> Array:
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _split(x: Array) -> Array:
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


MATRIX: tuple[tuple[str, Change], ...] = (
    ("is read transposed", lambda w: np.ascontiguousarray(w.T).reshape(w.shape)),
    ("has the halves of its rows exchanged", lambda w: np.roll(w, w.shape[0] // 2, axis=0)),
    ("has the halves of its columns exchanged", _halves),
    ("has its rows in reverse order", lambda w: w[::-1]),
    ("has its columns in reverse order", lambda w: w[..., ::-1]),
    ("has its rows one late", lambda w: np.roll(w, 1, axis=0)),
    ("has its rows one early", lambda w: np.roll(w, -1, axis=0)),
    ("is negated", lambda w: -w),
    ("is 0", lambda w: w * 0),
    ("is 1", lambda w: w * 0 + 1),
)


def changes(axes: Sequence[str], ev: Evidence) -> Iterator[tuple[str, Change]]:
    """Arrangements of an array with these axes."""
    if "H" in axes:
        yield from _heads(axes.index("H"), ev)
    if list(axes[-2:-1]) == ["H"]:
        yield "heads and channels laid out the other way round", _exchanged(-2, -1)
        yield "heads and channels cut the other way round", _cut_across
        for n in _cuts(axes[-1], ev):
            yield f"the first {n} channels of all heads before the others of all", partial(_parts, n=n)
            yield f"heads cut as if the first {n} channels of all stood before", partial(_parted, n=n)
    if axes[:1] == ["B"]:
        yield "the first sequence's numbers in every sequence", lambda x: x[:1] + 0 * x
    if list(axes[1:3]) in (["S", "H"], ["T", "H"]):
        yield "heads and tokens laid out the other way round", _exchanged(1, 2)
    if axes[-1:] == ["K"]:
        yield "the largest slot first", lambda x: -np.sort(-x, axis=-1)
        yield "the smallest slot first", lambda x: np.sort(x, axis=-1)
        yield "its slots in reverse order", lambda x: x[..., ::-1]
        yield "its slots one late", lambda x: np.roll(x, 1, -1)
        yield "its slots one early", lambda x: np.roll(x, -1, -1)
    elif axes and axes[-1] not in ("S", "T"):
        for n in _cuts(axes[-1], ev):
            yield f"its first {n} channels behind the others", partial(np.roll, shift=-n, axis=-1)
        yield "its halves exchanged", _halves
        yield "its halves in pairs", _paired
        yield "its pairs in halves", _split
        yield "its channels in reverse order", lambda x: x[..., ::-1]
        yield "its rows divided by their root mean square", lambda x: x / rms(x, ev.config.rms_norm_eps)


def _heads(axis: int, ev: Evidence) -> Iterator[tuple[str, Change]]:
    """Arrangements of heads."""
    yield "its heads in reverse order", lambda x: np.flip(x, axis)
    if ev.config.num_attention_heads > 2:
        yield "its heads one late", lambda x: np.roll(x, 1, axis)
        yield "its heads one early", lambda x: np.roll(x, -1, axis)
    yield "the first head's numbers in all heads", lambda x: np.take(x, [0], axis) + 0 * x
    heads = ev.config.num_attention_heads
    for n in [n for n in range(2, heads) if heads % n == 0]:
        yield f"the first one's numbers in every {n} heads", partial(_first_of, n=n, axis=axis)


def _first_of(x: Array, n: int, axis: int) -> Array:
    """Of every n heads the first."""
    return np.take(x, np.arange(x.shape[axis]) // n * n, axis)


def _cut_across(x: Array) -> Array:
    """Channels of all heads read as if every head's n-th stood beside the others' n-th."""
    return np.swapaxes(x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2]), -2, -1)


def _parts(x: Array, n: int) -> Array:
    """All heads' first n channels, then all others, read head by head."""
    flat = (*x.shape[:-2], -1)
    return np.concatenate([x[..., :n].reshape(flat), x[..., n:].reshape(flat)], axis=-1).reshape(x.shape)


def _parted(x: Array, n: int) -> Array:
    """Head by head, read as if all heads' first n channels stood before all others."""
    at = x.shape[-2] * n
    flat = x.reshape(*x.shape[:-2], -1)
    parts = [y.reshape(*x.shape[:-1], -1) for y in (flat[..., :at], flat[..., at:])]
    return np.concatenate(parts, axis=-1)


def _cuts(axis: str, ev: Evidence) -> list[int]:
    """Where a concatenation has its seam, and where it would have it the other way round."""
    c = ev.config
    sizes = {"Dn": c.qk_nope_head_dim, "Dr": c.qk_rope_head_dim, "Dv": c.v_head_dim, "C": c.kv_lora_rank}
    return sorted({sizes[part] for part in axis.split("+") if part in sizes}) if "+" in axis else []


def _exchanged(a: int, b: int) -> Change:
    """Two axes laid out the other way round and read as if they were not."""
    return lambda x: np.ascontiguousarray(np.swapaxes(x, a, b)).reshape(x.shape)
