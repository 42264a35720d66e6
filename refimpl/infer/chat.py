"""Chat templates: messages to the text of a prompt, by the Jinja template that a checkpoint brings (extra `text`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from refimpl.autograd.errors import SpecError, require


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
    """The prompt's text, up to where the assistant's answer begins. `special`: bos_token and the like, by name.

    Templates come with checkpoints and are not trusted: they run in Jinja's immutable sandbox. What transformers'
    `apply_chat_template` offers them is here too: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop
    controls, trimmed blocks. SpecError for a template that fails or refuses the messages.
    """
    for i, message in enumerate(messages):
        whole = (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        )
        require(whole, f"message {i} is {message!r}; expected a role and a content, both texts")
    try:
        environment = _environment()
        return str(
            environment.from_string(template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, **special
            )
        )
    except SpecError:
        raise
    except (
        Exception
    ) as error:  # whatever a template does wrong: syntax, missing names, types, arithmetic, its own refusals
        line = getattr(error, "lineno", None)
        at = f" (line {line})" if line else ""
        raise SpecError(f"the chat template failed{at}: {type(error).__name__}: {error}") from error


def _environment() -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise SpecError("chat templates need jinja2: pip install 'deepseek-v3-refimpl[text]'") from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(x, indent=indent, ensure_ascii=ensure_ascii)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
