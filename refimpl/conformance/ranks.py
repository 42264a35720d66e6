"""Ourselves on ranks of the simulator, whose own ranks are tested: `refimpl conform ranks --profile parallel`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from refimpl import model
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import data_of
from refimpl.layers.config import Config
from refimpl.layers.stage import STAGES, Stage, observing, tap_matches, tap_name
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.axes.mesh import Mesh, enter
from refimpl.parallel_emulation.comm import Comm, spmd
from refimpl.train.mesh_model import spread

_HEADS = {
    "mla.q": "B S H@tp Dn+Dr",
    "mla.q_rope": "B S H@tp Dr",
    "mla.kv_b": "B T H@tp Dn+Dv",
    "mla.ctx": "B S H@tp Dv",
}
_SPLIT = _HEADS | {
    **dict.fromkeys(("mla.scores", "mla.probs"), "B H@tp S T"),
    **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.act"), "B S F@tp"),
    "attn_out": "B S D +tp",
    "ffn_out": "B S D +tp",
}
"""What each of several tensor-parallel ranks has of a tap."""
_TOKENS = ("router.", "shared.", "moe.shared", "ffn_out")
"""Taps of a layer of experts: each rank has its own tokens there."""
_INSIDE = ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down", "moe.routed", "moe.out")
"""Taps of experts, whose rows are other ranks' as well: not shown."""


_SHAPES = {s.tap: s.shape for s in STAGES.values()}


class Impl(model.Impl):
    """The specification, with `ranks`."""

    def info(self) -> dict[str, Any]:
        """As one rank; attention is expanded."""
        told = super().info()
        return told | {"name": "refimpl on ranks", "layouts": told["layouts"] | {"mla": "expanded"}}

    def ranks(self, tokens: Any, axes: Mapping[str, int], taps: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Every rank's taps in rank order, with the axes of those that it has a part of. axes: {"tp": 2} or {"ep": 2}."""
        unknown = set(axes) - {"tp", "ep"}
        require(not unknown, f"axes {', '.join(sorted(unknown))}; there are tp and ep")
        require(len(axes) == 1, f"axes {dict(axes)}; expected one")
        mesh, held, config = Mesh(**axes), dict(self.model.named_weights()), self.model.config
        patterns = list(taps)

        def program(comm: Comm) -> dict[str, Any]:
            mine = ForCausalLM.from_weights(config, {n: data_of(w) for n, w in held.items() if hasattr(w, "dtype")})
            groups = enter(comm, mesh)
            mine.model.layers = [spread(groups, layer) for layer in mine.model.layers]
            seen: dict[str, Any] = {}

            def keep(stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
                out = run(*args, **static)
                seen[tap_name(stage)] = data_of(out)
                return out

            with observing(self.plan, keep):
                out = mine(mine.inputs(tokens), None, attend="expanded")
            wanted = [t for t in seen if any(tap_matches(t, p) for p in patterns) and not t.endswith(_INSIDE)]
            found = {t: seen[t] for t in wanted}
            return found | {"logits": data_of(out.logits), "dims": _dims(config, found) if groups.tp.size > 1 else {}}

        return spmd(mesh.size, program)


def _dims(c: Config, taps: Iterable[str]) -> dict[str, str]:
    """Tap -> its axes, with marks where tensor-parallel ranks hold a part."""
    found = {}
    for tap in taps:
        layer, _, name = tap.removeprefix("fwd/").partition("/")
        if name and c.is_moe(int(layer.removeprefix("L"))) and name.startswith(_TOKENS):
            found[tap] = _SHAPES[name].replace("B S", "B S@tp")
        elif name in _SPLIT:
            found[tap] = _SPLIT[name]
    return found
