"""Which files make up a checkpoint: one file, shards with an index, or model-parallel parts.

Headers and the index are read and held against each other; no tensor is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from refimpl.autograd.errors import SpecError, require, where

from .header import parse_json
from .names import looks_like_deepseek
from .safetensors import SafetensorsFile, open_file
from .sources import Source, deepseek_sources, hf_sources

Naming = Literal["hf", "deepseek"]

INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "weights.safetensors")
PART = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


@dataclass(frozen=True)
class Layout:
    """A checkpoint's files and what they hold; `absent`: tensors that the index places in files that are not there -> the file."""

    folder: Path
    files: tuple[SafetensorsFile, ...]
    naming: Naming
    sources: dict[str, Source]
    absent: dict[str, str]


def find(path: Path, *, partial: bool = False) -> Layout:
    """The layout of a checkpoint: a .safetensors file, an index file, or a folder. Reads headers only. SpecError for an index
    that names absent files, or (partial) nothing but such.
    """
    if path.is_dir():
        try:
            return _find_in_folder(path, partial)
        except OSError as error:
            raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    if path.name.endswith(".index.json"):
        return _layout(path.parent, *_open_index(path, partial))
    if path.exists() and path.suffix != ".safetensors":
        raise SpecError(f"{path} is no checkpoint; expected a .safetensors file or a folder with one")
    return _layout(path.parent, [open_file(path)])


def _find_in_folder(folder: Path, partial: bool) -> Layout:
    parts = [p for p in folder.iterdir() if PART.fullmatch(p.name)]
    single = [folder / name for name in SINGLE if (folder / name).exists()]
    index = [folder / INDEX] if (folder / INDEX).exists() else []
    if index and single:  # mlx-lm writes an index even of one file
        with where(f"while reading {index[0]}"):
            named = set(_read_index(index[0])[0].values())
        single = [p for p in single if p.name not in named]
        if partial and single and not any((folder / name).exists() for name in named):
            index = []  # left beside the file that its shards were merged into
    found = [p.name for p in index + single] + ["model{rank}-mp{world}.safetensors"] * bool(parts)
    if len(found) > 1:
        raise SpecError(f"{folder} holds {' and '.join(found)}; name the file that is meant")
    if index:
        return _layout(folder, *_open_index(index[0], partial))
    if parts:
        return _layout(folder, _open_parts(parts))
    if single:
        return _layout(folder, [open_file(single[0])])
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    looked = f"expected {INDEX}, {', '.join(SINGLE)} or model{{rank}}-mp{{world}}.safetensors"
    raise SpecError(f"{folder} holds no checkpoint; {looked}; it has {', '.join(others[:5]) or 'none'}")


def _layout(folder: Path, files: list[SafetensorsFile], absent: dict[str, str] | None = None) -> Layout:
    deepseek = looks_like_deepseek(name for f in files for name in f)
    part = PART.fullmatch(files[0].path.name)
    if deepseek and part and int(part[2]) != len(files):
        raise SpecError(f"{files[0].path} is one of {part[2]} parts; name their folder")
    sources = dict(deepseek_sources(files) if deepseek else hf_sources(files))
    return Layout(folder, tuple(files), "deepseek" if deepseek else "hf", sources, absent or {})


def _open_index(path: Path, partial: bool) -> tuple[list[SafetensorsFile], dict[str, str]]:
    """The shards of an index that are there, checked against it both ways; and what it places in those that are not."""
    with where(f"while reading {path}"):
        weight_map, total_size = _read_index(path)
        shards = sorted(set(weight_map.values()))
        absent = [s for s in shards if not (path.parent / s).exists()]
        there = [s for s in shards if s not in absent]
        require(there if partial else not absent, f"{len(absent)} of {len(shards)} shards are missing: {_some(absent)}")
        _check_unlisted(path.parent, set(shards))
        files = [open_file(path.parent / shard) for shard in there]
        lost = {name: shard for name, shard in weight_map.items() if shard in absent}
        _check_index({n: s for n, s in weight_map.items() if n not in lost}, files)
        _check_total(None if lost else total_size, files)
    return files, lost


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    try:
        index = parse_json(path.read_bytes())
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    ok = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    require(ok and weight_map, "expected an object with a non-empty weight_map of tensor -> shard")
    assert isinstance(weight_map, dict)
    for shard in set(weight_map.values()):
        plain = Path(shard).name == shard and shard.endswith(".safetensors")
        require(plain, f"weight_map names {shard!r}; expected a .safetensors file of the same folder")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    require(total is None or type(total) in (int, float), f"total_size is {total!r}; expected a number")
    return weight_map, total


def _check_unlisted(folder: Path, shards: set[str]) -> None:
    """A shard lying beside its numbered siblings but absent from the index would be dropped without
    a word.
    """
    number = re.compile(r"-\d+-of-")  # model-00002-of-00163.safetensors
    families = {number.sub("-of-", s) for s in shards if number.search(s)}
    beside = {p.name for p in folder.iterdir()} - shards
    lost = sorted(name for name in beside if number.search(name) and number.sub("-of-", name) in families)
    require(not lost, f"shards that the index does not list: {_some(lost)}")


def _check_index(weight_map: dict[str, str], files: list[SafetensorsFile]) -> None:
    held = {name: f.path.name for f in files for name in f}
    missing = [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in held]
    require(not missing, f"tensors of the index that its shards lack: {_some(missing)}")
    for f in files:
        for name in f:
            listed, here = weight_map.get(name), f.path.name
            require(listed is not None, f"tensor {name!r} of {here} is not in the index")
            require(listed == here, f"tensor {name!r} is in {here}, but the index says {listed}")


def _check_total(total: float | None, files: list[SafetensorsFile]) -> None:
    """total_size counts the tensors' bytes (transformers) or the shards' with their headers (other
    writers).
    """
    data = sum(t.nbytes for f in files for t in f.header.values())
    whole = sum(f.file_bytes for f in files)
    ok = total is None or total in (data, whole)
    require(ok, f"total_size is {total}; expected {data} (the tensors' bytes) or {whole} (the shards')")


def _open_parts(paths: list[Path]) -> list[SafetensorsFile]:
    """model{0..world-1}-mp{world}.safetensors in rank order."""
    ranks = {(int(m[2]), int(m[1])): p for p in paths if (m := PART.fullmatch(p.name))}
    worlds = sorted({world for world, _ in ranks})
    require(len(worlds) == 1, f"{paths[0].parent} mixes parts of mp {' and mp '.join(map(str, worlds))}")
    absent = [f"model{r}-mp{worlds[0]}.safetensors" for r in range(worlds[0]) if (worlds[0], r) not in ranks]
    require(
        not absent,
        f"{paths[0].parent}: {len(absent)} of {worlds[0]} parts are missing: {_some(absent)}",
    )
    return [open_file(ranks[worlds[0], r]) for r in range(worlds[0])]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises SpecError naming the file."""
    with where(f"while reading {path}"):
        try:
            value = parse_json(path.read_bytes())
        except OSError as error:
            raise SpecError(f"cannot be read: {error.strerror}") from error
        require(isinstance(value, dict), f"holds {json.dumps(value):.40}; expected an object")
        assert isinstance(value, dict)
        return value
