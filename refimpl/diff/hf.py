"""transformers' DeepseekV3ForCausalLM as a candidate: load a case's weights, run it, write its trace.

torch and transformers come with the extra `interop` and are imported only when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config, Dialect
from refimpl.model import ForCausalLM
from refimpl.names import layer_of

from .case import Case
from .trace import Header, Trace, digest

DTYPES = ("float32", "bfloat16")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NOT_SETTINGS = ("dialect", "auto_map", "quantization_config", "torch_dtype", "dtype")


def libraries() -> tuple[Any, Any]:
    """torch and transformers; SpecError says how to install them."""
    try:
        import torch
        import transformers
    except ImportError as error:
        extra = "pip install 'deepseek-v3-refimpl[interop]'"
        raise SpecError(f"{error.name} cannot be imported; it comes with the extra: {extra}") from None
    return torch, transformers


def to_torch(array: Array) -> Any:
    """A tensor with the array's bits, in memory of its own. torch knows no ml_dtypes: bfloat16 goes by way of int16."""
    torch, _ = libraries()
    a = np.array(array, order="C")
    if a.dtype == _BFLOAT16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def to_numpy(tensor: Any) -> Array:
    """An array with the tensor's bits, in memory of its own."""
    torch, _ = libraries()
    t = tensor.detach().cpu().contiguous()
    if t.dtype == torch.bfloat16:
        return np.array(t.view(torch.int16).numpy()).view(_BFLOAT16)
    return np.array(t.numpy())


# ------------------------------------------------------------------------------------------------ loading


def load_model(
    config: Mapping[str, Any] | Config, weights: Mapping[str, Array], dtype: str = "float32", *, experts: str = "eager"
) -> Any:
    """DeepseekV3ForCausalLM in eval mode, with eager attention, holding `weights` (checkpoint names) in `dtype`.

    transformers' own loader fuses the experts and keeps the selection bias and the rotary frequencies in float32
    (`.to(bfloat16)` afterwards would round them). MTP layers are left out. `experts`: "eager", "batched_mm",
    "grouped_mm". Raises SpecError for a config that transformers would misread, and for missing or extra tensors.
    """
    torch, transformers = libraries()
    c = _supported(config if isinstance(config, Config) else Config.from_dict(config))
    settings = _settings(c.to_dict() if isinstance(config, Config) else config)
    kinds = {"attn_implementation": "eager", "experts_implementation": experts}
    ForCausalLM.from_weights(c, weights)  # refuses missing, extra and misshapen tensors; transformers would fill in
    state = {n: to_torch(weights[n]) for n in weights if (layer_of(n) or 0) < c.num_hidden_layers}
    with _without_progress_bar(transformers):
        model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
            None,
            config=transformers.DeepseekV3Config(**settings, **kinds),
            state_dict=state,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    require(not wrong, f"transformers {transformers.__version__} did not take the weights as they are: {wrong}")
    return model


def _supported(c: Config) -> Config:
    """The config, if transformers' modeling_deepseek_v3 computes what it says."""
    moe = c.first_k_dense_replace < c.num_hidden_layers
    asked = {
        "scoring_func": (c.scoring_func, "sigmoid"),
        "topk_method": (c.topk_method, "noaux_tc"),
        "moe_layer_freq": (c.moe_layer_freq, 1),
        "dialect": (c.dialect, Dialect()),
    }
    for name, (value, only) in asked.items():
        require(value == only, f"{name} is {value!r}; transformers' DeepSeek-V3 computes only {only!r}")
    require(not moe or c.n_routed_experts // c.n_group >= 2, "transformers needs at least two experts per group")
    require(not moe or c.n_shared_experts >= 1, "transformers' DeepSeek-V3 always has a shared expert")
    return c


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for DeepseekV3Config: null groups spelled out, as many key heads as query heads (its default is 128).

    A copy: transformers writes rope_theta and rope_type into the rope_scaling dictionary that it is given.
    """
    kept = {k: deepcopy(v) for k, v in raw.items() if not k.startswith("_") and k not in _NOT_SETTINGS}
    nulls = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    kept |= {k: v for k, v in nulls.items() if k in kept and kept[k] is None}
    return kept | {"num_key_value_heads": kept["num_attention_heads"]}


@contextmanager
def _without_progress_bar(transformers: Any) -> Iterator[None]:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def checkpoint_names(model: Any, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """transformers' names and fused experts -> checkpoint names, one matrix per expert; a tied head is left out.

    `tensors` is `model.state_dict()`, or anything else by the same names and shapes, such as gradients.
    """
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not path.endswith(".experts"):
            found[name] = to_numpy(tensor)
            continue
        for e, matrix in enumerate(to_numpy(tensor)):  # gate_up (2F, D): the gate's rows first
            for part, half in zip(_FUSED[last], np.split(matrix, len(_FUSED[last])), strict=True):
                found[f"{path}.{e}.{part}.weight"] = half
    return found


# ---------------------------------------------------------------------------------------------- recording


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
    from .hf_bugs import injected

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
    from .hf_probes import dims

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
    from .hf_taps import observe, run

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread, a fixed seed and no gradients, and leave its settings as they were."""
    torch, _ = libraries()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _producer() -> dict[str, str]:
    torch, transformers = libraries()
    return {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__}


__all__ = ["checkpoint_names", "libraries", "load_model", "one_thread", "record", "to_numpy", "to_torch"]
