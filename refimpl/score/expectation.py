"""What a correct engine may show: our float64 log-probabilities, and those of twins at the declared precision.

The whole run is one region of a replay in which nothing was recorded (docs/diff.md): a twin moves every value of every stage at
random by up to two units of roundoff of the storage declared for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.diff.lanes import Recorded
from refimpl.diff.precision import declared_precision
from refimpl.diff.program import program_of
from refimpl.diff.replay import replay
from refimpl.diff.streamed import StageWeights
from refimpl.diff.tolerance import TWINS, UNIT, Noise
from refimpl.layers.stage import Call
from refimpl.model import read_inputs
from refimpl.model.phases import named, parts_of

_LOGITS = "fwd/logits"
CODES = {"int8": 2.0**-8}
"""Activations rounded to 8 bits in front of every product, as llama.cpp's kernels for quantised weights do: relative error of a
number by blocks of 32, amax / 254 at most, of which the root mean square is 0.5 % of the block's.
"""


@dataclass(frozen=True)
class Expected:
    """`exact` (B, S, V), log-probabilities in float64 of the token after each; `twins`, theirs; `doubtful` (B, S), where rounding
    may send a token to other experts; `unit`, the roundoff of the storage; `size` (B, S), the root mean square of the logits.
    """

    tokens: list[list[int]]
    exact: Array
    twins: tuple[Array, ...]
    doubtful: Array
    unit: float
    size: Array
    precision: str

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.exact.shape[-1])


def declared(text: str) -> dict[str, str]:
    """ "bfloat16,mla.c_kv=float16": the storage of the run, then that of taps by pattern, as a trace's header has them."""
    storage, *parts = text.split(",")
    pairs = [p.partition("=") for p in parts]
    known = {*UNIT, *CODES, "fp8"} - {"float64"}  # nothing finer is left to move its twins by
    for name in (storage, *(value for _, _, value in pairs)):
        require(name in known, f"precision {name!r}; known: {', '.join(sorted(known))}")
    require(all(pattern for pattern, _, _ in pairs), f"precision {text!r}; expected STORAGE,PATTERN=STORAGE,...")
    return {"storage": storage} | {pattern: value for pattern, _, value in pairs}


def expected(case: Case, precision: str = "float32", *, track: Callable[[list[Any]], Iterable[Any]] = iter) -> Expected:
    """Run the case's tokens in float64 and in the twins. SpecError for an unknown precision, and for inputs that are not sound."""
    told = declared(precision)
    noise, plan = _noise(told)
    config = case.config
    inputs = read_inputs(config, case.tokens, case.positions, case.valid)
    parts = parts_of(["fwd"], inputs.tokens.shape[1])
    program = program_of(config, inputs, n_mtp=0, parts=parts)
    narrow = told["storage"] if told["storage"] in ("bfloat16", "float16") else ""
    weights = StageWeights(case.checkpoint, dict.fromkeys(case.checkpoint, narrow))
    outputs = frozenset({_LOGITS})
    layers = config.num_hidden_layers
    recorded = Recorded({}, named(inputs, parts), weights, plan, noise, outputs, layers=layers)
    step = next(replay(program, recorded))  # one tap, one step; its twins are there until the next is asked for
    twins = tuple([log_softmax(x) for _, x in zip(track(list(range(TWINS))), step.twins(), strict=True)])
    exact = np.asarray(step.exact, np.float64)
    doubtful = np.zeros(exact.shape[:2], bool) if step.unsettled is None else step.unsettled
    unit = noise.unit(_LOGITS)
    size = np.sqrt(np.mean(exact**2, axis=-1))
    return Expected(case.tokens, log_softmax(exact), twins, doubtful, unit, size, precision)


def _noise(told: Mapping[str, str]) -> tuple[Noise, Any]:
    """The roundings of a declared precision, and its plan."""
    codes = CODES.get(told["storage"])
    plain = {k: "float32" if v in CODES else v for k, v in told.items()}
    p = declared_precision(plain)
    if codes is None:
        return Noise(p.unit, p.format), p.plan
    return Noise(lambda tap: max(codes, p.unit(tap)), _unrounded), p.plan


def _unrounded(call: Call) -> str:
    return "fp32"


def log_softmax(z: Array) -> Array:
    """z - log sum exp z, in float64.  z (..., V) -> (..., V)."""
    z = np.asarray(z, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    out: Array = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return out
