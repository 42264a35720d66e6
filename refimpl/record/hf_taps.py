"""Seeing inside transformers' DeepSeek-V3 without changing it: hooks on its modules, and torch's TorchFunctionMode for
the functions called within attention, router and experts.

A tap holds the bits that the model held, its axes in our order, but for one thing: where transformers' eager mask adds
the dtype's lowest number, the trace has -inf (the softmax gives 0 for both). Rotated channels stay in transformers'
order, all first elements of the pairs before all second ones: layout rope=half.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import tap_matches

from .hf_probes import BUSY, EXPERTS, Probe, Seen, dims, expected_taps
from .torch_arrays import libraries, to_numpy


def run(model: Any, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Any:
    """Logits (B, S, V), a torch tensor."""
    torch, _ = libraries()
    ids = torch.tensor(tokens)
    ones = torch.ones_like(ids)  # without it, transformers takes a jump in the positions for a new document
    places = torch.tensor(positions)
    return model(input_ids=ids, attention_mask=ones, position_ids=places, use_cache=False).logits


def observe(
    model: Any,
    config: Config,
    tokens: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    taps: str | Iterable[str] = "all",
) -> tuple[Any, dict[str, Array]]:
    """Run the model -> logits (B, S, V), a torch tensor, and {tap: array} for the taps asked for ("all", or patterns).

    Raises SpecError for a pattern that fits no tap, a module that is not there, and a tap that nothing gave.
    """
    experts = model.get_experts_implementation()[""]
    wanted = _wanted(expected_taps(config, experts), taps)
    watch = _Watch(config, wanted, np.shape(tokens))
    with watch.on(model):
        logits = run(model, tokens, positions)
    silent = [tap for tap in wanted if tap not in watch.taps]
    require(not silent, f"{len(silent)} taps were expected and nothing gave them: {', '.join(silent[:5])}")
    return logits, {tap: watch.taps[tap] for tap in wanted}


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
        b, s = shape
        self.sizes = {"B": b, "S": s, "T": s, "H": config.num_attention_heads}
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
                require(path in modules, f"transformers has no module {path}: {self._lost(path)} cannot be recorded")
                if path in busy:
                    handles.append(modules[path].register_forward_pre_hook(self._enter(path)))
                handles.append(modules[path].register_forward_hook(self._leave(path), with_kwargs=True))
            with _functions(self._function):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _lost(self, path: str) -> str:
        return ", ".join(t for t, p in self.wanted.items() if p is not None and p.module == path)

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
                    self._keep_experts(path, to_numpy(args[1]))

        return hook

    def _function(self, name: str, seen: Seen) -> None:
        if not self.inside:
            return
        for tap in self.functions.get((self.inside, name, self.count[name]), ()):
            self._keep(tap, seen)
        self.count[name] += 1
        if name == "linear" and self.inside.endswith("mlp.experts"):
            self.products.append(seen)

    def _keep(self, tap: str, seen: Seen) -> None:
        probe = self.wanted[tap]
        assert probe is not None
        require(tap not in self.taps, f"{tap} was seen twice in one run")
        if (tensor := probe.pick(seen, self.config)) is None:
            return
        x = to_numpy(tensor)
        shape = [int(n) if n.isdigit() else self.sizes.get(n, -1) for n in dims(tap).split()]
        try:
            self.taps[tap] = x.reshape(shape)
        except ValueError:
            raise SpecError(f"{tap} has shape {x.shape}; expected {dims(tap)}") from None

    def _keep_experts(self, path: str, ids: Array) -> None:
        """Eager experts go by ascending expert: rows -> (gate, up) -> act -> down. Their rows are sorted by expert,
        slot, token; ours by expert, token.
        """
        first, second = self.products[0::2], self.products[1::2]
        rows, act = (np.concatenate([to_numpy(s.args[0]) for s in half]) for half in (first, second))
        both, down = (np.concatenate([to_numpy(s.out) for s in half]) for half in (first, second))
        gate, up = np.split(both, 2, axis=-1)
        token, slot = np.indices(ids.shape).reshape(2, -1)
        theirs = np.lexsort((token, slot, ids.ravel()))
        ours = np.lexsort((slot, token, ids.ravel()))
        place = np.argsort(theirs)[ours]
        at = f"fwd/L{path.split('.')[2]}"
        for tap, x in zip(EXPERTS, (rows, gate, up, act, down), strict=True):
            if f"{at}/{tap}" in self.wanted:
                self.taps[f"{at}/{tap}"] = x[place]


def _functions(see: Callable[[str, Seen], None]) -> Any:
    """A context in which `see` is told of every torch function that is called, but for those it calls itself."""
    from torch.overrides import TorchFunctionMode

    class Functions(TorchFunctionMode):  # type: ignore[misc, unused-ignore]  # Any where torch is absent
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            see(getattr(func, "__name__", ""), Seen(args, kwargs or {}, out))
            return out

    return Functions()
