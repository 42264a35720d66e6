"""What an entry of the matrix is, and the ways in which a running transformers model is edited: each is undone on leaving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import require
from refimpl.record.hf_bugs import modules, with_forward, with_setting

Patch = Callable[[Any], AbstractContextManager[None]]


@dataclass(frozen=True)
class Entry:
    """An edit of a model: `stages` are the taps that are wrong in themselves, none for an innocent one; `also` taps that then
    cannot look right either (weights of experts that are one too many); `weights` the end of the tensors that differ from
    the case.
    """

    id: str
    what: str
    patch: Patch
    stages: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    weights: str = ""

    @property
    def innocent(self) -> bool:
        """Whether a correct port may do this."""
        return not self.stages


def bug(id: str, what: str, stages: str, patch: Patch, *, also: str = "", weights: str = "") -> Entry:
    """An entry that must be flagged; stages and also: taps, separated by blanks."""
    return Entry(id, what, patch, frozenset(stages.split()), frozenset(also.split()), weights)


def innocent(id: str, what: str, patch: Patch) -> Entry:
    """An entry that must never be flagged."""
    return Entry(id, what, patch)


@contextmanager
def together(*edits: AbstractContextManager[None]) -> Iterator[None]:
    """Several edits at once."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit)
        yield


@contextmanager
def with_function(name: str, wrap: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """The function of transformers' modeling_deepseek_v3 computes wrap(itself) instead."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    before = getattr(theirs, name)
    setattr(theirs, name, wrap(before))
    try:
        yield
    finally:
        setattr(theirs, name, before)


def with_attention(attend: Callable[[Callable[..., Any]], Callable[..., Any]]) -> AbstractContextManager[None]:
    """The kernel: attend(eager)(module, q, k, v, mask, scaling), q and k (B, H, S, Dn+Dr), v (B, H, T, Dv), to
    (B, S, H, Dv).
    """

    def wrap(eager: Any) -> Any:
        inner = attend(lambda *args: eager(*args)[0])
        return lambda module, q, k, v, mask, scaling, **_: (inner(module, q, k, v, mask, scaling), None)

    return with_function("eager_attention_forward", wrap)


@contextmanager
def with_weight(model: Any, ending: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Every parameter whose name ends so holds change(a copy of itself). SpecError if there are none."""
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    require(found, f"this model has no {ending}")
    before = [p.detach().clone() for p in found]
    for p, old in zip(found, before, strict=True):
        p.data.copy_(change(old.clone()))
    try:
        yield
    finally:
        for p, old in zip(found, before, strict=True):
            p.data.copy_(old)


def after(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Callable[..., Any]]:
    """For `with_forward`: the module gives change(module, what it gave)."""
    return lambda module, forward: lambda *args, **kwargs: change(module, forward(*args, **kwargs))


__all__ = [
    "Entry",
    "after",
    "bug",
    "innocent",
    "modules",
    "together",
    "with_attention",
    "with_forward",
    "with_function",
    "with_setting",
    "with_weight",
]
