"""A run of transformers' model: whole, or in parts on a cache; with a loss, if it is trained on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import require
from refimpl.model.phases import Part, parts_of

from .torch_arrays import libraries

Rows = Sequence[Sequence[int]]
Around = Callable[[Part, Any], AbstractContextManager[Any]]
"""What stands around one part of a run, given its cache (None: there is none)."""


@dataclass(frozen=True)
class Batch:
    """tokens and positions (B, S); valid (B, S), 0 for padding, or None; the phases it is run in; labels (B, S) of a run that is
    trained on, -100 for those that do not count, else None.
    """

    tokens: Rows
    positions: Rows
    valid: Rows | None = None
    phases: tuple[str, ...] = ("fwd",)
    labels: Rows | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The run's parts, by their names. SpecError for several parts of a run that is trained on."""
        found = parts_of(self.phases, len(self.tokens[0]))
        require(self.labels is None or len(found) == 1, "a run that gradients are taken of has one part, fwd")
        return found


def _nothing(part: Part, cache: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def run_batch(model: Any, batch: Batch, around: Around = _nothing) -> tuple[Any, Any]:
    """Logits (B, S, V) of all parts, one behind the other, and the loss, None without labels: torch tensors."""
    torch, transformers = libraries()
    ids, places = torch.tensor(batch.tokens), torch.tensor(batch.positions)
    # without a mask, transformers takes a jump in the positions for a new document
    real = torch.ones_like(ids) if batch.valid is None else torch.tensor(batch.valid)
    more: dict[str, Any] = {} if batch.labels is None else {"labels": torch.tensor(batch.labels)}
    parts, logits, loss, cache = batch.parts, [], None, None
    if len(parts) > 1:
        cache = transformers.DynamicCache(config=model.config)
        more[_cache_name(model)] = cache
    for part in parts:
        own, mask = slice(part.start, part.stop), real[:, : part.stop]
        with around(part, cache):
            out = model(
                input_ids=ids[:, own],
                attention_mask=mask,
                position_ids=places[:, own],
                use_cache=cache is not None,
                **more,
            )
        logits.append(out.logits)
        loss = getattr(out, "loss", None)
    require(batch.labels is None or loss is not None, "the model gives no loss for labels, so it has no gradients")
    return torch.cat(logits, 1) if len(logits) > 1 else logits[0], loss


def run_on(model: Any, tokens: Rows, cache: MutableMapping[str, Any]) -> Any:
    """Logits (B, S, V), a torch tensor, of tokens behind those that `cache` holds; a dict, empty at first, which is updated."""
    torch, transformers = libraries()
    ids, past = torch.tensor(tokens), cache.get("length", 0)
    kept = cache.setdefault("cache", transformers.DynamicCache(config=model.config))
    total = cache["length"] = past + ids.shape[1]
    out = model(
        input_ids=ids,
        attention_mask=torch.ones(len(ids), total, dtype=torch.int64),
        position_ids=torch.arange(past, total).expand(len(ids), -1),
        use_cache=True,
        **{_cache_name(model): kept},
    )
    return out.logits


def _cache_name(model: Any) -> str:
    """What the model's forward calls its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
