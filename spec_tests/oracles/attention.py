"""The oracle's attention: RMSNorm, rotation by complex numbers, YaRN, MLA one head at a time.

Sources: R sections 2.1.1 (eqs 1-11) and 4.3, transformers 5.23.0 modeling_rope_utils (YaRN),
DeepSeek inference/model.py.
"""

import cmath
import math

import numpy as np

# transformers leaves both latent norms at their class default, whatever rms_norm_eps says.
LATENT_EPS = 1e-6


def rms_norm(x, w, eps):
    """w_i x_i / sqrt(mean(x^2) + eps)."""
    root = math.sqrt(math.fsum(float(v) * float(v) for v in x) / len(x) + eps)
    return np.array([float(g) * float(v) / root for g, v in zip(w, x, strict=True)])


def linear(weights, name, x):
    """W x, plus the bias if the checkpoint has one."""
    out = [float(np.dot(row, x)) for row in weights[name + ".weight"]]
    bias = weights.get(name + ".bias")
    return np.array(out if bias is None else [y + float(b) for y, b in zip(out, bias, strict=True)])


def rope_settings(config):
    """(kind, theta, parameters) from `rope_parameters`, or `rope_scaling` and `rope_theta`."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind not in ("default", "yarn"):
        raise ValueError(f"the oracle knows default and yarn, not {kind}")
    return kind, float(theta), parameters


def growth(factor, mscale):
    """m = 0.1 mscale ln(factor) + 1, YaRN's correction for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(config):
    """Dr/2 radians per position; YaRN divides the slow ones by its factor, with a ramp between."""
    kind, theta, p = rope_settings(config)
    dim = config["qk_rope_head_dim"]
    plain = [theta ** (-2.0 * i / dim) for i in range(dim // 2)]
    if kind == "default":
        return plain
    low, high = _ramp_ends(config, theta, p)
    speeds = []
    for i, speed in enumerate(plain):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        speeds.append(speed / p["factor"] * ramp + speed * (1.0 - ramp))
    return speeds


def _ramp_ends(config, theta, p):
    """The pairs that turn beta_fast (ramp 0) and beta_slow (ramp 1) times in the old window."""
    dim = config["qk_rope_head_dim"]
    window = p.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def pair(turns):
        return dim * math.log(window / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = max(math.floor(pair(p.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(p.get("beta_slow") or 1)), dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def attention_factor(config):
    """Factor of cos and sin: m(mscale)/m(mscale_all_dim), or m(1) if one of them is missing."""
    kind, _, p = rope_settings(config)
    if kind == "default":
        return 1.0
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return growth(p["factor"], p["mscale"]) / growth(p["factor"], p["mscale_all_dim"])
    return growth(p["factor"], 1.0)


def softmax_scale(config):
    """(Dn + Dr)^-1/2, times m(mscale_all_dim)^2 under YaRN."""
    kind, _, p = rope_settings(config)
    plain = 1.0 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    if kind == "default" or not p.get("mscale_all_dim"):
        return plain
    return plain * growth(p["factor"], p["mscale_all_dim"]) ** 2


def rotations(config, position):
    """One complex number per pair: attention_factor e^(i position frequency)."""
    factor = attention_factor(config)
    return [factor * cmath.exp(1j * position * speed) for speed in frequencies(config)]


def rotate(x, turns, interleaved):
    """Multiply pair i by turns[i]; pairs are channels (2i, 2i+1), or (i, i + Dr/2) if not interleaved; layout kept."""
    out, half = np.array(x, np.float64), len(x) // 2
    for i, turn in enumerate(turns):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[a], x[b]) * turn
        out[a], out[b] = turned.real, turned.imag
    return out


def mla(config, weights, at, xs, turns, visible, note):
    """MLA of one sequence of vectors, after o_proj; every intermediate goes to `note`."""
    interleaved = config.get("rope_interleave", True)
    keys, queries = [], []
    for s, x in enumerate(xs):
        queries.append(_query(config, weights, at, x, turns[s], interleaved, note, s))
        keys.append(_key(config, weights, at, x, turns[s], interleaved, note, s))
    out = []
    for s in range(len(xs)):
        contexts = []
        for h in range(config["num_attention_heads"]):
            contexts.append(_attend(config, weights, at, queries[s][h], keys, visible[s], h, note, s))
            note("mla.ctx", contexts[h], s, h)
        out.append(linear(weights, at + "o_proj", np.concatenate(contexts)))
    return out


def _query(config, weights, at, x, turns, interleaved, note, s):
    """Per head (q_nope, q_rope) of one token."""
    nope, size = config["qk_nope_head_dim"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if config.get("q_lora_rank") is None:
        flat = linear(weights, at + "q_proj", x)
    else:
        down = linear(weights, at + "q_a_proj", x)
        latent = rms_norm(down, weights[at + "q_a_layernorm.weight"], LATENT_EPS)
        flat = linear(weights, at + "q_b_proj", latent)
        note("mla.q_a", down, s)
        note("mla.q_a_norm", latent, s)
    heads = []
    for h in range(config["num_attention_heads"]):
        q = flat[h * size : (h + 1) * size]
        heads.append((q[:nope], rotate(q[nope:], turns, interleaved)))
        note("mla.q", q, s, h)
        note("mla.q_rope", heads[h][1], s, h)
    return heads


def _key(config, weights, at, x, turns, interleaved, note, s):
    """(latent, rotated shared key, per-head [k_nope ; v]) of one token."""
    rank, size = config["kv_lora_rank"], config["qk_nope_head_dim"] + config["v_head_dim"]
    down = linear(weights, at + "kv_a_proj_with_mqa", x)
    latent = rms_norm(down[:rank], weights[at + "kv_a_layernorm.weight"], LATENT_EPS)
    shared = rotate(down[rank:], turns, interleaved)
    up = linear(weights, at + "kv_b_proj", latent)
    heads = [up[h * size : (h + 1) * size] for h in range(config["num_attention_heads"])]
    note("mla.kv_a", down, s)
    note("mla.c_kv", latent, s)
    note("mla.k_rope", shared, s)
    note("mla.kv_b", np.array(heads), s)
    return latent, shared, heads


def _attend(config, weights, at, query, keys, visible, h, note, s):
    """Context (Dv,) of one query in one head: softmax over the keys it sees, times values."""
    nope, scale = config["qk_nope_head_dim"], softmax_scale(config)
    scores = []
    for t, (_, shared, heads) in enumerate(keys):
        score = float(np.dot(query[0], heads[h][:nope])) + float(np.dot(query[1], shared))
        scores.append(score * scale if visible[t] else -math.inf)
    probs = softmax(scores)
    context, latent = np.zeros(config["v_head_dim"]), np.zeros(config["kv_lora_rank"])
    for p, (c, _, heads) in zip(probs, keys, strict=True):
        context += p * heads[h][nope:]
        latent += p * c
    note("mla.scores", np.array(scores), h, s)
    note("mla.probs", np.array(probs), h, s)
    note("mla.ctx_latent", latent, s, h)
    note("mla.q_absorbed", absorb(config, weights, at, query[0], h), s, h)
    return context


def softmax(scores):
    """exp(z) / sum exp(z); all zeros if every score is -inf."""
    top = max(scores)
    if top == -math.inf:
        return [0.0] * len(scores)
    powers = [math.exp(z - top) for z in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def absorb(config, weights, at, q_nope, h):
    """W_UK[h]^T q_nope, the query in latent space: q_nope . k_nope = absorbed . c_kv."""
    first = h * (config["qk_nope_head_dim"] + config["v_head_dim"])
    out = np.zeros(config["kv_lora_rank"])
    for d, value in enumerate(q_nope):
        out += value * weights[at + "kv_b_proj.weight"][first + d]
    return out


def absorbed_attention(config, weights, taps, layer):
    """A layer's (scores, ctx) computed in latent space: must equal mla.scores and mla.ctx."""
    unit, scale = f"fwd/L{layer}/", softmax_scale(config)
    c, k_rope = taps[unit + "mla.c_kv"], taps[unit + "mla.k_rope"]
    q, q_rope = taps[unit + "mla.q_absorbed"], taps[unit + "mla.q_rope"]
    scores, ctx = np.array(taps[unit + "mla.scores"]), np.zeros(taps[unit + "mla.ctx"].shape)
    size, nope = config["qk_nope_head_dim"] + config["v_head_dim"], config["qk_nope_head_dim"]
    up = np.asarray(weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"], np.float64)
    for b, h, s, t in np.argwhere(np.isfinite(scores)):
        scores[b, h, s, t] = scale * (np.dot(q[b, s, h], c[b, t]) + np.dot(q_rope[b, s, h], k_rope[b, t]))
    for b, s, h, d in np.ndindex(*ctx.shape):
        ctx[b, s, h, d] = np.dot(up[h * size + nope + d], taps[unit + "mla.ctx_latent"][b, s, h])
    return scores, ctx
