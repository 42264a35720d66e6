"""Read the recorded cases in spec_tests/golden: config, weights by checkpoint name, arrays."""

import functools
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def tensors(path):
    """{name: float32 array} of a safetensors file: 8 bytes of header length, a JSON header, raw little-endian data."""
    data = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, found = json.loads(data[8:start]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32", f"{name} is {entry['dtype']}"
            first, last = entry["data_offsets"]
            found[name] = np.frombuffer(data[start + first : start + last], "<f4").reshape(entry["shape"])
    return found


@functools.cache
def arrays(name):
    """{key: array} of golden/NAME.npz."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def case(name):
    """(config, weights, arrays) of a recorded case such as "hf_tiny"; share, do not change."""
    config = json.loads((FOLDER / f"{name}.json").read_text())
    return config, tensors(FOLDER / f"{name}.weights.safetensors"), arrays(name)
