"""Regimes of FP8 weights: what a loader with a known mistake makes of them."""

import numpy as np
import pytest

from refimpl.diff import Case
from refimpl.diff.judge import judge
from refimpl.layers.numerics import dequantize_blocks
from refimpl.record import trace_case

from .test_regimes import made


class Misread(Case):
    """The case as a loader with a mistake reads it."""

    def __init__(self, case, read):
        super().__init__(**vars(case))
        object.__setattr__(self, "read_pair", read)

    def weights(self):
        pairs = {n: self.checkpoint.raw(n) for n in self.checkpoint}
        return {n: w if scales is None else self.read_pair(w, scales) for n, (w, scales) in pairs.items()}


def inferred(codes, scales, sizes):
    """Each row and column scaled by block i // size, or the last there is."""
    row, column = (
        np.minimum(np.arange(n) // s, k - 1) for n, s, k in zip(codes.shape, sizes, scales.shape, strict=True)
    )
    return codes.astype(np.float32) * scales[row][:, column]


def permuted(codes, scales):
    """Rows moved by a block for a kernel, scales not, and moved back after."""
    by = 128 % len(codes)
    return np.roll(dequantize_blocks(np.roll(codes, by, axis=0), scales), -by, axis=0)


MISREAD = {
    "F01": lambda c, s: inferred(c, s, [-(-n // k) for n, k in zip(c.shape, s.shape, strict=True)]),
    "F02": lambda c, s: inferred(c, s, [-(-c.shape[0] // s.shape[0]), 128]),
    "F03": lambda c, s: inferred(c, s[: max(len(c) // 128, 1)], (128, 128)),
    "F04": permuted,
}


@pytest.mark.slow
@pytest.mark.parametrize("id", MISREAD)
def test_cut_off_blocks_show_what_whole_ones_hide(id):
    """Catches sizes that no block boundary crosses: a block size inferred from the shapes (F01, F02), the last block scaled by its
    neighbour (F03) or rows permuted without their scales (F04) read small weights right.
    """
    hidden, shown = made("fp8-weights"), made("ragged-128,fp8-weights")
    assert judge(hidden, trace_case(Misread(hidden, MISREAD[id]))).verdict == "CONFORMS"
    judgement = judge(shown, trace_case(Misread(shown, MISREAD[id])))
    assert judgement.verdict == "DIVERGES" and [g.name for g in judgement.gates if g.state == "FAIL"] == ["weights"]


@pytest.mark.parametrize(
    "read",
    [
        lambda codes, scales: codes.astype(np.float32),
        lambda codes, scales: dequantize_blocks(codes, np.exp2(np.ceil(np.log2(scales)))),
    ],
    ids=["F05", "F10"],
)
def test_fp8_weights_show_a_loader_that_mistakes_their_scales(read):
    """Catches weights without scales, or with scales that any mistake leaves as they are."""
    case = made("fp8-weights")
    gates = {g.name: g.state for g in judge(case, trace_case(Misread(case, read), taps=["*/embed"])).gates}
    assert gates["weights"] == "FAIL"
