"""Seeing inside transformers' DeepSeek without changing it: hooks on its modules, and torch's TorchFunctionMode for
the functions called within attention, router and experts.

A tap holds the bits that the model held, its axes in our order, but for one thing: where transformers' eager mask adds
the dtype's lowest number, the trace has -inf (the softmax gives 0 for both), and a mask of truth values becomes 0 and -inf.
Rotated channels stay in transformers' order, of V3 all first elements of the pairs before all second ones: layout rope=half.

No model is refused, however wrong: what it does not show is left out and noted, and judging is the diff's business.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import tap_matches
from refimpl.model.phases import Part

from .hf_choice import Choosing
from .hf_experts import PRODUCTS, inside
from .hf_gradients import Held, gradient, gradients, names, of_call, retain
from .hf_hear import hearing_cache, hearing_flex, hearing_torch
from .hf_probes import BUSY, CHOICE, EXPERTS, Probe, Seen, dims, expected_taps
from .hf_run import Batch, Rows, run_batch
from .torch_arrays import libraries, to_numpy

Probes = dict[str, Probe | None]
"""Tap -> where it is seen; None for what is seen of all experts together."""
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


def run(model: Any, tokens: Rows, positions: Rows) -> Any:
    """Logits (B, S, V), a torch tensor."""
    return run_batch(model, Batch(tokens, positions))[0]


def look(
    model: Any, config: Config, tokens: Rows, positions: Rows, taps: str | Iterable[str] = "all", **more: Any
) -> Sighting:
    """`look_at` of `Batch(tokens, positions, **more)`."""
    return look_at(model, config, Batch(tokens, positions, **more), taps)


def look_at(model: Any, config: Config, batch: Batch, taps: str | Iterable[str] = "all") -> Sighting:
    """Run the model and keep the taps asked for ("all", or patterns) that it shows, and their gradients, if there are labels.

    SpecError for a pattern that fits no tap.
    """
    torch, _ = libraries()
    trained, known = batch.labels is not None, _known(model, config, batch)
    wanted = _wanted([*known, *(names(model, known) if trained else ())], taps)
    watches = {p.name: _Watch(config, _of(known, wanted, p, trained), batch, p) for p in batch.parts}
    kernel = model.config._attn_implementation
    with torch.set_grad_enabled(trained):
        logits, loss = run_batch(model, batch, lambda part, cache: watches[part.name].on(model, cache, kernel))
    found = {tap: x for w in watches.values() for tap, x in w.taps.items()}
    if trained:
        found |= gradients(model, loss, watches["fwd"].held, found)
    notes = dict.fromkeys(note for w in watches.values() for note in w.notes)
    expected = [tap for tap in wanted if tap in found or not getattr(known.get(tap), "optional", False)]
    silent = [tap for tap in expected if tap not in found]
    if silent:
        some = ", ".join(silent[:5]) + (", ..." if len(silent) > 5 else "")
        notes[f"{len(silent)} of {len(expected)} taps were not seen: {some}"] = None
    return Sighting(logits, {tap: found[tap] for tap in expected if tap in found}, expected, [*notes])


def _known(model: Any, config: Config, batch: Batch) -> Probes:
    kinds = {"experts": model.get_experts_implementation().get(""), "attention": model.config._attn_implementation}
    return {t: p for part in batch.parts for t, p in expected_taps(config, phase=part.name, **kinds).items()}


def _of(known: Probes, wanted: Iterable[str], part: Part, trained: bool) -> Probes:
    """A part's probes; where gradients are taken all of them, since a gradient may be wanted whose tap is not."""
    chosen = known if trained else wanted
    return {tap: known[tap] for tap in chosen if tap.startswith(f"{part.name}/")}


def observe(
    model: Any, config: Config, tokens: Rows, positions: Rows, taps: str | Iterable[str] = "all"
) -> tuple[Any, dict[str, Array]]:
    """The logits and the taps of `look`."""
    seen = look(model, config, tokens, positions, taps)
    return seen.logits, seen.taps


def _wanted(known: list[str], taps: str | Iterable[str]) -> list[str]:
    if taps == "all":
        return known
    patterns = taps.split(",") if isinstance(taps, str) else list(taps)
    found = set()
    for p in patterns:
        hits = {t for t in known if tap_matches(t, p)}
        require(hits, f"no tap fits {p!r}; there are {', '.join(known[:40])}, ...")
        found |= hits
    return [t for t in known if t in found]


class _Watch:
    """Keeps what the probes see while `on(model)` is open."""

    def __init__(self, config: Config, wanted: Probes, batch: Batch, part: Part) -> None:
        self.config, self.wanted, self.phase = config, wanted, part.name
        self.trained = batch.labels is not None
        self.taps: dict[str, Array] = {}
        self.held: list[Held] = []  # of a run that is trained on
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self.sizes = {"B": len(batch.tokens), "S": part.length, "T": part.stop, "H": config.num_attention_heads}
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
        self.inside, self.experts = "", ""
        self.count: Counter[str] = Counter()
        self.products: list[tuple[str, Seen]] = []
        self.choosing = self._choosing()

    def _choosing(self) -> Choosing:
        return Choosing(self.sizes["B"] * self.sizes["S"], self.config.n_routed_experts)

    @contextmanager
    def on(self, model: Any, cache: Any = None, kernel: str = "") -> Iterator[None]:
        """Watch every call of the model and of its cache; on leaving, no hook is left on them."""
        self.experts = model.get_experts_implementation().get("")
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
            see = self._function
            with hearing_cache(cache, see), hearing_flex(kernel, see), hearing_torch(see):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.inside, self.count, self.products = path, Counter(), []
            self.choosing = self._choosing()

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            for tap in self.modules.get(path, ()):
                self._keep(tap, Seen(args, kwargs, out))
            if path == self.inside:
                self.inside = ""
                if path.endswith("mlp.experts") and self.products:
                    self._keep_experts(path, module, args)
                for tap in self.functions.get((path, CHOICE, 0), ()):
                    self._keep_choice(path, tap)

        return hook

    def _function(self, name: str, seen: Seen) -> None:
        if not self.inside:
            return
        for tap in self.functions.get((self.inside, name, self.count[name]), ()):
            probe = self.wanted[tap]
            if probe is not None and (not probe.after or self.count[probe.after]):
                self._keep(tap, seen)
        self.count[name] += 1
        if (self.inside, CHOICE, 0) in self.functions:
            self.choosing.see(name, seen)
        if self.inside.endswith("mlp.experts") and name in PRODUCTS.get(self.experts, ()):
            self.products.append((name, seen))

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
        if self.trained and tap in self.taps:
            retain(seen)
            pick = probe.grad or probe.pick
            self.held.append(Held((tap,), lambda: [to_numpy(pick(of_call(seen), self.config))]))

    def _keep_choice(self, path: str, tap: str) -> None:
        """What the experts were chosen by, if the gate shows it."""
        found = self.choosing.found(self.config.topk_group < self.config.n_group)
        if found is None:
            self.notes[f"{path}: what the experts are chosen by, before groups are dropped, cannot be told"] = None
        elif tap in self.taps:
            self.notes[f"{tap} was seen twice in one run: the first is kept"] = None
        else:
            self.taps[tap] = found.reshape(self.sizes["B"], self.sizes["S"], -1)

    def _keep_experts(self, path: str, experts: Any, args: tuple[Any, ...]) -> None:
        """The inside of all experts, in our order of rows."""
        taps = tuple([f"{self.phase}/L{path.split('.')[2]}/{tap}" for tap in EXPERTS])
        ids, calls, kind = to_numpy(args[1]), self.products, self.experts
        try:
            found = inside(kind, experts, ids, calls, to_numpy)
        except _NOT_THERE as error:
            self.notes[f"{path}: {error}"] = None
            return
        again = [tap for tap in taps if tap in self.taps]
        if again:
            self.notes[f"{again[0]} was seen twice in one run: the first is kept"] = None
            return
        self.taps |= {tap: x for tap, x in zip(taps, found, strict=True) if tap in self.wanted}
        if self.trained:
            for _, seen in calls:
                retain(seen)
            self.held.append(Held(taps, lambda: inside(kind, experts, ids, calls, lambda t: to_numpy(gradient(t)))))
