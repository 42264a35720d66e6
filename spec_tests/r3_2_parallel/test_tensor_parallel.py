"""R 3.2, 3.4: tensor, vocabulary and sequence parallelism. W ranks give what one rank gives, forward and backward."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import Parameter, SpecError, Tensor, backward, nn_ops
from refimpl.layers import PRESETS, loss
from refimpl.layers.block import DecoderLayer
from refimpl.layers.mla import Attention
from refimpl.layers.moe import MLP
from refimpl.layers.stage import observing
from refimpl.parallel_emulation.axes import sequence as sp
from refimpl.parallel_emulation.axes import tensor as tp
from refimpl.parallel_emulation.axes import vocabulary
from refimpl.parallel_emulation.axes.placed import Placed, placed
from refimpl.parallel_emulation.collectives import shares, slices
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.spec_tests.cases import layer_programs
from refimpl.spec_tests.cases.layer_programs import CONFIG, drawn, normal, pull, split_layer, surroundings

# Only the order of float64 sums differs: of at most some hundred terms each, through at most ten products in a row. That
# is 1e-13 of the largest element; the values here are at most of order 100.
CLOSE = {"rtol": 0, "atol": 1e-10}
RANKS = st.integers(1, 8)


def join(results, name, axis=None):
    """The whole of a split result; a replicated one must be the same on every rank, bit for bit."""
    parts = [r[name] for r in results]
    if axis is not None:
        return np.concatenate(parts, axis=axis)
    for part in parts:
        np.testing.assert_array_equal(part, parts[0])
    return parts[0]


def axis_of(name):
    """Along which axis a weight is split among tensor-parallel ranks: heads and channels, rows first, then columns."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 1
    split = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
    return 0 if any(f".{s}." in f".{name}" for s in split) else None


def check(results, want, *, x_axis=None):
    """Every rank's part of y, dx and all gradients, put together, is the serial result."""
    assert {n for r in results for n in r} == set(want)
    for name in want:
        axis = x_axis if name in ("y", "dx") else axis_of(name)
        np.testing.assert_allclose(join(results, name, axis), want[name], err_msg=name, **CLOSE)


def stages_called(run):
    """How often each stage is called."""
    seen = Counter()

    def note(stage, call, /, *args, **static):
        seen[stage.name] += 1
        return call(*args, **static)

    with observing(note):
        run()
    return seen


@st.composite
def attentions(draw):
    """A config of attention, the number of ranks, sequences and tokens; ranks need not divide heads or tokens."""
    n = draw(RANKS)
    c = CONFIG.replace(
        num_attention_heads=draw(st.integers(n, n + 4)),
        q_lora_rank=draw(st.sampled_from([None, 6])),
        attention_bias=draw(st.booleans()),
        v_head_dim=draw(st.integers(1, 6)),
        qk_nope_head_dim=draw(st.integers(1, 6)),
    )
    return c, n, draw(st.integers(1, 2)), draw(st.integers(max(n, 2), n + 6))


# ---- Tensor parallel


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_column_then_row_is_the_product_bit_for_bit_where_sums_are_exact(n, more, rows, seed):
    """Catches channels cut at other places in the two matrices, a slice left out or used twice. On whole numbers every
    sum is exact, so its order cannot excuse anything."""
    rng = np.random.default_rng(seed)
    x, a, b, dy = [rng.integers(-9, 10, s).astype(float) for s in ((rows, 3), (n + more, 3), (4, n + more), (rows, 4))]

    def program(comm):
        mine = tp.part(comm, n + more, "channels")
        leaves = [Tensor(x), Parameter(a[mine]), Parameter(b[:, mine])]
        y = tp.row_linear(comm, tp.column_linear(comm, leaves[0], leaves[1]), leaves[2])
        grads = backward(y, dy)
        return dict(zip("ydab", [y.data, *[grads[t] for t in leaves]], strict=True))

    got = spmd(n, program, seed=seed)
    np.testing.assert_array_equal(join(got, "y"), x @ a.T @ b.T)
    np.testing.assert_array_equal(join(got, "d"), dy @ b @ a)
    np.testing.assert_array_equal(join(got, "a", 0), (dy @ b).T @ x)
    np.testing.assert_array_equal(join(got, "b", 1), dy.T @ (x @ a.T))


@given(st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_an_mlp_split_by_channels_is_the_mlp(n, more, seed):
    """Catches gate and up cut differently, an output that was not added up, a gradient of x added up twice."""
    whole = drawn(MLP(5, n + more), seed)
    x, dy = normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2)
    want = pull(lambda m, x: m(x)[0], whole, x, dy)
    got = spmd(n, lambda comm: pull(lambda m, x: tp.mlp(comm, m, x), tp.shard_mlp(comm, whole), x, dy), seed=seed)
    check(got, want)


@given(attentions(), st.sampled_from(["expanded", "absorbed"]))
@settings(max_examples=30, deadline=None)
def test_attention_split_by_heads_is_attention(case, attend):
    """Catches heads cut through the middle, a bias added by every rank, latents whose gradient is one rank's only, the
    serial head count in a reshape."""
    c, n, batch, length = case
    whole, (table, mask) = drawn(Attention(c)), surroundings(c, batch, length)
    x, dy = normal(batch, length, c.hidden_size, seed=1), normal(batch, length, c.hidden_size, seed=2)

    def parallel(comm):
        def run(m, x):
            return tp.attention(comm, m, x, table, mask, attend=attend)[0]

        return pull(run, tp.shard_attention(comm, whole), x, dy)

    want = pull(lambda m, x: m(x, table, mask, attend="expanded")[0], whole, x, dy)
    check(spmd(n, parallel, seed=length), want)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_decoding_keeps_the_whole_latent_cache_on_every_rank(n):
    """Catches a cache divided by heads: C + Dr numbers a token are no head's own, so tensor parallelism saves none of it;
    and a step that does not see the past."""
    whole, steps = drawn(Attention(CONFIG)), normal(2, 6, 24, seed=1)
    table, mask = surroundings(CONFIG, 2, 6)
    want, kv = whole(steps, table, mask)

    def program(comm):
        m, past, out = tp.shard_attention(comm, whole), None, []
        for cut in (slice(0, 4), slice(4, 5), slice(5, 6)):  # a prefill, then two steps, absorbed by default
            y, past = tp.attention(comm, m, steps[:, cut], table[:, :, cut], mask[:, :, cut, : cut.stop], past)
            out.append(y)
        return {"y": np.concatenate(out, axis=1), "c": past[0], "k": past[1]}

    got = []
    called = stages_called(lambda: got.extend(spmd(n, program)))
    assert called["mla.scores"] == n and called["mla.scores_absorbed"] == 2 * n
    np.testing.assert_allclose(join(got, "y"), want, **CLOSE)
    np.testing.assert_allclose(join(got, "c"), kv[0], **CLOSE)
    np.testing.assert_allclose(join(got, "k"), kv[1], **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("program", [layer_programs.tp_block, layer_programs.sp_block])
def test_a_dense_layer_is_the_serial_layer(program, n):
    """Catches a norm or a residual on the wrong side of a message, gradients of norms that are one rank's part."""
    table, mask = surroundings(CONFIG)
    x, dy = normal(2, 7, 24, seed=1), normal(2, 7, 24, seed=2)
    want = pull(lambda m, x: m(x, table, mask)[0], drawn(DecoderLayer(CONFIG, 0)), x, dy)
    check(spmd(n, program), want, x_axis=1 if program is layer_programs.sp_block else None)


def test_placed_programs_run_the_serial_layer_unchanged():
    """Catches a module in whose place a program stands and which loses its weights' names or its other calls."""
    table, mask = surroundings(CONFIG)
    layer, x, dy = drawn(DecoderLayer(CONFIG, 0)), normal(2, 7, 24, seed=1), normal(2, 7, 24, seed=2)

    def program(comm):
        mine = split_layer(comm, layer)
        attention = Placed(mine.self_attn, lambda m, *args: tp.attention(comm, m, *args))
        mlp = Placed(mine.mlp, lambda m, x: (tp.mlp(comm, m, x), None))
        return pull(lambda m, x: m(x, table, mask)[0], placed(layer, self_attn=attention, mlp=mlp), x, dy)

    check(spmd(3, program), pull(lambda m, x: m(x, table, mask)[0], layer, x, dy))


# ---- Sequence parallel


@given(attentions(), st.sampled_from(["latents", "hidden"]))
@settings(max_examples=30, deadline=None)
def test_sequence_parallel_attention_is_attention(case, gather):
    """Catches tokens in another order after the gather, rotary angles of local instead of global positions, a key latent
    without the other ranks' gradients, gradients of replicated weights from my tokens or my heads alone."""
    c, n, batch, length = case
    whole, (table, mask) = drawn(Attention(c)), surroundings(c, batch, length)
    x, dy = normal(batch, length, c.hidden_size, seed=1), normal(batch, length, c.hidden_size, seed=2)

    def parallel(comm):
        mine = sp.tokens_of(comm, length)

        def run(m, x):
            return sp.attention(comm, m, x, table, mask, gather=gather)

        return pull(run, tp.shard_attention(comm, whole), x[:, mine], dy[:, mine])

    check(spmd(n, parallel, seed=length), pull(lambda m, x: m(x, table, mask)[0], whole, x, dy), x_axis=1)


def test_gathering_latents_sends_what_is_smaller_and_nothing_more():
    """Catches a gather of the hidden where 3.4 times less suffices: Q + C + Dr = 2112 of D = 7168 for V3."""
    v3 = PRESETS["deepseek-v3"]
    numbers = v3.q_lora_rank + v3.kv_lora_rank + v3.qk_rope_head_dim
    assert (numbers, round(v3.hidden_size / numbers, 1)) == (2112, 3.4)
    n, (batch, length, d) = 3, (2, 7, 24)
    for gather, width in (("latents", 10 + 9 + 8), ("hidden", d)):
        log = Log()
        spmd(n, layer_programs.sp_block, gather, log=log)
        for rank, tokens in enumerate(shares(length, n)):
            sent = {k: log.bytes(rank=rank, label=f"attention.{k}") for k in ("gather", "scatter.bwd")}
            assert sent == {
                "gather": (n - 1) * batch * tokens * width * 8,
                "scatter.bwd": (n - 1) * batch * tokens * d * 8,
            }
            others = length - tokens
            sent = {k: log.bytes(rank=rank, label=f"attention.{k}") for k in ("gather.bwd", "scatter")}
            assert sent == {"gather.bwd": batch * others * width * 8, "scatter": batch * others * d * 8}


def test_sequence_parallelism_costs_the_bytes_of_tensor_parallelism():
    """Catches a gather that sends every token to every rank twice: all-gather plus reduce-scatter is one all-reduce."""
    n, (batch, length, d) = 4, (2, 8, 24)  # divisible, so that the shares of a flat all-reduce fall on whole tokens
    whole = drawn(MLP(d, 18))
    x = normal(batch, length, d)
    logs = Log(), Log()
    spmd(n, lambda comm: tp.mlp(comm, tp.shard_mlp(comm, whole), x), log=logs[0])
    mine = slices(shares(length, n))
    spmd(n, lambda comm: sp.mlp(comm, tp.shard_mlp(comm, whole), x[:, mine[comm.rank]], length=length), log=logs[1])
    for rank in range(n):
        assert logs[0].bytes(rank=rank) == logs[1].bytes(rank=rank) == 2 * (n - 1) / n * x.nbytes


def test_tensor_parallel_bytes_are_one_all_reduce_forward_and_one_backward():
    """Catches a second all-reduce in attention or MLP (its latents share one message), or one that is not needed."""
    n, tokens, d = 3, 2 * 7, 24
    log = Log()
    spmd(n, layer_programs.tp_block, log=log)

    def all_reduced(numbers):  # over all ranks: 2 (n - 1) / n of the bytes each
        return 2 * (n - 1) * tokens * numbers * 8

    assert log.bytes(label="mlp.*") == 2 * all_reduced(d)  # mlp.scatter, mlp.gather, mlp.bwd.scatter, mlp.bwd.gather
    assert log.bytes(label="attention.scatter") + log.bytes(label="attention.gather") == all_reduced(d)
    assert log.bytes(label="attention.bwd.*") == all_reduced(10 + 9 + 8)
    assert log.calls(rank=0) == 2 * 4


# ---- Vocabulary


@given(RANKS, st.integers(0, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_split_embedding_is_the_embedding_bit_for_bit(n, more, length, seed):
    """Catches ids off by the first row, a row counted by two ranks, repeated tokens whose gradients do not add up."""
    rng = np.random.default_rng(seed)
    w, tokens = rng.standard_normal((n + more, 3)), rng.integers(0, n + more, (2, length))
    dy = rng.standard_normal((2, length, 3))
    w[0] = np.nan if (tokens != 0).all() else w[0]  # what stands in a row that nobody asked for does not matter

    def serial():
        leaf = Parameter(w)
        y = leaf[tokens]
        return y.data, backward(y, dy)[leaf]

    def program(comm):
        leaf = Parameter(vocabulary.shard_rows(comm, w))
        y = vocabulary.embed(comm, tokens, leaf, vocab=n + more)
        return {"y": y.data, "dw": backward(y, dy)[leaf]}

    got, (y, dw) = spmd(n, program, seed=seed), serial()
    np.testing.assert_array_equal(join(got, "y"), y)
    np.testing.assert_array_equal(join(got, "dw", 0), dw)


@given(RANKS, st.integers(0, 6), st.integers(1, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_split_cross_entropy_is_cross_entropy(n, more, rows, seed, large):
    """Catches a maximum of my rows only, an ignored label that counts or takes a gradient, the label's one in every rank.

    The sum of V exponentials is taken in parts: relative error V eps at most, and of order 1 in the loss."""
    rng = np.random.default_rng(seed)
    v = n + more
    z = rng.standard_normal((rows, v)) * (300 if large else 1)  # e^300 squared overflows without the maximum
    labels = np.where(rng.random(rows) < 0.3, loss.IGNORE, rng.integers(0, v, rows))

    def grads_of(f, z):
        leaf = Tensor(z)
        y = f(leaf)
        return {"y": y.data, "dz": backward(y, np.asarray(0.7))[leaf]}

    want = grads_of(lambda z: nn_ops.nll(z, labels), z)

    def program(comm):
        mine = z[:, tp.part(comm, v, "rows")]
        return grads_of(lambda z: vocabulary.nll(z, labels, tp=comm, vocab=v), mine)

    log = Log()
    got = spmd(n, program, seed=seed, log=log)
    np.testing.assert_allclose(join(got, "y"), want["y"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(join(got, "dz", 1), want["dz"], rtol=0, atol=1e-14)
    assert log.bytes() == 2 * (n - 1) * 3 * rows * 8  # maximum, sum, picked: 3 numbers a row, not V; nothing backward


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_embedding_head_and_loss_together_are_the_serial_ones(n):
    """Catches a loss of unshifted labels, logits gathered in another order, an input gradient of my rows only."""
    v, tokens = CONFIG.vocab_size, np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 7))
    leaves = [Parameter(normal(v, 24, seed=s)) for s in (4, 5)]
    x = leaves[0][tokens]
    y = nn_ops.linear(x, leaves[1])
    value = loss.main(y, np.where(np.arange(7) == 3, -100, tokens))
    grads = backward(value, keep=[x])
    want = {"logits": y.data, "loss": value.data, "dx": grads[x], "embed": grads[leaves[0]], "head": grads[leaves[1]]}
    got = spmd(n, layer_programs.vocabulary_loss)
    for name in want:
        whole = join(got, name, 0 if name in ("embed", "head") else None)
        np.testing.assert_allclose(whole, want[name], err_msg=name, **CLOSE)


@given(RANKS, st.integers(0, 4), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_sequence_parallel_embedding_and_head_are_the_serial_ones(n, more, seed):
    """Catches tokens that end up with another rank than their embedding, a head that sees my tokens only."""
    v, length, rng = n + more, n + more, np.random.default_rng(seed)
    w, head, tokens = rng.standard_normal((v, 3)), rng.standard_normal((v, 3)), rng.integers(0, v, (2, length))
    dy = rng.standard_normal((2, length, v))

    def program(comm):
        mine = tp.part(comm, v, "rows")
        leaves = [Parameter(w[mine]), Parameter(head[mine])]
        x = sp.embed(comm, tokens, leaves[0], vocab=v)
        y = sp.logits(comm, x, leaves[1], length=length)
        grads = backward(y, dy[..., mine])
        return {"x": x.data, "y": y.data, "dw": grads[leaves[0]], "dhead": grads[leaves[1]]}

    got, leaves = spmd(n, program), [Parameter(w), Parameter(head)]
    x = leaves[0][tokens]
    y = nn_ops.linear(x, leaves[1])
    grads = backward(y, dy)
    np.testing.assert_array_equal(join(got, "x", 1), x.data)
    np.testing.assert_allclose(join(got, "y", 2), y.data, **CLOSE)
    np.testing.assert_allclose(join(got, "dw", 0), grads[leaves[0]], **CLOSE)
    np.testing.assert_allclose(join(got, "dhead", 0), grads[leaves[1]], **CLOSE)


# ---- Bad input


X = np.zeros((1, 3, 24))
BAD = {
    "1 heads for 2 tensor-parallel ranks": lambda c: tp.shard_attention(
        c, drawn(Attention(CONFIG.replace(num_attention_heads=1)))
    ),
    "1 feed-forward channels for 2": lambda c: tp.shard_mlp(c, drawn(MLP(3, 1))),
    "1 vocabulary rows for 2": lambda c: vocabulary.shard_rows(c, np.zeros((1, 3))),
    "3 vocabulary rows on rank 0; of 4 its share is 0:2": lambda c: vocabulary.embed(
        c, np.zeros((1, 1), int), np.zeros((3, 2)), vocab=4
    ),
    "token ids from 0 to 4; expected 0 to 3": lambda c: vocabulary.embed(
        c, np.array([[0, 4]]), np.zeros((2, 2)), vocab=4
    ),
    "labels from -1 to -1; expected 0 to 3": lambda c: vocabulary.nll(np.zeros((1, 2)), np.array([-1]), tp=c, vocab=4),
    "1 tokens for 2 sequence-parallel ranks": lambda c: sp.tokens_of(c, 1),
    "3 tokens on rank 0; of 4 its share is 0:2": lambda c: sp.mlp(c, drawn(MLP(24, 4)), X[:, : 3 - c.rank], length=4),
    "gather is 'latents' or 'hidden'": lambda c: sp.attention(
        c, drawn(Attention(CONFIG)), X, *surroundings(CONFIG, 1, 3), gather="all"
    ),
    "a layer with experts needs ffn": lambda c: sp.block(
        c,
        placed(drawn(DecoderLayer(CONFIG, 1)), self_attn=tp.shard_attention(c, drawn(Attention(CONFIG)))),
        X[:, : 2 - c.rank],
        *surroundings(CONFIG, 1, 3),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_sizes_that_do_not_fit_are_refused(message):
    """Catches a rank without heads, channels, rows or tokens, and slices that are not this rank's."""
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        spmd(2, BAD[message])


def test_a_rank_calls_the_stages_of_the_serial_layer():
    """Catches mathematics re-derived beside the stages, which precision plans and patches would then not reach."""
    table, mask = surroundings(CONFIG)
    layer, x = drawn(DecoderLayer(CONFIG, 0)), normal(2, 7, 24)
    serial = stages_called(lambda: layer(x, table, mask))
    for program in (layer_programs.tp_block, layer_programs.sp_block):
        called = stages_called(lambda program=program: spmd(2, program)) - Counter({"mla.rope_tables": 2, "mask": 2})
        assert called == {name: 2 * times for name, times in serial.items()}
