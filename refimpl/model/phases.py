"""A run in parts: a whole forward pass, a prefill in chunks, a prefill and cached decode steps. Each part is a phase of a trace.

A part is named by what it finds in the cache: `fwd` nothing, `dec7` seven tokens. So the names of the phases say where the
parts begin, and each ends where the next one begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.mla import Attend
from refimpl.layers.stage import Recorder

from .causal_lm import ForCausalLM, Output
from .impl import introduce
from .inputs import Inputs

_CACHED = re.compile(r"dec(\d{1,12})")


@dataclass(frozen=True)
class Part:
    """A phase and its columns of the tokens, [start, stop), and the form of attention it runs in."""

    name: str
    start: int
    stop: int
    attend: Attend = "expanded"

    @property
    def length(self) -> int:
        """S: how many tokens it runs."""
        return self.stop - self.start


def parts_of(phases: Iterable[str], length: int, attend: Attend = "expanded") -> tuple[Part, ...]:
    """The parts that the phases' names say: `fwd, dec20, dec21` of 22 tokens are 20, 1 and 1. Other phases (`bwd`, `grad`,
    `upd`) are no parts. SpecError for a start past the end, a phase given twice, or
    parts that do not begin with `fwd`.
    """
    listed = list(phases)
    twice = next((name for i, name in enumerate(listed) if name in listed[:i]), "")
    require(not twice, f"phases {', '.join(listed)}: {twice} is there twice")
    starts = {int(name.removeprefix("dec")) if name != "fwd" else 0: name for name in listed if is_part(name)}
    order = sorted(starts)
    require(starts.get(0) == "fwd", f"phases {', '.join(listed)}: the first part is fwd")
    require(order[-1] < length, f"phase {starts[order[-1]]} begins after the {length} tokens that there are")
    ends = [*order[1:], length]
    return tuple([Part(starts[a], a, b, attend) for a, b in zip(order, ends, strict=True)])


def is_part(phase: str) -> bool:
    """Whether a phase is a run of tokens through the model."""
    return phase == "fwd" or bool(_CACHED.fullmatch(phase))


def in_part(tap: str) -> bool:
    """Whether a tap is of a run of tokens, not a gradient or an update."""
    return is_part(tap.partition("/")[0])


def cut(inputs: Inputs, part: Part) -> Inputs:
    """A part's columns of everything."""
    return replace(inputs, **{n: a[:, part.start : part.stop] for n, a in inputs.named()})


def named(inputs: Inputs, parts: Sequence[Part]) -> dict[str, Array]:
    """The inputs as a program names them: `tokens`, or `dec7/tokens` where there are several parts."""
    if len(parts) == 1:
        return dict(inputs.named())
    return {f"{p.name}/{n}": a for p in parts for n, a in cut(inputs, p).named()}


def run_parts(
    model: ForCausalLM,
    inputs: Inputs,
    parts: Sequence[Part],
    recorder: Recorder,
    *,
    with_mtp: bool = False,
    losses: Mapping[str, float] | None = None,
) -> Output:
    """Run one part after the other, each on the cache that those before it left -> what the last one gave. MTP modules have no
    cache (R 2.2 uses them in training): they run in a run of one part only. With `losses`, `mtp_weight` and `aux_weight`, the
    loss follows.
    """
    known, out = named(inputs, parts), None
    introduce(recorder, model, inputs)
    for name, array in known.items():
        recorder.know(name, array)
    if losses is not None:
        require(len(parts) == 1, "a run that is trained on has one part, fwd")
        return model.forward_and_loss(inputs, **losses)
    for p in parts:
        own = {n: known[n if len(parts) == 1 else f"{p.name}/{n}"] for n, _ in inputs.named()}
        cache = out.cache if out else None
        out = model(Inputs(**own), cache, attend=p.attend, name=p.name, with_mtp=with_mtp and len(parts) == 1)
    assert out is not None
    return out
