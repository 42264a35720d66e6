"""Make the file of measured GPU outputs that r3_3_fp8/test_tensor_core_hardware.py reads.

    python -m refimpl.spec_tests.convert_hardware MODEL_VALIDATION OUT.npz

MODEL_VALIDATION is the folder of that name in north-numerical-computing/MATLAB-tensor-core (commit b12b5a7, BSD-2),
which holds GPU/FORMAT/{a,b}_GPU_FORMAT.txt, float32 values as hexadecimal words, K per row; and {c,d}_GPU_fp32.txt, one
float32 per line as 32 binary digits. No value is changed: inputs become codes of their format, and a value that the
format does not hold is an error.
"""

import pathlib
import re
import sys

import numpy as np

from refimpl.checkpoint import Transaction
from refimpl.spec_tests.oracles.tensor_core import DTYPES

GPUS = {"h100": "H100", "l40s": "L40S", "ada": "Ada", "b200": "B200"}
FOLDERS = {"e4m3": "E4M3", "e5m2": "E5M2", "bf16": "bf16", "fp16": "fp16"}
PRODUCTS = {"l40s": 8, "ada": 8, "h100": 16, "b200": 16}  # bf16 and fp16; FP8 has 32


def names():
    """(gpu, format) of what is converted: B200's FP8 was measured with an emulated instruction."""
    return [(g, f) for g in GPUS for f in FOLDERS if g != "b200" or f in ("bf16", "fp16")]


def convert(folder):
    """{gpu_format_x: array}: codes a, b (n, K), and c, d as uint32 patterns (n,)."""
    arrays = {}
    for gpu, fmt in names():
        where, key = pathlib.Path(folder) / GPUS[gpu] / FOLDERS[fmt], f"{gpu}_{fmt}"
        depth = PRODUCTS[gpu] if fmt in ("bf16", "fp16") else 32
        for x in "ab":
            arrays[f"{key}_{x}"] = codes(words(where / f"{x}_{GPUS[gpu]}_{FOLDERS[fmt]}.txt"), fmt).reshape(-1, depth)
        arrays[f"{key}_d"] = words(where / f"d_{GPUS[gpu]}_fp32.txt")
        started_from_zero = gpu == "h100" and fmt in ("e4m3", "e5m2")  # the c file exists, and was not used
        d = arrays[f"{key}_d"]
        arrays[f"{key}_c"] = np.zeros_like(d) if started_from_zero else words(where / f"c_{GPUS[gpu]}_fp32.txt")
        lengths = {x: len(arrays[f"{key}_{x}"]) for x in "abcd"}
        if len(set(lengths.values())) != 1:
            raise SystemExit(f"{where}: rows of a, b, c, d differ: {lengths}")
    return arrays


def words(path):
    """float32 patterns of a text file: 32 binary digits, or up to 8 hexadecimal ones, separated by white space."""
    tokens = path.read_text().split()
    base = 2 if all(re.fullmatch("[01]{32}", t) for t in tokens) else 16
    return np.array([int(t, base) for t in tokens], np.uint32)


def codes(patterns, fmt):
    """float32 patterns as codes of a format that holds them exactly."""
    values = patterns.view(np.float32)
    dtype = np.dtype(DTYPES[fmt.replace("fp16", "f16")])
    found = values.astype(dtype)
    if not np.array_equal(found.astype(np.float32), values):
        raise SystemExit(f"a value is not exact in {fmt}: is this the right folder?")
    return found.view(f"u{dtype.itemsize}")


def main(arguments):
    """Command line."""
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    folder, out = arguments
    arrays = convert(folder)
    with Transaction() as files, files.new(pathlib.Path(out)) as f:
        np.savez_compressed(f, **arrays)
    print(
        f"{out}: {len(names())} sets of {len(arrays['h100_e4m3_d'])} rows. Now: export REFIMPL_HARDWARE_VECTORS={out}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
