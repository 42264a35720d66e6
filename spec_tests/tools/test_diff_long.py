"""Long traces: a mistake is tried on the first tokens before all of them, in less time and memory, and named all the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.diff import Case
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.fits import few
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.record import new_case, trace_case
from refimpl.spec_tests.cases.mutated import Mutated

LENGTH = 80
"""Tokens: more than the first ones."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = tmp_path_factory.mktemp("long")
    short = Case.read(new_case(folder / "case", PRESETS["tiny"], seed=3, length=2))
    return replace(short, tokens=np.random.default_rng(3).integers(0, 128, (2, LENGTH)).tolist())


def caused(case: Case, id: str) -> list[tuple[str, str, Any]] | None:
    """What is said of a mistake; None of one that this case's stages do not take."""
    try:
        with np.errstate(all="ignore"):
            trace = trace_case(case, patches=[Mutated(MUTANTS[id], case)])
    except TypeError:
        return None
    judgement = judge(case, trace)
    return [(d.id, d.title, d.taps) for d in judgement.causes] if judgement.culprits else []


@pytest.mark.parametrize("id", ["X25", "X27k", "X40", "A04"])
def test_mistakes_that_look_ahead_are_named_on_long_traces(case: Case, id: str) -> None:
    """Catches a mistake in which tokens see later ones, which the first tokens alone do not show, given up."""
    assert [found[0] for found in caused(case, id) or ()] == [id]


def test_what_the_first_tokens_deny_is_not_tried_on_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches every mistake run on every token of a long trace: of the whole only what reproduces the first tokens is."""
    whole = list[str]()
    real = few.reproduces

    def noted(m: Any, f: Any, calls: Any, r: Any) -> Any:
        whole.extend([m.id] if LENGTH in r.taps[f.tap].shape else [])
        return real(m, f, calls, r)

    monkeypatch.setattr(few, "reproduces", noted)
    assert caused(case, "A04") and set(whole) == {"A04"}


@functools.cache
def _known() -> list[str]:
    return [id for id, m in MUTANTS.items() if m.applies(PRESETS["tiny"])]


@pytest.mark.slow
def test_the_first_tokens_deny_nothing_that_is_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a known mistake that sees later tokens and does not say so (`Mutant.ahead`): named if all tokens are tried at
    once, and not if the first ones are. Oracle: the same judgement without them.
    """

    def said() -> Iterator[Any]:
        yield from (caused(case, id) for id in _known())

    first = list(said())
    monkeypatch.setattr(few, "first_tokens", lambda *args: None)
    for id, here, there in zip(_known(), first, said(), strict=True):
        assert here == there, id
