"""Text to tokens and back, by the `tokenizer.json` beside a checkpoint (extra `text`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.checkpoint import json_object

from .chat import render


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with what `tokenizer_config.json` and `chat_template.jinja` say, where they are there."""

    def __init__(self, inner: Any, settings: Mapping[str, Any], template: str | None) -> None:
        self._inner, self._settings, self._template = inner, settings, template
        self.special = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _text(settings.get(name)))
        }

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """SpecError for a file that is missing or broken, and where the library is not installed."""
        file = folder / "tokenizer.json"
        require(file.is_file(), f"{folder} has no tokenizer.json; give token ids instead of text")
        try:
            from tokenizers import Tokenizer as Inner
        except ImportError:
            raise SpecError("text needs the library tokenizers: pip install 'deepseek-v3-refimpl[text]'") from None
        try:
            inner = Inner.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise SpecError(f"{file} is no tokenizer: {error}") from error
        settings = folder / "tokenizer_config.json"
        with where(f"while reading {folder}"):
            found = json_object(settings) if settings.is_file() else {}
            return cls(inner, found, _template(folder, found))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the begin-of-sentence token in front if the settings add one."""
        ids = self._ids(text)
        if self._settings.get("add_bos_token") and "bos_token" in self.special:
            bos = self._inner.token_to_id(self.special["bos_token"])
            require(
                bos is not None, f"the begin-of-sentence token {self.special['bos_token']!r} is not in the vocabulary"
            )
            ids = ids if ids[:1] == [bos] else [bos, *ids]
        return ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the chat template, up to where the answer begins."""
        require(self._template, "the checkpoint has no chat template; give a text that is not a conversation")
        text = render(str(self._template), messages, self.special)
        return self._ids(text, add_special_tokens=False)  # the template writes them

    def _ids(self, text: str, **how: bool) -> list[int]:
        """SpecError for half a pair of surrogates, which is how Python holds bytes that are no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpecError(f"the text holds {text[error.start]!r} at {error.start}, which is no character") from None
        return [int(i) for i in self._inner.encode(text, **how).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """One token's own text, special ones shown; U+FFFD for a part of a character."""
        return str(self._inner.decode([token], skip_special_tokens=False))

    @property
    def eos(self) -> tuple[int, ...]:
        """The end-of-sentence token's id, if there is one."""
        found = self._inner.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None
        return () if found is None else (int(found),)


def eos_of(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` of generation_config.json, or of the config; () if neither says."""
    file = folder / "generation_config.json"
    own = json_object(file) if file.is_file() else {}
    said = own.get("eos_token_id", config.get("eos_token_id"))
    ids = said if isinstance(said, list) else [] if said is None else [said]
    require(all(isinstance(i, int) for i in ids), f"eos_token_id is {said!r}; expected an id or a list of them")
    return tuple(ids)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{file}: cannot be read: {error}") from None
    said = settings.get("chat_template")
    if isinstance(said, list):  # several by name
        said = next((t.get("template") for t in said if isinstance(t, Mapping) and t.get("name") == "default"), None)
    require(said is None or isinstance(said, str), "chat_template in tokenizer_config.json is no text")
    return said


def _text(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: the text, or an object with its `content`."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None
