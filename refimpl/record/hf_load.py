"""transformers' DeepSeek holding a case's weights, and its weights back under checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint.names import layer_of
from refimpl.layers.config import Config, Dialect
from refimpl.model import ForCausalLM

from .candidate import theirs
from .hf_class import is_v2, model_class
from .hf_fill import FUSED, fill, not_loaded
from .torch_arrays import libraries, to_numpy, to_torch

_NOT_SETTINGS = ("model_type", "dialect", "auto_map", "quantization_config", "torch_dtype", "dtype")


class Loaded(NamedTuple):
    """A model, and the names of its parameters and buffers that nothing of the case filled."""

    model: Any
    unfilled: list[str]


def load_model(
    config: Mapping[str, Any] | Config, weights: Mapping[str, Array], dtype: str = "float32", **options: Any
) -> Any:
    """The model of `load`, whose options these are."""
    return load(config, weights, dtype, **options).model


def load(
    config: Mapping[str, Any] | Config,
    weights: Mapping[str, Array],
    dtype: str = "float32",
    *,
    experts: str = "eager",
    attention: str = "eager",
    model: str | None = None,
    strict: bool = True,
) -> Loaded:
    """The case's model in eval mode, holding `weights` (checkpoint names) in `dtype`: DeepseekV3ForCausalLM, DeepseekV2ForCausalLM
    for a config of V2, or the user's own `model` (`hf_class.model_class`).

    transformers' own loader fuses the experts and keeps the selection bias and the rotary frequencies in float32
    (`.to(bfloat16)` afterwards would round them). MTP layers are left out. `experts`: "eager", "batched_mm",
    "grouped_mm"; `attention`: "eager", "sdpa", "flex_attention". Raises SpecError for a config that transformers would misread,
    and (strict) for missing or extra tensors, where transformers itself warns; what the loader leaves of a model of the user's
    own is filled from the case, and said where it cannot be.
    """
    c = config if isinstance(config, Config) else Config.from_dict(config)
    kind = model_class(c, model)
    if model is None:
        _supported(c)
    settings = _settings(c.to_dict() if isinstance(config, Config) else config)
    kinds = {"attn_implementation": attention, "experts_implementation": experts}
    if strict:
        ForCausalLM.from_weights(c, weights)  # refuses missing, extra and misshapen tensors; transformers would fill in
    state = {n: to_torch(weights[n]) for n in weights if (layer_of(n) or 0) < c.num_hidden_layers}
    with theirs(f"--model {model}") if model else nullcontext():
        loaded, wrong = _loaded(kind, settings | kinds, state, dtype, own=model is not None)
    require(model is not None or not (strict and wrong), f"transformers did not take the weights as they are: {wrong}")
    return Loaded(loaded, fill(loaded, state, not_loaded(loaded, wrong)) if model else [])


def _loaded(
    kind: Any, settings: Mapping[str, Any], state: Mapping[str, Any], dtype: str, *, own: bool
) -> tuple[Any, dict[str, list[Any]]]:
    """The model, by transformers' own loader, and the tensors that it complains of; of a class of the user's `own` we say it."""
    torch, transformers = libraries()
    with _quiet(transformers, own):
        loaded, report = kind.from_pretrained(
            None,
            config=kind.config_class(**settings),
            state_dict=dict(state),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=own,
        )
    return loaded, {problem: sorted(names) for problem, names in report.items() if names}


def _supported(c: Config) -> Config:
    """The config, if transformers' modeling_deepseek_v3, or _v2, computes what it says."""
    moe, v2 = c.first_k_dense_replace < c.num_hidden_layers, is_v2(c)
    asked = {"moe_layer_freq": (c.moe_layer_freq, 1), "dialect": (c.dialect, Dialect())}
    if v2:
        asked |= {"norm_topk_prob": (c.norm_topk_prob, False), "rope_interleave": (c.rope_interleave, True)}
    else:
        asked |= {"scoring_func": (c.scoring_func, "sigmoid"), "topk_method": (c.topk_method, "noaux_tc")}
    name_of = "V2" if v2 else "V3"
    for name, (value, only) in asked.items():
        require(value == only, f"{name} is {value!r}; transformers' DeepSeek-{name_of} computes only {only!r}")
    two = v2 or not moe or c.n_routed_experts // c.n_group >= 2
    require(two, "transformers needs at least two experts per group")
    require(not moe or c.n_shared_experts >= 1, f"transformers' DeepSeek-{name_of} always has a shared expert")
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
def _quiet(transformers: Any, own: bool) -> Iterator[None]:
    """No progress bar and, for a class of the user's own, no table of what the loader left, which is filled afterwards."""
    logs = transformers.utils.logging
    shown, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    if own:
        logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shown:
            logs.enable_progress_bar()


def checkpoint_names(model: Any, tensors: Mapping[str, Any]) -> dict[str, Array]:
    """transformers' names and fused experts -> checkpoint names, one matrix per expert; a tied head is left out.

    `tensors` is `model.state_dict()`, or anything else by the same names and shapes, such as gradients.
    """
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not path.endswith(".experts") or last not in FUSED:
            found[name] = to_numpy(tensor)
            continue
        for e, matrix in enumerate(to_numpy(tensor)):  # gate_up (2F, D): the gate's rows first
            for part, half in zip(FUSED[last], np.split(matrix, len(FUSED[last])), strict=True):
                found[f"{path}.{e}.{part}.weight"] = half
    return found
