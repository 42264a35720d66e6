"""The body of a request, read: OpenAI's fields and, of vLLM's, those that a specification can answer.

Nothing is ignored in silence: a field that is not known here, or whose value would change the answer in a way that is not computed
here, is refused. null is as good as absent, as with OpenAI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import SpecError
from refimpl.infer.settings import Request, Settings

from .refusal import Refusal, bad
from .service import Service

SAMPLER = ("temperature", "top_p", "min_p", "repetition_penalty")
COMMON = (
    *("model", *SAMPLER, "top_k", "max_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "n", "logprobs"),
    *("stream", "stream_options", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids", "user"),
)
COMPLETION = frozenset([*COMMON, "prompt", "echo"])
CHAT = frozenset([*COMMON, "messages", "top_logprobs", "max_completion_tokens"])
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",)},
    **{"tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "store": (False,)},
    **{"response_format": ({"type": "text"},), "metadata": ({},), "service_tier": ("auto", "default")},
}
"""Fields that are understood only so far as to do nothing."""
STOPS, STOP_LENGTH, TOP = 16, 256, 20
"""At most so many stop texts of so many characters (looking for one costs its length at every token), so many likeliest tokens."""


@dataclass(frozen=True)
class Prompt:
    """What a choice goes on from; `text` as it was given, if it was."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """`choices`: what to run, n for each prompt in turn; `logprobs`: with so many beside each; `silent`: the one token that is
    run is not shown (max_tokens 0).
    """

    prompts: tuple[Prompt, ...]
    choices: tuple[Request, ...]
    stream: bool = False
    usage: bool = False
    echo: bool = False
    silent: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    as_ids: bool = False

    @property
    def scored(self) -> int | None:
        """How many of the likeliest to keep for the prompt's own tokens; None if nobody asked for them."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((n for n in wanted if n is not None), default=None)

    def prompt(self, choice: int) -> Prompt:
        """What a choice goes on from."""
        return self.prompts[choice * len(self.prompts) // len(self.choices)]


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body, without its nulls."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, bad UTF-8, numbers of thousands of digits
        raise Refusal(400, f"the body is not JSON: {error}") from None
    bad(isinstance(found, dict), "the body is no JSON object")
    return {k: v for k, v in found.items() if v is not None}


def completion(service: Service, body: bytes) -> Asked:
    """A body of /v1/completions."""
    o = _known(service, read_json(body), COMPLETION)
    bad("prompt" in o, "you must provide a prompt", "prompt")
    echo, logprobs = _flag(o, "echo"), _whole(o, "logprobs", 0, TOP)
    prompts = [_prompt(service, p, f"prompt {i}") for i, p in enumerate(_prompts(o["prompt"]))]
    return _asked(service, o, prompts, default=16, field="max_tokens", echo=echo, logprobs=logprobs)


def chat(service: Service, body: bytes) -> Asked:
    """A body of /v1/chat/completions."""
    o = _known(service, read_json(body), CHAT)
    bad(isinstance(o.get("messages"), list) and o["messages"], "you must provide messages, a list of them", "messages")
    bad(service.tokenizer, "the checkpoint has no tokenizer.json, and a conversation is text", "messages")
    messages = [_message(m, f"messages[{i}]") for i, m in enumerate(o["messages"])]
    top = _whole(o, "top_logprobs", 0, TOP)
    bad(top is None or _flag(o, "logprobs"), "top_logprobs needs logprobs to be true", "top_logprobs")
    assert service.tokenizer
    try:
        ids = tuple(service.tokenizer.chat(messages))
    except SpecError as error:
        raise Refusal(400, str(error), param="messages") from None
    both = "max_tokens" in o and "max_completion_tokens" in o
    bad(not both, "max_tokens is the old name of max_completion_tokens; give one of them", "max_tokens")
    name = "max_completion_tokens" if "max_completion_tokens" in o else "max_tokens"
    logprobs = (top or 0) if _flag(o, "logprobs") else None
    return _asked(service, o, [Prompt(ids)], default=None, field=name, logprobs=logprobs)


def _asked(
    service: Service,
    o: Mapping[str, Any],
    prompts: Sequence[Prompt],
    *,
    default: int | None,
    field: str,
    logprobs: int | None,
    echo: bool = False,
) -> Asked:
    """What both have in common; `field` holds the most tokens, `default` if it is absent (None: all there is room for)."""
    stream, tokens = _flag(o, "stream"), _whole(o, field, 0 if echo else 1, service.bounds.tokens)
    prompt_logprobs = _whole(o, "prompt_logprobs", 0, TOP)
    bad(prompt_logprobs is None or not stream, "prompt_logprobs do not come in a stream", "prompt_logprobs")
    bad("stream_options" not in o or stream, "stream_options needs stream to be true", "stream_options")
    return Asked(
        tuple(prompts),
        tuple(_choices(service, o, prompts, tokens, default, logprobs or 0)),
        stream=stream,
        usage=_include_usage(o.get("stream_options", {})),
        echo=echo,
        silent=tokens == 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        token_ids=_flag(o, "return_token_ids") or service.tokenizer is None,
        as_ids=_flag(o, "return_tokens_as_token_ids") or service.tokenizer is None,
    )


def _choices(
    service: Service,
    o: Mapping[str, Any],
    prompts: Sequence[Prompt],
    tokens: int | None,
    default: int | None,
    logprobs: int,
) -> Iterator[Request]:
    """n requests for each prompt. The i-th of all draws from seed + i, as the i-th prompt of `refimpl generate` does."""
    n, seed, most = _whole(o, "n", 1) or 1, _whole(o, "seed", 0) or 0, service.bounds.concurrency
    bad(len(prompts) * n <= most, f"{len(prompts) * n} choices; at most {most} are written at a time", "n")
    decode = service.tokenizer.decode if service.tokenizer else None
    for i, ids in enumerate(p.ids for p in prompts for _ in range(n)):
        room = service.room(len(ids))
        limit = max(1, tokens) if tokens is not None else min(default or room, room)
        yield Request(ids, _settings(service, o, max_tokens=limit, seed=seed + i, logprobs=logprobs), decode=decode)


def _settings(service: Service, o: Mapping[str, Any], **own: Any) -> Settings:
    """The sampler; 1 where nothing is said, as with OpenAI. top_k 0 and -1 are vLLM's ways to say all."""
    own |= {k: o[k] for k in SAMPLER if k in o}
    top_k = _whole(o, "top_k", -1)
    stop = [o["stop"]] if isinstance(o.get("stop"), str) else o.get("stop", [])
    short = isinstance(stop, list) and len(stop) <= STOPS and all(isinstance(s, str) for s in stop)
    said = f"expected at most {STOPS} texts of at most {STOP_LENGTH} characters"
    bad(short and all(len(s) <= STOP_LENGTH for s in stop), f"stop: {said}", "stop")
    ends = o.get("stop_token_ids", [])
    bad(isinstance(ends, list), "stop_token_ids: expected a list of ids", "stop_token_ids")
    eos = (*(() if _flag(o, "ignore_eos") else service.eos), *ends)
    try:
        return Settings(top_k=top_k if top_k and top_k > 0 else None, stop=tuple(stop), eos=eos, **own)
    except SpecError as error:
        raise Refusal(400, str(error), param=_blamed(error, o)) from None


def _blamed(error: SpecError, o: Mapping[str, Any]) -> str | None:
    """The field that a message begins with."""
    first = str(error).split(" ", 1)[0]
    return first if first in o else None


def _known(service: Service, o: dict[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    """Only fields that are understood, for the model that is here."""
    for name, value in o.items():
        if name in NEUTRAL:
            same = any(type(value) is type(v) or not isinstance(value, bool) for v in NEUTRAL[name])
            bad(same and value in NEUTRAL[name], f"{name} is not supported here; leave it out", name)
        else:
            bad(name in fields, f"unrecognized request argument: {name}", name)
    bad(isinstance(o.get("model"), str), "you must provide a model, by its name", "model")
    bad(isinstance(o.get("user", ""), str), "user: expected a text", "user")
    if o["model"] != service.name:
        said = f"the model {o['model']!r} does not exist; here is {service.name!r}"
        raise Refusal(404, said, param="model", code="model_not_found")
    return o


def _prompts(said: Any) -> list[Any]:
    """A text, texts, ids, or lists of ids -> a list of texts or of lists of ids."""
    if isinstance(said, str):
        return [said]
    bad(isinstance(said, list) and said, "prompt: expected a text, a list of ids, or a list of these", "prompt")
    return said if isinstance(said[0], str | list) else [said]


def _prompt(service: Service, said: Any, where: str) -> Prompt:
    if isinstance(said, str):
        bad(service.tokenizer, "the checkpoint has no tokenizer.json; give ids instead of text", "prompt")
        assert service.tokenizer
        return Prompt(tuple(service.tokenizer.encode(_proper(said, where))), said)
    whole = isinstance(said, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in said)
    bad(whole, f"{where}: expected a text or a list of ids", "prompt")
    return Prompt(tuple(said))


def _message(said: Any, where: str) -> dict[str, str]:
    bad(isinstance(said, dict), f"{where}: expected an object", "messages")
    known = {k: v for k, v in said.items() if v is not None}
    unknown = sorted(set(known) - {"role", "content", "name"})
    bad(not unknown, f"{where}: {', '.join(unknown)} not supported here", "messages")
    content = known.get("content")
    if isinstance(content, list):  # of parts; other than text there is none
        texts = all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
        bad(texts, f"{where}: only parts of type text", "messages")
        known["content"] = "\n".join(p["text"] for p in content)
    for name in ("role", "content"):
        bad(isinstance(known.get(name), str), f"{where}: {name} must be a text", "messages")
    bad(isinstance(known.get("name", ""), str), f"{where}: name must be a text", "messages")
    return {k: _proper(v, where) for k, v in known.items()}


def _proper(text: str, where: str) -> str:
    """A text that has an encoding: JSON can also name half a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(400, f"{where}: a lone surrogate is no character") from None
    return text


def _flag(o: Mapping[str, Any], name: str) -> bool:
    value = o.get(name, False)
    bad(isinstance(value, bool), f"{name}: expected true or false", name)
    return bool(value)


def _whole(o: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = o.get(name)
    if value is None:
        return None
    number = isinstance(value, int) and not isinstance(value, bool)
    said = f"{name} is {value!r}; expected a whole number from {least}" + ("" if most is None else f" to {most}")
    bad(number and value >= least and (most is None or value <= most), said, name)
    return int(value)


def _include_usage(options: Any) -> bool:
    known = isinstance(options, dict) and set(options) <= {"include_usage"}
    bad(known, "stream_options: expected an object with include_usage", "stream_options")
    return _flag(options, "include_usage")
