"""transformers' DeepSeek as a candidate: run a case through it and write its trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.diff import Case, Header, Trace, digest
from refimpl.layers.loss import IGNORE
from refimpl.model.phases import in_part

from .candidate import self_check, theirs, written
from .hf_bugs import injected
from .hf_load import checkpoint_names, load
from .hf_probes import KERNELS, SEEN_INSIDE, dims
from .hf_run import Batch, run_batch
from .hf_taps import look_at
from .refimpl_tap import file_of, parallel
from .tapmap import read, untested
from .torch_arrays import libraries, one_thread, to_numpy

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("eager", *KERNELS)
EXPERTS = SEEN_INSIDE
_PADDING = "padding: a query that sees no key weighs all keys alike under eager attention, where it should see nothing; sdpa does"


def record(
    case_dir: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    patch: str | None = None,
    taps: str | Iterable[str] = "all",
    experts: str = "eager",
    attention: str = "eager",
    phases: Sequence[str] = ("fwd",),
    gradients: bool = False,
    model: str | None = None,
) -> Path:
    """Run a case through transformers and write the trace `out`; -> its path, which of several processes is one in a folder.

    taps: "all", or names and patterns, with or without the phase ("fwd/logits", "L*/router.*"). `patch` puts in a bug
    of `hf_bugs.BUGS`. `phases` cut the run: "fwd", "dec20", "dec21" is a prefill of 20 tokens, then one token, then the rest.
    With `gradients`, those of the next-token loss by every tap and weight are recorded. `model` is a class of the user's own
    (`hf_class.model_class`). Nothing of it, nor any hook, outlives the call. A tap that was to be recorded and was not stays in
    the header's `expected`, and its notes say so. Raises SpecError for an unknown bug and a case that transformers
    cannot run.
    """
    chosen = (("dtype", dtype, DTYPES), ("attention", attention, ATTENTION), ("experts", experts, EXPERTS))
    for name, value, known in chosen:
        require(value in known, f"{name} {value!r}; known: {', '.join(known)}")
    case, out = Case.read(case_dir), Path(out)
    _batch(case, phases, gradients)  # what cannot be run is refused before the model is loaded
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries warn each other of
        net, unfilled = load(case.raw_config, case.weights(), dtype, experts=experts, attention=attention, model=model)
        said = (model and f"model {model}", _unfilled(unfilled), patch and f"injected bug {patch}")
        notes = "; ".join(filter(None, said))
        with injected(net, patch):
            trace = trace_of(net, case, dtype=dtype, taps=taps, notes=notes, phases=phases, gradients=gradients)
    out = file_of(out, trace.header.parallel)
    with written(out):
        out.parent.mkdir(exist_ok=True)
        trace.write(out)
    return out


def trace_of(
    model: Any,
    case: Case,
    *,
    dtype: str = "float32",
    taps: str | Iterable[str] = "all",
    notes: str = "",
    phases: Sequence[str] = ("fwd",),
    gradients: bool = False,
) -> Trace:
    """The trace of a loaded model, whatever was done to it: three runs, of which two are watched."""
    batch, producer = _batch(case, phases, gradients), _producer()
    with theirs(f"{type(model).__name__} of transformers {producer['version']}"):
        plain = to_numpy(run_batch(model, batch)[0])  # not watched, so that what is raised is not ours
    seen, again = (look_at(model, case.config, batch, taps) for _ in range(2))
    kinds = f"{model.config._attn_implementation} attention, {model.get_experts_implementation().get('')} experts"
    alike = _PADDING if case.valid and kinds.startswith("eager") else ""
    said = [kinds, notes, *seen.notes, alike, untested(read("transformers"), producer["version"])]
    labels = {"labels": [list(row) for row in batch.labels]} if batch.labels and case.valid else {}
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=[list(row) for row in batch.positions],
        valid=case.valid,
        producer=producer,
        weights={n: digest(w) for n, w in checkpoint_names(model, model.state_dict()).items()},
        layouts={"rope": "interleaved" if model.config.model_type == "deepseek_v2" else "half", "mla": "expanded"},
        dims={tap: dims(tap) for tap in seen.taps if in_part(tap)},
        phases=[*phases, *(("bwd", "grad") if gradients else ())],
        training=labels,
        expected=seen.expected,
        precision={"storage": dtype, "accumulate": "float32"},
        parallel=parallel(),
        self_check=self_check(plain, to_numpy(seen.logits), seen.taps, again.taps),
        notes="; ".join(filter(None, said)),
    )
    return Trace(header, seen.taps)


def _unfilled(names: list[str]) -> str:
    """What the model was left with, in words."""
    many = f"{len(names)} parameters of the model have nothing in the case and are as they were initialised"
    return f"{many}: {', '.join(names)}" if names else ""


def _batch(case: Case, phases: Sequence[str], gradients: bool) -> Batch:
    """What is run. SpecError for parts that the case has not."""
    batch = Batch(case.tokens, positions_of(case), case.valid, tuple(phases), _labels(case) if gradients else None)
    require(len(batch.parts) == len(phases), f"phases {', '.join(phases)}: fwd and decN, each once")
    return batch


def _labels(case: Case) -> list[list[int]]:
    """The tokens (B, S); padding does not count, nor does a token that padding would have to predict."""
    if case.valid is None:
        return case.tokens
    real = np.asarray(case.valid) != 0
    before = np.pad(real, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    labels: list[list[int]] = np.where(real & before, np.asarray(case.tokens), IGNORE).tolist()
    return labels


def positions_of(case: Case) -> list[list[int]]:
    """The case's positions, or else tokens counted from 0. SpecError for what transformers' mask, which goes by place, would treat
    otherwise.
    """
    real = np.ones(np.shape(case.tokens), int) if case.valid is None else np.asarray(case.valid)
    if case.positions is None:
        counted: list[list[int]] = np.where(real, real.cumsum(axis=1) - 1, 0).tolist()
        return counted
    rows = ([p for p, one in zip(*pair, strict=True) if one] for pair in zip(case.positions, real, strict=True))
    rising = all(a < b for row in rows for a, b in pairwise(row))
    require(rising, "positions that do not rise; transformers masks by place in the row, not by position")
    return case.positions


def _producer() -> dict[str, str]:
    torch, transformers = libraries()
    return {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__}
