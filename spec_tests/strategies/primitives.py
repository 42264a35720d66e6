"""For every primitive of the engine: a hypothesis strategy of its arguments.

`CASES[name]` draws a Case, float64 arrays and static settings, over all legal shapes: zero-sized,
0-d, broadcast, repeated indices. Values keep clear of kinks (ties of `maximum`, x = 0 under a root),
where a central difference and a vjp legitimately disagree. `LAYOUTS` lays the same values out
differently in memory.
"""

import inspect
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.autograd import attention_op, expert_ops, nn_ops, ops


def primitives():
    """{name: lifted op} of everything that `@primitive` made in the engine's op modules."""
    return {
        name: op
        for module in (ops, nn_ops, expert_ops, attention_op)
        for name, op in vars(module).items()
        if hasattr(op, "raw") and inspect.unwrap(op).__module__ == module.__name__
    }


@dataclass(frozen=True)
class Case:
    """Positional arrays (or None) and keyword settings of one call."""

    args: tuple
    static: dict = field(default_factory=dict)


def strided(a):
    """The same values, every other element of a wider array."""
    if not a.ndim:
        return a
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 7, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def backwards(a):
    """The same values behind negative strides."""
    return np.flip(np.flip(a).copy())


def fortran(a):
    """The same values, first axis fastest (np.asfortranarray would make a 0-d array 1-d)."""
    return np.array(a, order="F")


LAYOUTS = {"Fortran": fortran, "strided": strided, "backwards": backwards}

sizes = st.integers(1, 4)
leading = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
any_shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def numbers(draw, shape, *, positive=False, apart_from_zero=False):
    """A float64 array of that shape."""
    a = draw(rngs).standard_normal(shape)
    if positive or apart_from_zero:
        a = np.where(a < 0, a - 0.5, a + 0.5)
    return np.asarray(np.abs(a) if positive else a)


@st.composite
def elementwise(draw, *, n=1, shapes=any_shape, static=None, **kind):
    """n arrays of one shape."""
    shape = draw(shapes)
    return Case(tuple(numbers(draw, shape, **kind) for _ in range(n)), static or {})


@st.composite
def broadcast(draw, *, apart_from_zero=False):
    """Two arrays that broadcast against each other."""
    both = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3, min_side=0)
    shapes = draw(both).input_shapes
    return Case(tuple(numbers(draw, s, apart_from_zero=apart_from_zero) for s in shapes))


@st.composite
def unequal(draw):
    """Two arrays that broadcast and are nowhere equal: maximum has a kink there."""
    case = draw(broadcast())
    return Case((case.args[0], np.asarray(case.args[1] + 0.01 * np.sqrt(2))))


@st.composite
def power(draw):
    p = draw(st.sampled_from([-1, 0, 0.5, 1, 2, 3]))
    return Case((numbers(draw, draw(any_shape), positive=True),), {"p": p})


@st.composite
def matmul(draw):
    both = hnp.mutually_broadcastable_shapes(signature="(m,k),(k,n)->(m,n)", max_dims=2, max_side=3, min_side=0)
    return Case(tuple(numbers(draw, s) for s in draw(both).input_shapes))


@st.composite
def reduction(draw):
    shape = draw(any_shape)
    axis = st.none()
    if shape:
        one = st.integers(-len(shape), len(shape) - 1)
        axis |= one | hnp.valid_tuple_axes(len(shape), min_size=1)
    return Case((numbers(draw, shape),), {"axis": draw(axis), "keepdims": draw(st.booleans())})


@st.composite
def reshape(draw):
    shape = draw(any_shape)
    target = draw(st.permutations(shape) | st.just([int(np.prod(shape))]))
    if 0 not in shape and target and draw(st.booleans()):
        target = [-1, *target[1:]]
    return Case((numbers(draw, shape),), {"shape": tuple(target)})


@st.composite
def transpose(draw):
    shape = draw(any_shape)
    axes = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    return Case((numbers(draw, shape),), {"axes": axes})


@st.composite
def getitem(draw):
    """Basic, integer-array (repeating) and boolean indices."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4))
    fancy = hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=4))
    index = hnp.basic_indices(shape, allow_newaxis=True) | fancy | hnp.arrays(bool, shape)
    return Case((numbers(draw, shape),), {"index": draw(index)})


@st.composite
def concat(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    parts = []
    for size in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        other = list(shape)
        other[axis] = size
        parts.append(numbers(draw, tuple(other)))
    return Case(tuple(parts), {"axis": axis})


def indices(draw, shape, n):
    """Integers below n, repeating freely."""
    return draw(rngs).integers(0, n, shape)


@st.composite
def take_rows(draw):
    rows, width = draw(sizes), draw(sizes)
    return Case((numbers(draw, (rows, width)), indices(draw, draw(leading), rows)))


@st.composite
def take_along(draw):
    lead, n, k = draw(leading), draw(sizes), draw(st.integers(1, 5))
    return Case((numbers(draw, (*lead, n)), indices(draw, (*lead, k), n)))


@st.composite
def linear(draw):
    lead, d, f = draw(leading), draw(sizes), draw(sizes)
    args = (numbers(draw, (*lead, d)), numbers(draw, (f, d)))
    bias = draw(st.sampled_from(["absent", "None", "given"]))
    extra = {"absent": (), "None": (None,), "given": (numbers(draw, (f,)),)}[bias]
    return Case(args + extra)


@st.composite
def rms_norm(draw):
    d = draw(sizes)
    eps = draw(st.sampled_from([1e-6, 1e-2]))
    x = numbers(draw, (*draw(leading), d), apart_from_zero=True)  # curvature grows as 1/|x|^2
    return Case((x, numbers(draw, (d,))), {"eps": eps})


@st.composite
def softmax(draw):
    """Scores, some of them (whole rows too) masked with -inf."""
    x = draw(rngs).standard_normal((*draw(leading), draw(sizes)))
    hidden = draw(hnp.arrays(bool, x.shape) | st.just(np.zeros(x.shape, bool)))
    return Case((np.where(hidden, -np.inf, x),))


@st.composite
def attention(draw):
    """Any mask, also one whose rows see nothing; more queries than one block."""
    b, s, t, h, dim, v = (draw(sizes) for _ in range(6))
    s += draw(st.sampled_from([0, 4]))
    seen = draw(hnp.arrays(bool, (b, 1, s, t)))
    mask = np.where(seen, 0.0, -np.inf)
    shapes = (b, s, h, dim), (b, t, h, dim), (b, t, h, v)
    return Case((*(numbers(draw, x) for x in shapes), mask), {"scale": 0.37})


@st.composite
def spread(draw):
    """Axes of size 1 repeated, axes added in front."""
    shape = draw(any_shape)
    ones = tuple(draw(st.sampled_from([n, 1])) for n in shape)
    return Case((numbers(draw, ones),), {"shape": (*draw(leading), *shape)})


@st.composite
def rotate(draw):
    """One table row per x, or one that all heads share."""
    lead, half = draw(leading), draw(sizes)
    shared = draw(st.booleans()) and len(lead) > 0
    angle = draw(rngs).standard_normal((*lead[:-1], 1, half) if shared else (*lead, half))
    table = np.stack([np.cos(angle), np.sin(angle)])
    return Case((numbers(draw, (*lead, 2 * half)), table), {"interleaved": draw(st.booleans())})


@st.composite
def nll(draw):
    n, v = draw(st.integers(0, 5)), draw(sizes)
    labels = np.where(draw(hnp.arrays(bool, n)), -100, indices(draw, (n,), v))
    denominator = draw(st.sampled_from([None, 1.0, 7.5]))
    return Case((numbers(draw, (n, v)), labels), {"denominator": denominator})


def chosen_experts(draw):
    """(ids (*, K), number of experts, K): distinct per token, as top-k gives them, or repeating."""
    e = draw(sizes)
    k, lead = draw(st.integers(1, e)), draw(leading)
    if draw(st.booleans()):
        return indices(draw, (*lead, k), e), e, k
    return draw(rngs).standard_normal((*lead, e)).argsort(-1)[..., :k], e, k


@st.composite
def dispatch(draw):
    ids, e, _ = chosen_experts(draw)
    return Case((numbers(draw, (*ids.shape[:-1], draw(sizes))), ids), {"n_experts": e})


@st.composite
def grouped_linear(draw):
    ids, e, _ = chosen_experts(draw)
    d, f = draw(sizes), draw(sizes)
    ws = tuple(numbers(draw, (f, d)) for _ in range(e))
    return Case((numbers(draw, (ids.size, d)), ids, *ws))


@st.composite
def combine(draw):
    ids, _, _ = chosen_experts(draw)
    return Case((numbers(draw, (ids.size, draw(sizes))), ids, numbers(draw, ids.shape)))


CASES = {
    "add": broadcast(),
    "sub": broadcast(),
    "mul": broadcast(),
    "div": broadcast(apart_from_zero=True),
    "maximum": unequal(),
    "neg": elementwise(),
    "exp": elementwise(),
    "log": elementwise(positive=True),
    "power": power(),
    "sigmoid": elementwise(),
    "swiglu": elementwise(n=2),
    "cast": elementwise(static={"dtype": np.float64}),
    "round_through": elementwise(static={"to": np.copy}),
    "stop": elementwise(),
    "matmul": matmul(),
    "sum": reduction(),
    "reshape": reshape(),
    "transpose": transpose(),
    "getitem": getitem(),
    "_concat": concat(),
    "take_rows": take_rows(),
    "take_along": take_along(),
    "linear": linear(),
    "rms_norm": rms_norm(),
    "softmax": softmax(),
    "attention": attention(),
    "broadcast": spread(),
    "rotate": rotate(),
    "nll": nll(),
    "dispatch": dispatch(),
    "grouped_linear": grouped_linear(),
    "combine": combine(),
}
