"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, no pickle (PEFT 0.21)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction, json_object, open_file
from refimpl.checkpoint.safetensors import write_into

from .lora import A, Lora, adapted_modules

PREFIX = "base_model.model."
"""What PEFT's names put in front of a module's."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_OTHER = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication"),
    *(
        "lora_bias",
        "modules_to_save",
        "monteclora_config",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
    ),
    *("use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config"),
)
"""Keys that change what an adapter computes when they are set; none of it is here."""


def save(folder: str | os.PathLike[str], adapters: Mapping[str, Array], lora: Lora, *, base: str = "") -> None:
    """Write an adapter that `PeftModel.from_pretrained(model, folder)` reads; `base` names the model it belongs to. Both files
    appear together.
    """
    folder = Path(folder)
    modules = adapted_modules(adapters)
    require(modules, "no adapters to save")
    for m in modules:
        require(adapters[m + A].shape[0] == lora.r, f"{m}: rank {adapters[m + A].shape[0]}, the config says {lora.r}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    with where(f"while saving {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with Transaction() as files:
            write_into(files, folder / TENSORS, {PREFIX + n: a for n, a in adapters.items()}, {"format": "pt"})
            with files.new(folder / CONFIG) as f:
                f.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def load(folder: str | os.PathLike[str]) -> tuple[Lora, dict[str, Array]]:
    """The settings and the adapters by our names, float32. SpecError for what is no LoRA, or one with mechanisms that are not
    here (`_OTHER`).
    """
    folder = Path(folder)
    config = json_object(folder / CONFIG)
    with where(f"while reading {folder / CONFIG}"):
        lora = _settings(config)
    with where(f"while reading {folder / TENSORS}"):
        stored = open_file(folder / TENSORS)
        odd = [n for n in stored if not n.startswith(PREFIX)]
        require(not odd, f"names that do not begin with {PREFIX}: {', '.join(odd[:3])}")
        adapters = {n.removeprefix(PREFIX): np.array(stored[n], np.float32) for n in stored}
        for m in adapted_modules(adapters):
            require(adapters[m + A].shape[0] == lora.r, f"{m}: rank {adapters[m + A].shape[0]}, not {lora.r}")
    return lora, adapters


def _settings(config: Mapping[str, Any]) -> Lora:
    require(config.get("peft_type") == "LORA", f"peft_type is {config.get('peft_type')!r}; expected LORA")
    used = [k for k in _OTHER if config.get(k)] + ["bias"] * (config.get("bias", "none") != "none")
    require(not used, f"{', '.join(used)}: set, and not known here")
    r, alpha, targets = (config.get(k) for k in ("r", "lora_alpha", "target_modules"))
    require(
        isinstance(r, int) and isinstance(alpha, int | float), f"r is {r!r}, lora_alpha {alpha!r}; expected numbers"
    )
    named = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    require(named or isinstance(targets, str), f"target_modules is {targets!r}; expected names, or a pattern")
    assert isinstance(r, int) and isinstance(alpha, int | float) and targets is not None
    return Lora(r, alpha, (targets,) if isinstance(targets, str) else tuple(sorted(targets)))
