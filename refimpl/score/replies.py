"""What the replies of OpenAI-compatible servers show, in the shapes that they have: vLLM's prompt_logprobs, the completions' echo,
a generated token's top_logprobs keyed by text, by token or by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.autograd.errors import SpecError, require

from .shown import Entry, logprob, number

_BY_ID = "token_id:"
"""vLLM's return_tokens_as_token_ids."""


@dataclass(frozen=True)
class Words:
    """What a token is called in a reply: text -> id, for texts that are one token's alone."""

    ids: Mapping[str, int] = field(default_factory=dict)

    def id_of(self, name: Any, given: Any = None) -> int | None:
        """The id of a token by its own `id`, or by its name; None if the name could be several."""
        if given is not None:
            return number(given, "token id")
        if isinstance(name, str) and name.startswith(_BY_ID):
            return number(name.removeprefix(_BY_ID), "token id")
        return self.ids.get(name) if isinstance(name, str) else None


def choice(reply: Any, row: int = 0) -> Mapping[str, Any]:
    """A reply's choice for a row. SpecError where there is none."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) <= row:
        raise SpecError(f"the reply has no choice {row}")
    found = next((c for c in choices if isinstance(c, dict) and c.get("index") == row), choices[row])
    if not isinstance(found, dict):
        raise SpecError(f"choice {row} is {found!r}; expected an object")
    return found


def whole(reply: Any, row: int, tokens: Sequence[int], words: Words) -> dict[int, Entry]:
    """Position -> entry, of a reply that shows a prompt; {} where it shows nothing of it. Entry i of a reply is of the token at i,
    given those before: what follows position i - 1.
    """
    said = choice(reply, row)
    if said.get("prompt_logprobs") is not None:
        return _after(_lists(said["prompt_logprobs"], "prompt_logprobs"), tokens, words, _keyed_by_id)
    inner = said.get("logprobs")
    if not isinstance(inner, dict) or not isinstance(inner.get("top_logprobs"), list):
        return {}
    entries = inner["top_logprobs"]
    require(len(entries) >= len(tokens), f"log-probabilities of {len(entries)} tokens; the prompt has {len(tokens)}")
    return _after(entries[: len(tokens) + 1], tokens, words, _keyed_by_text)


def generated(reply: Any, words: Words) -> tuple[Entry, int | None]:
    """(what is shown of the first generated token, the token itself if it can be told); empty where it shows nothing."""
    said = choice(reply)
    inner, text = said.get("logprobs"), said.get("text")
    chosen = words.id_of(text)
    if not isinstance(inner, dict):
        return {}, chosen
    if isinstance(content := inner.get("content"), list) and content and isinstance(content[0], dict):
        tops = _lists(content[0].get("top_logprobs") or [content[0]], "top_logprobs")
        return _listed(tops, words), chosen
    if isinstance(keyed := inner.get("top_logprobs"), list) and keyed and isinstance(keyed[0], dict):
        return _keyed_by_text(keyed[0], words), chosen
    if isinstance(alone := inner.get("token_logprobs"), list) and alone and alone[0] is not None and chosen is not None:
        return {chosen: logprob(alone[0])}, chosen
    return {}, chosen


def _after(entries: Sequence[Any], tokens: Sequence[int], words: Words, read: Any) -> dict[int, Entry]:
    found = {i - 1: read(e, words) for i, e in enumerate(entries) if e is not None and i > 0}
    return {t: e for t, e in found.items() if e and t < len(tokens)}


def _keyed_by_id(entry: Any, words: Words) -> Entry:
    require(isinstance(entry, dict), f"prompt_logprobs has {entry!r}; expected an object by token id")
    values = {number(i, "token id"): v.get("logprob") if isinstance(v, dict) else v for i, v in entry.items()}
    return {i: logprob(v) for i, v in values.items()}


def _keyed_by_text(entry: Any, words: Words) -> Entry:
    require(isinstance(entry, dict), f"top_logprobs has {entry!r}; expected an object by token")
    named = {words.id_of(name): logprob(v) for name, v in entry.items()}
    return {i: v for i, v in named.items() if i is not None}


def _listed(tops: Sequence[Any], words: Words) -> Entry:
    require(all(isinstance(e, dict) for e in tops), "top_logprobs has an entry that is no object")
    named = {words.id_of(e.get("token"), e.get("id")): logprob(e.get("logprob")) for e in tops}
    return {i: v for i, v in named.items() if i is not None}


def _lists(x: Any, what: str) -> list[Any]:
    if not isinstance(x, list):
        raise SpecError(f"{what} is {type(x).__name__}; expected a list")
    return x
