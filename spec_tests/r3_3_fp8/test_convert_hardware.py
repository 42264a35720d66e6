"""The converter of measured GPU outputs, on files laid out as the public repository has them."""

import subprocess
import sys

import numpy as np
import pytest

from refimpl.spec_tests import convert_hardware as convert
from refimpl.spec_tests.oracles.tensor_core import DTYPES


def layout(folder, rng, n=3):
    """Random data, and the text files that hold them; {name: array} as the converter should find it."""
    arrays = {}
    for gpu, fmt in convert.names():
        where = folder / convert.GPUS[gpu] / convert.FOLDERS[fmt]
        where.mkdir(parents=True)
        depth = convert.PRODUCTS[gpu] if "f" in fmt else 32
        dtype = np.dtype(DTYPES[fmt.replace("fp16", "f16")])
        for x in "ab":
            values = rng.normal(size=(n, depth)).astype(np.float32).astype(dtype)
            lines = [" ".join(f"{v:08x}" for v in row.view(np.uint32)) for row in values.astype(np.float32)]
            (where / f"{x}_{convert.GPUS[gpu]}_{convert.FOLDERS[fmt]}.txt").write_text("\n".join(lines) + "\n")
            arrays[f"{gpu}_{fmt}_{x}"] = values.view(f"u{dtype.itemsize}")
        for x in "cd":
            bits = rng.normal(size=n).astype(np.float32).view(np.uint32)
            (where / f"{x}_{convert.GPUS[gpu]}_fp32.txt").write_text("".join(f"{v:032b}\r\n" for v in bits))
            unused = x == "c" and gpu == "h100" and fmt.startswith("e")
            arrays[f"{gpu}_{fmt}_{x}"] = np.zeros_like(bits) if unused else bits
    return arrays


def test_the_command_writes_what_the_tests_read(tmp_path):
    """Catches words read as numbers, codes cast twice, the unused accumulators of H100 FP8, and half-written files."""
    expected = layout(tmp_path / "model_validation", np.random.default_rng(0))
    out = tmp_path / "vectors.npz"
    done = subprocess.run(
        [sys.executable, "-m", "refimpl.spec_tests.convert_hardware", tmp_path / "model_validation", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"REFIMPL_HARDWARE_VECTORS={out}" in done.stdout
    with np.load(out) as found:
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_values_of_another_format_are_refused(tmp_path):
    """Catches BF16 files taken for E4M3: the cast would round without a word."""
    layout(tmp_path, np.random.default_rng(1))
    (tmp_path / "H100" / "E4M3" / "a_H100_E4M3.txt").write_text(f"{np.float32(1.03125).view(np.uint32):08x}\n" * 96)
    with pytest.raises(SystemExit, match="not exact in e4m3"):
        convert.convert(tmp_path)


def test_files_of_different_length_are_refused(tmp_path):
    """Catches a truncated download."""
    layout(tmp_path, np.random.default_rng(2))
    (tmp_path / "L40S" / "bf16" / "d_L40S_fp32.txt").write_text("0" * 32)
    with pytest.raises(SystemExit, match="rows of a, b, c, d differ"):
        convert.convert(tmp_path)
