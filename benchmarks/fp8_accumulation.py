"""How far Hopper's FP8 accumulation is from exact at K = 4096, without and with promotion every N_C terms (R 3.3.2).

    python benchmarks/fp8_accumulation.py [docs/fp8_accumulation.svg]

Two kinds of random matrices. Gaussian: sums cancel; the error is given relative to the root mean square of the exact result
(rms and largest), and for single elements above a tenth of it. Uniform in [0, 1): nothing cancels, so that the bits which the
tensor core drops below its 13 fraction bits add up in one direction. Codes and scales are those of one scale per row.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np

from refimpl.layers.numerics.quantisation import Quantized, quantize
from refimpl.layers.numerics.tensor_cores import scaled_gemm
from refimpl.plotting import drawn

K = 4096


def operands(kind: str, m: int = 64, n: int = 256, seed: int = 0) -> tuple[Quantized, Quantized]:
    """a (m, K) and b (n, K), one scale per row, so that a chain may run over all of K."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal if kind == "gaussian" else rng.random
    a, b = (quantize(draw((rows, K)).astype(np.float32), (1, K), name=name) for rows, name in ((m, "a"), (n, "b")))
    return a, b


def errors(kind: str) -> dict[int, tuple[float, float, float]]:
    """Promotion interval -> rms and largest error over the rms of the exact result, largest relative error of an element."""
    a, b = operands(kind)
    exact = scaled_gemm(a, b, mode="exact")
    size, found = float(np.sqrt((exact**2).mean())), {}
    for interval in (32, 64, 128, 256, 512, 1024, K):
        off = np.abs(scaled_gemm(a, b, mode="deepgemm_sm90", interval=interval) - exact)
        sizeable = np.abs(exact) > 0.1 * size
        rms = float(np.sqrt((off**2).mean()))
        found[interval] = rms / size, float(off.max()) / size, float((off / np.abs(exact))[sizeable].max())
    return found


def draw(figure: Any, found: dict[str, dict[int, tuple[float, float, float]]]) -> None:
    """Error over promotion interval."""
    axes = figure.subplots()
    for kind, rows in found.items():
        for column, label in enumerate(("rms", "largest", "one element")):
            axes.loglog(list(rows), [100 * row[column] for row in rows.values()], marker="o", label=f"{kind}, {label}")
    axes.axhline(2, color="grey", linewidth=0.8, label="R 3.3.2, never promoted")
    axes.set(xlabel=f"promotion interval (K = {K}: never)", ylabel="error, %", title="Hopper FP8 accumulation")
    axes.legend(fontsize=7, handlelength=4)


if __name__ == "__main__":
    found = {kind: errors(kind) for kind in ("gaussian", "uniform")}
    for kind, rows in found.items():
        print(f"{kind + ', K = 4096':<24}{'rms':>10}{'largest':>10}{'element':>10}")
        for interval, row in rows.items():
            name = f"promoted every {interval}" if interval < K else "never promoted"
            print(f"{name:<24}" + "".join(f"{x:>10.1e}" for x in row))
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_bytes(drawn(lambda f: draw(f, found), size=(6, 4), salt="accumulation"))
