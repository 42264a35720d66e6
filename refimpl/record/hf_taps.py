"""Seeing inside transformers' DeepSeek-V3 without changing it: hooks on its modules, and torch's TorchFunctionMode for
the functions called within attention, router and experts.

A tap holds the bits that the model held, its axes in our order, but for one thing: where transformers' eager mask adds
the dtype's lowest number, the trace has -inf (the softmax gives 0 for both). Rotated channels stay in transformers'
order, all first elements of the pairs before all second ones: layout rope=half.

No model is refused, however wrong: what it does not show is left out and noted, and judging is the diff's business.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import tap_matches

from .hf_probes import BUSY, EXPERTS, Probe, Seen, dims, expected_taps
from .torch_arrays import libraries, to_numpy

_NOT_THERE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What looking for a tensor raises where a call has another number of arguments, of results or of axes."""


class Sighting(NamedTuple):
    """One run: logits (B, S, V), a torch tensor; the taps that were seen, those that were looked for, and in words what was
    not as it should be.
    """

    logits: Any
    taps: dict[str, Array]
    expected: list[str]
    notes: list[str]


def run(model: Any, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Any:
    """Logits (B, S, V), a torch tensor."""
    torch, _ = libraries()
    ids = torch.tensor(tokens)
    ones = torch.ones_like(ids)  # without it, transformers takes a jump in the positions for a new document
    places = torch.tensor(positions)
    return model(input_ids=ids, attention_mask=ones, position_ids=places, use_cache=False).logits


def look(
    model: Any,
    config: Config,
    tokens: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    taps: str | Iterable[str] = "all",
) -> Sighting:
    """Run the model and keep the taps asked for ("all", or patterns) that it shows. SpecError for a pattern that fits no
    tap.
    """
    experts = model.get_experts_implementation()[""]
    wanted = _wanted(expected_taps(config, experts), taps)
    watch = _Watch(config, wanted, np.shape(tokens))
    with watch.on(model):
        logits = run(model, tokens, positions)
    silent = [tap for tap in wanted if tap not in watch.taps]
    if silent:
        some = ", ".join(silent[:5]) + (", ..." if len(silent) > 5 else "")
        watch.notes[f"{len(silent)} of {len(wanted)} taps were not seen: {some}"] = None
    return Sighting(logits, {tap: watch.taps[tap] for tap in wanted if tap in watch.taps}, list(wanted), [*watch.notes])


def observe(
    model: Any,
    config: Config,
    tokens: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    taps: str | Iterable[str] = "all",
) -> tuple[Any, dict[str, Array]]:
    """The logits and the taps of `look`."""
    seen = look(model, config, tokens, positions, taps)
    return seen.logits, seen.taps


def _wanted(known: dict[str, Probe | None], taps: str | Iterable[str]) -> dict[str, Probe | None]:
    if taps == "all":
        return known
    patterns = taps.split(",") if isinstance(taps, str) else list(taps)
    found = set()
    for p in patterns:
        hits = {t for t in known if tap_matches(t, p)}
        require(hits, f"no tap fits {p!r}; there are {', '.join(list(known)[:40])}, ...")
        found |= hits
    return {t: p for t, p in known.items() if t in found}


class _Watch:
    """Keeps what the probes see while `on(model)` is open."""

    def __init__(self, config: Config, wanted: dict[str, Probe | None], shape: tuple[int, ...]) -> None:
        self.config, self.wanted = config, wanted
        self.taps: dict[str, Array] = {}
        self.notes: dict[str, None] = {}  # a set that keeps its order
        b, s = shape
        self.sizes = {"B": b, "S": s, "T": s, "H": config.num_attention_heads}
        self.more = {  # what a module gives may be of another size; what is no module's output must look like the tap
            "Dr": config.qk_rope_head_dim,
            "E": config.n_routed_experts,
            "G": config.n_group,
            "M": config.topk_group,
        }
        self.modules: dict[str, list[str]] = defaultdict(list)
        self.functions: dict[tuple[str, str, int], list[str]] = defaultdict(list)
        for tap, p in wanted.items():
            if p is not None and p.function is None:
                self.modules[p.module].append(tap)
            elif p is not None and p.function is not None:
                self.functions[p.module, p.function, p.nth].append(tap)
        self.inside = ""
        self.count: Counter[str] = Counter()
        self.products: list[Seen] = []

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Watch every call of the model; on leaving, no hook is left on it."""
        modules, handles = dict(model.named_modules()), []
        busy = [f"model.layers.{i}.{m}" for i in range(self.config.num_hidden_layers) for m in BUSY]
        paths = {*self.modules, *(path for path, _, _ in self.functions), *(p for p in busy if p in modules)}
        try:
            for path in sorted(paths):
                if path not in modules:
                    self.notes[f"transformers has no module {path}"] = None
                    continue
                if path in busy:
                    handles.append(modules[path].register_forward_pre_hook(self._enter(path)))
                handles.append(modules[path].register_forward_hook(self._leave(path), with_kwargs=True))
            with _functions(self._function):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.inside, self.count, self.products = path, Counter(), []

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            for tap in self.modules.get(path, ()):
                self._keep(tap, Seen(args, kwargs, out))
            if path == self.inside:
                self.inside = ""
                if path.endswith("mlp.experts") and self.products:
                    self._keep_experts(path, module, args)

        return hook

    def _function(self, name: str, seen: Seen) -> None:
        if not self.inside:
            return
        for tap in self.functions.get((self.inside, name, self.count[name]), ()):
            probe = self.wanted[tap]
            if probe is not None and (not probe.after or self.count[probe.after]):
                self._keep(tap, seen)
        self.count[name] += 1
        if name == "linear" and self.inside.endswith("mlp.experts"):
            self.products.append(seen)

    def _keep(self, tap: str, seen: Seen) -> None:
        probe = self.wanted[tap]
        assert probe is not None
        if tap in self.taps:
            self.notes[f"{tap} was seen twice in one run: the first is kept"] = None
            return
        try:
            tensor = probe.pick(seen, self.config)
            x = None if tensor is None else to_numpy(tensor)
        except _NOT_THERE as error:
            self.notes[f"{tap} is not at {probe.where}: {error}"] = None
            return
        if x is None:
            return
        sizes = self.sizes if probe.function is None else self.sizes | self.more
        shape = [int(n) if n.isdigit() else sizes.get(n, -1) for n in dims(tap).split()]
        try:
            self.taps[tap] = x.reshape(shape)
        except ValueError:
            self.notes[f"{tap} has shape {x.shape}; expected {dims(tap)}"] = None
            if probe.function is None:
                self.taps[tap] = x

    def _keep_experts(self, path: str, experts: Any, args: tuple[Any, ...]) -> None:
        """The inside of all experts, in our order of rows."""
        at = f"fwd/L{path.split('.')[2]}"
        try:
            found = _inside(experts, to_numpy(args[1]), self.products)
        except _NOT_THERE as error:
            self.notes[f"{path}: {error}"] = None
            return
        for tap, x in zip(EXPERTS, found, strict=True):
            name = f"{at}/{tap}"
            if name in self.taps:
                self.notes[f"{name} was seen twice in one run: the first is kept"] = None
            elif name in self.wanted:
                self.taps[name] = x


def _inside(experts: Any, ids: Array, products: list[Seen]) -> list[Array]:
    """EXPERTS of transformers' eager loop, rows sorted by expert, token. An expert's two products are known by the part of
    the fused weights that they multiply with; its rows are sorted by slot, token. ValueError if they are not those of `ids`.
    """
    first: dict[int, Seen] = {}
    second: dict[int, Seen] = {}
    for seen in products:
        for found, stack in ((first, experts.gate_up_proj), (second, experts.down_proj)):
            if (e := _place(stack, seen.args[1])) is not None:
                found[e] = seen
    rows = {e: len(seen.args[0]) for e, seen in first.items()}
    chosen = {int(e): int(n) for e, n in zip(*np.unique(ids, return_counts=True), strict=True)}
    if rows != chosen or set(second) != set(first) or len(products) != 2 * len(first):
        raise ValueError("the rows that the experts multiply are not those of the experts that were chosen")
    order = sorted(first)
    x, act = (np.concatenate([to_numpy(half[e].args[0]) for e in order]) for half in (first, second))
    both, down = (np.concatenate([to_numpy(half[e].out) for e in order]) for half in (first, second))
    gate, up = np.split(both, 2, axis=-1)
    token, slot = np.indices(ids.shape).reshape(2, -1)
    theirs = np.lexsort((token, slot, ids.ravel()))
    ours = np.lexsort((slot, token, ids.ravel()))
    place = np.argsort(theirs)[ours]
    return [a[place] for a in (x, gate, up, act, down)]


def _place(stack: Any, part: Any) -> int | None:
    """e if `part` is the memory of stack[e]."""
    if part.shape != stack.shape[1:] or part.dtype != stack.dtype:
        return None
    e, rest = divmod(part.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
    return e if rest == 0 and 0 <= e < len(stack) else None


def _functions(see: Callable[[str, Seen], None]) -> Any:
    """A context in which `see` is told of every torch function that is called, but for those it calls itself."""
    from torch.overrides import TorchFunctionMode

    class Functions(TorchFunctionMode):  # type: ignore[misc, unused-ignore]  # Any where torch is absent
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            see(getattr(func, "__name__", ""), Seen(args, kwargs or {}, out))
            return out

    return Functions()
