"""transformers' DeepseekV3ForCausalLM as a candidate: run a case through it and write its trace."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Header, Trace, digest

from .hf_bugs import injected
from .hf_load import checkpoint_names, load_model
from .hf_probes import dims
from .hf_taps import observe, run
from .torch_arrays import libraries, one_thread, to_numpy

DTYPES = ("float32", "bfloat16")


def record(
    case_dir: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    patch: str | None = None,
    taps: str | Iterable[str] = "all",
    experts: str = "eager",
) -> Path:
    """Run a case through transformers and write the trace `out`; -> its path.

    taps: "all", or names and patterns, with or without the phase ("fwd/logits", "L*/router.*"). `patch` puts in a bug
    of `hf_bugs.BUGS`. Nothing of it, nor any hook, outlives the call. Raises SpecError for an unknown bug, a case that
    transformers cannot run, and a tap that was to be recorded and was not.
    """
    require(dtype in DTYPES, f"dtype {dtype!r}; known: {', '.join(DTYPES)}")
    case, out = Case.read(case_dir), Path(out)
    positions = _positions(case)
    with one_thread():
        model = load_model(case.raw_config, case.weights(), dtype, experts=experts)
        with injected(model, patch):
            found, self_check = _run(model, case, positions, taps)
            held = checkpoint_names(model, model.state_dict())
    notes = f"eager attention, {experts} experts" + (f"; injected bug {patch}" if patch else "")
    precision = {"storage": dtype, "accumulate": "float32"}
    more = {"positions": positions, "precision": precision, "self_check": self_check, "notes": notes}
    Trace(_header(case, found, held, **more), found).write(out)
    return out


def _header(case: Case, taps: dict[str, Array], weights: dict[str, Array], **more: Any) -> Header:
    return Header(
        config=case.raw_config,
        tokens=case.tokens,
        producer=_producer(),
        weights={n: digest(w) for n, w in weights.items()},
        layouts={"rope": "half", "mla": "expanded"},
        dims={tap: dims(tap) for tap in taps},
        expected=list(taps),
        **more,
    )


def _run(
    model: Any, case: Case, positions: list[list[int]], taps: str | Iterable[str]
) -> tuple[dict[str, Array], dict[str, float]]:
    """The taps, how far recording them moved the logits (must be 0), and how far a second run differs in any tap."""
    plain = to_numpy(run(model, case.tokens, positions))
    logits, first = observe(model, case.config, case.tokens, positions, taps)
    _, again = observe(model, case.config, case.tokens, positions, taps)
    return first, {
        "logits_taps_off_vs_on": _difference(plain, to_numpy(logits)),
        "repeat": max(_difference(first[t], again[t]) for t in first),
    }


def _difference(a: Array, b: Array) -> float:
    """0 for the same bits (NaN and infinity included), else the largest difference."""
    if a.tobytes() == b.tobytes():
        return 0.0
    return float(np.nan_to_num(np.abs(a.astype(np.float64) - b.astype(np.float64)), nan=np.inf).max())


def _positions(case: Case) -> list[list[int]]:
    """The case's positions. SpecError for what transformers' mask, which goes by place, would treat otherwise."""
    require(case.valid is None, "the case has padding; what transformers attends to from a padded token is not defined")
    if case.positions is None:
        return [list(range(len(row))) for row in case.tokens]
    rising = all(a < b for row in case.positions for a, b in pairwise(row))
    require(rising, "positions that do not rise; transformers masks by place in the row, not by position")
    return case.positions


def _producer() -> dict[str, str]:
    torch, transformers = libraries()
    return {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__}
