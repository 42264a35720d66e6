"""Safetensors files made and read with struct and json alone: the oracle for our reader and writer.

Nothing here uses the code under test, so a mistake shared by our reader and our writer still shows.
"""

import json
import struct
from math import prod
from pathlib import Path

SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
SIZE |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header, data=b"", *, length=None):
    """header: a dict, or the header's text as bytes; length: a lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def make_file(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, bytes)}, laid out in the given order."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (dtype, shape, raw) in tensors.items():
        assert len(raw) == prod(shape) * SIZE[dtype]
        header[name] = entry(dtype, list(shape), len(data), len(data) + len(raw))
        data += raw
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_bytes(header, data))
    return path


def parse_file(path):
    """{name: (dtype, shape, bytes)} and the metadata of a well-formed file."""
    raw = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    metadata = header.pop("__metadata__", None)
    data = raw[8 + n :]
    return {
        name: (t["dtype"], tuple(t["shape"]), data[slice(*t["data_offsets"])]) for name, t in header.items()
    }, metadata


def f32(*values):
    return struct.pack(f"<{len(values)}f", *values)
