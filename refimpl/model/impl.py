"""The adapter protocol, for ourselves: load, forward, step, loss_and_grads, stage. Other tools drive us through it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Self

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array, Parameter, Tensor, backward, data_of
from refimpl.layers.config import Config
from refimpl.layers.mla import Attend
from refimpl.layers.numerics.quantisation import quantization_settings
from refimpl.layers.precision import Plan, plan
from refimpl.layers.rope import RopeScaling
from refimpl.layers.stage import STAGES, Recorder, observing, tap_matches

from . import packed_cache
from .causal_lm import ForCausalLM, Output
from .identity import identity
from .inputs import Cache, Inputs
from .weights import effective

KVState = MutableMapping[str, Any]
"""What `forward` fills and `step` goes on from: a dict, updated in place; start with an empty one."""


class Taps(dict[str, Array]):
    """{tap: array}, always with "logits". `.cache` is the state that `step` continues from (also as `["cache"]`)."""

    cache: KVState

    def __missing__(self, key: str) -> Any:
        if key == "cache" and hasattr(self, "cache"):
            return self.cache
        raise KeyError(key)


class Impl:
    """The specification as an implementation. `Impl().load(config, weights).forward(tokens)["logits"]`."""

    def __init__(
        self, *, precision: str | Plan = "float32", attend: Attend = "auto", kv_format: str | None = None
    ) -> None:
        """`precision`: a plan or its name. `attend`: "auto", "expanded" or "absorbed". `kv_format`: None keeps the cache as
        computed, "fp8" and "int8" keep it in bytes.
        """
        self.plan = plan(precision) if isinstance(precision, str) else precision
        self.attend, self.kv_format = attend, kv_format
        if kv_format is not None:
            packed_cache.kv_format(kv_format)
        self._model: ForCausalLM | None = None

    def info(self) -> dict[str, Any]:
        """Name, version, precision plan, layouts, the stages that can be called."""
        from refimpl.version import __version__

        rope = "interleaved" if self._model is None or self.model.config.rope_interleave else "half"
        layouts = {"rope": rope, "mla": self.attend}
        return {
            "name": "refimpl",
            "version": __version__,
            "precision": self.plan.name,
            "layouts": layouts,
            "stages": list(STAGES),
        }

    @property
    def model(self) -> ForCausalLM:
        """The loaded model; SpecError before `load`."""
        if self._model is None:
            raise SpecError("no model is loaded; call load(config, weights) first")
        return self._model

    def load(self, config: Mapping[str, Any] | Config, weights: Mapping[str, Any]) -> Self:
        """Take a config (config.json keys) and weights under checkpoint names: float arrays, bfloat16 (ml_dtypes),
        or FP8 codes, either as a pair (codes, scale_inv) or with a companion `<name>_scale_inv`.

        Arrays that already have the plan's dtype are not copied. SpecError lists missing and extra tensors, wrong
        shapes and dtypes, and tensors with NaN or infinity.
        """
        require(
            isinstance(weights, Mapping),
            f"weights is a {type(weights).__name__}; expected a mapping of names to arrays",
        )
        with where("in the config"):
            c = config if isinstance(config, Config) else Config.from_dict(config)
            block, _ = quantization_settings({} if isinstance(config, Config) else config)
        with where(f"in the weights of a model of {c.num_hidden_layers} layers"):
            self._model = ForCausalLM.from_weights(c, effective(weights, self.plan, block))
        return self

    def new_cache(self) -> KVState:
        """An empty state for `forward` and `step`."""
        return {}

    def forward(
        self,
        tokens: Any,
        positions: Any = None,
        cache: KVState | None = None,
        taps: Iterable[str] = (),
        *,
        valid: Any = None,
        documents: Any = None,
    ) -> Taps:
        """Run tokens (B, S) -> {"logits": (B, S, V)} and the taps asked for.

        `taps` are names or patterns, with or without the phase: "fwd/L1/router.ids", "L*/attn_out", "*" for all.
        positions (B, S) default to counting on from the cache; valid (B, S) is 0 for padding; documents (B, S)
        separates packed texts. `cache` is a dict that is read and updated in place.
        """
        state = {} if cache is None else cache.cache if isinstance(cache, Taps) else cache
        require(
            isinstance(state, MutableMapping), f"cache is a {type(state).__name__}; expected a dict, empty at first"
        )
        past = self._past(state)
        flat = isinstance(tokens, list | tuple) and tokens and not hasattr(tokens[0], "__len__")
        tokens = [tokens] if flat or getattr(tokens, "ndim", 0) == 1 else tokens
        with where("in the inputs of forward"):
            inputs = self.model.inputs(tokens, positions, valid, documents, cache=past)
        wanted = _Wanted(taps)
        with observing(*self._observers(wanted, self.model, inputs, past)):
            out = self.model(inputs, past, attend=self.attend, with_mtp=wanted.any("mtp"))
        result = Taps(wanted.results(), logits=data_of(out.logits))
        self._remember(state, out.cache)
        result.cache = state
        return result

    def advance(
        self, tokens: Any, cache: KVState, *, valid: Any = None, attend: Attend | None = None, at: Array | None = None
    ) -> Output:
        """As `forward`, without taps, for those who need the hidden: tokens (B, S) -> the model's Output (`at` as there); the
        cache grows in place. On an error it is what it was."""
        past = self._past(cache)
        with where("in the inputs of advance"):
            inputs = self.model.inputs(tokens, valid=valid, cache=past)
        with self.rounding():
            out = self.model(inputs, past, attend=attend or self.attend, at=at)
        self._remember(cache, out.cache)
        return out

    def rounding(self) -> AbstractContextManager[None]:
        """A context in which stages compute under the precision plan."""
        return observing(*([] if self.plan.name in ("float32", "float64") else [self.plan]))

    def _remember(self, state: KVState, cache: Cache) -> None:
        before, cache = state.get("kv"), replace(cache, model=identity(self.model))
        state["kv"] = packed_cache.pack(cache, before, self.kv_format) if self.kv_format else cache

    def step(self, token: Any, cache: KVState, taps: Iterable[str] = ()) -> Taps:
        """One decode step: token (B,), (B, 1) or one int -> {"logits": (B, 1, V)}; the cache grows in place."""
        require(cache is not None, "step needs the cache that forward filled: forward(tokens, cache={})")
        token = np.asarray(token)
        return self.forward(token.reshape(-1, 1), cache=cache, taps=taps)

    def loss_and_grads(
        self, tokens: Any, labels: Any, taps: Iterable[str] = (), *, mtp_weight: float = 0.0, aux_weight: float = 0.0
    ) -> Taps:
        """{"loss": (), "grad/<checkpoint name>": ...} of the next-token cross-entropy; labels (B, S) are shifted
        inside, -100 is ignored. taps: "fwd/..." activations, "bwd/..." their gradients. `mtp_weight` adds lambda times
        the MTP loss (R eq 25), `aux_weight` the sequence-wise balance loss (R eq 17).
        """
        model = self.model.with_gradients()
        with where("in the inputs of loss_and_grads"):
            inputs, wanted = model.inputs(tokens, labels=labels), _Wanted(taps)
        with observing(*self._observers(wanted, model, inputs, None)):
            loss, parts = model.loss(inputs, mtp_weight=mtp_weight, aux_weight=aux_weight)
        inner = wanted.backward()
        grads = backward(loss, keep=inner.values())
        result = Taps({n: data_of(v) for n, v in parts.items()} | wanted.results())
        result |= {name: grads[t] for name, t in inner.items() if t in grads}
        named = [(n, w) for n, w in model.named_weights() if isinstance(w, Parameter) and w in grads]
        result |= {f"grad/{n}": grads[w] for n, w in named}
        return result

    def stage(self, name: str, inputs: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> Array:
        """One stage alone: `inputs` are its array arguments by name (a list for a starred one), `params` its
        settings.
        """
        require(name in STAGES, f"no stage {name!r}; there are: {', '.join(STAGES)}")
        stage, given = STAGES[name], dict(inputs) | dict(params or {})
        signature = inspect.signature(stage.fn)
        with where(f"in stage {name}{signature}"):
            unknown = sorted(set(given) - set(signature.parameters))
            require(not unknown, f"unknown arguments: {', '.join(unknown)}")
            args, static = [], {}
            for p in signature.parameters.values():
                if p.kind is p.KEYWORD_ONLY:
                    static[p.name] = self._setting(p, given)
                elif p.kind is p.VAR_POSITIONAL:
                    args += [self._array(a) for a in given.get(p.name, ())]
                else:
                    args.append(self._array(_given(p, given)))
            try:
                with observing(self.plan):
                    return data_of(stage(*args, **static))
            except (ValueError, TypeError, IndexError, AttributeError) as error:
                raise error if isinstance(error, SpecError) else SpecError(f"{type(error).__name__}: {error}") from None

    def _past(self, state: KVState) -> Cache | None:
        state = state.cache if isinstance(state, Taps) else state
        require(
            "kv" in state or not state,
            f"the cache holds {', '.join(map(str, state))}; expected one that forward filled",
        )
        kept = state.get("kv")
        known = kept is None or isinstance(kept, Cache | packed_cache.PackedCache)
        require(known, f"the cache's entry is a {type(kept).__name__}; expected what forward put there")
        if isinstance(kept, packed_cache.PackedCache):
            require(self.kv_format, "the cache is packed; give Impl the kv_format that packed it")
            assert self.kv_format is not None
            kept = packed_cache.unpack(kept, self.model.config, self.kv_format, self.plan.dtype)
        else:
            require(kept is None or self.kv_format is None, "the cache is not packed, but kv_format is set")
        if kept is not None:
            kept.check(self.model.config, identity(self.model))
        return kept

    def _array(self, a: Any) -> Any:
        if isinstance(a, tuple | list) and a and hasattr(a[0], "dtype"):
            return tuple([self._array(x) for x in a])
        if a is None:
            return None
        a = np.asarray(a)
        return a if a.dtype.kind in "iub" else a.astype(self.plan.dtype)

    def _setting(self, p: inspect.Parameter, given: Mapping[str, Any]) -> Any:
        if p.name == "dtype":
            return self.plan.dtype
        value = _given(p, given)
        return RopeScaling.from_dict(value) if p.name == "yarn" and isinstance(value, Mapping) else value

    def _observers(self, wanted: _Wanted, model: ForCausalLM, inputs: Inputs, past: Cache | None) -> list[Any]:
        observers: list[Any] = [] if self.plan.name in ("float32", "float64") else [self.plan]
        if wanted.patterns:
            wanted.recorder = introduce(Recorder(wanted.keep), model, inputs, past)
            observers.append(wanted.recorder)
        return observers


def introduce(recorder: Recorder, model: ForCausalLM, inputs: Inputs, past: Cache | None = None) -> Recorder:
    """Tell a recorder the names of the weights (`w/<name>`), the inputs and the cache."""
    for name, w in model.named_weights():
        if hasattr(w, "dtype"):
            recorder.know(f"w/{name}", w)
    for name, a in inputs.named():
        recorder.know(name, a)
    for i, (c_kv, k_rope) in enumerate(past.layers if past else ()):
        recorder.know(f"past/L{i}/cache.c_kv", c_kv)
        recorder.know(f"past/L{i}/cache.k_rope", k_rope)
    for name in ("positions", "valid", "documents"):
        if past is not None and getattr(past, name) is not None:
            recorder.know(f"past/cache.{name}", getattr(past, name))
    return recorder


class _Wanted:
    """The taps a caller asked for, and what was recorded of them."""

    def __init__(self, taps: Iterable[str]) -> None:
        listed = [taps] if isinstance(taps, str) else list(taps) if isinstance(taps, Iterable) else [taps]
        require(all(isinstance(t, str) for t in listed), f"taps are names or patterns, not {listed!r}")
        self.patterns = [t for t in listed if t != "logits"]
        self.recorder = Recorder()

    def any(self, word: str) -> bool:
        return any(word in p or p == "*" for p in self.patterns)

    def keep(self, tap: str) -> bool:
        return any(tap_matches(tap, p) or tap_matches("bwd/" + tap.partition("/")[2], p) for p in self.patterns)

    def results(self) -> dict[str, Array]:
        taps = self.recorder.taps
        found: dict[str, Array] = {}
        for p in self.patterns:
            hits = [t for t in taps if tap_matches(t, p)]
            if not hits and not p.startswith("bwd/"):
                raise SpecError(
                    f"no tap matches {p!r}; this run has {', '.join(c.tap for c in self.recorder.program[:40])}, ..."
                )
            literal = len(hits) == 1 and hits[0].endswith("/" + p)
            found |= {p if literal else t: data_of(taps[t]) for t in hits}
        return found

    def backward(self) -> dict[str, Tensor]:
        """bwd/<unit>/<tap> -> the Tensor whose gradient was asked for."""
        named = {"bwd/" + tap.partition("/")[2]: t for tap, t in self.recorder.taps.items() if isinstance(t, Tensor)}
        return {n: t for n, t in named.items() if any(fnmatchcase(n, p) for p in self.patterns)}


def _given(p: inspect.Parameter, given: Mapping[str, Any]) -> Any:
    require(p.name in given or p.default is not p.empty, f"argument {p.name!r} is missing")
    return given.get(p.name, p.default)
