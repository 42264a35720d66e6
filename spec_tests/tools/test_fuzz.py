"""Hostile traces: whatever a file holds, `refimpl diff` ends with a verdict or with "bad input", never with a traceback."""

import copy
import dataclasses
import json
import pathlib
import struct

import numpy as np
import pytest

import refimpl
from refimpl.autograd import SpecError
from refimpl.diff import Case, Trace, render, to_json
from refimpl.diff.judge import judge
from refimpl.record import trace_case

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
RECORDING = TINY / "hf-bfloat16.safetensors"
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**40,
    -(2**70),
    0.5,
    float("nan"),
    "",
    "x",
    "float8",
    "NaN",
    [],
    [[]],
    [0],
    [1, 2],
    {},
]
VALUES += [
    {"a": 1},
    [[0] * 24] * 2,
    [[-5] * 24] * 2,
    [[10**9] * 24] * 2,
    ["fwd/L0/resid"],
    {"fwd/L0/resid": 3},
    "B S D",
    "0:4",
    "L0 is L1",
]
WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "U16": 2}
DTYPES = [*WIDTH, "U8", "BOOL", "F8_E4M3", "I8"]


def parts():
    """(header, data) of the recording."""
    raw = RECORDING.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def outcome(case, path):
    """Exit code of judging a file, as the command line would give it; any other exception is a failure of the test."""
    try:
        judgement = judge(case, Trace.read(path))
    except SpecError as error:
        assert str(error)
        return 3
    assert render(judgement) and json.loads(to_json(judgement))
    return judgement.exit_code


def places(tree, path=()):
    """Every place in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def put(tree, path, value):
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = put(tree[path[0]], path[1:], value)
    return tree


@pytest.fixture(scope="module")
def case():
    return Case.read(TINY)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_value_at_any_place_of_the_trace_header(case, tmp_path, seed):
    """Catches a traceback on a header whose JSON is sound and whose values are not: wrong types, sizes, names."""
    header, data = parts()
    trace = json.loads(header["__metadata__"]["trace"])
    trace |= {"slices": {"layers": [0, 1, 2]}, "layouts": {"rope": "half", "mla": "expanded"}, "valid": None}
    if seed % 2:
        adam = {"lr": 0.1, "beta1": 0.9, "max_norm": 1.0, "moments": "bfloat16", "decays": "all", "step": 2}
        training = {"mtp_weight": 0.0, "gamma": 0.1, "labels": trace["tokens"], "optimizer": adam}
        trace |= {"phases": ["fwd", "bwd"], "training": training}
        trace |= {"parallel": {"rank": 0, "axes": {"tp": [0, 1]}}}
    rng = np.random.default_rng(seed)
    some = [p for p in places(trace) if len(p) < 4 and p[:1] != ("weights",)] + [
        ("weights", k) for k in list(trace["weights"])[:3]
    ]
    seen = set()
    for _ in range(120):
        path = some[rng.integers(len(some))]
        changed = put(trace, path, VALUES[rng.integers(len(VALUES))])
        file = tmp_path / "t.safetensors"
        file.write_bytes(joined(header | {"__metadata__": {"trace": json.dumps(changed)}}, data))
        seen.add(outcome(case, file))
    assert seen <= {0, 1, 2, 3} and 3 in seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_dtype_shape_and_bits_of_any_tap(case, tmp_path, seed):
    """Catches a traceback, or an endless search for an arrangement, on arrays that are not what their names say."""
    header, data = parts()
    taps, rng = [t for t in header if t != "__metadata__"], np.random.default_rng(seed)
    seen = set()
    for i in range(100):
        new, bits = copy.deepcopy(header), bytearray(data)
        for tap in rng.choice(taps, size=1 + i % 3, replace=False):
            entry = new[tap]
            match rng.integers(5):
                case 0:
                    entry["dtype"] = DTYPES[rng.integers(len(DTYPES))]
                    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4}.get(
                        entry["dtype"], 2 if "16" in entry["dtype"] else 1
                    )
                    size = entry["data_offsets"][1] - entry["data_offsets"][0]
                    entry["shape"] = [size // width] if size % width == 0 else [1]
                case 1:
                    entry["shape"] = [*entry["shape"][::-1]]
                case 2:
                    entry["shape"] = [1, int(np.prod(entry["shape"]))]
                case 3:
                    start, end = entry["data_offsets"]
                    bits[start:end] = rng.integers(0, 256, end - start, np.uint8).tobytes()
                case 4:
                    new[f"fwd/L{rng.integers(-1, 9)}/{tap.rpartition('/')[2]}x"] = new.pop(tap)
        file = tmp_path / "t.safetensors"
        file.write_bytes(joined(new, bytes(bits)))
        seen.add(outcome(case, file))
    assert seen <= {0, 1, 2, 3} and 1 in seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_value_and_bits_of_a_training_step(case, tmp_path, seed):
    """Catches a traceback on settings of an optimiser that are strange together, and on moments, norms and gradients of any shape
    and bits: holes, nothing, bytes.
    """
    adam = {"lr": 1e-3, "step": 2, "moments": "bfloat16", "max_norm": 1.0}
    trace = trace_case(case, training={"gamma": 0.001, "aux_weight": 0.01, "optimizer": adam})
    rng, seen = np.random.default_rng(seed), set()
    names = sorted(trace.taps)
    groups = [[n for n in names if n.startswith(p)] for p in ("upd/", "grad/", "bwd/", "fwd/")]
    for i in range(20):
        kept = {n: trace.taps[n] for n in names if rng.random() < (0.1, 0.5, 1.0)[i % 3]}
        for group in groups[: 1 + i % 4]:
            tap = group[rng.integers(len(group))]
            a = np.array(trace.taps[tap])
            holed = np.where(rng.random(a.shape) < 0.1, np.nan, a).astype(a.dtype) if a.dtype.kind == "f" else a
            bits = np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape)
            kept[tap] = (holed, bits, a[..., :0], a.ravel()[:1], np.zeros(3, np.uint8), a.T.copy())[rng.integers(6)]
        key = ["lr", "beta1", "beta2", "eps", "weight_decay", "max_norm", "moments", "masters", "decays", "step", "x"]
        strange = {key[rng.integers(len(key))]: [*VALUES, 0.9, 1e200, "bfloat16"][rng.integers(len(VALUES) + 3)]}
        training = trace.header.training | {"optimizer": adam | (strange if i % 2 else {})}
        header = dataclasses.replace(trace.header, training=json.loads(json.dumps(training)))
        Trace(header, kept).write(tmp_path / "t.safetensors")
        seen.add(outcome(case, tmp_path / "t.safetensors"))
    assert seen <= {0, 1, 2, 3} and {1, 3} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_flipped_and_lost_bytes(case, tmp_path, seed):
    """Catches a traceback on a damaged file: one byte changed, anywhere, or the end missing."""
    raw, rng = RECORDING.read_bytes(), np.random.default_rng(seed)
    seen = set()
    for i in range(150):
        bits = bytearray(raw if i % 3 else raw[: rng.integers(len(raw))])
        if bits:
            at = rng.integers(len(bits) if i % 2 else min(len(bits), 20000))
            bits[at] ^= 1 << int(rng.integers(8))
        file = tmp_path / "t.safetensors"
        file.write_bytes(bytes(bits))
        seen.add(outcome(case, file))
    assert seen <= {0, 1, 2, 3} and 3 in seen


def test_some_hostile_traces_in_every_run(case, tmp_path):
    """Catches, without the slow tests, the commonest: taps of NaN, of nothing, of one number, of bytes."""
    trace = Trace.read(RECORDING)
    taps = {t: np.asarray(a) for t, a in trace.taps.items()}
    strange = [
        np.zeros((0,), np.float32),
        np.zeros((), np.float32),
        np.full((2, 24, 48), np.nan, np.float32),
        np.zeros(3, np.uint8),
    ]
    for x in strange:
        for tap in (
            "fwd/embed",
            "fwd/L0/resid",
            "fwd/L1/router.ids",
            "fwd/L1/router.weights",
            "fwd/logits",
            "fwd/mask",
            "new",
        ):
            judgement = judge(case, Trace(trace.header, taps | {tap: x}))
            assert judgement.exit_code in (1, 2) and render(judgement) and to_json(judgement)
