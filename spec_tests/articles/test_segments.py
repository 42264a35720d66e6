"""Segment recurrence: a text in pieces, each layer remembering its inputs of the pieces before."""

import numpy as np
import pytest

from refimpl.autograd import SpecError, Tensor, backward, directional, ops
from refimpl.layers import STAGES
from refimpl.layers.common import mask
from refimpl.layers.mla import entries
from refimpl.layers.rope import rope_tables
from refimpl.layers.variants.segments import segment
from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, small

MODEL = small()
ATTENTIONS = [layer.self_attn for layer in MODEL.model.layers]
WIDTH, SIZE = SMALL.hidden_size, 4


def table(first, n):
    positions = np.arange(first, first + n)[None].repeat(2, axis=0)
    return rope_tables(positions, dim=SMALL.qk_rope_head_dim, theta=SMALL.rope_theta, yarn=SMALL.yarn, dtype=np.float64)


def layer(attention, at):
    """x + MLA(x) as a layer of `segment`, whose tokens begin at place `at`."""

    def run(memory, x):
        s, p = x.shape[1], 0 if memory is None else memory.shape[1]
        m = mask(np.zeros((2, s), int), None, None, None, past=p, dtype=np.float64)
        past = entries(attention, memory, table(at - p, p)) if p else None
        return ops.add(x, attention(x, table(at, s), m, past)[0])

    return run


def read(x, sizes, length):
    """The last layer's output of every token, read in segments of those sizes."""
    memories, out, at = [None] * len(ATTENTIONS), [], 0
    for n in sizes:
        layers = [layer(a, at) for a in ATTENTIONS]
        y, memories = segment(layers, memories, x[:, at : at + n], length=length)
        out.append(y)
        at += n
    return np.concatenate(out, axis=1)


@pytest.fixture
def x():
    return np.random.default_rng(6).normal(size=(2, 4 * SIZE, WIDTH))


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [1, 9, 6], [15, 1], [1] * 16], ids=str)
def test_with_a_memory_of_everything_segments_are_the_whole(x, sizes):
    """Catches memory of the wrong layer, positions that start again, the newest tokens forgotten instead of the oldest."""
    np.testing.assert_allclose(read(x, sizes, 16), read(x, [16], 0), **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_memory_reaches_one_layer_deeper_per_layer(x, length):
    """Catches a memory longer or shorter than said: with two layers, the first token of the last segment feels the `length` tokens
    before it, and through the lower layer at most the segment before (bit for bit nothing further back).
    """
    plain = read(x, [SIZE] * 4, length)
    felt = []
    for place in range(12):
        other = x.copy()
        other[:, place] += 0.1
        felt.append(not np.array_equal(read(other, [SIZE] * 4, length)[:, 12], plain[:, 12]))
    # its memory holds outputs of layer 0 for places 12 - length..11, which saw places back to 8 - length
    assert felt == [place >= 8 - length for place in range(12)]


def test_without_a_memory_segments_are_texts_of_their_own(x):
    """Catches a memory of length 0 that keeps everything (x[-0:])."""
    np.testing.assert_array_equal(read(x, [SIZE] * 4, 0)[:, :SIZE], read(x[:, :SIZE], [SIZE], 0))
    other = x.copy()
    other[:, :12] += 1
    np.testing.assert_array_equal(read(other, [SIZE] * 4, 0)[:, 12:], read(x, [SIZE] * 4, 0)[:, 12:])


def test_what_is_kept_is_the_newest():
    """Catches the oldest kept, and a list grown without end."""
    a, b = np.arange(6.0).reshape(1, 3, 2), np.arange(6.0, 10).reshape(1, 2, 2)
    keep = STAGES["variant.segment_memory"]
    for length in range(7):
        held = [row.tolist() for row in keep(a, b, length=length)[0]]
        assert held == [[2.0 * i, 2.0 * i + 1] for i in range(5)][max(5 - length, 0) :]
    with pytest.raises(SpecError, match="a memory of -1 tokens"):
        keep(None, b, length=-1)


def test_no_gradient_reaches_an_earlier_segment(x):
    """Catches back-propagation through the memory; in one pass over the same tokens that gradient is there."""
    first, second = Tensor(x[:, :SIZE]), Tensor(x[:, SIZE : 2 * SIZE])
    start, none = [layer(a, 0) for a in ATTENTIONS], [None] * len(ATTENTIONS)
    _, memories = segment(start, none, first, length=SIZE)
    y, _ = segment([layer(a, SIZE) for a in ATTENTIONS], memories, second, length=SIZE)
    dy = np.random.default_rng(1).normal(size=y.shape)
    found = backward(y, dy)
    assert first not in found and np.abs(found[second]).max() > 0
    whole, _ = segment(start, none, ops.concat([first, second], axis=1), length=0)
    at_once = backward(whole, np.concatenate([np.zeros_like(dy), dy], axis=1))
    assert np.abs(at_once[first]).max() > 1e-3


def test_weights_learn_from_how_they_read_the_memory(x):
    """Catches a detached memory of keys and values instead of inputs: the derivative by the latent's weight needs both parts."""
    attention = ATTENTIONS[0]
    name = "kv_a_proj_with_mqa.weight"

    def output(w, memory):
        changed = attention.map(lambda n, old: w if n == name else old)
        return layer(changed, SIZE)(memory, x[:, SIZE : 2 * SIZE])

    w = dict(attention.named_weights())[name]
    assert directional(lambda w: output(w, x[:, :SIZE]), w) < 1e-7
    dy = np.random.default_rng(1).normal(size=(2, SIZE, WIDTH))
    leaf, again = Tensor(w), Tensor(w)
    with_memory = backward(output(leaf, x[:, :SIZE]), dy)[leaf]
    assert np.abs(with_memory - backward(output(again, None), dy)[again]).max() > 1e-3
