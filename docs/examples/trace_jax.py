"""A trace from JAX: `python trace_jax.py CASE OUT`, then `refimpl diff CASE OUT`. Arrays leave a jitted function by a callback."""

import sys

import jax
import jax.numpy as jnp

from refimpl.diff import Case
from refimpl.record.refimpl_tap import recording, tap  # one file, NumPy only: paste it beside your model


def shown(name, x):
    """x, and its value under a tap's name when the compiled program gets there."""
    jax.debug.callback(lambda value: tap(name, value) is None, x)
    return x


def rms_norm(x, w, eps):
    return w * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@jax.jit
def port(tokens, w):
    """As far as this port has come: the embedding, and the latents of the first layer."""
    x = shown("embed", w["model.embed_tokens.weight"][tokens])
    h = shown("L0/attn_norm", rms_norm(x, w["model.layers.0.input_layernorm.weight"], eps))
    a = "model.layers.0.self_attn."
    q = shown("L0/mla.q_a", h @ w[f"{a}q_a_proj.weight"].T)
    shown("L0/mla.q_a_norm", rms_norm(q, w[f"{a}q_a_layernorm.weight"], 1e-6))
    return shown("L0/mla.kv_a", h @ w[f"{a}kv_a_proj_with_mqa.weight"].T)


folder, out = sys.argv[1:]
case = Case.read(folder)
eps = case.config.rms_norm_eps
with recording(out, folder, producer="my JAX port"):
    port(
        jnp.asarray(case.tokens), {name: jnp.asarray(w, jnp.float32) for name, w in case.weights().items()}
    ).block_until_ready()
    jax.effects_barrier()
