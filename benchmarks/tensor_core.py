"""The tensor-core emulator against SGEMM and against mmasim 2.1.1, in the same run: `python benchmarks/tensor_core.py`.

    pip install --no-deps mmasim==2.1.1 && pip install torch     # the second comparison only

M, K, N = 512, 512, 2048, one thread (OPENBLAS_NUM_THREADS=1), Gaussian data. Candidates take turns, the best of each
counts: a shared machine swings by a factor of two, so ratios are the result. Goals: at most 60 x SGEMM's time, at least 50 x
mmasim's speed per multiply-add; exits 1 if one is missed. mmasim is vectorised over dot products (torch, one thread,
batches of the size that suits it best), on fewer of them; where it is not installed its goal counts as missed.
"""

from __future__ import annotations

import pathlib
import runpy
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

runpy.run_path(str(pathlib.Path(__file__).parents[1] / "conftest.py"))  # time this tree, installed or not

from refimpl.layers.numerics import tensor_core_matmul  # noqa: E402
from refimpl.layers.numerics.tensor_cores import text as tensor_core  # noqa: E402
from refimpl.layers.numerics.tensor_cores.machines import INPUTS, carrier  # noqa: E402

M, K, N, TURNS = 512, 512, 2048, 12
TARGETS = ["hopper e4m3", "hopper e5m2", "ada e4m3", "blackwell e4m3", "hopper bf16", "hopper f16", "hopper tf32"]
SLOWER_THAN_SGEMM, FASTER_THAN_MMASIM = 60, 50
Run = Callable[[], object]


def best(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Least seconds of each, taken in turns."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def operands() -> tuple[Any, Any]:
    """Gaussian x (M, K), w (N, K)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(N, K)).astype(np.float32)


def emulate(target: str, x: Any, w: Any) -> Run:
    """The fast form on x, w in the target's format."""
    arch, fmt = target.split()
    f = INPUTS[fmt]
    a, b = (v.astype(f.dtype).view(carrier(f)) for v in (x, w))
    c = np.zeros((len(a), len(b)), np.float32)
    return lambda: tensor_core_matmul(a, b, c, arch=arch, fmt=fmt)


def mmasim(x: Any, w: Any, ours: Run) -> tuple[float, float] | None:
    """Multiply-adds per second of mmasim's Hopper E4M3 and of ours, in turns; None without mmasim.

    mmasim computes the first outputs only, in batches of the size that suits it best; they must be ours to the bit.
    """
    try:
        import torch
        from mmasim.nv_ptx import WGMMA
    except ImportError:
        return None
    torch.set_num_threads(1)
    op, theirs, least = WGMMA("Hopper", "m64n8k32.f32.e4m3.e4m3"), 0.0, float("inf")
    for dots in (512, 2048, 8192):
        rows, columns = np.divmod(np.arange(dots), N)
        a, b = (v.astype(INPUTS["e4m3"].dtype).view(np.uint8) for v in (x[rows], w[columns]))
        left, right = (torch.from_numpy(v).view(torch.float8_e4m3fn) for v in (a, b))
        seconds = best({"mmasim": lambda p=left, q=right, n=dots: op.dpa(p, q, torch.zeros(n)), "ours": ours}, 4)
        same = tensor_core.tensor_core_matmul(a[:, None], b[:, None], np.float32(0), arch="hopper", fmt="e4m3")[:, 0, 0]
        assert np.array_equal(op.dpa(left, right, torch.zeros(dots)).numpy(), same), "mmasim gives other bits"
        theirs, least = max(theirs, dots * K / seconds["mmasim"]), min(least, seconds["ours"])
    return theirs, M * K * N / least


def peak_megabytes(run: Run) -> float:
    """Largest memory that NumPy held beside the operands."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main() -> int:
    """0 if both goals are met."""
    x, w = operands()
    right = np.ascontiguousarray(w.T)
    runs: dict[str, Run] = {"SGEMM": lambda: x @ right} | {t: emulate(t, x, w) for t in TARGETS}
    least, work = best(runs, TURNS), M * K * N
    print(f"numpy {np.__version__}; M {M}, K {K}, N {N}; best of {TURNS}, in turns")
    for name, seconds in least.items():
        print(f"{name:16} {work / seconds / 1e9:7.3f} GMAC/s  {seconds / least['SGEMM']:7.1f} x SGEMM's time")
    print(
        f"peak memory, result included: {peak_megabytes(runs['hopper e4m3']):.1f} MB of which the result has {M * N * 4 / 1e6:.1f}"
    )
    slower, speeds = least["hopper e4m3"] / least["SGEMM"], mmasim(x, w, runs["hopper e4m3"])
    met = [slower <= SLOWER_THAN_SGEMM]
    print(f"{'met' if met[0] else 'MISSED'}: {slower:.1f} x SGEMM's time, goal at most {SLOWER_THAN_SGEMM}")
    if speeds is None:
        print("MISSED: mmasim or torch is not installed")
        return 1
    theirs, ours = speeds
    met.append(ours / theirs >= FASTER_THAN_MMASIM)
    word = "met" if met[1] else "MISSED"
    print(f"{word}: {ours / theirs:.0f} x mmasim's {theirs / 1e6:.1f} MMAC/s, goal at least {FASTER_THAN_MMASIM}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
