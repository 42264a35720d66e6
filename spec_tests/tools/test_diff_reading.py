"""How a recorded array is brought into our axes: every arrangement of a small one, by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.tensor import Array
from refimpl.diff.reading import Pick, is_bfloat16, is_float16, read

A = np.arange(24).reshape(2, 3, 4)  # B S D
LONG = np.arange(60).reshape(2, 5, 6)
HEADS = np.arange(120).reshape(2, 3, 4, 5)  # B S H D
FLAT, MORE = "tokens are flattened to (N, ...): declare dims with N for B S", np.arange(160)
LAST, DECLARE = "only the last position was recorded: compared there", ": declare slices"
CHUNKS = np.pad(LONG, ((0, 0), (0, 1), (0, 0))).reshape(2, 3, 2, 6)

FITS: dict[str, tuple[Array, Array, str, str, Pick]] = {  # recorded, ours, our axes, what is said, the part that it is
    "as ours": (A, A, "B S D", "", {}),
    "an axis more": (A[:, None], A, "B S D", "", {}),
    "one sequence": (A[0], A[:1], "B S D", "", {}),
    "flattened": (A.reshape(6, 4), A, "B S D", FLAT, {}),
    "no tokens": (A.reshape(6, 4), A, "B T D", "axes are merged to 6x4, ours are 2x3x4", {}),
    "features": (A.reshape(2, 12), A, "B S D", "axes are merged to 2x12, ours are 2x3x4", {}),
    "all merged": (A.reshape(24), A, "B S D", "axes are merged to 24, ours are 2x3x4", {}),
    "of two axes": (A[0].reshape(12), A[0], "B S", "tokens are flattened to (N, ...): declare dims with N for B S", {}),
    "turned": (A.transpose(2, 0, 1), A, "B S D", 'axes are D B S: declare dims "D B S"', {}),
    "turned, merged": (A.transpose(2, 0, 1).reshape(4, 6), A, "B S D", 'axes are D B S: declare dims "D B S"', {}),
    "last": (A[:, -1], A, "B S D", LAST, {1: slice(-1, None)}),
    "last of two": (A[:, 1], A[:, :2], "B S D", LAST, {1: slice(-1, None)}),
    "last, merged": (HEADS[:, 1].reshape(2, 20), HEADS[:, :2], "B S H D", LAST, {1: slice(-1, None)}),
    "last, S first": (A[-1], A, "S T D", LAST, {0: slice(-1, None)}),
    "longer": (LONG[..., :4], LONG[:, :3, :4], "B S D", "padded along S to 5: cut to 3", {}),
    "longer, wider": (LONG, LONG[:, :3, :4], "B S V", "padded along S to 5 and V to 6: cut to 3 and 4", {}),
    "wider": (LONG, LONG[..., :4], "B T V", "padded along V to 6: cut to 4", {}),
    "flat, longer": (MORE[:36].reshape(9, 4), A, "B S D", "tokens are flattened and padded to 9: cut to the first 6", {}),
    "flat, longer, merged": (MORE.reshape(8, 20), HEADS, "B S H D", "tokens are flattened and padded to 8: cut to the first 6", {}),
    "chunks": (CHUNKS, LONG, "B S D", "positions are in 3 chunks of 2: put together", {}),
    "chunks stacked": (CHUNKS.swapaxes(0, 1), LONG, "B S D", "positions are in 3 chunks of 2: put together", {}),
    "fewer": (A[:, :2], A, "B S D", f"2 of 3 tokens, taken for the first{DECLARE}", {1: slice(0, 2)}),
    "fewer keys": (A[..., :3], A, "B S T", f"3 of 4 tokens, taken for the first{DECLARE}", {2: slice(0, 3)}),
    "fewer sequences": (A[:1], A, "B S D", "1 of 2 sequences, taken for the first", {0: slice(0, 1)}),
    "fewer of both": (
        LONG[:1, :3],
        LONG,
        "B S D",
        "1 of 2 sequences and 3 of 5 tokens, taken for the first",
        {0: slice(0, 1), 1: slice(0, 3)},
    ),
}  # fmt: skip


def _part(a: Array, pick: Pick) -> Array:
    for axis, entries in pick.items():
        a = np.take(a, np.arange(a.shape[axis])[entries], axis=axis)
    return a


@pytest.mark.parametrize("name", FITS)
def test_an_arrangement_is_read_and_said(name: str) -> None:
    """Catches numbers put elsewhere than they were, a part taken for another, and another word on what to declare."""
    x, ours, axes, said, pick = FITS[name]
    found = read(x, ours.shape, axes.split())
    assert found is not None and (found.note, found.pick) == (said, pick)
    np.testing.assert_array_equal(found.array, _part(ours, pick))


@pytest.mark.parametrize(
    "shape", [(2, 3, 3), (3, 3, 4), (2, 0, 4), (24, 1, 2), (5,), (), (7, 3), (5, 4), (2, 3, 4, 2), (2, 4, 3, 2)]
)
def test_what_fits_nothing_is_not_read(shape: tuple[int, ...]) -> None:
    """Catches features, or sequences that there are not, taken for padding or for a part; nothing at all taken for something."""
    assert read(np.zeros(shape), A.shape, ["B", "S", "D"]) is None


DECLARED = {  # dims -> how an array in our axes B S H lies then
    "B S H": lambda a: a,
    "S B H": lambda a: a.swapaxes(0, 1),
    "H B S": lambda a: a.transpose(2, 0, 1),
    "N H": lambda a: a.reshape(4, 2),
    "H N": lambda a: a.reshape(4, 2).T,
    "S H B": lambda a: a.transpose(1, 2, 0).reshape(4, 2),
}


@pytest.mark.parametrize("dims", DECLARED)
def test_declared_axes_are_read_as_declared(dims: str) -> None:
    """Catches axes of the same length exchanged although it was said which is which; a part of them likewise."""
    a = np.arange(8).reshape(2, 2, 2)
    found = read(DECLARED[dims](a), a.shape, ["B", "S", "H"], dims)
    assert found is not None and (found.note, found.pick) == ("", {})
    np.testing.assert_array_equal(found.array, a)
    pick = {"S": [1, 4], "elsewhere": [0]}
    found = read(DECLARED[dims](a), (2, 6, 2), ["B", "S", "H"], dims, pick)
    assert found is not None and (found.note, found.pick) == ("", {1: [1, 4]})
    np.testing.assert_array_equal(found.array, a)


@pytest.mark.parametrize("dims", ["B S", "B S D", "B B H", "S N", ""])
def test_words_that_do_not_fit_are_not_believed(dims: str) -> None:
    """Catches an array that is ours as it is and is turned by, or refused for, letters of another tap."""
    a = np.arange(12).reshape(2, 2, 3)
    found = read(a, a.shape, ["B", "S", "H"], dims)
    assert found is not None
    np.testing.assert_array_equal(found.array, a)


def _held(x: Array, dtype: type) -> Array:
    return x.astype(dtype).astype(np.float32)


def test_narrow_numbers_in_wide_arrays_are_known() -> None:
    """Catches a rounding of a few numbers called a format, a format that one number is not of, and numbers that float16 has not.
    Oracle: the rounding itself.
    """
    normal = np.random.default_rng(0).uniform(1, 2, 40_000).astype(np.float32)
    for is_one, narrow in ((is_bfloat16, ml_dtypes.bfloat16), (is_float16, np.float16)):
        x = _held(normal, narrow)
        assert is_one(x) and not is_one(x.astype(np.float64)) and not is_one(normal)
        assert is_one(x.reshape(200, 200).T)
        for at in (0, 20_000, -1):  # the first, one in another block, the last
            y = x.copy()
            y[at] = np.nextafter(y[at], np.float32(9))
            assert not is_one(y)
        different = np.arange(1, 18, dtype=np.float32)
        assert is_one(different) and not is_one(different[:16]) and not is_one(np.repeat(different[:16], 3_000))
        assert is_one(np.append(np.repeat(different[:16], 3_000), different[16]))
    assert not is_bfloat16(_held(normal, np.float16))
    largest = _held(normal, np.float16) * np.float32(2**10)
    assert is_float16(np.append(largest, np.float32(65504))) and is_float16(
        np.append(largest, np.float32([np.inf, np.nan]))
    )
    assert not is_float16(np.append(largest, np.float32(65536))) and not is_float16(
        np.append(largest, np.float32(-(2**20)))
    )
