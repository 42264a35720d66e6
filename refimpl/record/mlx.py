"""mlx-lm's deepseek_v3 on MLX's CPU backend, in float32: its expert product refuses bfloat16 there.

A module's __call__ is looked up on its class, so an instance is watched by giving it a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.checkpoint.names import layer_of
from refimpl.diff import Case, Trace

from .candidate import Candidate, Recorded, deliver, library, plain_only, record_runs, theirs
from .tapmap import read
from .watch import Watch, array
from .wrapping import wrapped_functions


def record(case_dir: str | Path, out: str | Path) -> Recorded:
    """Run the case through mlx-lm and write its trace."""
    case = Case.read(case_dir)
    with on_cpu():
        return deliver(trace_of(load(case), case), out)


def load(case: Case) -> Any:
    """mlx-lm's model holding the case's weights, through its own `sanitize`; MTP layers, which it has not, are left out."""
    mx, source = library("mlx.core", "mlx"), library("mlx_lm.models.deepseek_v3", "mlx")
    depth = case.config.num_hidden_layers
    weights = {n: mx.array(_given(w)) for n, w in case.weights().items() if (layer_of(n) or 0) < depth}
    with theirs("mlx-lm"):
        model = source.Model(source.ModelArgs.from_dict(case.raw_config))
        taken = {n: w.astype(mx.float32) for n, w in model.sanitize(weights).items()}  # codes come out in bfloat16
        model.load_weights(list(taken.items()))
    return model


def _given(w: Any) -> Array:
    """float32; FP8 codes, where a case has them raw, in the bytes that mlx-lm looks for."""
    a = np.asarray(w)
    return a.view(np.uint8) if a.dtype == ml_dtypes.float8_e4m3fn else a.astype(np.float32)


def trace_of(model: Any, case: Case) -> Trace:
    """The trace of a loaded model, whatever was done to it: three runs, of which two are watched."""
    mx, map_ = library("mlx.core", "mlx"), read("mlx_lm")
    plain_only(case, "mlx-lm's model")
    modules = dict(model.named_modules())

    def watch() -> Watch:
        found = Watch(map_, case)
        found.choose(modules.__contains__, modules, "mlx-lm's model")
        return found

    def run(seen: Watch | None) -> Array:
        with watching(modules, seen) if seen else ExitStack():
            return array(model(mx.array(case.tokens)))

    return record_runs(case, map_, run, watch, Candidate(model), storage="float32")


@contextmanager
def watching(modules: dict[str, Any], watch: Watch) -> Iterator[None]:
    """Tell `watch` of the calls it wants to know of; on leaving, every module has its own class again."""
    inside: list[str] = []  # the paths of the modules that are running

    def told(name: str, args: Any, kwargs: Any, out: Any) -> None:
        for path in inside:
            watch.see((path, name), args, kwargs, out)

    with wrapped_functions(watch, modules, told), ExitStack() as stack:
        for path in dict.fromkeys(path for path, _ in watch.keys):
            stack.callback(setattr, modules[path], "__class__", type(modules[path]))
            modules[path].__class__ = _watched(type(modules[path]), path, inside, watch)
        yield


def _watched(kind: type, path: str, inside: list[str], watch: Watch) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(path)
        try:
            out = kind.__call__(self, *args, **kwargs)
        finally:
            inside.remove(path)
        watch.see((path, ""), args, kwargs, out)
        return out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run MLX on its CPU backend, everywhere the same, and leave its setting as it was."""
    mx = library("mlx.core", "mlx")
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)
