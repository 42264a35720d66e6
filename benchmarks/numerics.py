"""Casts and quantisers against ml_dtypes' casts, in the same run: `python benchmarks/numerics.py`.

One thread, 4 Mi elements. Each candidate and its rival take turns, the best of each counts, because a shared machine
swings by a factor of two between minutes; ratios hold better than seconds.
"""

import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from refimpl.layers.numerics.formats import BF16, E4M3, E5M2, FP16, Format, decode, encode, to_bf16
from refimpl.layers.numerics.quantisation import quantize

N, TURNS = 1 << 22, 30
Run = Callable[[], object]


def best(*runs: Run) -> list[float]:
    """Least seconds of each, taken in turns, in this order and the reverse."""
    least = [float("inf")] * len(runs)
    for turn in range(TURNS):
        for i, run in list(enumerate(runs))[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def compare(what: str, rival: str, theirs: Run, ours: Run, goal: str = "") -> None:
    """One line: elements per second of both, and the ratio."""
    t, o = best(theirs, ours)
    print(f"{what:34} {rival:30} {N / t / 1e9:6.3f} {N / o / 1e9:6.3f} Gelem/s {t / o:6.2f} x  {goal}", flush=True)


def casts(fmt: Format, x: np.ndarray, goals: tuple[str, str]) -> None:
    """Encode and decode against `astype` of the format's dtype."""
    codes = encode(x, fmt, overflow="overflow")
    typed = codes.view(fmt.dtype)
    name = fmt.dtype.name
    compare(
        f"encode {fmt.name}",
        f"astype({name})",
        lambda: x.astype(fmt.dtype),
        lambda: encode(x, fmt, overflow="overflow"),
        goals[0],
    )
    compare(
        f"decode {fmt.name}",
        f"{name}.astype(float32)",
        lambda: typed.astype(np.float32),
        lambda: decode(codes, fmt),
        goals[1],
    )


def tiles(x: np.ndarray) -> None:
    """Quantise and dequantise a matrix, against doing the casts inside with ml_dtypes on whole arrays."""
    x = x.reshape(4096, 1024)

    def rival(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tiled = x.reshape(4096, 8, 128)
        s = np.maximum(np.abs(tiled).max(-1, keepdims=True), np.float32(1e-4)) / np.float32(448)
        return (tiled / s).astype(ml_dtypes.float8_e4m3fn), s

    codes, s = rival(x)
    q = quantize(x, (1, 128))
    compare("quantize 1 x 128", "the same, whole arrays", lambda: rival(x), lambda: quantize(x, (1, 128)))
    compare("dequantize 1 x 128", "the same, whole arrays", lambda: codes.astype(np.float32) * s, q.dequantize)
    compare("quantize 128 x 128", "1 x 128, whole arrays", lambda: rival(x), lambda: quantize(x, (128, 128)))
    compare("requantize 1 x 128 to 128 x 1", "1 x 128, whole arrays", lambda: rival(x), lambda: q.requantize((128, 1)))


def main() -> None:
    """Print the table."""
    x = (np.random.default_rng(0).normal(size=N) * 30).astype(np.float32)
    print(f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}; {N} elements, best of {TURNS}")
    print(f"{'':34} {'rival':30} {'theirs':>6} {'ours':>6}")
    casts(E4M3, x, ("asked: 3.5", "asked: 8"))
    casts(E5M2, x, ("asked: 3.5", "asked: 8"))
    casts(BF16, x, ("asked: 1", "asked: 1"))
    casts(FP16, x, ("", ""))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    compare("to_bf16", "astype twice", lambda: x.astype(bf16).astype(np.float32), lambda: to_bf16(x), "asked: 1")
    tiles(x)


if __name__ == "__main__":
    main()
