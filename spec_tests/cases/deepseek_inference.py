"""A stand-in for DeepSeek's inference/model.py in plain torch: its module tree and the names that the tap map `deepseek` reads.

The released file is no package, and its FP8 products need a GPU; this one was written here, from the names of its modules,
functions and attributes (commit 9b4e978), for one process and float32. What it computes is held to outputs that were recorded of
the released code (golden/official_tiny.npz) by test_interop_deepseek.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from refimpl.checkpoint.names import config_to_deepseek, to_deepseek
from refimpl.record.candidate import Candidate
from refimpl.record.torch_arrays import to_torch

attn_impl = "absorb"
"""As there, a global of the module: "absorb" or "naive"."""


def linear(x, weight, bias=None):
    """x W^T + b: everything with a matrix calls this one."""
    return F.linear(x, weight, bias)


def apply_rotary_emb(x, freqs_cis):
    """Neighbouring channels as one complex number, turned by exp(i angle).  x (B, S, H, Dr), freqs_cis (S, Dr/2) complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)


def precompute_freqs_cis(a):
    """exp(i t theta_d), YaRN where the longest sequence is longer than the original one."""
    half = a["qk_rope_head_dim"] // 2
    freqs = a["rope_theta"] ** -(torch.arange(half, dtype=torch.float32) / half)
    if a["max_seq_len"] > a["original_seq_len"]:
        turns = torch.tensor([a["beta_fast"], a["beta_slow"]], dtype=torch.float64)
        channels = half * torch.log(a["original_seq_len"] / (turns * 2 * math.pi)) / math.log(a["rope_theta"])
        low, high = max(math.floor(channels[0]), 0), min(math.ceil(channels[1]), 2 * half - 1)
        ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        freqs = freqs / a["rope_factor"] * ramp + freqs * (1 - ramp)
    angles = torch.outer(torch.arange(a["max_seq_len"], dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


class Linear(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outside, inside))

    def forward(self, x):
        return linear(x, self.weight)


class ParallelEmbedding(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self.eps, self.weight = dim, 1e-6, nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


class MLA(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.n_heads, self.nope, self.rope = a["n_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"]
        self.v_head_dim, self.rank, wide = a["v_head_dim"], a["kv_lora_rank"], a["n_heads"] * (self.nope + self.rope)
        self.q_lora_rank = a["q_lora_rank"]
        if self.q_lora_rank:
            self.wq_a, self.q_norm = Linear(a["dim"], self.q_lora_rank), RMSNorm(self.q_lora_rank)
            self.wq_b = Linear(self.q_lora_rank, wide)
        else:
            self.wq = Linear(a["dim"], wide)
        self.wkv_a, self.kv_norm = Linear(a["dim"], self.rank + self.rope), RMSNorm(self.rank)
        self.wkv_b = Linear(self.rank, self.n_heads * (self.nope + self.v_head_dim))
        self.wo = Linear(self.n_heads * self.v_head_dim, a["dim"])
        self.softmax_scale = (self.nope + self.rope) ** -0.5
        if a["max_seq_len"] > a["original_seq_len"]:
            self.softmax_scale *= (0.1 * a["mscale"] * math.log(a["rope_factor"]) + 1) ** 2
        self.cache = {}  # the released code keeps buffers of fixed length

    def forward(self, x, start_pos, freqs_cis, mask):
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.q_lora_rank else self.wq(x)
        q_nope, q_pe = q.unflatten(-1, (self.n_heads, -1)).split([self.nope, self.rope], dim=-1)
        q_pe = apply_rotary_emb(q_pe, freqs_cis)
        kv, k_pe = self.wkv_a(x).split([self.rank, self.rope], dim=-1)
        k_pe = apply_rotary_emb(k_pe.unsqueeze(2), freqs_cis)
        attend = self._absorbed if attn_impl == "absorb" else self._naive
        return self.wo(attend(q_nope, q_pe, self.kv_norm(kv), k_pe, start_pos, mask).flatten(2))

    def _kept(self, name, new, start_pos):
        """What was cached of earlier positions, with the new ones behind it."""
        old = self.cache[name][:, :start_pos] if start_pos else new[:, :0]
        self.cache[name] = torch.cat([old, new], dim=1)
        return self.cache[name]

    def _probs(self, scores, mask, x):
        scores = scores * self.softmax_scale
        if mask is not None:
            scores += mask.unsqueeze(1)
        return scores.softmax(dim=-1, dtype=torch.float32).type_as(x)

    def _absorbed(self, q_nope, q_pe, kv, k_pe, start_pos, mask):
        wkv_b = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, : self.nope])
        kv, pe = self._kept("kv", kv, start_pos), self._kept("pe", k_pe.squeeze(2), start_pos)
        scores = torch.einsum("bshc,btc->bsht", q_nope, kv) + torch.einsum("bshr,btr->bsht", q_pe, pe)
        latent = torch.einsum("bsht,btc->bshc", self._probs(scores, mask, kv), kv)
        return torch.einsum("bshc,hdc->bshd", latent, wkv_b[:, -self.v_head_dim :])

    def _naive(self, q_nope, q_pe, kv, k_pe, start_pos, mask):
        k_nope, v = self.wkv_b(kv).unflatten(-1, (self.n_heads, -1)).split([self.nope, self.v_head_dim], dim=-1)
        k = self._kept("k", torch.cat([k_nope, k_pe.expand(-1, -1, self.n_heads, -1)], dim=-1), start_pos)
        v = self._kept("v", v, start_pos)
        scores = torch.einsum("bshd,bthd->bsht", torch.cat([q_nope, q_pe], dim=-1), k)
        return torch.einsum("bsht,bthd->bshd", self._probs(scores, mask, v), v)


class MLP(nn.Module):
    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(dim, inter_dim), Linear(inter_dim, dim), Linear(dim, inter_dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Expert(MLP):
    """One routed expert."""


class Gate(nn.Module):
    """There the bias exists only for the width of the 671B model; here always, as in the recording."""

    def __init__(self, a):
        super().__init__()
        self.topk, self.n_groups, self.topk_groups = (
            a["n_activated_experts"],
            a["n_expert_groups"],
            a["n_limited_groups"],
        )
        self.score_func, self.route_scale = a["score_func"], a["route_scale"]
        self.weight = nn.Parameter(torch.empty(a["n_routed_experts"], a["dim"]))
        self.bias = nn.Parameter(torch.empty(a["n_routed_experts"]))

    def forward(self, x):
        scores = linear(x, self.weight)
        scores = scores.softmax(dim=-1) if self.score_func == "softmax" else scores.sigmoid()
        affinity, scores = scores, scores + self.bias
        if self.n_groups > 1:
            scores = scores.unflatten(-1, (self.n_groups, -1))
            best = scores.topk(2, dim=-1)[0].sum(dim=-1).topk(self.topk_groups, dim=-1)[1]
            dropped = torch.ones_like(scores[..., 0], dtype=torch.bool).scatter_(1, best, False)
            scores = scores.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        indices = scores.topk(self.topk, dim=-1)[1]
        weights = affinity.gather(1, indices)
        if self.score_func == "sigmoid":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * self.route_scale).type_as(x), indices


class MoE(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.gate, self.dim = Gate(a), a["dim"]
        self.experts = nn.ModuleList([Expert(a["dim"], a["moe_inter_dim"]) for _ in range(a["n_routed_experts"])])
        self.shared_experts = MLP(a["dim"], a["n_shared_experts"] * a["moe_inter_dim"])

    def forward(self, x):
        rows = x.reshape(-1, self.dim)
        weights, indices = self.gate(rows)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(indices == e)
            if len(token):
                y[token] += expert(rows[token]) * weights[token, place, None]
        return (y + self.shared_experts(rows)).view_as(x)


class Block(nn.Module):
    def __init__(self, layer_id, a):
        super().__init__()
        self.attn, self.attn_norm, self.ffn_norm = MLA(a), RMSNorm(a["dim"]), RMSNorm(a["dim"])
        self.ffn = MLP(a["dim"], a["inter_dim"]) if layer_id < a["n_dense_layers"] else MoE(a)

    def forward(self, x, start_pos, freqs_cis, mask):
        x = x + self.attn(self.attn_norm(x), start_pos, freqs_cis, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Logits of the last position alone, as there."""

    def __init__(self, a):
        super().__init__()
        self.embed, self.norm = ParallelEmbedding(a["vocab_size"], a["dim"]), RMSNorm(a["dim"])
        self.layers = nn.ModuleList([Block(i, a) for i in range(a["n_layers"])])
        self.head = Linear(a["dim"], a["vocab_size"])
        self.register_buffer("freqs_cis", precompute_freqs_cis(a), persistent=False)

    @torch.inference_mode()
    def forward(self, tokens, start_pos=0):
        length = tokens.size(1)
        h, mask = self.embed(tokens), None
        if length > 1:
            mask = torch.full((length, length), float("-inf")).triu_(1)
        for layer in self.layers:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + length], mask)
        return self.head(self.norm(h)[:, -1])


def loaded(config, weights):
    """The model of a config.json, with checkpoint weights under the names that convert.py gives them."""
    model = Transformer(config_to_deepseek(config))
    held = {to_deepseek(n): to_torch(w).float() for n, w in weights.items()}
    model.load_state_dict(held)
    return model.eval()


def build(case):
    """For `refimpl record torch --map deepseek --build`."""
    return Candidate(loaded(case.config.to_dict(), case.weights()))
