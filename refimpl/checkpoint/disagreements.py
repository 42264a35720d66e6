"""Where files and config.json disagree in what engines look for, and which of them stumble over it.

A checkpoint can have every name and shape of its model and still not load, or load wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.layers.config import Config

from .mapping import Checkpoint
from .names import BIAS, SCALE, layer_of
from .shards import INDEX, json_object

_CODES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Disagreement:
    """What config.json (or the index) says, what the files hold, and who stumbles."""

    what: str
    stumbles: str


def disagreements(ckpt: Checkpoint, config: Config) -> list[Disagreement]:
    """All of them; reads headers only."""
    raw = ckpt.config or {}
    return [*_quantisation(ckpt, raw), *_mtp(ckpt, config, raw), *_bias(ckpt), *_index(ckpt)]


def _quantisation(ckpt: Checkpoint, raw: Mapping[str, Any]) -> Iterator[Disagreement]:
    told = raw.get("quantization_config") or {}
    codes = [n for n in ckpt if ckpt.dtype(n) in _CODES]
    method, plain = told.get("quant_method"), {ckpt.dtype(n) for n in ckpt} <= {"BF16", "F16", "F32"}
    if told and not codes and not ckpt.absent and (method == "fp8" or plain):
        yield Disagreement(
            f"config.json announces quantization_config {method}, but no tensor is {'FP8' if method == 'fp8' else 'quantised'}",
            f"engines that build such layers from it (vLLM, SGLang, transformers) look for scales, as weight{SCALE}: KeyError, or "
            "scales left uninitialised; take the entry out",
        )
    bare = [n for n in codes if ckpt.unscaled(n) and n + SCALE not in ckpt.absent]
    if bare:
        yield Disagreement(
            f"{len(bare)} of {len(codes)} tensors of FP8 codes have no scale, the first {bare[0]}",
            f"engines look for weight{SCALE} and stop, or multiply by what memory held; write the scales beside the codes",
        )
    if codes and not told:
        yield Disagreement(
            f"{len(codes)} tensors are FP8 codes, but config.json has no quantization_config",
            "vLLM, SGLang and transformers build plain layers, cast the codes to their dtype without the scales, or refuse "
            f"weight{SCALE} as unexpected",
        )


def _mtp(ckpt: Checkpoint, c: Config, raw: Mapping[str, Any]) -> Iterator[Disagreement]:
    depth, counted = c.num_hidden_layers, c.num_nextn_predict_layers or 0
    told = f"{counted}" if {"num_nextn_predict_layers", "num_mtp_layers"} & set(raw) else f"{counted} by default"
    present = {i for n in (*ckpt, *ckpt.absent) if (i := layer_of(n)) is not None and i >= depth}
    if counted and not present:
        yield Disagreement(
            f"num_nextn_predict_layers is {told}, but no layer follows the {depth} of the model: MTP is absent",
            "engines that build what it counts find weights missing, vLLM and SGLang when drafting is asked for; set it to 0",
        )
    elif len(present) > counted:
        yield Disagreement(
            f"{len(present)} MTP layers are present, but num_nextn_predict_layers is {told}",
            "engines that count by it take these tensors for unexpected ones, or never draft; transformers ignores them",
        )
    elif len(present) < counted:
        yield Disagreement(
            f"num_nextn_predict_layers is {told}, but {len(present)} MTP layers are present",
            "engines that build what it counts find weights missing",
        )


def _bias(ckpt: Checkpoint) -> Iterator[Disagreement]:
    other = {ckpt.dtype(n) for n in ckpt if n.endswith(BIAS)} - {"F32"}
    if other:
        yield Disagreement(
            f"the selection bias {BIAS} is {', '.join(sorted(other))}; every release has it in F32",
            "where it stays in its dtype, scores closer than its spacing choose other experts; vLLM and Megatron hold it in "
            "float32 and keep the rounding that was done",
        )


def _index(ckpt: Checkpoint) -> Iterator[Disagreement]:
    """An index that was opened, or that lies beside the file that was."""
    folder = ckpt.files[0].parent
    index = folder / INDEX
    absent = sorted(set(ckpt.absent.values()))
    if len(ckpt.files) == 1 and not absent and index.exists():
        shards = json_object(index).get("weight_map")
        named = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        absent = sorted(n for n in named if not (folder / Path(n).name).exists())
    if absent:
        lost = f", with {len(ckpt.absent)} tensors" if ckpt.absent else ""
        yield Disagreement(
            f"{INDEX} names {len(absent)} files that are not there{lost}: {', '.join(absent[:3])}",
            "transformers, vLLM and SGLang go by the index where there is one, and stop at the first absent file",
        )
