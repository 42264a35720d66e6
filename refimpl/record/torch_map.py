"""Any torch module through a tap map: forward hooks on the modules it names, wrappers around the functions it names.

A function is one that the file defining the module's class calls by that name; else a function of torch, method or not, seen
by TorchFunctionMode. Hooks do not run inside CUDA graphs or compiled code: what they miss is in the notes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace
from refimpl.diff.names import Framework

from .candidate import Candidate, Recorded, builder, deliver, library, plain_only, record_runs, theirs
from .tapmap import read
from .torch_arrays import one_thread
from .watch import Watch, array
from .wrapping import wrapped_functions

_EXTRAS = {
    "refimpl.record.build_transformers:build": "interop",
    "refimpl.record.build_torchtitan:build": "torchtitan",
    "refimpl.record.build_megatron:build": "megatron",
}
"""How a shipped map makes its model -> the extra that brings what it needs."""


def record(case_dir: str | Path, out: str | Path, *, map_name: str, build: str | None = None) -> Recorded:
    """Build the model, run the case through it and write its trace.

    build: `pkg.mod:fn`, a function that is given the case (refimpl.diff.Case) and returns a torch module that holds its weights,
    or a Candidate; the maps that are shipped name their own. Raises SpecError for a map that names modules the model lacks.
    """
    case, map_ = Case.read(case_dir), read(map_name)
    library("torch", _EXTRAS.get(build or map_.build, "torch"))
    require(build or map_.build, f"--build is needed: the map {map_.key} does not say how to make the model")
    with built(case, build or map_.build) as candidate:
        return deliver(trace_of(candidate, case, map_), out)


@contextmanager
def built(case: Case, build: str) -> Iterator[Candidate]:
    """What the builder makes of the case, until it is released. What frameworks warn of meanwhile is theirs and not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = builder(build)
        with theirs(f"--build {build}"):
            made = make(case)
        candidate = made if isinstance(made, Candidate) else Candidate(made)
        try:
            yield candidate
        finally:
            candidate.release()


def trace_of(made: Candidate, case: Case, map_: Framework) -> Trace:
    """The trace of a built model, whatever was done to it: three runs, of which two are watched."""
    torch = library("torch", "torch")
    require(
        callable(getattr(made.module, "named_modules", None)),
        f"--build gave {type(made.module).__name__}, not a torch module",
    )
    if made.call is None:
        plain_only(case, "a module called with tokens alone")
    modules = dict(made.module.named_modules(remove_duplicate=False))  # layers may share a rotary embedding

    def watch() -> Watch:
        found = Watch(map_, case)
        found.choose(modules.__contains__, modules, type(made.module).__name__)
        return found

    def run(seen: Watch | None) -> Array:
        with watching(modules, seen) if seen else ExitStack():
            out = made.call(made.module, case.tokens) if made.call else made.module(torch.tensor(case.tokens))
        return array(_logits(out))

    with one_thread():
        return record_runs(case, map_, run, watch, made, storage=_storage(torch, made.module))


@contextmanager
def watching(modules: Mapping[str, Any], watch: Watch) -> Iterator[None]:
    """Tell `watch` of the calls it wants to know of; on leaving, no hook or wrapper is left."""
    inside: list[str] = []  # the paths of the modules that are running
    functions = {name for _, name in watch.keys if name}

    def told(name: str, args: Any, kwargs: Any, out: Any) -> None:
        for path in inside:
            watch.see((path, name), args, kwargs, out)

    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        places.setdefault(id(module), []).append(path)
    with ExitStack() as stack:
        paths = dict.fromkeys(path for path, _ in watch.keys)
        shared = {path: same for path in paths if len(same := places[id(modules[path])]) > 1}
        around = [above for same in shared.values() for place in same for above in _above(place)]
        for path in dict.fromkeys([*paths, *around]):
            here = partial(_here, path, shared.get(path, [path]), inside, modules)
            for handle in _hooks(path, modules[path], inside, watch, here):
                stack.callback(handle.remove)
        left = functions - stack.enter_context(wrapped_functions(watch, modules, told))
        if left:
            stack.enter_context(_torch_functions(left, told))
        yield


def _hooks(path: str, module: Any, inside: list[str], watch: Watch, here: Callable[[], bool]) -> Iterator[Any]:
    """Hooks that keep `inside` and tell of the module's calls that are `here`."""

    def enter(module: Any, args: Any) -> None:
        inside.append(path)

    def leave(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        inside.remove(path)
        if here():
            watch.see((path, ""), args, kwargs, out)

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, with_kwargs=True)


def _above(place: str) -> list[str]:
    """The paths around a place, the root last: `a.b.c` -> `a.b`, `a`, ``."""
    words = place.split(".")
    return [".".join(words[:n]) for n in range(len(words) - 1, -1, -1)]


def _here(path: str, places: list[str], inside: list[str], modules: Mapping[str, Any]) -> bool:
    """Whether a call of a module that lies in several places is this place's: no other is in a module that began later."""

    def begun(place: str) -> int:
        return max([i for i, p in enumerate(inside) if p in _above(place)], default=-1)

    mine, last = begun(path), max(map(begun, places))
    return mine == last or (mine >= 0 and modules[inside[mine]] is modules[inside[last]])


def _torch_functions(names: set[str], told: Callable[..., None]) -> AbstractContextManager[Any]:
    """A context in which `told` hears of every call of these functions of torch, but for those it makes itself."""
    from torch.overrides import TorchFunctionMode

    class Functions(TorchFunctionMode):  # type: ignore[misc, unused-ignore]  # Any where torch is absent
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in names:
                told(func.__name__, args, kwargs or {}, out)
            return out

    return Functions()


def _logits(out: Any) -> Any:
    """The logits in what a model gives: an array, an object that has `logits`, or the first of several."""
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, (tuple, list)) and out:
        return out[0]
    require(hasattr(out, "shape"), f"the model gave {type(out).__name__}; expected logits")
    return out


def _storage(torch: Any, module: Any) -> str:
    """The dtype that most of the model's numbers are kept in."""
    sizes: dict[str, int] = {}
    for p in module.parameters():
        name = str(p.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + p.numel()
    found = {n: size for n, size in sizes.items() if n in ("float64", "float32", "bfloat16", "float16")}
    if not found:
        raise SpecError("the model has no floating-point parameters")
    return max(found, key=lambda n: found[n])
