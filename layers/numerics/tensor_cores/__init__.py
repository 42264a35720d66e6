"""Tensor cores bit for bit: the integer text, faster forms of it, machines as data, scaled GEMMs, error bounds."""

from .block_scaled import mxf4, nvf4
from .bound import scaled_gemm_bound
from .explain import why
from .fast import mxf8f6f4, tensor_core_matmul
from .gemm import MODES, scaled_gemm
from .machines import MACHINES, Machine

__all__ = [
    "MACHINES",
    "MODES",
    "Machine",
    "mxf4",
    "mxf8f6f4",
    "nvf4",
    "scaled_gemm",
    "scaled_gemm_bound",
    "tensor_core_matmul",
    "why",
]
