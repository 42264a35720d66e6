"""What runs on the GPU in hopper_check.py: cuBLAS through torch, and Triton kernels around one `tl.dot`.

Arrays go in and come out as NumPy, FP8 as uint8 codes. The second kernel has the accumulation line of DeepSeek-V3's
inference/kernel.py; the third its quantiser, x / s with s = max(amax, 1e-4) / 448.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

BLOCK_N = 64
INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\.[\w.]+|fma\.rn\.f32|add\.(?:rn\.)?f32")  # in PTX


@triton.jit
def dot_kernel(a, b, c, d, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr, PROMOTE: tl.constexpr):
    """d = c + a bᵀ with one tl.dot over all of K: a (M, K), b (N, K) row-major, c, d (M, N) float32.

    With PROMOTE 0, Triton's default on sm90, c is the accumulator of the first wgmma. With any other number, K too, wgmma
    starts from zero every PROMOTE terms and the sums are added to c with add.f32 (seen in the PTX of Triton 3.6.0).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[None, :] * K + k[:, None])
    at = m[:, None] * N + n[None, :]
    start = tl.load(c + at)
    if PROMOTE == 0:
        tl.store(d + at, tl.dot(x, y, start))
    else:
        tl.store(d + at, tl.dot(x, y, start, max_num_imprecise_acc=PROMOTE))


@triton.jit
def gemm_kernel(a, b, sa, sb, d, N, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc += dot * s_a * s_b every 128: a (M, K), b (N, K), sa (M, K/128), sb (N/128, K/128), d (M, N) float32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    groups: tl.constexpr = K // 128
    for g in range(groups):
        k = g * 128 + tl.arange(0, 128)
        x = tl.load(a + m[:, None] * K + k[None, :])
        y = tl.load(b + n[None, :] * K + k[:, None])
        left = tl.load(sa + m * groups + g)
        right = tl.load(sb + (n // 128) * groups + g)
        acc += tl.dot(x, y) * left[:, None] * right[None, :]
    tl.store(d + m[:, None] * N + n[None, :], acc)


@triton.jit
def quantise_kernel(x, codes, scales):
    """One tile of 128 per program: codes = e4m3(x / s)."""
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    value = tl.load(x + at)
    s = tl.maximum(tl.max(tl.abs(value)), 1e-4) / 448.0
    tl.store(codes + at, (value / s).to(codes.dtype.element_ty))
    tl.store(scales + tl.program_id(0), s)


class Gpu:
    """A Hopper GPU; `ptx` of the kernels that ran tells which instruction did."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.instructions: dict[str, list[str]] = {}

    def facts(self) -> dict[str, str]:
        """What a report must say about this machine."""
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "?")()
        return {
            "device": torch.cuda.get_device_name(),
            "capability": str(torch.cuda.get_device_capability()),
            "CUDA driver": str(driver),
            "torch": torch.__version__,
            "CUDA of torch": str(torch.version.cuda),
            "triton": triton.__version__,
        }

    def _put(self, x: Any) -> Any:
        t = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        return t.view(torch.float8_e4m3fn) if x.dtype == np.uint8 else t

    def _note(self, name: str, compiled: Any) -> None:
        ptx = getattr(compiled, "asm", {}).get("ptx", "")
        self.instructions[name] = sorted(set(INSTRUCTION.findall(ptx)))

    def scaled_mm(self, a: Any, b: Any, *, fast: bool) -> Any:
        """a bᵀ by cuBLAS, scales 1, with or without fast accumulation.  -> float32 (M, N)"""
        one = torch.ones((), device=self.device)
        left, right = self._put(a), self._put(b).t()
        d = torch._scaled_mm(left, right, one, one, out_dtype=torch.float32, use_fast_accum=fast)
        return d.cpu().numpy()

    def dot(self, a: Any, b: Any, c: Any, *, block_m: int, promote: int) -> Any:
        """c + a bᵀ in one tl.dot, promoted every so many k, or never (0).  M a multiple of block_m, N of 64."""
        (m, k), n = a.shape, len(b)
        d = torch.empty((m, n), dtype=torch.float32, device=self.device)
        grid = (m // block_m, n // BLOCK_N)
        call = dot_kernel[grid](*(self._put(x) for x in (a, b, c)), d, n, block_m, BLOCK_N, k, promote, num_warps=4)
        self._note(f"dot, BLOCK_M {block_m}, promote {promote}", call)
        return d.cpu().numpy()

    def gemm(self, a: Any, b: Any, sa: Any, sb: Any, *, block_m: int, fuse: bool) -> Any:
        """The accumulation of kernel.py.  -> float32 (M, N)"""
        (m, k), n = a.shape, len(b)
        d = torch.empty((m, n), dtype=torch.float32, device=self.device)
        grid, inputs = (m // block_m, n // BLOCK_N), (self._put(x) for x in (a, b, sa, sb))
        call = gemm_kernel[grid](*inputs, d, n, k, block_m, BLOCK_N, num_warps=4, enable_fp_fusion=fuse)
        self._note(f"gemm, BLOCK_M {block_m}, fusion {fuse}", call)
        return d.cpu().numpy()

    def quantise(self, x: Any) -> tuple[Any, Any]:
        """Codes and scales of tiles of 1 x 128.  x (M, K) -> (M, K), (M, K/128)"""
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=self.device)
        scales = torch.empty((x.shape[0], x.shape[1] // 128), dtype=torch.float32, device=self.device)
        quantise_kernel[(scales.numel(),)](self._put(x), codes, scales, num_warps=1)
        return codes.view(torch.uint8).cpu().numpy(), scales.cpu().numpy()
