"""Numbers recorded in arrays of another dtype than their own: read as what they are, and every real mistake still seen."""

import dataclasses
import functools
import pathlib

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, render
from refimpl.diff.formats import in_own_formats
from refimpl.diff.judge import judge

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
IDS, WIDE = "ids are whole numbers in floating-point arrays", "every value of these float64 arrays is a float32 number"
DTYPES = ["float32", "bfloat16"]


@functools.cache
def recorded(dtype):
    trace = Trace.read(TINY / f"hf-{dtype}.safetensors")
    return Trace(trace.header, {t: np.asarray(a) for t, a in trace.taps.items()})


def changed(trace, change, **header):
    return Trace(dataclasses.replace(trace.header, **header), {t: change(t, a) for t, a in trace.taps.items()})


def chosen(tap):
    return tap.endswith(("router.ids", "router.groups"))


def number(dtype):
    return lambda t, a: a.astype(dtype) if chosen(t) else a


def wide(t, a):
    return a if chosen(t) else a.astype(np.float64)


def everything(t, a):
    return a.astype(np.float64)


FORMS = {  # how -> change, what is said
    "ids in float32": (number(np.float32), {IDS}),
    "ids in float64": (number(np.float64), {IDS}),
    "numbers in float64": (wide, {WIDE}),
    "everything in float64": (everything, {IDS, WIDE}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMS)
def test_numbers_in_another_dtype_conform(how, dtype):
    """Catches ids blamed for being floating point, and numbers held to the roundings of float64 because of their array."""
    change, said = FORMS[how]
    judgement = judge(Case.read(TINY), changed(recorded(dtype), change))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert {note.partition(":")[0] for note in judgement.notes} == said


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mistake_is_seen_through_another_dtype(dtype):
    """Catches a tap that is no longer judged because of the dtype of its array, and one judged as coarsely as another's."""

    def wrong(t, a):
        a = everything(t, a)
        return np.roll(a, 1, axis=1) if t == "fwd/L1/router.ids" else a * 1.0625 if t == "fwd/L0/mla.c_kv" else a

    judgement = judge(Case.read(TINY), changed(recorded(dtype), wrong))
    assert {f.tap for f in judgement.culprits} >= {"fwd/L1/router.ids", "fwd/L0/mla.c_kv"}, render(judgement)
    assert {f.tap for f in judgement.culprits} == {
        f.tap
        for f in judge(Case.read(TINY), changed(recorded(dtype), lambda t, a: wrong(t, a).astype(a.dtype))).culprits
    }


def test_a_run_said_to_be_in_float64_that_holds_float32_numbers_is_one_of_float32():
    """Catches a header that repeats the dtype of its arrays and so asks for roundings that no float32 port has."""
    trace = changed(recorded("float32"), wide, precision={"storage": "float64"})
    found, notes = in_own_formats(trace)
    assert found.header.precision["storage"] == "float32" and {n.partition(":")[0] for n in notes} == {WIDE}
    assert judge(Case.read(TINY), trace).verdict == "CONFORMS"


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_numbers_that_float32_has_not_stay_as_they_are(storage):
    """Catches a run in float64 rounded to float32 before it is judged, and a difference in the last numbers overlooked."""

    def finer(t, a):
        a = wide(t, a)
        if a.dtype == np.float64 and t != "fwd/embed":
            a.reshape(-1)[-1] *= 1 + 2.0**-40
        return a

    trace = changed(recorded("float32"), finer, precision={"storage": storage})
    found, notes = in_own_formats(trace)
    single = {t for t, a in found.taps.items() if a.dtype == np.float32}
    assert single == (
        set() if storage == "float64" else {"fwd/embed", "fwd/mask"}
    )  # 0 and -inf are numbers of any format
    assert found.header.precision["storage"] == storage and ("fwd/embed" in single) == bool(notes)


@pytest.mark.parametrize(
    ("ids", "read"),
    [([1.5, 2.0], None), ([np.nan, 3.0], [-1, 3]), ([np.inf, 1.0], None), ([2.0**40, 1.0], None), ([0.0, 7.0], [0, 7])],
)
def test_only_whole_numbers_are_ids(ids, read):
    """Catches scores under the name of ids cut to integers, NaN of padding that makes the ids unreadable, and an overflow."""
    x = np.array([ids])
    found, notes = in_own_formats(Trace(recorded("float32").header, {"fwd/L1/router.ids": x}))
    given = found.taps["fwd/L1/router.ids"]
    assert (given.tolist(), given.dtype.kind, bool(notes)) == (
        ([read], "i", True) if read else (x.tolist(), "f", False)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trace_that_is_as_it_should_be_is_not_touched(dtype):
    """Catches arrays of sound traces read, or copied, to find out what they are."""

    class Closed(dict):
        def __getitem__(self, tap):
            a = super().__getitem__(tap)
            return np.broadcast_to(np.zeros((), a.dtype), a.shape)  # of whole arrays nobody may hold more

    trace = Trace(recorded(dtype).header, Closed(recorded(dtype).taps))
    found, notes = in_own_formats(trace)
    assert found.taps is trace.taps and not notes
