"""Rank programs of the parallel layers with inputs of their own: the same source on the simulator and under mpiexec.

`python -m refimpl.parallel_emulation run -n 4 refimpl.spec_tests.cases.layer_programs:moe` runs one in both and compares them
bit for bit. Each returns a dict of arrays; PROGRAMS are those for 1 to 4 ranks.
"""

from functools import partial

import numpy as np

from refimpl.autograd import Parameter, Tensor, backward
from refimpl.layers import common, rope
from refimpl.layers.block import DecoderLayer
from refimpl.layers.module import is_buffer
from refimpl.parallel_emulation import axes
from refimpl.parallel_emulation.axes import vocabulary
from refimpl.parallel_emulation.axes.expert_wire import ONE_RANK, OWN, V1, V2, V3_TRAINING
from refimpl.parallel_emulation.axes.placed import Placed, placed
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.train import AdamState, AdamW, adamw

from .configs import SMALL

CONFIG = SMALL.replace(intermediate_size=18, num_attention_heads=5, num_nextn_predict_layers=1)
"""Heads and channels that do not divide among the ranks."""
BATCH, LENGTH = 2, 7  # tokens do not divide among the ranks


# ---- Helpers, for tests too


def drawn(module, seed=0, dtype=np.float64):
    """The module with random weights, drawn large so that a mistake shows."""
    rng = np.random.default_rng(seed)

    def draw(name, unset):
        if "norm" in name:
            return (1 + 0.2 * rng.standard_normal(unset.shape)).astype(dtype)
        spread = 0.3 if len(unset.shape) == 1 else 1.3 / np.sqrt(unset.shape[-1])
        return (spread * rng.standard_normal(unset.shape)).astype(dtype)

    return module.map(draw)


def normal(*shape, seed=0, dtype=np.float64):
    """Random numbers of that shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def surroundings(c, batch=BATCH, length=LENGTH, dtype=np.float64):
    """rope tables (2, B, S, Dr/2) and causal mask (B, 1, S, S)."""
    positions = np.arange(length)[None].repeat(batch, 0)
    table = rope.rope_tables(positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=dtype)
    return table, common.mask(positions, None, None, None, past=0, dtype=dtype)


def pull(f, module, x, dy):
    """y = f(module, x), and the gradients of <dy, y>: {"y", "dx", weight names}, those of unused weights left out."""
    tracked = module.map(lambda name, w: w if is_buffer(name) else Parameter(w))
    x = Tensor(x)
    y = f(tracked, x)
    grads = backward(y, dy)
    return {"y": y.data, "dx": grads[x]} | _found(tracked, grads)


def _found(module, grads):
    return {n: grads[w] for n, w in module.named_weights() if isinstance(w, Parameter) and w in grads}


def split_layer(comm, layer):
    """My heads and channels of a dense layer."""
    attention = axes.tensor.shard_attention(comm, layer.self_attn)
    return placed(layer, self_attn=attention, mlp=axes.tensor.shard_mlp(comm, layer.mlp))


# ---- The programs


def tp_block(comm):
    """A dense layer, heads and channels split."""
    table, mask = surroundings(CONFIG)
    layer = split_layer(comm, drawn(DecoderLayer(CONFIG, 0)))
    x, dy = normal(BATCH, LENGTH, 24, seed=1), normal(BATCH, LENGTH, 24, seed=2)
    return pull(lambda m, x: axes.tensor.block(comm, m, x, table, mask)[0], layer, x, dy)


def sp_block(comm, gather="latents"):
    """The same with tokens split between the products."""
    table, mask = surroundings(CONFIG)
    layer, mine = split_layer(comm, drawn(DecoderLayer(CONFIG, 0))), axes.sequence.tokens_of(comm, LENGTH)
    x, dy = normal(BATCH, LENGTH, 24, seed=1)[:, mine], normal(BATCH, LENGTH, 24, seed=2)[:, mine]
    return pull(lambda m, x: axes.sequence.block(comm, m, x, table, mask, gather=gather), layer, x, dy)


def vocabulary_loss(comm):
    """Embedding, head and loss, vocabulary split."""
    v, tokens = CONFIG.vocab_size, np.random.default_rng(3).integers(0, CONFIG.vocab_size, (BATCH, LENGTH))
    labels = np.where(np.arange(LENGTH) == 3, -100, tokens)
    weights = [Parameter(vocabulary.shard_rows(comm, normal(v, 24, seed=s))) for s in (4, 5)]
    x = vocabulary.embed(comm, tokens, weights[0], vocab=v)
    y = vocabulary.logits(comm, x, weights[1])
    loss = vocabulary.main_loss(comm, y, labels, vocab=v)
    grads = backward(loss, keep=[x])
    whole = vocabulary.whole_logits(comm, y.data, vocab=v)
    return {"logits": whole, "loss": loss.data, "dx": grads[x], "embed": grads[weights[0]], "head": grads[weights[1]]}


def moe(comm, recipe=ONE_RANK, wire=OWN, gpus=1, dtype=np.float64):
    """A layer of experts on 3, 4, 5, ... tokens of each rank."""
    nodes = make_nodes(comm, gpus)
    layer = drawn(DecoderLayer(CONFIG, 1), dtype=dtype).mlp
    x = normal(1, 3 + comm.rank, 24, seed=10 + comm.rank, dtype=dtype)
    dy = normal(*x.shape, seed=20 + comm.rank, dtype=dtype)
    mine = axes.expert.shard_moe(comm, layer)
    return pull(lambda m, x: axes.expert.moe(nodes, m, x, recipe=recipe, wire=wire)[0], mine, x, dy)


def moe_v3_training(comm):
    """FP8 dispatch, BF16 combine in DeepEP V1's order, two hops where the ranks make whole nodes of two."""
    return moe(comm, V1, V3_TRAINING, 1 if comm.size % 2 else 2, np.float32)


def moe_v2(comm):
    """The same in DeepEP V2's order."""
    return moe(comm, V2, V3_TRAINING, 1 if comm.size % 2 else 2, np.float32)


def sp_moe_block(comm):
    """A layer of experts, attention tensor and sequence parallel, experts parallel over the same ranks."""
    table, mask = surroundings(CONFIG)
    layer, mine = drawn(DecoderLayer(CONFIG, 1)), axes.sequence.tokens_of(comm, LENGTH)
    nodes, experts = make_nodes(comm, 1), axes.expert.shard_moe(comm, layer.mlp)
    layer = placed(layer, self_attn=axes.tensor.shard_attention(comm, layer.self_attn), mlp=experts)

    def run(m, x):
        ffn = axes.sequence.replicated(comm, m.mlp, split=("experts.",))
        return axes.sequence.block(comm, m, x, table, mask, ffn=lambda n: axes.expert.moe(nodes, ffn, n)[0])

    x, dy = normal(BATCH, LENGTH, 24, seed=1)[:, mine], normal(BATCH, LENGTH, 24, seed=2)[:, mine]
    return pull(run, layer, x, dy)


def zero1(comm, steps=3, max_norm=0.5):
    """AdamW on dense weights over all ranks and on experts over the ranks that hold the same, 2 expert-parallel ranks.

    -> {name: working weight after the last step}
    """
    ep = 2 if comm.size % 2 == 0 else 1
    same = comm.split(comm.rank % ep, comm.rank, "expert data parallel")
    dense = {"a": normal(5, 3, seed=1), "b": normal(4, seed=2)}
    experts = {f"e{i}": normal(3, 3, seed=30 + i + 2 * (comm.rank % ep)) for i in range(2)}
    shards = [axes.data.start(comm, dense), axes.data.start(same, experts, distinct=comm)]
    update = partial(_adamw, opt=AdamW(lr=0.1))
    weights = [dense, experts]
    for t in range(steps):
        grads = [{n: normal(*w.shape, seed=100 * t + comm.rank) for n, w in part.items()} for part in weights]
        weights, shards, _ = axes.data.step(shards, grads, update, max_norm=max_norm)
    return weights[0] | weights[1]


def _adamw(weights, grads, state, *, opt):
    return adamw(weights, grads, state or AdamState(), opt)


def data_parallel_gradients(comm):
    """The loss of a linear map on 0, 1, 2, ... micro-batches of different sizes."""
    batches = [normal(2 + i, 3, seed=10 * comm.rank + i) for i in range(comm.rank + (comm.size == 1))]
    weights = {"w": normal(3, seed=1), "unused": normal(2, seed=2)}

    def loss(w, batch):
        y = (w["w"] * batch).sum(axis=-1)
        return (y * y).sum() * (1.0 / len(batch))

    mean, grads = axes.data.gradients(comm, loss, weights, batches, len)
    return {"loss": np.array(mean)} | axes.data.all_reduced(comm, grads)


def moe_placed(comm):
    """A whole layer of experts, its serial code with the program in the MoE's place."""
    layer, (table, mask) = drawn(DecoderLayer(CONFIG, 1)), surroundings(CONFIG)
    experts = Placed(axes.expert.shard_moe(comm, layer.mlp), partial(axes.expert.moe, make_nodes(comm, 1)))
    x, dy = normal(BATCH, LENGTH, 24, seed=40 + comm.rank), normal(BATCH, LENGTH, 24, seed=50 + comm.rank)
    return pull(lambda m, x: m(x, table, mask)[0], placed(layer, mlp=experts), x, dy)


PROGRAMS = (
    *(tp_block, sp_block, vocabulary_loss, moe, moe_v3_training, moe_v2, sp_moe_block, zero1),
    *(data_parallel_gradients, moe_placed),
)
