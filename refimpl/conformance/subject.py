"""The implementation under test: an object with any of the protocol's methods, and what it cannot do said in one way.

info() -> {"name", "version", "precision", "layouts"}; load(config, weights); forward(tokens, positions, cache, taps, valid=)
-> {tap: array} with "logits"; step(token, cache, taps); loss_and_grads(tokens, labels, taps, mtp_weight=, aux_weight=);
stage(name, inputs, params) -> array; ranks(tokens, axes, taps) -> every rank's taps. `refimpl.model.Impl` has all but the last,
`refimpl.conformance.ranks.Impl` that, too. A method that is absent or raises
NotImplementedError is `Lacking`: no failure, but not a pass either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Header, Trace, digest
from refimpl.diff.reading import is_bfloat16
from refimpl.record.candidate import named_object

from .process import Lacking, Process
from .shipped import SHIPPED

METHODS = ("load", "forward", "step", "loss_and_grads", "stage", "ranks")
"""What may be asked of an implementation, besides `info`."""
DIMS = "dims"
"""The key of an answer that is no tap: {tap: its axes, as `dims` of a trace's header}."""
_PLAIN = ("float64", "float32", "bfloat16", "float16")
"""Storages that say what every tap is kept in."""
_STORAGE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Subject:
    """An implementation, asked for things. `info` as it gave them; `case`, the one that is loaded."""

    impl: Any
    info: dict[str, Any] = field(default_factory=dict)
    case: Case | None = None

    def __post_init__(self) -> None:
        told = self.impl.info() if hasattr(self.impl, "info") else {}
        require(isinstance(told, Mapping), f"info() gave a {type(told).__name__}; expected a dict")
        self.info = {"name": type(self.impl).__name__, "version": "", **told}

    @property
    def name(self) -> str:
        """Name and version, for reports."""
        return f"{self.info['name']} {self.info['version']}".strip()

    @property
    def precision(self) -> dict[str, str]:
        """What it declares to keep and to add up in: `precision` of a trace's header."""
        told = self.info.get("precision", "float32")
        if isinstance(told, Mapping):
            return {str(k): str(v) for k, v in told.items()}
        storage = _STORAGE.get(told, told)
        return {"storage": storage, "accumulate": "float64" if storage == "float64" else "float32"}

    def must_have(self, method: str) -> None:
        """Lacking at once where asking would need long preparations; a process is asked."""
        if getattr(self.impl, method, None) is None:
            raise Lacking(f"{method} is not implemented")

    def load(self, case: Case) -> None:
        """Give it a case's config and weights, unless it has them."""
        if self.case is not case:
            self.hold(case.raw_config, case.weights())
            self.case = case

    def hold(self, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Give it any config and weights."""
        self.case = None
        self.call("load", config, weights)

    def call(self, method: str, *args: Any, **settings: Any) -> Any:
        """A method's answer. Lacking if it has none."""
        self.must_have(method)
        try:
            return getattr(self.impl, method)(*args, **settings)
        except NotImplementedError as error:
            raise Lacking(f"{method}: {error}") from None

    def logits(self, tokens: Any, **settings: Any) -> Array:
        """(B, S, V) in float64."""
        return _array(self.call("forward", tokens, **settings), "logits").astype(np.float64)

    def stage(self, name: str, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Array:
        """One stage's output."""
        return np.asarray(self.call("stage", name, inputs, params))

    def trace(self, case: Case, taps: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> Trace:
        """What it gave for a case, as the diff reads it. Keys may lack the phase: "L0/attn_out", "logits"; "dims" has the axes of
        taps, where shapes do not tell them.
        """
        plain = self.precision["storage"] in _PLAIN
        named = {_full(n): np.asarray(a) for n, a in taps.items() if a is not None and n != DIMS}
        named = named if plain else {n: _narrowed(a) for n, a in named.items()}
        phases = list(dict.fromkeys(n.partition("/")[0] for n in named))
        header = Header(
            config=case.raw_config | {k: v for k, v in {"dialect": self.info.get("dialect")}.items() if v},
            tokens=case.tokens,
            positions=case.positions,
            valid=case.valid,
            producer={"name": str(self.info["name"]), "version": str(self.info["version"])},
            weights={n: digest(w) for n, w in case.weights().items()},
            precision=self.precision,
            layouts={k: str(v) for k, v in self.info.get("layouts", {}).items()},
            dims={_full(n): str(d) for n, d in dict(taps.get(DIMS) or {}).items() if _full(n) in named},
            phases=phases,
            training=dict(training or {}),
        )
        return Trace(header, named)


def _narrowed(a: Array) -> Array:
    """In bfloat16 where it holds nothing wider: a plan's name does not say of which taps that is so."""
    return a.astype(ml_dtypes.bfloat16) if a.dtype == np.float32 and is_bfloat16(a) else a


def _full(name: str) -> str:
    known = ("fwd/", "bwd/", "grad/", "upd/")
    return name if name.startswith(known) else f"fwd/{'loss.total' if name == 'loss' else name}"


def _array(answer: Any, name: str) -> Array:
    require(isinstance(answer, Mapping), f"the answer is a {type(answer).__name__}; expected a dict of arrays")
    require(name in answer, f"the answer has no {name!r}; it has {', '.join(map(str, answer))}")
    return np.asarray(answer[name])


def subject(name: str = "", command: str = "") -> Subject:
    """The implementation that `pkg.mod:Class` names (or a function that makes one, or an object), or that is `SHIPPED` under this
    name, or the process that a command starts; ourselves for neither. SpecError if there is none such.
    """
    require(not (name and command), "an implementation and a command are given; expected one of them")
    if name in SHIPPED:
        name, command = SHIPPED[name].impl, SHIPPED[name].command
    if command:
        return Subject(Process(command))
    name = name or "refimpl.model:Impl"
    found = named_object(name, f"implementation {name}", f"pkg.mod:Class, or one of {', '.join(SHIPPED)}")
    return Subject(found() if callable(found) else found)
