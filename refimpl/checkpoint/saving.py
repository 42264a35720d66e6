"""Write a checkpoint: float32, bfloat16 or block-scaled FP8; Hugging Face's files or DeepSeek's
converted ones.

Tensors are converted one at a time when their turn comes, so that a checkpoint larger than memory
can be converted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from refimpl.autograd.errors import SpecError, require, where
from refimpl.layers.config import Config
from refimpl.layers.numerics.quantisation import quantization_settings

from .atomic import Transaction
from .names import SCALE, config_to_deepseek, expert_of, is_fp8, layer_of, quantization_config, shard_axis, to_deepseek
from .safetensors import Array, Pending, write_into
from .shards import INDEX, PART, SINGLE
from .stored import STORED, Dtype, Plan

_FORMAT = {"format": "pt"}  # transformers refuses a file without it; it says nothing of the bytes


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    config: Config | Mapping[str, Any],
    *,
    dtype: Dtype = "bfloat16",
    max_shard_bytes: int | None = None,
    layout: Literal["hf", "deepseek"] = "hf",
    mp: int = 1,
) -> list[Path]:
    """Write tensors (canonical names) and config.json; returns the files written. All appear
    together or none does.

    path: a folder, or a .safetensors file for a single one. dtype "fp8" stores the projections as
    E4M3 codes with float32 weight_scale_inv per 128 x 128 block (or config's weight_block_size) and
    the rest as bfloat16; the router's selection bias is float32 always, as in the release (whose
    688,574,839,360 bytes say so). max_shard_bytes: shards of at most that many bytes and an index.
    layout "deepseek": convert.py's names, no MTP layers (convert.py skips them), one file for each
    of `mp` ranks. FP8 tensors of an opened Checkpoint keep their codes. Raises SpecError, and
    leaves everything as it was, for values that the target cannot hold, cuts that do not come out
    even, or other weights in the folder that would stay there.
    """
    path = Path(path)
    settings = config.to_dict() if isinstance(config, Config) else dict(config)
    with where(f"while saving to {path}"):
        _check_arguments(path, tensors, dtype, max_shard_bytes, layout, mp)
        block, scale_fmt = quantization_settings(settings)
        settings.pop("quantization_config", None)
        settings["torch_dtype"] = "float32" if dtype == "float32" else "bfloat16"
        if dtype == "fp8":
            settings |= quantization_config(scale_fmt, block)
        plan = Plan(tensors, dtype, block, scale_fmt)
        if layout == "deepseek":
            contents = _deepseek_files(path, plan, settings["num_hidden_layers"], mp)
            settings = config_to_deepseek(settings)
        else:
            contents = hf_files(path, plan, max_shard_bytes)
        return _write(path, contents, settings)


def _check_arguments(
    path: Path,
    tensors: Mapping[str, Array],
    dtype: str,
    max_bytes: int | None,
    layout: str,
    mp: int,
) -> None:
    one = path.suffix == ".safetensors"
    positive = mp >= 1 and (max_bytes is None or max_bytes >= 1)
    scales = [name for name in tensors if name.endswith(SCALE)]
    require(dtype in STORED, f"dtype {dtype!r}; expected one of {', '.join(STORED)}")
    require(layout in ("hf", "deepseek"), f"layout {layout!r}; expected 'hf' or 'deepseek'")
    require(positive, f"mp={mp} and max_shard_bytes={max_bytes} must be positive")
    require(not (layout == "hf" and mp > 1), f"mp={mp} needs layout 'deepseek'")
    require(not (layout == "deepseek" and max_bytes), "layout 'deepseek' has no shards")
    require(not (one and (mp > 1 or max_bytes)), "several files need a folder, not a file's name")
    require(not scales, f"{scales[:3]} are scales: codes and scales come from an open Checkpoint")


def _write(path: Path, contents: Mapping[str, Mapping[str, Pending]], settings: Mapping[str, Any]) -> list[Path]:
    """config.json, the weights, then an index if there are shards: the last is the others' key."""
    folder = path.parent if path.suffix == ".safetensors" else path
    _make_folder(folder, path, contents)
    sharded = any("-of-" in name for name in contents)
    first, *others = contents
    weights = [first, *others] if sharded else [*others, first]  # rank 0's part is a key as well
    names = ["config.json", *weights, *([INDEX] if sharded else [])]
    with Transaction() as files:
        for name in names:
            if name in contents:
                write_into(files, folder / name, contents[name], _FORMAT)
            else:
                value = settings if name == "config.json" else _index(contents)
                with files.new(folder / name) as f:
                    f.write((json.dumps(value, indent=2) + "\n").encode())
    return [folder / name for name in names]


def _make_folder(folder: Path, path: Path, contents: Mapping[str, Any]) -> None:
    """Create the folder; refuse one whose other weights would make the checkpoint ambiguous."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {p.name for p in folder.iterdir()}
    except OSError as error:
        raise SpecError(f"{folder} cannot be made: {error.strerror}") from error
    if path == folder:
        index = {INDEX} if any("-of-" in name for name in contents) else set()
        rivals = {n for n in present if n in (INDEX, *SINGLE) or PART.fullmatch(n)}
        rest = ", ".join(sorted(rivals - index - contents.keys()))
        require(not rest, f"{folder} holds {rest}, which would stay beside the new; remove it")


# ------------------------------------------------------------------------------------ Hugging Face


def hf_files(path: Path, plan: Plan, max_bytes: int | None) -> dict[str, dict[str, Pending]]:
    """File name -> its tensors: one file, or shards filled in order, a weight with its scales."""
    shards: list[dict[str, Pending]] = [{}]
    filled = 0
    for name in plan.tensors:
        group = plan.pending(name)
        size = sum(t.nbytes for t in group.values())
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= group
        filled += size
    if max_bytes is None:
        return {path.name if path.suffix == ".safetensors" else SINGLE[0]: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def _index(contents: Mapping[str, Mapping[str, Pending]]) -> dict[str, Any]:
    total = sum(t.nbytes for tensors in contents.values() for t in tensors.values())
    weight_map = {name: shard for shard, tensors in contents.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


# ---------------------------------------------------------------------------------------- DeepSeek


def _deepseek_files(path: Path, plan: Plan, layers: int, mp: int) -> dict[str, dict[str, Pending]]:
    """model{rank}-mp{mp}.safetensors as convert.py cuts them, without the MTP layers."""
    names = [n for n in plan.tensors if (layer_of(n) or 0) < layers]
    experts = 1 + max((e for n in names if (e := expert_of(n)) is not None), default=-1)
    require(experts % mp == 0, f"{experts} experts do not divide among mp={mp} ranks")
    files: dict[str, dict[str, Pending]] = {}
    for rank in range(mp):
        tensors: dict[str, Pending] = {}
        for name in names:
            e = expert_of(name)
            if e is None or e * mp // experts == rank:
                cut = () if e is not None else _cut(plan, name, rank, mp)
                tensors |= {to_deepseek(n): t for n, t in plan.pending(name, cut).items()}
        part = path.name if path.suffix == ".safetensors" else f"model{rank}-mp{mp}.safetensors"
        files[part] = tensors
    return files


def _cut(plan: Plan, name: str, rank: int, mp: int) -> tuple[slice, ...]:
    """Rank's share of a tensor. Shares of FP8 must be whole blocks, each with its own scale."""
    axis = shard_axis(name)
    if axis is None or mp == 1:
        return ()
    length = plan.shape(name)[axis]
    share, rest = divmod(length, mp)
    require(rest == 0, f"{name}: {length} of axis {axis} do not divide among mp={mp} ranks")
    if plan.dtype == "fp8" and is_fp8(name):
        block = plan.block[axis]
        require(share % block == 0, f"{name}: {share} for each rank are no whole blocks of {block}")
    return (*[slice(None)] * axis, slice(rank * share, (rank + 1) * share))
