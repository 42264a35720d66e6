"""Write a trace for `refimpl diff` from inside any program. One file, NumPy only: paste it beside your model.

In the model, around what a tap is (docs/taps.md names them all); it returns the array, and without a recording does nothing:

    from refimpl_tap import recording, tap
    h = tap("L3/attn_norm", norm(x))
    tap("L3/router.ids", ids)

Around one run of the case's tokens, without a cache:

    with recording("out.safetensors", "path/to/case", producer="my port 1.0"):
        model(tokens)

In a program of several ranks (torch.distributed) each writes `rank-R-of-N.safetensors` into the folder `out`; where ranks hold
parts of a tap, say so: dims={"fwd/L3/mla.q": "B S H@ranks Dn+Dr"}, and with parallel={"rank": 3, "axes": {"tp": [1, 2],
"dp": [1, 2]}} which axes of ranks there are.

Arrays of NumPy, torch, MLX, JAX and CuPy are taken as they are, each in its own dtype, bfloat16 too. The file appears whole, when
the block has ended well. Then: refimpl diff path/to/case out.safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Raw", "Recording", "digest", "file_of", "parallel", "raw", "recording", "tap"]

_WIDTHS = {"bool": "BOOL", "int": "I", "uint": "U", "float": "F"}
_PHASE = re.compile(r"(fwd|bwd|dec\d+|upd|grad)/")
_active: list[Recording] = []  # no context variable: engines run their model in threads of their own


class Raw(NamedTuple):
    """An array as the safetensors format holds it: dtype ("BF16", "F32", "I64", ...), shape, bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def raw(x: Any) -> Raw:
    """The bits of an array of any library. TypeError for what is none, and for dtypes that NumPy has no counterpart of."""
    libraries = {base.__module__.partition(".")[0] for base in type(x).__mro__}
    bf16 = "bfloat16" in str(getattr(x, "dtype", ""))
    if "torch" in libraries:
        x = x.to_local() if hasattr(x, "to_local") else x  # of a DTensor what this rank holds
        x = x.detach().cpu().contiguous()
        x = (x.view(sys.modules["torch"].int16) if bf16 else x).numpy()
    elif "mlx" in libraries:
        x = np.array(x.view(sys.modules["mlx.core"].uint16) if bf16 else x)
    elif "cupy" in libraries:
        x = x.get()
    a = np.ascontiguousarray(x).reshape(np.shape(x))  # which makes a scalar an array of one axis
    if bf16:
        return Raw("BF16", a.shape, a.tobytes())
    found = re.fullmatch(r"(bool|u?int|float)(\d*)", a.dtype.name)
    if not found or a.dtype.name == "float128":
        raise TypeError(f"{type(x).__name__} of dtype {a.dtype}: a tap is an array of numbers")
    return Raw(_WIDTHS[found[1]] + found[2], a.shape, a.astype(a.dtype.newbyteorder("<")).tobytes())


def digest(x: Any) -> str:
    """sha256 of a weight's shape and float32 values, whatever dtype it is held in."""
    r = x if isinstance(x, Raw) else raw(x)
    if r.dtype == "BF16":
        values = (np.frombuffer(r.data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(r.data, _numpy(r.dtype)).astype("<f4")
    return "sha256:" + hashlib.sha256(str(tuple(r.shape)).encode() + values.tobytes()).hexdigest()


def _numpy(dtype: str) -> str:
    return "|b1" if dtype == "BOOL" else f"<{dtype[0].lower()}{int(dtype[1:]) // 8}"


class Recording:
    """The taps of one run, and what was run: `header` holds the keys of the trace header that docs/taps.md lists."""

    def __init__(self, **header: Any) -> None:
        self.header = header
        self.taps: dict[str, Raw] = {}
        self.again: dict[str, None] = {}

    def tap(self, name: str, x: Any) -> None:
        """Keep a copy of an array under its tap name; the phase "fwd/" may be left out. The first of a name is kept."""
        name = name if _PHASE.match(name) else f"fwd/{name}"
        if name in self.taps:
            self.again[name] = None
        else:
            self.taps[name] = raw(x)

    def write(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the trace, whole or not at all -> its file."""
        twice = [f"{', '.join(self.again)}: recorded more than once, the first is kept"] if self.again else []
        notes = "; ".join(filter(None, [self.header.get("notes", ""), *twice]))
        head = {"schema": "refimpl-trace/1", "expected": sorted(self.taps), **self.header, "notes": notes}
        file = file_of(path, self.header.get("parallel") or {})
        file.parent.mkdir(exist_ok=True)
        _write(file, self.taps, json.dumps(head, sort_keys=True))
        return file


def parallel() -> dict[str, Any]:
    """The header's `parallel` in a process of several joined by torch.distributed, of one axis, `ranks`; {} in any other."""
    joined = getattr(sys.modules.get("torch"), "distributed", None)
    if joined is None or not (joined.is_available() and joined.is_initialized()) or joined.get_world_size() == 1:
        return {}
    rank, world = joined.get_rank(), joined.get_world_size()
    return {"rank": rank, "ranks": world, "axes": {"ranks": [rank, world]}}


def file_of(path: str | os.PathLike[str], parallel: Mapping[str, Any]) -> pathlib.Path:
    """The path itself; of several ranks, a file of its own in the folder of that name."""
    path = pathlib.Path(path)
    if not parallel:
        return path
    total = parallel.get("ranks") or math.prod(size for _, size in parallel["axes"].values())
    return path.with_suffix("") / f"rank-{parallel['rank']}-of-{total}.safetensors"


@contextmanager
def recording(
    out: str | os.PathLike[str],
    case: str | os.PathLike[str],
    *,
    producer: str = "unnamed",
    storage: str = "float32",
    weights: Mapping[str, Any] | None = None,
    layouts: Mapping[str, str] | None = None,
    **header: Any,
) -> Iterator[Recording]:
    """Record what `tap` is told while the block runs and write it to `out`.

    storage: the dtype of activations. weights: checkpoint name -> array that the model holds; without them the digests are
    those of the case's own files, as if they had been loaded well. layouts: {"rope": "half"} where rotated channels are
    not interleaved, {"mla": "absorbed"}. header: any other key of the trace header.
    """
    folder = pathlib.Path(case)
    run = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    held = _weights_of(folder) if weights is None else weights.items()
    filled = {
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        **{k: run[k] for k in ("tokens", "positions", "valid") if k in run},
        "producer": {"name": producer},
        "precision": {"storage": storage, "accumulate": "float32"},
        "weights": {name: digest(x) for name, x in held},
        "layouts": dict(layouts or {}),
        "parallel": parallel(),
    }
    made = Recording(**(filled | header))
    _active.append(made)
    try:
        yield made
    finally:
        _active.remove(made)
    made.write(out)


def tap(name: str, x: Any) -> Any:
    """x, of which every recording that is going on keeps a copy as `name`: "L3/router.ids", "logits"."""
    for made in _active:
        made.tap(name, x)
    return x


def _weights_of(folder: pathlib.Path) -> Iterable[tuple[str, Raw]]:
    """The tensors of a case's files, as they are stored. ValueError for codes that a scale belongs to."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [n for n in ("weights.safetensors", "model.safetensors") if (folder / n).is_file()][:1]
    for name in names:
        data = (folder / name).read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        for key, t in json.loads(data[8 : 8 + n]).items():
            if key == "__metadata__":
                continue
            if t["dtype"].startswith("F8") or key.endswith("_scale_inv"):
                raise ValueError(f"{key} is stored in {t['dtype']} with scales: pass weights={{name: values}}")
            begin, end = t["data_offsets"]
            yield key, Raw(t["dtype"], tuple(t["shape"]), data[8 + n + begin : 8 + n + end])


def _write(path: pathlib.Path, tensors: Mapping[str, Raw], trace: str) -> None:
    """A safetensors file; the widest dtypes first, so that each tensor is aligned to its own size."""
    order = sorted(tensors, key=lambda name: (-int(re.sub(r"\D", "", tensors[name].dtype) or 8), name))
    fields: dict[str, Any] = {"__metadata__": {"trace": trace}}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + len(t.data)
        fields[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                f.write(tensors[name].data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
