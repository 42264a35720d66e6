"""DeepSeek-V3 in plain torch, one file to start a port from: `refimpl conform torch_port:Port` (in this folder).

Written to be read next to the report (R): MLA (2.1.1), the gate and DeepSeekMoE (2.1.2), YaRN (4.3). No MTP, no FP8: `conform` says
so. Shows three taps a layer, so that a mistake is placed; spoil a line and see.
"""

import math

import torch
from torch.nn.functional import cross_entropy, embedding, linear, silu


def rms_norm(x, w, eps):
    return w * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


class Port:
    """The protocol's methods; `w` maps checkpoint names to tensors, `c` is config.json."""

    def info(self):
        return {"name": "torch_port", "version": torch.__version__, "precision": "float32", "layouts": {}}

    def load(self, config, weights):
        self.c, self.w = dict(config), {n: torch.tensor(a.astype("float32")) for n, a in weights.items()}
        self.check()
        self.frequencies, self.rope_gain, self.scale = self.yarn()

    def check(self):
        """Refuse what is not this model's: every weight is asked for by name and shape."""
        c, w, d = self.c, self.w, self.c["hidden_size"]
        shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}.mlp."
            if self.is_dense(i):
                shapes[f"{at}down_proj.weight"] = (d, c["intermediate_size"])
            else:
                shapes[f"{at}gate.weight"] = (c["n_routed_experts"], d)
        for name, shape in shapes.items():
            if name not in w or tuple(w[name].shape) != shape:
                raise ValueError(f"{name}: {tuple(w[name].shape) if name in w else 'missing'}, expected {shape}")

    def is_dense(self, i):
        return i < self.c["first_k_dense_replace"]

    def yarn(self):
        """Rotary frequencies (Dr/2,), the gain of cos and sin, the softmax scale."""
        c, dim, s = self.c, self.c["qk_rope_head_dim"], self.c.get("rope_scaling")
        theta, scale = c["rope_theta"], (c["qk_nope_head_dim"] + dim) ** -0.5
        f = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if not s or s.get("type", s.get("rope_type")) != "yarn":
            return f.float(), 1.0, scale

        def turns(n):
            return dim * math.log(s["original_max_position_embeddings"] / (n * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(turns(s["beta_fast"])), 0), min(math.ceil(turns(s["beta_slow"])), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        f = f / s["factor"] * ramp + f * (1 - ramp)
        one, all_dim = s.get("mscale"), s.get("mscale_all_dim")
        gain = mscale(s["factor"], one) / mscale(s["factor"], all_dim) if one and all_dim else mscale(s["factor"], 1.0)
        return f.float(), gain, scale * (mscale(s["factor"], all_dim) ** 2 if all_dim else 1.0)

    def rotate(self, x, positions):
        """x (..., S, h, Dr): pairs (2i, 2i+1), or (i, i + Dr/2) if rope_interleave is false."""
        angle = positions.float()[..., None] * self.frequencies
        cos, sin = (angle.cos() * self.rope_gain)[:, :, None], (angle.sin() * self.rope_gain)[:, :, None]
        if self.c.get("rope_interleave", True):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def attention(self, i, x, positions, mask, cache):
        """MLA, R eqs 1-11, keys and values made from the cached latents."""
        c, p, eps = self.c, f"model.layers.{i}.self_attn.", self.c["rms_norm_eps"]
        b, s, _ = x.shape
        h, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        w = lambda name: self.w[f"{p}{name}.weight"]  # noqa: E731
        bias = lambda name: self.w.get(f"{p}{name}.bias")  # noqa: E731
        if c.get("q_lora_rank"):
            q = rms_norm(linear(x, w("q_a_proj"), bias("q_a_proj")), w("q_a_layernorm"), eps)
            q = linear(q, w("q_b_proj"))
        else:
            q = linear(x, w("q_proj"))
        q = q.view(b, s, h, nope + rope)
        q = torch.cat([q[..., :nope], self.rotate(q[..., nope:], positions)], -1)
        kv = linear(x, w("kv_a_proj_with_mqa"), bias("kv_a_proj_with_mqa"))
        latent = rms_norm(kv[..., : c["kv_lora_rank"]], w("kv_a_layernorm"), eps)
        k_rope = self.rotate(kv[..., None, c["kv_lora_rank"] :], positions)
        if cache is not None:
            if i in cache:
                latent, k_rope = torch.cat([cache[i][0], latent], 1), torch.cat([cache[i][1], k_rope], 1)
            cache[i] = latent, k_rope
        k, v = linear(latent, w("kv_b_proj")).view(b, -1, h, nope + c["v_head_dim"]).split([nope, c["v_head_dim"]], -1)
        k = torch.cat([k, k_rope.expand(-1, -1, h, -1)], -1)
        scores = torch.einsum("bshd,bthd->bhst", q, k) * self.scale
        probs = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()  # a query of padding sees no key
        return linear(torch.einsum("bhst,bthd->bshd", probs, v).flatten(2), w("o_proj"), bias("o_proj"))

    def route(self, i, x):
        """The gate, R eqs 12-16 -> weights and ids (N, K)."""
        c, p = self.c, f"model.layers.{i}.mlp.gate."
        z = linear(x, self.w[f"{p}weight"])
        s = z.sigmoid() if c["scoring_func"] == "sigmoid" else z.softmax(-1)
        a = s + self.w[f"{p}e_score_correction_bias"] if c["topk_method"] == "noaux_tc" else s
        groups, kept = c.get("n_group") or 1, c.get("topk_group") or 1
        if c["topk_method"] != "greedy":
            members = a.view(len(a), groups, -1)
            best = members.topk(2, -1).values.sum(-1) if c["topk_method"] == "noaux_tc" else members.max(-1).values
            keep = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(kept, -1).indices, True)
            a = members.masked_fill(~keep[..., None], float("-inf")).flatten(1)
        ids = a.topk(c["num_experts_per_tok"], -1).indices
        g = s.gather(1, ids)  # of the scores without the bias
        g = g / (g.sum(-1, keepdim=True) + 1e-20) if c["norm_topk_prob"] else g
        return g * c["routed_scaling_factor"], ids

    def mlp(self, at, x):
        gate, up, down = (self.w[f"{at}{n}_proj.weight"] for n in ("gate", "up", "down"))
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    def feed_forward(self, i, x):
        """A dense layer, or shared and routed experts, R eq 12."""
        at = f"model.layers.{i}.mlp."
        if self.is_dense(i):
            return self.mlp(at, x)
        rows = x.flatten(0, 1)
        g, ids = self.route(i, rows)
        y = torch.zeros_like(rows)
        for e in ids.unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, self.mlp(f"{at}experts.{e}.", rows[token]) * g[token, slot, None])
        shared = self.mlp(f"{at}shared_experts.", x) if self.c.get("n_shared_experts") else 0
        return y.view_as(x) + shared

    def run(self, tokens, positions=None, valid=None, cache=None, note=lambda name, x: None):
        c = self.c
        tokens = torch.tensor(tokens)
        (b, s), past = tokens.shape, cache.get("length", 0) if cache is not None else 0
        positions = torch.arange(past, past + s).expand(b, s) if positions is None else torch.tensor(positions)
        order = torch.arange(past + s)
        mask = (order[None] <= order[past:, None]).expand(b, 1, s, past + s)
        if valid is not None:
            mask = mask & torch.tensor(valid).bool()[:, None, None]
        x = embedding(tokens, self.w["model.embed_tokens.weight"])
        for i in range(c["num_hidden_layers"]):
            at, eps = f"model.layers.{i}.", c["rms_norm_eps"]
            y = self.attention(i, rms_norm(x, self.w[f"{at}input_layernorm.weight"], eps), positions, mask, cache)
            note(f"L{i}/attn_out", y)
            x = x + y
            y = self.feed_forward(i, rms_norm(x, self.w[f"{at}post_attention_layernorm.weight"], eps))
            note(f"L{i}/ffn_out", y)
            x = x + y
            note(f"L{i}/resid", x)
        if cache is not None:
            cache["length"] = past + s
        x = rms_norm(x, self.w["model.norm.weight"], c["rms_norm_eps"])
        return linear(x, self.w["model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"])

    @torch.no_grad()
    def forward(self, tokens, positions=None, cache=None, taps=(), valid=None):
        found = {}
        note = (lambda name, x: found.update({name: x.numpy()})) if taps else (lambda name, x: None)
        logits = self.run(tokens, positions, valid, cache, note)
        return found | {"logits": logits.numpy()}

    def step(self, token, cache, taps=()):
        return self.forward(torch.tensor(token).view(-1, 1), cache=cache, taps=taps)

    def loss_and_grads(self, tokens, labels, taps=(), mtp_weight=0.0, aux_weight=0.0):
        if mtp_weight or aux_weight:
            raise NotImplementedError("the loss of MTP modules and the balance loss")
        for name, w in self.w.items():
            w.requires_grad_(not name.endswith("e_score_correction_bias"))
        logits, labels = self.run(tokens), torch.tensor(labels)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        found = {f"grad/{n}": w.grad.numpy() for n, w in self.w.items() if w.grad is not None}
        self.w = {n: w.detach() for n, w in self.w.items()}
        return found | {"loss": loss.item()}
