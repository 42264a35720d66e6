"""Read the recorded cases in spec_tests/golden: config, weights by checkpoint name, arrays.

They lie in two folders, each a distribution of its own beside the package; where one was not installed, what needs it is skipped.
"""

import functools
import json
import pathlib

import numpy as np
import pytest

FOLDERS = [pathlib.Path(__file__).parent / name for name in ("models", "arithmetic")]


def file(name):
    """The path of a recorded file, such as "hf_tiny.json"."""
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    wanted = " ".join(f"deepseek-v3-refimpl-golden-{folder.name}" for folder in FOLDERS)
    return pytest.skip(f"golden/{name} is not here: pip install {wanted}", allow_module_level=True)


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
    """{key: array} of NAME.npz."""
    with np.load(file(f"{name}.npz")) as recorded:
        return dict(recorded)


@functools.cache
def case(name):
    """(config, weights, arrays) of a recorded case such as "hf_tiny"; share, do not change."""
    config = json.loads(file(f"{name}.json").read_text())
    return config, tensors(file(f"{name}.weights.safetensors")), arrays(name)
