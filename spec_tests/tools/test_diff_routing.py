"""Routing maps, weights of all experts, rows in the order of tokens, keys repeated for every head: read, and mistakes still seen.

The recordings are transformers'; what other programs would have is made of it token by token, in plain loops.
"""

import dataclasses
import functools
import pathlib

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.diff.routing import as_lists

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
DTYPES = [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
ROWS = ("rows", "gate", "up", "act", "down")
MAP, ALL, ORDER = "is a map of what is chosen", "has a number for every expert", "in the order of tokens"


@functools.cache
def recorded(dtype):
    trace = Trace.read(TINY / f"hf-{dtype}.safetensors")
    return Trace(trace.header, {t: np.asarray(a) for t, a in trace.taps.items()})


def judged(trace, taps):
    header = dataclasses.replace(trace.header, expected=[], dims={})
    return judge(Case.read(TINY), Trace(header, taps))


def layers(taps):
    return [t.removesuffix("router.ids") for t in taps if t.endswith("router.ids")]


def marked(ids, n, dtype, numbers=None):
    """(B, S, n): 1, or the number, where an expert is chosen."""
    x = np.zeros((*ids.shape[:2], n), dtype)
    for at in np.ndindex(*ids.shape):
        x[at[0], at[1], ids[at]] = 1 if numbers is None else numbers[at]
    return x


def by_token(x, ids):
    """Rows sorted by expert, token, slot, as (N, K, W)."""
    n, k = ids.size // ids.shape[-1], ids.shape[-1]
    places = sorted((int(e), i) for i, e in enumerate(ids.reshape(-1)))
    y = np.empty_like(x)
    for row, (_, place) in zip(x, places, strict=True):
        y[place] = row
    return y.reshape(n, k, -1)


def maps(taps, dtype=np.int32):
    return taps | {f"{u}router.ids": marked(taps[f"{u}router.ids"], 16, dtype) for u in layers(taps)}


def group_maps(taps):
    return taps | {t: marked(a, 4, bool) for t, a in taps.items() if t.endswith("router.groups")}


def dense(taps):
    weights = {u: taps[f"{u}router.weights"] for u in layers(taps)}
    return taps | {f"{u}router.weights": marked(taps[f"{u}router.ids"], 16, w.dtype, w) for u, w in weights.items()}


def without_ids(taps):
    return {t: a for t, a in taps.items() if not t.endswith("router.ids")}


def of_tokens(taps, which=ROWS, flat=False):
    found = {f"{u}moe.{r}": by_token(taps[f"{u}moe.{r}"], taps[f"{u}router.ids"]) for u in layers(taps) for r in which}
    return taps | {t: a.reshape(-1, a.shape[-1]) if flat else a for t, a in found.items()}


def repeated(taps, axis):
    return taps | {t: np.stack([a] * 4, axis) for t, a in taps.items() if t.endswith("mla.k_rope")}


FORMS = {  # how -> what other programs have, what is said
    "maps of integers": (maps, MAP),
    "maps of truth values": (lambda t: maps(t, bool), MAP),
    "maps in bfloat16": (lambda t: maps(t, ml_dtypes.bfloat16), MAP),
    "maps of groups": (group_maps, MAP),
    "weights of all experts": (dense, ALL),
    "maps, and weights of all experts": (lambda t: maps(dense(t)), ALL),
    "weights of all experts alone": (lambda t: without_ids(dense(t)), ALL),
    "weights of all experts, flattened": (
        lambda t: {n: a.reshape(-1, a.shape[-1]) if "router." in n else a for n, a in dense(t).items()},
        ALL,
    ),
    "rows (N, K, W)": (of_tokens, ORDER),
    "rows (N K, W)": (lambda t: of_tokens(t, flat=True), ORDER),
    "rows (N K, W) before the experts": (lambda t: of_tokens(t, ("rows",), flat=True), ORDER),
    "rows (N K, W) behind the experts": (lambda t: of_tokens(t, ("down",), flat=True), ORDER),
    "keys of every head": (lambda t: repeated(t, 2), "repeated for every head"),
    "keys of every head, heads first": (lambda t: repeated(t, 1), "repeated for every head"),
    "keys of every head, merged": (
        lambda t: {
            n: a.reshape(48, -1) if a.ndim == 4 and n.endswith("k_rope") else a for n, a in repeated(t, 2).items()
        },
        "repeated for every head",
    ),
}

IN_GAUGE = (
    "maps of integers",
    "maps of truth values",
    "maps in bfloat16",
)  # which do not tell the slots of a list of weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMS)
def test_what_says_the_same_conforms(how, dtype):
    """Catches a correct port blamed for its form of routing, weights put to another expert, rows to another token."""
    change, said = FORMS[how]
    trace = recorded(dtype)
    judgement = judged(trace, change(trace.taps))
    assert judgement.verdict == ("CONFORMS_IN_GAUGE" if how in IN_GAUGE else "CONFORMS"), render(judgement)
    assert any(said in note for note in judgement.notes), judgement.notes
    assert {f.tap for f in judgement.findings} == set(trace.taps)  # nothing is left out


def times(taps, tap, factor=1.5):
    return taps | {tap: taps[tap] * np.asarray(factor, taps[tap].dtype)}


def other_expert(taps, tap):
    ids = taps[tap].copy()
    ids[0, 3, 0] = next(e for e in range(16) if e not in ids[0, 3])
    return taps | {tap: ids}


def first_head(taps):
    x = taps["fwd/L1/mla.k_rope"].copy()
    x[:, :, 0] *= np.asarray(1.5, x.dtype)
    return taps | {"fwd/L1/mla.k_rope": x}


WRONG = {  # a mistake -> the form that it is in, where it is
    "weights": (lambda t: times(t, "fwd/L1/router.weights"), dense, "fwd/L1/router.weights"),
    "an expert": (
        lambda t: other_expert(t, "fwd/L2/router.ids"),
        lambda t: maps(dense(t)),
        "fwd/L2/router.ids",
    ),
    "a row's gate": (lambda t: times(t, "fwd/L1/moe.gate"), of_tokens, "fwd/L1/moe.gate"),
    "a row's output": (lambda t: times(t, "fwd/L1/moe.down"), lambda t: of_tokens(t, flat=True), "fwd/L1/moe.down"),
    "keys": (lambda t: times(t, "fwd/L1/mla.k_rope"), lambda t: repeated(t, 2), "fwd/L1/mla.k_rope"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_seen_in_another_form(what, dtype):
    """Catches a form that hides the mistake, or whose blame goes to other stages than that of the same mistake in our form."""
    wrong, form, tap = WRONG[what]
    trace = recorded(dtype)
    ours, theirs = (judged(trace, taps) for taps in (wrong(trace.taps), form(wrong(trace.taps))))
    assert tap in {f.tap for f in ours.culprits} == {f.tap for f in theirs.culprits}, render(theirs)


def test_keys_that_differ_between_heads_are_blamed():
    """Catches one head's key taken for all of them."""
    judgement = judged(recorded("float32"), first_head(repeated(recorded("float32").taps, 2)))
    assert {f.tap for f in judgement.culprits} == {"fwd/L1/mla.k_rope"}, render(judgement)


@pytest.mark.parametrize("flat", [True, False])
def test_rows_by_token_without_ids_are_not_compared(flat):
    """Catches a port blamed for rows that nobody can put in order, and silence of what to record."""
    taps = without_ids(of_tokens(recorded("float32").taps, flat=flat))
    judgement = judged(
        recorded("float32"),
        taps if not flat else {t: a for t, a in taps.items() if "moe." not in t or t.endswith("rows")},
    )
    assert not judgement.culprits and any("record router.ids" in note for note in judgement.notes), render(judgement)


def test_lists_are_no_maps_and_no_weights_of_all_experts():
    """Catches a list of experts 0 and 1 read as a map of two, and weights of experts that were not chosen thrown away."""
    trace = recorded("float32")
    found, notes = as_lists(trace)
    assert found is trace and not notes
    scores = {"fwd/L1/router.weights": trace.taps["fwd/L1/router.scores"]}
    found, notes = as_lists(Trace(trace.header, trace.taps | scores))
    assert found.taps["fwd/L1/router.weights"].shape == (2, 24, 16) and not notes


def test_a_map_of_fewer_and_a_list_of_two_groups():
    """Catches a token with fewer experts given expert 0 or another's, and group numbers 0 and 1 of two groups read as a map."""
    trace, x = recorded("float32"), np.zeros((1, 2, 16), np.uint8)
    x[0, 0, [3, 7, 11, 15]] = x[0, 1, [2, 9]] = 1
    found, _ = as_lists(Trace(trace.header, {"fwd/L1/router.ids": x}))
    assert found.taps["fwd/L1/router.ids"].tolist() == [[[3, 7, 11, 15], [2, 9, -1, -1]]]
    two = dataclasses.replace(trace.header, config=trace.header.config | {"n_group": 2, "topk_group": 1})
    groups = Trace(two, {"fwd/L1/router.groups": np.array([[[0, 1], [1, 0]]])})  # one too many, each another
    assert as_lists(groups) == (groups, {})


def test_weights_of_some_tokens_in_another_order_are_read_so_behind_them():
    """Catches weights of one sequence, without ids, that are told from their order and then read in it by what follows."""
    kept = ("fwd/L1/ffn_norm", "fwd/L1/router.weights", "fwd/L1/ffn_out")
    trace = recorded("float32")
    first = {t: np.asarray(trace.taps[t])[:1] for t in kept}
    judgement = judged(trace, first | {kept[1]: first[kept[1]][..., ::-1]})
    assert not judgement.culprits, render(judgement)
