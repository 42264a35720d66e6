"""The safetensors format: what is read, what is written, and what must be refused."""

import json
import os
import re
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint.header import DTYPES
from refimpl.checkpoint.safetensors import Pending, open_file, write_file
from refimpl.spec_tests.oracles.handmade import SIZE, entry, f32, file_bytes, make_file, parse_file

ONE_AND_A_HALF = {  # 1.5 in each float format, from the formats' definitions, not from NumPy
    "F64": struct.pack("<d", 1.5),
    "F32": struct.pack("<f", 1.5),
    "F16": struct.pack("<e", 1.5),
    "BF16": struct.pack("<f", 1.5)[2:],  # upper half of float32
    "F8_E4M3": bytes([0b0_0111_100]),  # bias 7
    "F8_E5M2": bytes([0b0_01111_10]),  # bias 15
}
INTEGERS = {
    "I64": "q",
    "I32": "i",
    "I16": "h",
    "I8": "b",
    "U64": "Q",
    "U32": "I",
    "U16": "H",
    "U8": "B",
}


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", ONE_AND_A_HALF)
def test_every_float_format_is_read_by_its_definition(tmp_path, dtype):
    """Catches: BF16 read as float16, E4M3 and E5M2 exchanged, bytes read in the wrong order."""
    path = make_file(tmp_path / "x.safetensors", {"x": (dtype, (2,), ONE_AND_A_HALF[dtype] * 2)})
    x = open_file(path)["x"]
    assert x.dtype == DTYPES[dtype]
    assert x.astype(np.float64).tolist() == [1.5, 1.5]


def test_e8m0_codes_are_powers_of_two(tmp_path):
    """Catches: E8M0 taken for an integer, or its bias 127 forgotten."""
    path = make_file(tmp_path / "x.safetensors", {"x": ("F8_E8M0", (3,), bytes([126, 127, 130]))})
    assert open_file(path)["x"].astype(np.float64).tolist() == [0.5, 1, 8]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_format_is_read_by_its_definition(tmp_path, dtype):
    """Catches: a sign or a width mixed up in the dtype table."""
    values = [0, 1, 100] if dtype[0] == "U" else [-100, -1, 100]
    raw = struct.pack(f"<3{INTEGERS[dtype]}", *values)
    path = make_file(tmp_path / "x.safetensors", {"x": (dtype, (3,), raw)})
    assert open_file(path)["x"].tolist() == values


def test_bool_is_read(tmp_path):
    """Catches: BOOL handed out as bytes."""
    x = open_file(make_file(tmp_path / "x.safetensors", {"x": ("BOOL", (2,), b"\1\0")}))["x"]
    assert x.tolist() == [True, False]


def test_shapes_are_c_order_and_scalars_have_none(tmp_path):
    """Catches: column-major reading; a 0-d tensor read as (1,); an empty one refused."""
    tensors = {
        "matrix": ("F32", (2, 3), f32(0, 1, 2, 3, 4, 5)),
        "scalar": ("F32", (), f32(7)),
        "empty": ("F32", (0, 3), b""),
    }
    f = open_file(make_file(tmp_path / "x.safetensors", tensors))
    assert f["matrix"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert f["scalar"].shape == () and f["scalar"][()] == 7
    assert f["empty"].shape == (0, 3)


def test_header_and_metadata_are_offered_without_data(tmp_path):
    """Catches: shapes that can be had only by reading the tensor."""
    path = make_file(tmp_path / "x.safetensors", {"x": ("BF16", (4,), bytes(8))}, {"format": "pt"})
    f = open_file(path)
    info = f.header["x"]
    assert (info.dtype, info.shape, info.nbytes, f.metadata) == ("BF16", (4,), 8, {"format": "pt"})
    assert list(f) == ["x"] and len(f) == 1 and "x" in f and "y" not in f


def test_data_at_odd_offsets_is_read(tmp_path):
    """Catches: reliance on alignment; writers other than ours need not pad the header."""
    header = {
        "byte": entry("U8", [1], 0, 1),
        "x": entry("F32", [2], 1, 9),
        "pad": entry("U8", [0], 9, 9),
    }
    for spaces in range(4):  # every offset modulo 4
        text = json.dumps(header).encode() + b" " * spaces
        (tmp_path / "x.safetensors").write_bytes(file_bytes(text, b"\5" + f32(1.5, -2)))
        x = open_file(tmp_path / "x.safetensors")["x"]
        assert x.tolist() == [1.5, -2] and (x + 1).tolist() == [2.5, -1]


def test_arrays_are_read_only_views(tmp_path):
    """Catches: a copy where a view was promised, and a stray write into the checkpoint on disk."""
    path = make_file(tmp_path / "x.safetensors", {"x": ("F32", (2,), f32(1, 2))})
    x = open_file(path)["x"]
    assert not x.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 5


# ------------------------------------------------------------------------------------------ writing


def test_written_bytes_are_what_the_format_says(tmp_path):
    """Catches: a writer and a reader of ours that are wrong in the same way."""
    tensors = {"b": np.array([[1, 2]], np.float32), "a": np.array(3, ml_dtypes.bfloat16)}
    write_file(tmp_path / "x.safetensors", tensors, {"k": "v"})
    found, metadata = parse_file(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    assert found == {"b": ("F32", (1, 2), f32(1, 2)), "a": ("BF16", (), f32(3)[2:])}


def test_same_content_gives_same_bytes_and_aligned_data(tmp_path):
    """Catches: dict order, time or names leaking into the file; data that other readers must copy."""
    arrays = {"b": np.ones(3, np.uint8), "a": np.ones(1), "c": np.ones((2, 1), np.float16)}
    write_file(tmp_path / "1", arrays, {"x": "1", "y": "2"})
    write_file(tmp_path / "2", dict(reversed(arrays.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    raw = (tmp_path / "1").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert start % 8 == 0
    for t in open_file(tmp_path / "1").header.values():
        assert (start + t.begin) % SIZE[t.dtype] == 0


def test_strided_and_big_endian_arrays_are_written_by_value(tmp_path):
    """Catches: dumping an array's memory instead of its values."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_file(tmp_path / "x", {"t": x.T, "step": x[:, ::2], "big": x.astype(">f4")})
    f = open_file(tmp_path / "x")
    assert np.array_equal(f["t"], x.T)
    assert np.array_equal(f["step"], x[:, ::2])
    assert np.array_equal(f["big"], x)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """Catches: a half-written checkpoint after a crash, and litter beside it."""
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": np.ones(2)})
    before = path.read_bytes()

    def fail():
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_file(path, {"x": np.zeros(2), "y": Pending("F32", (1,), fail)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_open_arrays_survive_the_replacement_of_their_file(tmp_path):
    """Catches: writing into the mapped file, which would change weights under a running model."""
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": np.ones(1000)})
    x = open_file(path)["x"]
    write_file(path, {"x": x * 2})
    assert x.sum() == 1000 and open_file(path)["x"].sum() == 2000


def test_tensors_are_made_one_at_a_time(tmp_path):
    """Catches: a converter that holds the whole checkpoint in memory. 16 tensors of 4 MB each."""

    def one():
        return np.ones(1 << 20, np.float32)

    tracemalloc.start()
    write_file(tmp_path / "x", {str(i): Pending("F32", (1 << 20,), one) for i in range(16)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert os.path.getsize(tmp_path / "x") > 64e6
    assert peak < 14e6  # two tensors and the header, not sixteen


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"x": np.ones(1, complex)}, None, "complex128"),
        ({"x": np.array(["a"])}, None, "dtype <U1"),
        ({"x": np.array([None])}, None, "dtype object"),
        ({"__metadata__": np.ones(1)}, None, "cannot name a tensor"),
        ({3: np.ones(1)}, None, "cannot name a tensor"),
        ({"\ud800": np.ones(1)}, None, "not valid Unicode"),
        ({"x": np.ones(1)}, {"k": 1}, "must map strings to strings"),
        ({"x": np.ones(1)}, {"k": "\udfff"}, "not valid Unicode"),
        ({"x": Pending("F32", (3,), lambda: np.ones(2, np.float32))}, None, "announced F32 (3,)"),
        ({"x": Pending("F32", (2,), lambda: np.ones(2, np.float64))}, None, "made float64"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, tensors, metadata, says):
    """Catches: files that only we could read, or no one."""
    with pytest.raises(SpecError, match=re.escape(says)) as error:
        write_file(tmp_path / "x.safetensors", tensors, metadata)
    assert "while writing" in str(error.value) and not os.listdir(tmp_path)


def test_unwritable_folder_is_an_error_with_the_path(tmp_path):
    """Catches: an OSError from deep inside for a mistyped folder."""
    with pytest.raises(SpecError, match=r"nowhere.x\.safetensors: cannot be written"):
        write_file(tmp_path / "nowhere" / "x.safetensors", {"x": np.ones(1)})


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_round_trip_is_the_identity_on_bits(data):
    """Catches: a dtype or a shape (0-d, zero-size) that changes on the way through a file."""
    names = data.draw(st.lists(st.text(max_size=8), unique=True, max_size=4))
    arrays = {}
    for name in names:
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        n = int(np.prod(shape, dtype=int)) * SIZE[dtype]
        raw = data.draw(st.binary(min_size=n, max_size=n))
        raw = bytes(b & 1 for b in raw) if dtype == "BOOL" else raw
        arrays[name] = np.frombuffer(raw, np.uint8).view(DTYPES[dtype]).reshape(shape)
    metadata = data.draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / "x", arrays, metadata)
        f = open_file(Path(folder) / "x")
    assert set(f) == set(arrays) and f.metadata == (metadata or {})
    for name, a in arrays.items():
        assert f[name].dtype == a.dtype and f[name].shape == a.shape
        assert f[name].tobytes() == a.tobytes()


# ------------------------------------------------------------------------------------ hostile files

X = entry("F32", [2], 0, 8)
DATA = bytes(8)


def with_x(**changes):
    return file_bytes({"x": X | changes}, DATA)


HOSTILE = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "header longer than the file": (file_bytes(b"{}", length=3), "exceeds the file's"),
    "header of 2^63 bytes": (file_bytes(b"{}", length=2**63), "exceeds the limit"),
    "header of 100 MB and one": (file_bytes(b"{}", length=100_000_001), "exceeds the limit"),
    "header of no bytes": (file_bytes(b""), "begins with b''"),
    "pickle": (file_bytes(b"\x80\x04."), "begins with"),
    "space before the brace": (file_bytes(b" {}"), "begins with"),
    "list": (file_bytes(b"[]"), "begins with"),
    "no JSON": (file_bytes(b"{x}"), "not UTF-8 JSON"),
    "cut JSON": (file_bytes(b'{"x":'), "not UTF-8 JSON"),
    "two objects": (file_bytes(b"{}{}"), "not UTF-8 JSON"),
    "invalid UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8 JSON"),
    "half a surrogate": (
        file_bytes(b'{"\\ud800":' + json.dumps(X).encode() + b"}", DATA),
        "Unicode",
    ),
    "nested too deep": (file_bytes(b'{"x":' + b"[" * 200_000), "not UTF-8 JSON"),
    "huge integer": (file_bytes(b'{"x":' + b"9" * 9999 + b"}"), "not UTF-8 JSON"),
    "NaN": (file_bytes(b'{"x": NaN}'), "NaN is not JSON"),
    "name twice": (file_bytes(b'{"x":%b,"x":%b}' % ((json.dumps(X).encode(),) * 2), DATA), "twice"),
    "dtype twice": (
        file_bytes(b'{"x":{"dtype":"I32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "'dtype' appears twice",
    ),
    "metadata is a list": (file_bytes({"__metadata__": []}), "must map strings"),
    "metadata is zero": (file_bytes({"__metadata__": 0}), "must map strings"),
    "metadata holds a number": (file_bytes({"__metadata__": {"k": 1}}), "must map strings"),
    "entry is a number": (file_bytes({"x": 3}), "expected an object with dtype"),
    "no dtype": (
        file_bytes({"x": {"shape": [2], "data_offsets": [0, 8]}}, DATA),
        "expected an object",
    ),
    "no offsets": (file_bytes({"x": {"shape": [2], "dtype": "F32"}}, DATA), "expected an object"),
    "unknown dtype": (with_x(dtype="F31"), "dtype 'F31' is not one of"),
    "dtype is a list": (with_x(dtype=["F32"]), "is not one of"),
    "negative dimension": (with_x(shape=[-2]), "shape [-2] must be"),
    "two negative dimensions": (with_x(shape=[-1, -2]), "must be a list of non-negative"),
    "fractional dimension": (with_x(shape=[2.0]), "must be a list of non-negative"),
    "boolean dimension": (with_x(shape=[True, 2]), "must be a list of non-negative"),
    "shape is a number": (with_x(shape=2), "must be a list of non-negative"),
    "33 dimensions": (with_x(shape=[1] * 32 + [2]), "33 dimensions"),
    "dimension beyond 64 bits": (with_x(shape=[2**64]), "must be a list of non-negative"),
    "product beyond 64 bits": (with_x(shape=[2**40, 2**40]), "overflows"),
    "product wraps to 2": (with_x(shape=[2**62 + 1, 4, 2]), "overflows"),
    "zero times too much": (with_x(shape=[0, 2**62], data_offsets=[0, 0]), "overflows"),
    "shape too large for the data": (with_x(shape=[3]), "has 12 bytes, data_offsets span 8"),
    "shape too small for the data": (with_x(shape=[1]), "has 4 bytes, data_offsets span 8"),
    "scalar of two": (with_x(shape=[]), "has 4 bytes"),
    "end before begin": (with_x(data_offsets=[8, 0]), "must be [begin, end]"),
    "minus zero as an offset": (
        file_bytes(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', DATA),
        "must be [begin, end]",
    ),
    "negative offset": (with_x(data_offsets=[-8, 0]), "must be [begin, end]"),
    "three offsets": (with_x(data_offsets=[0, 4, 8]), "must be [begin, end]"),
    "offsets are strings": (with_x(data_offsets=["0", "8"]), "must be [begin, end]"),
    "data beyond the file": (file_bytes({"x": X}, DATA[:-1]), "truncated?"),
    "offsets beyond the file": (with_x(data_offsets=[8, 16]), "a hole"),
    "hole at the start": (with_x(shape=[1], data_offsets=[4, 8]), "a hole"),
    "hole in the middle": (
        file_bytes({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, bytes(3)),
        "'y': data begins at 2, expected 1: a hole",
    ),
    "overlap": (
        file_bytes({"x": X, "y": entry("F32", [2], 4, 12)}, bytes(12)),
        "'y': data begins at 4, expected 8: an overlap",
    ),
    "two names for the same bytes": (file_bytes({"x": X, "y": X}, DATA), "an overlap"),
    "empty tensor outside": (
        file_bytes({"x": X, "y": entry("F32", [0], 99, 99)}, DATA),
        "data begins at 99",
    ),
    "trailing bytes": (file_bytes({"x": X}, DATA + b"!"), "1 bytes follow"),
    "trailing bytes without tensors": (file_bytes({}, b"!"), "1 bytes follow"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_lying_files_are_refused_with_file_and_reason(tmp_path, case):
    """Catches: reading beyond a buffer, two tools that see different tensors in one file, a crash."""
    content, says = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(says)) as error:
        open_file(path)
    assert f"while opening {path}" in str(error.value)


OURS_ALONE = {
    "33 dimensions": "NumPy has no such arrays",
    "zero times too much": "NumPy has no such arrays",
    "space before the brace": "the format page forbids it, the library 0.8 takes it",
    "name twice": "the format page forbids it, the library 0.8 takes the last",
}


@pytest.mark.parametrize("case", [case for case in HOSTILE if case not in OURS_ALONE])
def test_the_library_refuses_the_same_files(tmp_path, case):
    """Catches: a rule of ours that rejects files the rest of the world reads."""
    library = pytest.importorskip("safetensors", reason="the library is the oracle here")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[case][0])
    with pytest.raises(Exception), library.safe_open(path, "np"):  # noqa: B017
        pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: None, "No such file"),
        (lambda p: p.symlink_to(p), "symbolic links"),
        (lambda p: os.mkfifo(p), "not a regular file"),
    ],
    ids=["folder", "missing", "endless link", "pipe"],
)
@pytest.mark.skipif(os.name != "posix", reason="pipes and link errors are POSIX")
def test_what_is_no_file_is_refused(tmp_path, make, says):
    """Catches: an OSError without context, or waiting forever on a pipe."""
    make(tmp_path / "x")
    with pytest.raises(SpecError, match=says):
        open_file(tmp_path / "x")


GOOD = file_bytes({"__metadata__": {"a": "b"}, "x": X, "y": entry("BF16", [1, 3], 8, 14)}, bytes(range(14)))


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
)
def test_damaged_files_are_read_within_bounds_or_refused(flips, cut):
    """Catches: any exception but SpecError, and a tensor whose bytes are not those of the file."""
    raw = bytearray(GOOD)
    for at, value in flips:
        raw[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(raw[:cut])
        try:
            f = open_file(path)
        except SpecError:
            return
        found, _ = parse_file(path)  # the oracle; the file is well-formed, then
        assert {name: f[name].tobytes() for name in f} == {n: t[2] for n, t in found.items()}


# --------------------------------------------------------------------------------------- laziness


def sparse_file(path, tensors, nbytes):
    """A file of `tensors` uint8 tensors of nbytes each that occupies only its header on disk."""
    header = {str(i): entry("U8", [nbytes], i * nbytes, (i + 1) * nbytes) for i in range(tensors)}
    content = file_bytes(header)
    path.write_bytes(content)
    os.truncate(path, len(content) + tensors * nbytes)


def resident_bytes(path):
    """How much of the mapped file is in this process's memory."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    ours = [e for e in entries if str(path) in e.splitlines()[0]]
    return sum(int(re.search(r"^Rss:\s+(\d+) kB", e, re.M)[1]) * 1024 for e in ours)


def test_opening_forty_gigabytes_costs_the_header(tmp_path):
    """Catches: reading the file, or allocating for it, when it is opened."""
    path = tmp_path / "big.safetensors"
    sparse_file(path, 40, 1 << 30)
    tracemalloc.start()
    start = time.perf_counter()
    f = open_file(path)
    elapsed = time.perf_counter() - start
    views = [f[name] for name in f]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(v.nbytes for v in views) == 40 << 30
    assert elapsed < 1 and peak < 2e6


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
def test_a_tensor_read_touches_its_own_bytes(tmp_path):
    """Catches: a reader that pulls in a whole shard for one tensor."""
    path = tmp_path / "big.safetensors"
    sparse_file(path, 64, 1 << 26)  # 4 GB
    f = open_file(path)
    assert resident_bytes(path) < 1 << 20
    assert int(f["17"].sum()) == 0
    assert 1 << 26 <= resident_bytes(path) < (1 << 26) + (4 << 20)  # the tensor and some read-ahead


# ------------------------------------------------------------------------------------ the library


def samples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5))
    floats = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
    return {f"t.{d}": x.astype(DTYPES[d]) for d in floats} | {
        "i": np.arange(-3, 3, dtype=np.int32),
        "flag": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.ones((0, 4), np.int64),
    }


def test_the_library_reads_what_we_write(tmp_path):
    """Catches: a file that only we can read."""
    library = pytest.importorskip("safetensors.torch", reason="the library is the oracle here")
    torch = pytest.importorskip("torch", reason="the library's only binding with 8-bit floats")
    ours = samples()
    write_file(tmp_path / "x", ours)
    theirs = library.load_file(tmp_path / "x")
    assert set(theirs) == set(ours)
    for name, a in ours.items():
        assert tuple(theirs[name].shape) == a.shape
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == a.tobytes()


def test_we_read_what_the_library_writes(tmp_path):
    """Catches: a reader that knows only our own files."""
    library = pytest.importorskip("safetensors.torch", reason="the library is the oracle here")
    torch = pytest.importorskip("torch", reason="the library's only binding with 8-bit floats")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=g)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    kinds += (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64)
    theirs = {str(k): (100 * x).to(k) for k in kinds} | {"scalar": torch.tensor(3.0)}
    library.save_file(theirs, tmp_path / "x", metadata={"format": "pt"})
    f = open_file(tmp_path / "x")
    assert f.metadata == {"format": "pt"} and set(f) == set(theirs)
    for name, t in theirs.items():
        assert f[name].shape == tuple(t.shape)
        assert np.array_equal(f[name].astype(np.float64), t.to(torch.float64).numpy())


def test_our_bytes_are_the_librarys(tmp_path):
    """Catches: a layout (order, padding, spelling) that drifts from the reference writer's."""
    library = pytest.importorskip("safetensors.numpy", reason="the library is the oracle here")
    arrays = {k: v for k, v in samples().items() if v.dtype.kind in "fib"}
    write_file(tmp_path / "ours", arrays, {"format": "np"})
    library.save_file(arrays, tmp_path / "theirs", {"format": "np"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
