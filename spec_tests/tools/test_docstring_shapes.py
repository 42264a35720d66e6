"""The shapes in docstrings are true: of every primitive, and of every stage as the model calls it.

All dimensions of the model here are different numbers, so that a swapped letter cannot hide.
"""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.tensor import data_of
from refimpl.layers import STAGES, Config, Dialect, observing, router
from refimpl.layers.stage import phase, tap_name
from refimpl.model import ForCausalLM
from refimpl.spec_tests.cases import variants
from refimpl.spec_tests.oracles.shapes import ShapeError, check_call, describe, value
from refimpl.spec_tests.strategies.models import make_weights
from refimpl.spec_tests.strategies.primitives import CASES, primitives

OPS = primitives()
UNSHAPED = {  # their values are compared with loops, shape and all, in engine/test_ops.py
    "sum": "the result's shape is the setting's",
    "reshape": "the result's shape is the setting's",
    "broadcast": "the result's shape is the setting's",
    "transpose": "the result's shape is the setting's",
    "getitem": "the result's shape is the index's",
    "_concat": "any number of parts, one axis free",
}
CONFIG = Config(
    vocab_size=31,
    hidden_size=22,
    intermediate_size=32,
    moe_intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=5,
    n_shared_experts=2,
    n_routed_experts=20,
    num_experts_per_tok=6,
    n_group=4,
    topk_group=3,
    q_lora_rank=17,
    kv_lora_rank=13,
    qk_nope_head_dim=15,
    qk_rope_head_dim=14,
    v_head_dim=11,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
)
BATCH, LENGTH, CHUNK = 8, 25, 10
LETTERS = {
    "B": BATCH,
    "D": 22,
    "V": 31,
    "H": 5,
    "Dn": 15,
    "Dr": 14,
    "Dv": 11,
    "C": 13,
    "Q": 17,
    "E": 20,
    "G": 4,
    "K": 6,
}
WIDTH = {"mlp": 32, "moe": 28, "shared": 2 * 28, "int8": 33}  # F
HEAD = {n: LETTERS[n] for n in ("Dn", "Dr", "Dv")}  # letters that no docstring uses for anything else


# ---- Recorded calls


def model_of(config):
    """A model with random weights and a bias on the attention projections."""
    d = config.to_dict()
    weights = make_weights(d, np.random.default_rng(0), mtp=config.num_nextn_predict_layers)
    return ForCausalLM.from_weights(config, weights)


def record():
    """{stage: [(tap, args, static, out)]} of runs that reach every stage."""
    calls, rng = {}, np.random.default_rng(1)

    def note(stage, run, /, *args, **static):
        out = run(*args, **static)
        calls.setdefault(stage.name, []).append((tap_name(stage), args, static, out))
        return out

    tokens = rng.integers(0, 31, (BATCH, LENGTH))
    more = rng.integers(0, 31, (BATCH, CHUNK))
    valid, documents = np.ones_like(tokens), np.zeros_like(tokens)
    valid[1, -3:] = 0
    with observing(note):
        for config in (
            CONFIG,
            CONFIG.replace(attention_bias=True, num_nextn_predict_layers=0),
            CONFIG.replace(q_lora_rank=None, dialect=Dialect(routing_weight_on="activation")),
        ):
            model = model_of(config)
            inputs = model.inputs(tokens, None, valid, documents, labels=tokens)
            model.loss(inputs, mtp_weight=0.3, aux_weight=1e-4)
            cache = model(inputs).cache
            chunk = model.inputs(more, documents=np.zeros_like(more), cache=cache)
            for attend in ("expanded", "absorbed"):
                model(chunk, cache, attend=attend)
    counts = STAGES["router.counts"]
    with observing(note):
        load = counts(rng.integers(0, 20, (BATCH, LENGTH, 6)), n_experts=20)
        router.bias_update(np.zeros(20), load, gamma=1e-3, zero_sum=False)
        x = rng.standard_normal((BATCH, LENGTH, CONFIG.hidden_size))
        STAGES["int8.fake_quant"](x, STAGES["int8.scale"](x))
        STAGES["int8.mixed_linear"](x, rng.standard_normal((WIDTH["int8"], CONFIG.hidden_size)))
        with phase(f"dec{LENGTH}"):  # so that S and T differ
            for name, call in variants.calls(rng, **LETTERS, S=CHUNK, T=CHUNK + LENGTH).items():
                STAGES[name](*call.args, **call.static)
    return calls


CALLS = record()


def letters_at(stage, tap, args):
    """The letters of Stage.shape where this call was made."""
    cached = tap.startswith("dec")
    depth = int(m[1]) if (m := re.search(r"/mtp(\d)", tap)) else 0
    seen = {"S": CHUNK if cached else LENGTH, "k": depth}
    if depth and not stage.name.startswith("mtp."):
        seen["S"] -= depth  # inside an MTP module S counts its own positions
    seen["T"] = CHUNK + LENGTH if cached else seen["S"]
    seen["M"] = BATCH * seen["S"] * LETTERS["K"]
    if stage.name == "router.groups":
        seen["M"] = CONFIG.topk_group  # the report's M, "at most M nodes"
    return LETTERS | seen | {"F": WIDTH.get(stage.name.partition(".")[0], 0)}


# ---- The claims


def test_all_dimensions_are_different():
    """Catches a model in which two letters are the same number, so that swapping them is invisible."""
    half = LETTERS["Dr"] // 2
    sizes = [*LETTERS.values(), *WIDTH.values(), LENGTH, CHUNK, CHUNK + LENGTH, CONFIG.topk_group]
    assert len({*sizes, half, LENGTH - 1, LENGTH - 2}) == len(sizes) + 3


def test_every_stage_is_recorded():
    """Catches a stage that this file never sees."""
    assert set(CALLS) == set(STAGES)


@pytest.mark.parametrize("name", sorted(set(OPS) - set(UNSHAPED)))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_primitive_has_the_shapes_of_its_docstring(name, data):
    """Catches a docstring that rots, and an argument without a shape."""
    case = data.draw(CASES[name])
    y = OPS[name](*case.args, **case.static)
    assert describe(OPS[name])[1] is not None
    check_call(OPS[name], case.args, y)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_stage_has_the_shapes_of_its_docstring(name):
    """Catches a docstring that rots, and `None` passed where it is not announced."""
    assert describe(STAGES[name].fn)[1] is not None
    for _, args, static, out in CALLS[name]:
        depth = {"k": static["depth"]} if "depth" in static else {}
        check_call(STAGES[name].fn, args, out, **HEAD, **depth)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_stage_has_the_shape_it_declares(name):
    """Catches `Stage.shape`, which traces carry, disagreeing with what the stage returns."""
    stage = STAGES[name]
    for tap, args, _, out in CALLS[name]:
        letters = letters_at(stage, tap, args)
        assert data_of(out).shape == tuple(int(value(t, letters)) for t in stage.shape.split())


# ---- The checker is checked


def example(x, ids, w=None, *ws, scale=1.0):
    """y = something.  x (B, S, H Dv), ids (B, S) int, w (D, H (Dn+Dv)) or None, E times w (F, D)
    -> y (B, S, 2 D).
    """


def good():
    """Arguments and result that fit `example`: B 2, S 3, H 5, Dv 7, Dn 4, D 11, F 13, E 2."""
    arrays = [np.zeros(s) for s in ((2, 3, 35), (2, 3), (11, 55), (13, 11), (13, 11))]
    arrays[1] = arrays[1].astype(int)
    return arrays, np.zeros((2, 3, 22))


def test_a_true_docstring_passes_and_binds():
    """Catches a parser that rejects or ignores what it should read."""
    args, out = good()
    letters = check_call(example, args, out, Dv=7)
    assert letters == {"B": 2, "S": 3, "H": 5, "Dv": 7, "Dn": 4, "D": 11, "F": 13, "E": 2}
    check_call(example, [args[0], args[1], None], out, Dv=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("2 D", "D"), "D is"),
        (("B, S, 2 D", "S, B, 2 D"), "elsewhere but"),
        (("B, S, 2 D", "B, S"), "described with 2 axes"),
        (("H (Dn+Dv)", "H Dn+Dv"), None),
        (("(F, D)", "(D, F)"), "elsewhere but"),
        (("(B, S) int,", "(B, S),"), None),
        (("x (B, S, H Dv)", "x (B, S, H Dv) int"), "says int"),
        (("ids (B, S) int,", ""), "ids has no shape"),
        (("2 D)", "D/2)"), "elsewhere but"),
    ],
)
def test_a_wrong_docstring_fails(change, message):
    """Catches a checker that agrees with everything; `None` marks changes that stay true."""
    args, out = good()
    doc = " ".join(example.__doc__.split()).replace(*change)
    if message is None:
        check_call(example, args, out, doc)
    else:
        with pytest.raises(ShapeError, match=message):
            check_call(example, args, out, doc, Dv=7)


def test_none_must_be_announced():
    """Catches an optional argument that the docstring calls an array."""
    args, out = good()
    doc = example.__doc__.replace(" or None", "")
    with pytest.raises(ShapeError, match="w is None"):
        check_call(example, [args[0], args[1], None], out, doc, Dv=7)


def wrong_results(name):
    """The docstring of a stage with each letter of its result replaced by another of its letters."""
    doc = " ".join(STAGES[name].fn.__doc__.split())
    inputs, result, _ = describe(STAGES[name].fn)
    others = {t for d in inputs.values() for t in d.terms if t.isalpha()}
    text = f"({', '.join(result.terms)}{',' * (len(result.terms) == 1)})"
    at = doc.rindex(text, doc.index("->"))
    for i, term in enumerate(result.terms):
        for other in sorted(others - {term}):
            terms = [*result.terms[:i], other, *result.terms[i + 1 :]]
            yield f"{doc[:at]}({', '.join(terms)}){doc[at + len(text) :]}"


def telling(call):
    """Prefer calls in which S and T differ and no argument is None."""
    return call[0].startswith("dec"), -sum(a is None for a in call[1])


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_swapped_letter_in_a_result_is_noticed(name):
    """Catches shapes that agree by chance: every other letter in a result's place must fail."""
    if name.startswith("loss.") or describe(STAGES[name].fn)[1].terms == ("*",):
        return  # no letter to swap
    _, args, static, out = max(CALLS[name], key=telling)
    depth = {"k": static["depth"]} if "depth" in static else {}
    for doc in wrong_results(name):
        with pytest.raises(ShapeError):
            check_call(STAGES[name].fn, args, out, doc, **HEAD, **depth)
