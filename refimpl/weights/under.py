"""A case with the candidate's own weights in place of its own, so that a run is judged apart from the conversion."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

from refimpl.checkpoint import Checkpoint
from refimpl.diff import Case
from refimpl.diff.gates import Gate

from .containers import open_weights
from .holding import held_against


def under(case: Case, path: str | Path) -> tuple[Case, Gate]:
    """(the case as its tokens and config are, its weights the candidate's; a gate that says how those relate to the case's). The
    gate fails for anything but rounding and MTP modules left out.
    """
    held = open_weights(path, case.config)
    found = list(held_against(case.checkpoint, case.config, held))
    bad = [f for f in found if not f.ok]
    counts = ", ".join(f"{n} {status}" for status, n in Counter(f.status for f in found).most_common())
    text = f"{held.container} against the case: {counts}" + (
        f"; {bad[0].name}: {bad[0].status} {bad[0].how}" if bad else ""
    )
    gate = Gate("converted", "FAIL" if bad else "ok", text, tuple(f.name for f in bad))
    theirs = cast(Checkpoint, held.only(case.checkpoint))  # a mapping that knows shapes is all that judging asks of it
    return replace(case, checkpoint=theirs), gate
