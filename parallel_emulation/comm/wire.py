"""How an array travels: as bytes, with a description from which the receiver rebuilds it.

Every dtype that NumPy and ml_dtypes know goes the same way, so no engine has to understand bf16, FP8 or E8M0, and a
structured row (FP8 values, scales, expert numbers) is one message instead of three.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd import Array, SpecError, Tensor, require

_ALIGN = 64  # the payload of a message starts on a cache line, so that viewing it in its dtype costs nothing


def as_array(x: Any, what: str) -> Array:
    """The NumPy array to be moved; SpecError for a Tensor (its gradient would be lost) and for Python objects."""
    require(not isinstance(x, Tensor), f"{what}: a Tensor does not travel; send its .data, or use a primitive of duals")
    if not isinstance(x, np.ndarray):
        require(isinstance(x, np.generic | int | float | bool), f"{what}: {type(x).__name__} is not a NumPy array")
        x = np.asarray(x)
    if x.dtype.hasobject or not x.dtype.itemsize:
        raise SpecError(f"{what}: dtype {x.dtype} has no bytes to move")
    return x


def to_bytes(x: Array) -> Array:
    """x (*) -> its bytes (x.nbytes,) uint8, row-major; a view where x is contiguous."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def from_bytes(raw: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """raw (bytes,) uint8 -> the array of that dtype and shape, on the same memory."""
    return raw.view(dtype).reshape(shape)


def row_bytes(dtype: np.dtype[Any], row: tuple[int, ...]) -> int:
    """Bytes of one row of an array (M, *row)."""
    return dtype.itemsize * int(np.prod(row, dtype=np.int64))


def dtype_to_json(dtype: np.dtype[Any]) -> Any:
    """A dtype as JSON: '<f4', 'bfloat16', or the fields of a structured row (never a pickle)."""
    if dtype.fields is not None and dtype.names is not None:
        parts = [(name, *dtype.fields[name][:2]) for name in dtype.names]
        return {"size": dtype.itemsize, "fields": [[name, dtype_to_json(part), at] for name, part, at in parts]}
    if dtype.subdtype is not None:
        return {"of": dtype_to_json(dtype.subdtype[0]), "shape": list(dtype.shape)}
    return dtype.name if dtype.type.__module__ == "ml_dtypes" else dtype.str


def dtype_from_json(spec: Any) -> np.dtype[Any]:
    """The inverse of dtype_to_json."""
    if isinstance(spec, str):
        return np.dtype(getattr(ml_dtypes, spec, spec))
    if "of" in spec:
        return np.dtype((dtype_from_json(spec["of"]), tuple(spec["shape"])))
    names, parts, offsets = zip(*spec["fields"], strict=True)
    formats = [dtype_from_json(part) for part in parts]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": spec["size"]})


def pack(x: Array, label: str) -> Array:
    """One point-to-point message (bytes,) uint8: length of the header, header as JSON, padding, payload."""
    head = json.dumps([label, dtype_to_json(x.dtype), x.shape]).encode()
    start = -(-(8 + len(head)) // _ALIGN) * _ALIGN
    message = np.zeros(start + x.nbytes, np.uint8)
    message[: 8 + len(head)] = np.frombuffer(struct.pack("<Q", len(head)) + head, np.uint8)
    message[start:] = to_bytes(x)
    return message


def unpack(message: Array) -> tuple[Array, str]:
    """A packed message -> (array on the message's memory, label)."""
    size = int(message[:8].view("<u8")[0])
    label, dtype, shape = json.loads(message[8 : 8 + size].tobytes())
    start = -(-(8 + size) // _ALIGN) * _ALIGN
    return from_bytes(message[start:], dtype_from_json(dtype), tuple(shape)), label


def digest(tree: Any) -> str:
    """Fingerprint of a result (arrays, numbers, strings, None, nested in lists, tuples, dicts): equal iff same bits.

    Lists and tuples count as the same; padding inside structured rows does not count.
    """
    state = hashlib.blake2b(digest_size=12)
    _feed(state, tree)
    return state.hexdigest()


def _feed(state: hashlib.blake2b, tree: Any) -> None:
    tree = tree.data if isinstance(tree, Tensor) else tree
    if isinstance(tree, Mapping):
        state.update(b"{%d" % len(tree))
        for key in sorted(tree):
            state.update(repr(key).encode())
            _feed(state, tree[key])
    elif isinstance(tree, list | tuple):
        state.update(b"[%d" % len(tree))
        for item in tree:
            _feed(state, item)
    elif isinstance(tree, np.ndarray | np.generic):
        _feed_array(state, np.asarray(tree))
    elif tree is None or isinstance(tree, str | int | float | bool):
        state.update(f"{type(tree).__name__}:{tree!r};".encode())
    else:
        raise SpecError(f"a rank's result may hold arrays, numbers and strings, not {type(tree).__name__}")


def _feed_array(state: hashlib.blake2b, x: Array) -> None:
    state.update(json.dumps([dtype_to_json(x.dtype), x.shape]).encode())
    if x.dtype.names is None:
        state.update(to_bytes(x).tobytes())
    else:
        for name in x.dtype.names:
            _feed_array(state, x[name])
