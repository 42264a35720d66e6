"""transformers' DeepseekV3ForCausalLM as a candidate: run a case through it and write its trace."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require
from refimpl.diff import Case, Header, Trace, digest

from .candidate import self_check
from .hf_bugs import injected
from .hf_load import checkpoint_names, load_model
from .hf_probes import dims
from .hf_taps import look, run
from .refimpl_tap import file_of, parallel
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
    """Run a case through transformers and write the trace `out`; -> its path, which of several processes is one in a folder.

    taps: "all", or names and patterns, with or without the phase ("fwd/logits", "L*/router.*"). `patch` puts in a bug
    of `hf_bugs.BUGS`. Nothing of it, nor any hook, outlives the call. A tap that was to be recorded and was not stays in
    the header's `expected`, and its notes say so. Raises SpecError for an unknown bug and a case that transformers
    cannot run.
    """
    require(dtype in DTYPES, f"dtype {dtype!r}; known: {', '.join(DTYPES)}")
    case, out = Case.read(case_dir), Path(out)
    positions_of(case)
    with one_thread():
        model = load_model(case.raw_config, case.weights(), dtype, experts=experts)
        with injected(model, patch):
            trace = trace_of(model, case, dtype=dtype, taps=taps, notes=f"injected bug {patch}" if patch else "")
    out = file_of(out, trace.header.parallel)
    out.parent.mkdir(exist_ok=True)
    trace.write(out)
    return out


def trace_of(
    model: Any, case: Case, *, dtype: str = "float32", taps: str | Iterable[str] = "all", notes: str = ""
) -> Trace:
    """The trace of a loaded model, whatever was done to it: three runs, of which two are watched."""
    positions = positions_of(case)
    plain = to_numpy(run(model, case.tokens, positions))
    seen, again = (look(model, case.config, case.tokens, positions, taps) for _ in range(2))
    kinds = f"{model.config._attn_implementation} attention, {model.get_experts_implementation()['']} experts"
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=positions,
        producer=_producer(),
        weights={n: digest(w) for n, w in checkpoint_names(model, model.state_dict()).items()},
        layouts={"rope": "half", "mla": "expanded"},
        dims={tap: dims(tap) for tap in seen.taps},
        expected=seen.expected,
        precision={"storage": dtype, "accumulate": "float32"},
        parallel=parallel(),
        self_check=self_check(plain, to_numpy(seen.logits), seen.taps, again.taps),
        notes="; ".join([kinds, *([notes] if notes else []), *seen.notes]),
    )
    return Trace(header, seen.taps)


def positions_of(case: Case) -> list[list[int]]:
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
