"""benchmarks/hopper_check.py, which compares the emulator with a real Hopper GPU, works and can fail. Its result is not
tested here: that needs the GPU.
"""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "hopper_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="an installed wheel has no benchmarks")


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def script():
    spec = importlib.util.spec_from_file_location("hopper_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hopper_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_rehearsal_finds_every_output_equal(tmp_path):
    """Catches a script that rots because nobody here can run it: everything but the GPU's own calls is run."""
    done = run("--rehearse", "--dots", "1", "--side", "128", "--out", tmp_path / "report.md")
    assert done.returncode == 0, done.stderr
    assert "1,117,376 outputs that must be equal, 0 are not." in (tmp_path / "report.md").read_text()


def test_without_a_hopper_gpu_it_says_so_and_exits_2():
    """Catches success where nothing was checked."""
    done = run()
    assert done.returncode == 2 and "nothing was checked" in done.stderr


def test_one_wrong_bit_is_counted_and_explained(capsys):
    """Catches comparison by value, by tolerance, or of nothing."""
    check = script()
    a = np.full((64, 32), 0x38, np.uint8)
    c = np.zeros((64, 64), np.float32)
    right = check.Emulator().dot(a, a, c, block_m=64, promote=0)
    wrong = right.copy()
    wrong.view(np.uint32)[3, 5] ^= 1 << 10
    assert check.compare("right", right, right, (a, a, c)).wrong == 0
    row = check.compare("wrong", wrong, right, (a, a, c))
    assert row.wrong == 1 and "[3, 5]: 0x42000400, ours 0x42000000" in row.note
    assert "d[3, 5] on hopper e4m3" in capsys.readouterr().err
