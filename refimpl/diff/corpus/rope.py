"""Mistakes of how q and k are rotated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.autograd.tensor import Array

from .mutant import Mutant, stage, threads

_A01 = threads("DeepSeek-V3 #938; transformers #39687; vLLM #26995; Megatron-LM #1547; Megatron-LM #3900")
_A02 = threads("Megatron-LM #3900")


def _laid_out_for_halves(name: str) -> Callable[..., Array]:
    """Pairs rotated element by element with cos and sin in the order of halves."""

    def fn(x: Array, table: Array, *, interleaved: bool) -> Array:
        x = x[..., -2 * table.shape[-1] :]
        cos, sin = (np.concatenate([t, t], axis=-1) for t in (table if x.ndim == 3 else table[:, :, :, None]))
        turned = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
        out: Array = x * cos + turned * sin
        return out

    return fn


def _one_step_on(name: str) -> Callable[..., Array]:
    """Rotation by one position more than the tables say."""

    def fn(x: Array, table: Array, *, interleaved: bool) -> Array:
        turn = table[0] + 1j * table[1]
        on = turn * (turn[:, 1:2] / turn[:, :1] if turn.shape[1] > 1 else 1)
        out: Array = stage(name)(x, np.stack([on.real, on.imag]), interleaved=interleaved)
        return out

    return fn


def _next_row(name: str) -> Callable[..., Array]:
    """Rotation by the tables' next row; behind the last there is none."""
    return lambda x, table, **k: stage(name)(x, np.concatenate([table[:, :, 1:], table[:, :, -1:]], axis=2), **k)


def _backwards(name: str) -> Callable[..., Array]:
    """Rotation by -theta."""
    return lambda x, table, **k: stage(name)(x, np.stack([table[0], -table[1]]), **k)


def _in_halves(name: str) -> Callable[..., Array]:
    """A01, left in the order in which it was rotated, while the other of q and k is laid out that way as it is rotated."""

    def fn(x: Array, table: Array, *, interleaved: bool) -> Array:
        y = stage(name)(x, table, interleaved=not interleaved)
        split = (2, -1) if interleaved else (-1, 2)
        out: Array = y.reshape(*y.shape[:-1], *split).swapaxes(-1, -2).reshape(y.shape)
        return out

    return fn


def _other_pairs(name: str) -> Callable[..., Array]:
    """Rotation in halves where pairs are meant, or the other way."""
    return lambda x, table, *, interleaved: stage(name)(x, table, interleaved=not interleaved)


def _rope_first(q: Array, table: Array, *, interleaved: bool) -> Array:
    out: Array = stage("mla.q_rope")(q[..., : 2 * table.shape[-1]], table, interleaved=interleaved)
    return out


def _others_last(q: Array, q_rope: Array, *rest: Array, scale: float) -> Array:
    """Scores of q's last Dn channels."""
    out: Array = stage("mla.scores")(np.roll(q, -q_rope.shape[-1], axis=-1), q_rope, *rest, scale=scale)
    return out


def _others_last_absorbed(q: Array, w: Array, *, nope: int) -> Array:
    """q's last Dn channels in latent space."""
    out: Array = stage("mla.q_absorbed")(q[..., q.shape[-1] - nope :], w, nope=nope)
    return out


MUTANTS = (
    *[
        Mutant(
            f"A01{which}{form}",
            f"{which} is rotated in halves where pairs are meant, or the other way",
            f"mla.{which}_rope",
            fn(f"mla.{which}_rope"),
            _A01,
        )
        for form, fn in (("", _other_pairs), ("-laid", _in_halves))
        for which in ("q", "k")
    ],
    Mutant(
        "A01-both",
        "q and k are rotated in halves where pairs are meant, or the other way",
        "mla.q_rope",
        _other_pairs("mla.q_rope"),
        _A01,
        also={"mla.k_rope": _other_pairs("mla.k_rope")},
    ),
    *[
        Mutant(
            f"A02{which}",
            f"{which}'s pairs are rotated by tables laid out for halves",
            name,
            _laid_out_for_halves(name),
            _A02,
        )
        for which, name in (("q", "mla.q_rope"), ("k", "mla.k_rope"))
    ],
    Mutant("X22", "k is rotated one position too far", "mla.k_rope", _one_step_on("mla.k_rope")),
    Mutant("X23", "q is rotated one position too far", "mla.q_rope", _one_step_on("mla.q_rope")),
    *[
        Mutant(
            f"X27{which}",
            f"{which} is rotated by the next token's tables, the last by its own",
            at,
            _next_row(at),
            ahead=True,
        )
        for which, at in (("q", "mla.q_rope"), ("k", "mla.k_rope"))
    ],
    Mutant("X12", "q is rotated the other way", "mla.q_rope", _backwards("mla.q_rope")),
    Mutant("X13", "k is rotated the other way", "mla.k_rope", _backwards("mla.k_rope")),
    Mutant(
        "X12-both",
        "q and k are rotated the other way",
        "mla.q_rope",
        _backwards("mla.q_rope"),
        also={"mla.k_rope": _backwards("mla.k_rope")},
    ),
    Mutant("X14", "q is not rotated", "mla.q_rope", lambda q, t, **k: q[..., -2 * t.shape[-1] :]),
    Mutant("X15", "k is not rotated", "mla.k_rope", lambda kv, t, **k: kv[..., -2 * t.shape[-1] :]),
    Mutant("X16", "the rotated channels are taken from the front of q", "mla.q_rope", _rope_first),
    *[
        Mutant(
            f"X16-{at}",
            "q's first channels are taken for the rotated ones, and its last for the others",
            "mla.q_rope",
            _rope_first,
            also={f"mla.{at}": fn},
        )
        for at, fn in (("scores", _others_last), ("q_absorbed", _others_last_absorbed))
    ],
)
