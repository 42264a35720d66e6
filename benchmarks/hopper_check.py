"""Hold the emulator against a real H100 (or H200, GH200): `python benchmarks/hopper_check.py [--dots 3e7] [--out report.md]`.

    pip install -e . torch triton     # torch 2.11 and Triton 3.6 are the versions it was written for

What runs: the recorded vectors, accumulators included, and random and malicious operands of nine classes, through a Triton
`tl.dot` (wgmma for BLOCK_M 64, mma.sync for 16) and through torch._scaled_mm with and without fast accumulation; the
accumulation line of DeepSeek-V3's kernel.py, fused and not; its quantiser. At least 10^7 dot products of each kind. Every
output must be equal to the bit; the first that is not is explained by `why`. `--rehearse` runs the same on the emulator in
place of the GPU, which tests this script and nothing else.

Exit code: 0 if everything is equal, 1 if not, 2 if there is no Hopper GPU. The report goes to standard output, and to --out.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

runpy.run_path(str(pathlib.Path(__file__).parents[1] / "conftest.py"))  # this tree, installed or not

from refimpl.layers.numerics import Quantized, quantize, scaled_gemm, tensor_core_matmul, why  # noqa: E402
from refimpl.spec_tests import golden  # noqa: E402
from refimpl.spec_tests.cases.tensor_core import KINDS, as_bits, operands  # noqa: E402

SIDE = 1024  # outputs are computed SIDE x SIDE at a time
HOPPER = {"arch": "hopper", "fmt": "e4m3"}


@dataclass
class Row:
    """One line of the report. `must`: a mismatch here is a failure."""

    name: str
    outputs: int
    wrong: int
    must: bool = True
    note: str = ""

    def __str__(self) -> str:
        """As a row of a Markdown table."""
        return f"| {self.name} | {self.outputs:,} | {self.wrong:,} | {self.note} |"


class Emulator:
    """Stands in for the GPU in a rehearsal."""

    def __init__(self) -> None:
        self.instructions: dict[str, list[str]] = {}

    def facts(self) -> dict[str, str]:
        """No GPU's."""
        return {"device": "none: a rehearsal on the emulator"}

    def scaled_mm(self, a: Any, b: Any, *, fast: bool) -> Any:
        """One chain, or promoted every 128."""
        return promoted(a, b, a.shape[1] if fast else 128)

    def dot(self, a: Any, b: Any, c: Any, *, block_m: int, promote: int) -> Any:
        """wgmma or mma.sync by the block's height."""
        return expected_dot(a, b, c, block_m, promote)

    def gemm(self, a: Any, b: Any, sa: Any, sb: Any, *, block_m: int, fuse: bool) -> Any:
        """The mode that the block's height and fusion make."""
        return scaled_gemm(*quantised(a, b, sa, sb), mode=mode_of(block_m, fuse))

    def quantise(self, x: Any) -> tuple[Any, Any]:
        """IEEE division."""
        q = quantize(x)
        return q.codes, q.scales


def promoted(a: Any, b: Any, interval: int, c: Any = 0.0) -> Any:
    """A chain from zero per interval, added to c in float32."""
    total = np.broadcast_to(np.float32(c), (len(a), len(b)))
    for k in range(0, a.shape[1], interval):
        part = slice(k, k + interval)
        d = tensor_core_matmul(a[:, part], b[:, part], np.float32(0), **HOPPER)
        with np.errstate(over="ignore", invalid="ignore"):
            total = total + d
    return total


def expected_dot(a: Any, b: Any, c: Any, block_m: int, promote: int) -> Any:
    """What tl.dot should give: wgmma in one chain from c, or promoted; or mma.sync on FP16 in Triton's order of k."""
    if block_m == 64:
        return promoted(a, b, promote, c) if promote else tensor_core_matmul(a, b, c, **HOPPER)
    order = sorted(range(a.shape[1]), key=lambda k: (k // 32, k % 4 > 1))
    half = (x[:, order].view(golden_dtype()).astype(np.float16) for x in (a, b))
    return tensor_core_matmul(*half, c, arch="hopper", fmt="f16")


def golden_dtype() -> Any:
    """ml_dtypes' E4M3."""
    import ml_dtypes

    return ml_dtypes.float8_e4m3fn


def mode_of(block_m: int, fuse: bool) -> str:
    """The name of a kernel.py configuration."""
    if block_m < 64:
        return "triton_sm90_mma"
    return "triton_sm90_wgmma" if fuse else "triton_sm90_wgmma_unfused"


def quantised(a: Any, b: Any, sa: Any, sb: Any) -> tuple[Quantized, Quantized]:
    """Activations in 1 x 128, weights in 128 x 128."""
    return Quantized(a, sa, (1, 128), name="a"), Quantized(b, sb, (128, 128), name="b")


def compare(name: str, found: Any, expected: Any, inputs: Any = None, must: bool = True, payload: bool = True) -> Row:
    """Count unequal patterns; explain the first one where the inputs are a plain tensor-core product.

    Without `payload` one NaN is as good as another: an epilogue that multiplies may rewrite it.
    """
    if not payload:
        found = np.where(np.isnan(found) & np.isnan(expected), expected, found)
    wrong = np.argwhere(as_bits(found) != as_bits(expected))
    row = Row(name, found.size, len(wrong), must)
    if len(wrong):
        m, n = (int(i) for i in wrong[0])
        row.note = f"first [{m}, {n}]: {as_bits(found)[m, n]:#010x}, ours {as_bits(expected)[m, n]:#010x}"
        if inputs is not None:
            print(f"{name}: {row.note}\n{why(*inputs, m, n, **HOPPER)}\n", file=sys.stderr)
    print(row, flush=True)
    return row


def recorded(gpu: Any) -> Iterator[Row]:
    """The golden rows with their accumulators, 64 x 64 at a time: the diagonal is the recording."""
    for k in (32, 128, 512):
        z = golden.arrays("hopper_e4m3")
        a, b, c, d = (z[f"k{k}_{x}"] for x in "abcd")
        wrong = outputs = 0
        for i in range(0, len(a), 64):
            at = slice(min(i, len(a) - 64), min(i + 64, len(a)))  # the last block overlaps
            square = np.ascontiguousarray(np.broadcast_to(c[at].view(np.float32), (64, 64)))
            found = np.diagonal(as_bits(gpu.dot(a[at], b[at], square, block_m=64, promote=0)))
            wrong, outputs = wrong + int((found != d[at]).sum()), outputs + 64
        row = Row(f"recorded rows, K {k}, tl.dot with wgmma", outputs, wrong)
        print(row, flush=True)
        yield row


def random(gpu: Any, dots: float, side: int) -> Iterator[Row]:
    """Random and malicious operands, with accumulators: zero, ordinary, of all sizes, any bits."""
    rounds = max(1, round(dots / (len(KINDS) * 2 * side * side)))
    for kind in KINDS:
        for seed in range(rounds):
            rng = np.random.default_rng([seed, KINDS.index(kind)])
            for k in (32, 128):
                a, b, c = operands(rng, "e4m3", kind, side, side, k)
                found = gpu.dot(a, b, c, block_m=64, promote=0)
                yield compare(f"{kind}, K {k}, wgmma", found, tensor_core_matmul(a, b, c, **HOPPER), (a, b, c))
                if seed == 0:
                    found = gpu.dot(a, b, c, block_m=16, promote=0)
                    yield compare(f"{kind}, K {k}, mma.sync", found, expected_dot(a, b, c, 16, 0))
            if seed == 0:
                found = gpu.dot(a, b, c, block_m=64, promote=32)
                expected = expected_dot(a, b, c, 64, 32)
                yield compare(f"{kind}, K 128, promoted every 32", found, expected, must=False, payload=False)


def cublas(gpu: Any, dots: float, side: int) -> Iterator[Row]:
    """torch._scaled_mm; without fast accumulation the interval of promotion is cuBLAS's secret, so all are tried."""
    rounds = max(1, round(dots / (len(KINDS) * 3 * side * side)))
    for kind in KINDS:
        for seed in range(rounds):
            for k in (32, 64, 128):
                a, b, _ = operands(np.random.default_rng([seed, k]), "e4m3", kind, side, side, k)
                c = np.zeros((side, side), np.float32)
                found = gpu.scaled_mm(a, b, fast=True)
                yield compare(
                    f"{kind}, K {k}, _scaled_mm fast", found, tensor_core_matmul(a, b, c, **HOPPER), (a, b, c)
                )
    a, b, _ = operands(np.random.default_rng(0), "e4m3", "gauss", side, side, 4096)
    yield compare("gauss, K 4096, _scaled_mm fast", gpu.scaled_mm(a, b, fast=True), promoted(a, b, 4096))
    precise = gpu.scaled_mm(a, b, fast=False)
    for interval in (32, 64, 128, 256, 512, 1024):
        yield compare(
            f"K 4096, not fast, as if promoted every {interval}", precise, promoted(a, b, interval), must=False
        )


def kernels(gpu: Any, side: int) -> Iterator[Row]:
    """kernel.py's accumulation in its configurations, and its quantiser against IEEE division."""
    rng = np.random.default_rng(1)
    x, w = (rng.normal(size=(side, 1024)).astype(np.float32) for _ in "xw")
    a, b = quantize(x, name="a"), quantize(w, 128, name="b")
    for block_m, fuse in ((64, True), (64, False), (32, True), (16, True)):
        found = gpu.gemm(a.codes, b.codes, a.scales, b.scales, block_m=block_m, fuse=fuse)
        mode = mode_of(block_m, fuse)
        yield compare(f"kernel.py, BLOCK_M {block_m}, fusion {fuse}: {mode}", found, scaled_gemm(a, b, mode=mode))
    codes, scales = gpu.quantise(x)
    yield compare("quantiser: scales, amax / 448", scales, a.scales, must=False)
    yield compare("quantiser: codes of x / s (Triton's division is not IEEE's)", codes, a.codes, must=False)


def report(gpu: Any, rows: list[Row]) -> str:
    """The whole result in Markdown."""
    facts = {"date": datetime.date.today().isoformat(), "numpy": np.__version__} | gpu.facts()
    compared, wrong = (sum(getattr(r, what) for r in rows if r.must) for what in ("outputs", "wrong"))
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- instructions, {name}: {', '.join(found) or 'none found'}" for name, found in gpu.instructions.items()]
    lines += ["", f"{compared:,} outputs that must be equal, {wrong:,} are not.", ""]
    return (
        "\n".join([*lines, "| what | outputs | unequal | note |", "| --- | --- | --- | --- |", *map(str, rows)]) + "\n"
    )


def hopper() -> Any:
    """The GPU, or None where there is none of compute capability 9.0."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    from hopper_kernels import Gpu

    return Gpu()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dots", type=float, default=2e7, help="random dot products per kind of check")
    parser.add_argument("--side", type=int, default=SIDE, help="rows and columns of a result, a multiple of 128")
    parser.add_argument("--out", type=pathlib.Path, help="write the report here too")
    parser.add_argument("--rehearse", action="store_true", help="run against the emulator itself")
    options = parser.parse_args()
    gpu = Emulator() if options.rehearse else hopper()
    if gpu is None:
        print("no GPU of compute capability 9.0 (or no torch): nothing was checked", file=sys.stderr)
        return 2
    rows = [
        *recorded(gpu),
        *random(gpu, options.dots, options.side),
        *cublas(gpu, options.dots, options.side),
        *kernels(gpu, options.side),
    ]
    text = report(gpu, rows)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 1 if any(r.wrong for r in rows if r.must) else 0


if __name__ == "__main__":
    sys.exit(main())
