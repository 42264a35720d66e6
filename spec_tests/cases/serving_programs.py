"""Prefill and decode apart, as rank programs with inputs of their own: the same on the simulator and under mpiexec.

`python -m refimpl.parallel_emulation run -n 4 refimpl.spec_tests.cases.serving_programs:apart` compares the two bit for bit.
"""

import numpy as np

from refimpl.infer.split import Deployment, serve
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.collectives import shares

from .configs import SMALL
from .layer_programs import drawn

CONFIG = SMALL.replace(num_attention_heads=5)
"""12 experts, 4 of them for a token; heads that do not divide among the ranks."""
TOKENS = 4  # of every answer


def model():
    """The model that all ranks hold."""
    return drawn(ForCausalLM(CONFIG), seed=4)


def prompts(lengths=(7, 3, 12, 1, 5)):
    """Prompts of such lengths; one is shorter than a group of four."""
    rng = np.random.default_rng(11)
    return [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]


def layout(size):
    """A deployment on that many ranks, with all that there is: replicas, fewer running than held, new plans, FP8 latents."""
    decode = size // 2
    return Deployment(
        tp=size - decode,
        decode=decode,
        prefill_slots=24 * (size - decode),
        decode_slots=16 * decode,
        prefill_active=12,
        decode_active=12,
        kv="fp8",
        replan=2,
    )


def apart(comm):
    """Half of the ranks read, the others answer, in rounds of two prompts.  -> everything a rank knows."""
    return told(serve(comm, model(), prompts(), TOKENS, layout(comm.size), per_round=2))


def told(served):
    """A result as the launcher compares it."""
    return {name: value if name != "moves" else [list(m) for m in value] for name, value in vars(served).items()}


PROGRAMS = (apart,)


# ---- One rank, for comparison


class InParts:
    """An observer: the output projection of attention as sums over the heads of each of n ranks, added up in rank order."""

    def __init__(self, n):
        self.n = n

    def __call__(self, stage, run, /, *args, **static):
        if stage.name != "attn_out":
            return run(*args, **static)
        (o, w, b), y, at = args, None, 0
        assert b is None
        width = o.shape[3]
        for h in shares(o.shape[2], self.n):
            part = run(o[:, :, at : at + h], w[:, at * width : (at + h) * width], None)
            y, at = part if y is None else y + part, at + h
        return y


def one_rank(m, prompts, n, *, observers=(), parts=1, through=lambda c, k: (c, k)):
    """[(answer, logits (n, V))] of every prompt alone on the serial model; `through`: what the transfer does to latents."""
    found = []
    for prompt in prompts:
        with observing(*observers, *([InParts(parts)] if parts > 1 else [])):
            out = m(m.inputs([prompt]), attend="expanded")
        cache = type(out.cache)(tuple(through(c, k) for c, k in out.cache.layers), out.cache.positions)
        logits = [out.logits[0, -1]]
        while len(logits) < n:
            with observing(*observers):
                out = m(m.inputs([[logits[-1].argmax()]], cache=cache), cache, attend="absorbed")
            cache, logits = out.cache, [*logits, out.logits[0, -1]]
        found.append(([int(y.argmax()) for y in logits], np.array(logits)))
    return found
