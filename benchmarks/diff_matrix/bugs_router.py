"""Bugs of routers and of the mixture of experts. Ids with an R are those of the projects where they happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from entries import after, bug, modules, together, with_forward, with_setting
from torch.nn.functional import linear

from refimpl.autograd.errors import require

_EXPERTS = "moe.rows moe.gate moe.up moe.act moe.down moe.routed"


def _weigh(gate: Any, s: Any, choice: Any, ids: Any) -> Any:
    g = s.gather(1, ids)
    if gate.norm_topk_prob:
        g = g / (g.sum(dim=-1, keepdim=True) + 1e-20)
    return g * gate.routed_scaling_factor


def _best(choice: Any, k: int) -> Any:
    return choice.topk(k, dim=-1, sorted=False)[1]


@dataclass(frozen=True)
class Route:
    """transformers' router in parts, each of which a bug may replace. gate is the module."""

    logits: Callable[[Any, Any], Any] = lambda gate, x: linear(x.float(), gate.weight.float())
    scores: Callable[[Any], Any] = lambda z: z.sigmoid()
    choice: Callable[[Any, Any], Any] = lambda gate, s: s + gate.e_score_correction_bias
    best: int = 2
    groups: Callable[[Any], tuple[int, int]] = lambda gate: (gate.num_group, gate.topk_group)
    fill: float = float("-inf")
    more: int = 0
    ids: Callable[[Any, int], Any] = _best
    weigh: Callable[..., Any] = _weigh

    def __call__(self, gate: Any, x: Any) -> tuple[Any, Any, Any]:
        """x (B, S, D) -> logits (N, E), weights (N, K), ids (N, K)."""
        z = self.logits(gate, x.view(-1, gate.hidden_dim))
        s = self.scores(z)
        a = self.choice(gate, s)
        n_group, kept = self.groups(gate)
        grouped = a.view(len(a), n_group, -1)
        found = grouped.topk(self.best, dim=-1)[0].sum(dim=-1).topk(kept, dim=-1, sorted=False)[1]
        inside = (found[..., None] == torch.arange(n_group)).any(dim=1)  # (N, G)
        masked = grouped.masked_fill(~inside[..., None], self.fill).view_as(a)
        ids = self.ids(masked, gate.top_k + self.more)
        return z, self.weigh(gate, s, a, ids).float(), ids


def routed(**parts: Any) -> Callable[[Any], Any]:
    """A patch: every router is a Route with these parts."""
    route = Route(**parts)
    return lambda model: with_forward(model, "mlp.gate", lambda gate, _: lambda x: route(gate, x))


def _unmasked(model: Any) -> Any:
    """All groups kept: the top-k is taken over all experts."""
    require(model.config.n_group > 1, "one group only")
    return with_setting(model, "mlp.gate", "topk_group", lambda gate: gate.num_group)


def _grouped(model: Any) -> Any:
    """Groups where the config has none."""
    require(model.config.n_group == 1, "the model has groups")
    return routed(groups=lambda gate: (4, 2))(model)


def _scaled(factor: Callable[[Any], float]) -> Callable[[Any], Any]:
    change = after(lambda gate, out: (out[0], out[1] * factor(gate), out[2]))
    return lambda model: with_forward(model, "mlp.gate", change)


def _only_with_norm(gate: Any, s: Any, a: Any, ids: Any) -> Any:
    return _weigh(gate, s, a, ids) / (1 if gate.norm_topk_prob else gate.routed_scaling_factor)


def _sum(change: Callable[[Any], Any], normalise: bool = True) -> Callable[..., Any]:
    """Weights whose normalisation is change(g)."""

    def weigh(gate: Any, s: Any, a: Any, ids: Any) -> Any:
        g = s.gather(1, ids)
        return (change(g) if gate.norm_topk_prob else g) * gate.routed_scaling_factor

    return weigh


def _recovered(gate: Any, s: Any, a: Any, ids: Any) -> Any:
    return _weigh(gate, a - gate.e_score_correction_bias, a, ids)


def _over_all(gate: Any, s: Any, a: Any, ids: Any) -> Any:
    return s.gather(1, ids) / (s.sum(dim=-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor


def _weights_left_behind(gate: Any, out: Any) -> Any:
    return out[0], out[1], out[2].sort(dim=-1)[0]


def _shared_displaced(model: Any) -> Any:
    absent = with_forward(model, "mlp.shared_experts", after(lambda _, y: y * 0))
    return together(routed(more=1)(model), absent)


def _moe(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
    """A patch: the module gives combine(module, routed, shared)."""

    def wrap(mlp: Any, _: Any) -> Any:
        def forward(x: Any) -> Any:
            _, weights, ids = mlp.gate(x)
            y = mlp.experts(x.view(-1, x.shape[-1]), ids, weights).view_as(x)
            return combine(mlp, y, mlp.shared_experts(x))

        return forward

    return lambda model: together(*[_on(m, wrap) for m in _moe_layers(model)])


def _moe_layers(model: Any) -> list[str]:
    found = [path for path, m in model.named_modules() if path.endswith(".mlp") and hasattr(m, "experts")]
    require(found, "this model has no experts")
    return [(model, path) for path in found]


def _on(place: tuple[Any, str], wrap: Any) -> Any:
    return with_forward(place[0], place[1], wrap)


def _unnormed(model: Any) -> Any:
    """The router sees the residual stream, not its norm."""
    seen: dict[int, Any] = {}
    norms, gates = modules(model, "post_attention_layernorm"), modules(model, "mlp.gate")
    first = len(norms) - len(gates)

    def keep(norm: Any, forward: Any) -> Any:
        def remember(x: Any) -> Any:
            seen[norms.index(norm) - first] = x
            return forward(x)

        return remember

    def wrap(gate: Any, forward: Any) -> Any:
        return lambda x: forward(seen[gates.index(gate)])

    return together(with_forward(model, "post_attention_layernorm", keep), with_forward(model, "mlp.gate", wrap))


def _dispatch(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[[Any], Any]:
    """A patch: the experts are called with change(module, ids, weights)."""
    return lambda model: with_forward(
        model, "mlp.experts", lambda m, forward: lambda x, ids, weights: forward(x, *change(m, ids, weights))
    )


def _last_wins(experts: Any, _: Any) -> Any:
    """Contributions are stored, not added: of a token's experts the last one counts."""

    def forward(x: Any, ids: Any, weights: Any) -> Any:
        out = x.new_zeros(x.shape)
        for e in ids.unique().tolist():
            slot, token = (e == ids.T).nonzero(as_tuple=True)
            gate, up = linear(x[token], experts.gate_up_proj[e]).chunk(2, dim=-1)
            down = linear(experts.act_fn(gate) * up, experts.down_proj[e])
            out[token] = (down * weights[token, slot, None]).to(out.dtype)
        return out

    return forward


def _dropped(experts: Any, ids: Any, weights: Any) -> Any:
    """Every expert takes at most half of the tokens that an even load would bring it, twice over; the rest is dropped."""
    capacity = max(1, ids.numel() // experts.num_experts)
    rank = (ids.reshape(-1, 1) == ids.reshape(1, -1)).tril().sum(dim=1).view_as(ids)  # 1 for an expert's first token
    kept = rank <= capacity
    return ids.masked_fill(~kept, experts.num_experts), weights * kept


BUGS = (
    bug("R02", "masked groups are filled with 0 instead of -inf", "router.ids", routed(fill=0.0)),
    bug("R03", "a group's score is its best affinity, not the sum of two", "router.group_scores", routed(best=1)),
    bug("R04", "softmax instead of sigmoid", "router.scores", routed(scores=lambda z: z.softmax(dim=-1))),
    bug("R04-global", "top-k over all experts, no groups", "router.groups router.ids", _unmasked),
    bug(
        "R05",
        "score and bias are added in bfloat16",
        "router.choice",
        routed(choice=lambda gate, s: (s.bfloat16() + gate.e_score_correction_bias.bfloat16()).float()),
    ),
    bug(
        "R06",
        "the router's product is taken in bfloat16",
        "router.logits",
        routed(logits=lambda gate, x: linear(x.bfloat16(), gate.weight.bfloat16()).float()),
    ),
    bug(
        "R06-scores",
        "the sigmoid is taken in bfloat16",
        "router.scores",
        routed(scores=lambda z: z.bfloat16().sigmoid().float()),
    ),
    bug("R08", "scaled only where weights are renormalised", "router.weights", routed(weigh=_only_with_norm)),
    bug("R09-router", "the router scales twice", "router.weights", _scaled(lambda g: g.routed_scaling_factor)),
    bug(
        "R10", "the routed scaling factor is nowhere", "router.weights", _scaled(lambda g: 1 / g.routed_scaling_factor)
    ),
    bug(
        "R12",
        "no 1e-20 in the denominator",
        "router.weights",
        routed(weigh=_sum(lambda g: g / g.sum(dim=-1, keepdim=True))),
    ),
    bug(
        "R13",
        "1e-20 is added after the division",
        "router.weights",
        routed(weigh=_sum(lambda g: g / g.sum(dim=-1, keepdim=True) + 1e-20)),
    ),
    bug("R14", "the score is recovered as (s + b) - b", "router.weights", routed(weigh=_recovered)),
    bug("R15", "groups of experts although the config has one", "router.ids", _grouped),
    bug(
        "R16",
        "a routed expert too many takes the shared one's place",
        "router.ids moe.shared",
        _shared_displaced,
        also=f"router.weights shared.gate shared.up shared.act {_EXPERTS}",
    ),
    bug(
        "R20",
        "contributions overwrite each other",
        "moe.routed",
        lambda m: with_forward(m, "mlp.experts", _last_wins),
    ),
    bug("X01", "one expert too few", "router.ids", routed(more=-1), also=f"router.weights {_EXPERTS}"),
    bug("X02", "the bias does not choose", "router.choice", routed(choice=lambda gate, s: s + 0)),
    bug("X03", "weights are normalised over all experts", "router.weights", routed(weigh=_over_all)),
    bug(
        "X04",
        "ids are sorted and their weights are not",
        "router.weights moe.routed",  # either the order is wrong, or how they are paired
        lambda m: with_forward(m, "mlp.gate", after(_weights_left_behind)),
    ),
    bug("X05", "the router sees the residual stream before the norm", "router.logits", _unnormed),
    bug(
        "X06",
        "tokens go to the expert after theirs",
        _EXPERTS,
        _dispatch(lambda m, ids, w: ((ids + 1) % m.num_experts, w)),
    ),
    bug("X07", "what experts give is not weighted", "moe.routed", _dispatch(lambda m, ids, w: (ids, w * 0 + 1))),
    bug("X08", "experts have a capacity; tokens beyond it are dropped", _EXPERTS, _dispatch(_dropped)),
    bug(
        "X09",
        "the shared expert is scaled like a routed one",
        "ffn_out",
        _moe(lambda m, y, shared: y + shared * m.config.routed_scaling_factor),
    ),
    bug(
        "X10",
        "the experts' sum is averaged with the shared one",
        "ffn_out",
        _moe(lambda m, y, shared: (y + shared) / 2),
    ),
    bug(
        "X11",
        "the scaling factor is applied to the sum, the shared expert included",
        "ffn_out router.weights",
        lambda m: together(
            _scaled(lambda g: 1 / g.routed_scaling_factor)(m),
            _moe(lambda mlp, y, shared: (y + shared) * mlp.config.routed_scaling_factor)(m),
        ),
    ),
)
