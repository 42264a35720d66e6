"""Every tap there is: what it is, its axes, what it is computed from. Read off the stages and a run, never listed by hand.

The run is of a model of the same structure and the smallest sizes, holding zeros, so that a 61-layer config is described in a
moment; the numbers of the real one are put into the letters afterwards.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refimpl.autograd.tensor import data_of
from refimpl.diff import Case
from refimpl.diff.dims import Sizes, shape_of
from refimpl.diff.optimizer import Optimizer, stepped_by
from refimpl.layers import PRESETS, STAGES, Config, Recorder, adamw, observing
from refimpl.layers.mla import Attend
from refimpl.layers.router import bias_update, counts
from refimpl.layers.stage import Call, Stage, phase
from refimpl.model import Cache, ForCausalLM, introduce

Kind = Literal["float", "integer", "ids"]


@dataclass(frozen=True)
class Entry:
    """A tap: its name, its stage (what, equation, axes, comparison), its dtype class, what it is computed from (taps, weights,
    inputs, by name), and its shape if there is a run to speak of.
    """

    tap: str
    stage: Stage
    kind: Kind
    sources: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    @property
    def equation(self) -> str:
        """The first sentence of the stage's docstring, without its shapes."""
        doc = " ".join((self.stage.fn.__doc__ or "").split())
        return re.split(r"\. | \(all scalars\)", doc, maxsplit=1)[0].rstrip(".")


def smallest(c: Config) -> Config:
    """A config of the same structure and the smallest sizes: same layers, groups, kinds of projections, MTP modules."""
    per_group = 2 if c.topk_method == "noaux_tc" and c.n_group > 1 else 1
    experts = c.n_group * max(per_group, -(-c.num_experts_per_tok // max(c.topk_group, 1))) if c.n_routed_experts else 0
    small = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 2)
    small |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 2)
    rank = None if c.q_lora_rank is None else 2
    return c.replace(**small, num_attention_heads=1, n_routed_experts=experts, q_lora_rank=rank, vocab_size=8)


def entries(c: Config, *, batch: int, length: int, attend: Attend = "expanded", mtp: bool = True) -> list[Entry]:
    """The taps of a forward run of this config on tokens (batch, length), in model order, with their shapes."""
    n_mtp = c.num_nextn_predict_layers if mtp else 0
    program, kinds = _forward(smallest(c), n_mtp=n_mtp, attend=attend)
    return [
        Entry(call.tap, STAGES[call.stage], kinds[call.tap], tuple(_names(call.args)), shape)
        for call in program
        for shape in [shape_of(call, c, Sizes.whole(batch, length))]
    ]


def of_case(case: Case, *, attend: Attend = "expanded") -> list[Entry]:
    """The taps of a case's forward run; with MTP if its weights have MTP layers."""
    c, prefix = case.config, f"model.layers.{case.config.num_hidden_layers}."
    mtp = any(name.startswith(prefix) for name in case.checkpoint)
    return entries(c, batch=len(case.tokens), length=len(case.tokens[0]), attend=attend, mtp=mtp)


def everything() -> list[Entry]:
    """One entry a stage, in the order of the stages: tap and sources without phase and layer, shapes in letters only."""
    seen: dict[str, tuple[set[str], Kind]] = {}
    for program, kinds in _runs():
        for call in program:
            sources, _ = seen.setdefault(call.stage, (set(), kinds[call.tap]))
            sources |= {general(name) for name in _names(call.args)}
    order = [s.tap for s in STAGES.values()]

    def known(name: str) -> tuple[bool, int]:
        return (name not in order, order.index(name) if name in order else 0)

    return [
        Entry(s.tap, s, seen[s.name][1], tuple(sorted(sorted(seen[s.name][0]), key=known)))
        if s.name in seen
        else Entry(s.tap, s, "float", tuple(_arrays(s)))
        for s in STAGES.values()
    ]


def general(name: str) -> str:
    """A name without what varies: `fwd/L3/mla.q` -> `mla.q`, `w/model.layers.3.mlp.gate.weight` -> `mlp.gate.weight`."""
    if name.startswith(("grad/", "master/")):
        return name
    if name.startswith("w/"):
        name = re.sub(r"^w/(model\.)?(layers\.\d+\.)?", "", name)
        return re.sub(r"(?<=\.experts\.)\d+", "e", name)
    found = re.fullmatch(r"\w+/(?:(L\d+|mtp\d+)/)?(.+)", name)
    if not found:
        return name
    unit, tap = found.groups()
    inside = (unit or "").startswith("mtp") and f"mtp.{tap}" in {s.tap for s in STAGES.values()}
    return f"mtp.{tap}" if inside else tap


def _names(args: Iterable[Any]) -> Iterator[str]:
    """The names among a call's arguments, each once."""
    flat = [n for a in args for n in (a if isinstance(a, tuple) else (a,)) if isinstance(n, str)]
    yield from dict.fromkeys(flat)


def _arrays(s: Stage) -> list[str]:
    return [p.name for p in inspect.signature(s.fn).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def _model(c: Config, n_mtp: int) -> ForCausalLM:
    return ForCausalLM(c, n_mtp=n_mtp).map(lambda name, w: np.zeros(w.shape, np.float32))


def _forward(
    c: Config, *, n_mtp: int, attend: Attend, cache: Cache | None = None, packed: bool = False
) -> tuple[list[Call], dict[str, Kind]]:
    """A run under a recorder -> its program, and the dtype class of every tap. `packed`: padding and documents are given."""
    model, recorder = _model(c, n_mtp), Recorder()
    tokens = np.zeros((1, n_mtp + 2), np.int64)
    ones = np.ones_like(tokens) if packed else None
    inputs = model.inputs(tokens, valid=ones, documents=ones, cache=cache)
    introduce(recorder, model, inputs, cache)
    with observing(recorder):
        model(inputs, cache, with_mtp=bool(n_mtp), attend=attend)
    return recorder.program, _kinds(recorder)


def _kinds(recorder: Recorder) -> dict[str, Kind]:
    def kind(call: Call) -> Kind:
        if data_of(recorder.taps[call.tap]).dtype.kind not in "iu":
            return "float"
        return "ids" if STAGES[call.stage].compare == "set" else "integer"

    return {call.tap: kind(call) for call in recorder.program}


def _runs() -> Iterator[tuple[list[Call], dict[str, Kind]]]:
    """Runs that between them call every stage of the model: both attentions, padding and documents, cache, MTP, losses, update."""
    c, ones = smallest(PRESETS["tiny"].replace(num_nextn_predict_layers=1)), np.ones((1, 2), np.int64)
    yield _forward(c, n_mtp=1, attend="expanded", packed=True)
    model = _model(c, 0)
    first = model(model.inputs(ones, valid=ones, documents=ones))
    yield _forward(c, n_mtp=0, attend="absorbed", cache=first.cache, packed=True)
    yield _losses(c)
    yield _step()


def _step() -> tuple[list[Call], dict[str, Kind]]:
    """A later step than the first of a weight called `weight`."""
    grad = Call("grad/weight", "grad/weight", (), {}, adamw.step)
    program = stepped_by([grad], Optimizer(lr=1.0, step=2))
    return program, {call.tap: "float" for call in program}


def _losses(c: Config) -> tuple[list[Call], dict[str, Kind]]:
    model, recorder, tokens = _model(c, 1), Recorder(), np.zeros((1, 4), np.int64)
    inputs = model.inputs(tokens, labels=tokens)
    introduce(recorder, model, inputs)
    with observing(recorder):
        out = model.forward_and_loss(inputs, mtp_weight=1.0, aux_weight=1.0)
        with phase("upd"):
            load = counts(out.routing["L1"].ids, n_experts=c.n_routed_experts)
            bias = dict(model.named_weights())["model.layers.1.mlp.gate.e_score_correction_bias"]
            bias_update(bias, load, gamma=1.0, zero_sum=False)
    return recorder.program, _kinds(recorder)
