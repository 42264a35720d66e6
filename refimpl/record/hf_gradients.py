"""Gradients of a run of transformers' model: by the taps that were seen, and by its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.tensor import Array
from refimpl.diff.gradients import gradient_name

from .hf_load import checkpoint_names
from .hf_probes import NO_GRADIENT, Seen
from .torch_arrays import libraries, to_numpy

LOSSES = ("fwd/loss.main", "fwd/loss.total")
"""transformers' loss is both: it knows no MTP modules and no balance loss of V3."""


@dataclass(frozen=True)
class Held:
    """Taps whose tensors are kept until the backward pass, and what then gives the gradients by them."""

    taps: tuple[str, ...]
    give: Callable[[], Iterable[Array]]


def retain(seen: Seen) -> None:
    """Have the backward pass keep the gradients of all tensors of a call."""
    for t in _tensors((seen.args, tuple(seen.kwargs.values()), seen.out)):
        if t.requires_grad and not t.is_leaf:
            t.retain_grad()


def gradient(t: Any) -> Any:
    """The gradient by a tensor: 0 where no path leads from it to the loss."""
    torch, _ = libraries()
    return torch.zeros_like(t) if t.grad is None else t.grad


def of_call(seen: Seen) -> Seen:
    """A call with gradients in the places of its tensors."""
    return Seen(_mapped(seen.args), {n: _mapped(a) for n, a in seen.kwargs.items()}, _mapped(seen.out))


def names(model: Any, known: Iterable[str]) -> list[str]:
    """The losses, and what gradients by taps and weights are called."""
    by_tap = [gradient_name(tap) for tap in known if tap.rpartition("/")[2] not in NO_GRADIENT]
    weights = checkpoint_names(model, dict(model.named_parameters()))
    return [*LOSSES, *by_tap, *(f"grad/{n}" for n in weights)]


def gradients(model: Any, loss: Any, held: Iterable[Held], taps: Mapping[str, Array]) -> dict[str, Array]:
    """The losses and all gradients, by one backward pass; no gradient is left on the model. A tap's has the tap's own shape."""
    loss.backward()
    found = dict.fromkeys(LOSSES, to_numpy(loss))
    for h in held:
        for tap, x in zip(h.taps, h.give(), strict=True):
            if tap in taps and tap.rpartition("/")[2] not in NO_GRADIENT:
                found[gradient_name(tap)] = x.reshape(taps[tap].shape)
    weights = checkpoint_names(model, {n: gradient(p) for n, p in model.named_parameters()})
    model.zero_grad(set_to_none=True)
    return found | {f"grad/{n}": g for n, g in weights.items()}


def _tensors(x: Any) -> Iterable[Any]:
    if isinstance(x, tuple | list):
        for part in x:
            yield from _tensors(part)
    elif hasattr(x, "retain_grad"):
        yield x


def _mapped(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple([_mapped(part) for part in x])
    return gradient(x) if hasattr(x, "retain_grad") and x.is_floating_point() else x
