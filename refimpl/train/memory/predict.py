"""The peak of a training step's forward and backward, predicted from one layer of each kind in each mode.

A layer is probed alone, at its real size: what its tape holds (`held`), how far forward and backward go beyond that. The
peak of the whole model is then a sum over layers at the worst moment, with k_i kept by segment i, g_i gradients of its
weights, f_i and b_i the most that its forward and backward take besides:

    forward of i    k_1 + ... + k_(i-1) + f_i
    the ends        k_1 + ... + k_n + max(f, k + b of embedding, head, MTP and losses)
    backward of i   k_1 + ... + k_i + b_i + g_(i+1) + ... + g_n + g of the ends

Not in it: weights, masters and moments (known sizes), and what AdamW allocates.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd import Parameter, Tensor, backward
from refimpl.layers.common import mask
from refimpl.layers.config import Config
from refimpl.layers.module import Unset, is_buffer
from refimpl.layers.rope import rope_tables
from refimpl.layers.stage import observing, phase
from refimpl.train.training import Recipe

from .held import held
from .policies import Frugal, Mode, Policy, Segment


@dataclass(frozen=True)
class Part:
    """Bytes of a segment or of the ends: kept by the tape, most in forward, most in backward besides, gradients at last."""

    kept: int
    forward: int
    backward: int
    grads: int


@dataclass(frozen=True)
class Probe:
    """What parts of a model cost on batches of one size; parts are measured when first asked for."""

    c: Config
    batch: int
    length: int
    recipe: Recipe

    def __post_init__(self) -> None:
        object.__setattr__(self, "_found", {})

    def segment(self, s: Segment) -> Part:
        """A segment of layers; those of equal kind and mode are measured once."""
        kinds = tuple([self.c.is_moe(i) for i in range(s.first, s.stop)])
        return self._once((kinds, s.mode), lambda: _segment(self, s))

    def ends(self, mode: Mode) -> Part:
        """Embedding, final norm, head, MTP modules and losses."""
        return self._once(("ends", mode), lambda: _ends(self, mode))

    def _once(self, key: Any, measure: Callable[[], Part]) -> Part:
        found: dict[Any, Part] = self._found  # type: ignore[attr-defined]
        if key not in found:
            found[key] = measure()
        return found[key]


def peak(probe: Probe, policy: Policy) -> int:
    """Most bytes at any moment of forward and backward under a policy, above what is there before."""
    policy.check(probe.c)
    parts, ends = [probe.segment(s) for s in policy.segments], probe.ends(policy.ends)
    return peak_of(parts, ends)


def peak_of(parts: Sequence[Part], ends: Part) -> int:
    """The formulas of the module."""
    kept, moments = 0, []
    for p in parts:
        moments.append(kept + p.forward)
        kept += p.kept
    moments.append(kept + max(ends.forward, ends.kept + ends.backward))
    grads = ends.grads
    for p in reversed(parts):
        moments.append(kept + p.backward + grads)
        grads += p.grads
        kept -= p.kept
    return max(moments)


def measured(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """(result, most bytes allocated at any moment of it, bytes still there after it), by tracemalloc."""
    gc.collect()
    tracemalloc.start()
    try:
        result = run()
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, most, now


def _segment(p: Probe, s: Segment) -> Part:
    c, kind, batch, length = p.c, p.recipe.plan.dtype, p.batch, p.length
    model = _only(p, [f"model.layers.{i}." for i in range(s.first, s.stop)], Policy((s,)))
    x = Tensor(np.random.default_rng(0).standard_normal((batch, length, c.hidden_size)).astype(kind))
    positions = np.arange(length)[None].repeat(batch, axis=0)
    table = rope_tables(positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=kind)
    seen = mask(positions, None, None, None, past=0, dtype=kind)

    def forward() -> Any:
        with phase("fwd"), observing(p.recipe.plan):
            return model.blocks(x, table, seen, None, "auto")[0]

    return _part(model, forward, [x.data], np.ones_like(x.data))


def _ends(p: Probe, mode: Mode) -> Part:
    c, how = p.c, p.recipe
    extra = [f"model.layers.{c.num_hidden_layers + k}." for k in range(c.num_nextn_predict_layers)]
    model = _only(p, ["model.embed_tokens.", "model.norm.", "lm_head.", *extra], Policy((), mode))
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (p.batch, p.length))
    inputs = model.inputs(tokens, labels=tokens)

    def forward() -> Any:
        with observing(how.plan):
            return model.forward_and_loss(inputs, mtp_weight=how.mtp_weight, aux_weight=how.aux_weight).loss

    return _part(model, forward, [])


def _only(p: Probe, prefixes: Sequence[str], policy: Policy) -> Frugal:
    """A model that has weights where a name begins with one of the prefixes, and nothing elsewhere."""
    rng, dtype = np.random.default_rng(0), p.recipe.plan.dtype

    def filled(name: str, w: Any) -> Any:
        if not name.startswith(tuple(prefixes)) or w.optional:
            return w
        values = (rng.standard_normal(w.shape, dtype=np.float32) * np.float32(0.02)).astype(dtype)
        return values if is_buffer(name) else Parameter(values)

    return Frugal(p.c).map(filled).following(policy, p.recipe.plan)


def _part(model: Frugal, forward: Callable[[], Any], inputs: list[Any], dy: Any = None) -> Part:
    """Measure a forward and its backward, in one go: what backward frees of forward's counts as freed."""
    gc.collect()
    tracemalloc.start()
    try:
        y = forward()
        there, most = tracemalloc.get_traced_memory()
        weights = [w.data if isinstance(w, Tensor) else w for _, w in model.named_weights() if not isinstance(w, Unset)]
        kept = held(y, known=[*inputs, *weights])
        tracemalloc.reset_peak()
        grads = backward(y, dy)
        beyond = tracemalloc.get_traced_memory()[1] - there
    finally:
        tracemalloc.stop()
    sizes = [g.nbytes for leaf, g in grads.items() if type(leaf) is Parameter]
    return Part(kept, max(most, kept), beyond, sum(sizes))
