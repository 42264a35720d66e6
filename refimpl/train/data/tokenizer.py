"""Text to token ids: bytes, which need no library, and byte-level BPE through PyPI's `tokenizers` (extra `text`), in the released
`tokenizer.json` format (R 4.1: 128K tokens; the pre-tokenizer joins punctuation with line breaks).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
SENTINELS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)
"""The names in V3's tokenizer.json of the tokens that no text gives."""


class Tokenizer(Protocol):
    """What building shards needs. `ids` gives the id of each of SENTINELS; `encode` never gives one of them, whatever a text
    contains; `fingerprint` is the same for the same vocabulary only.
    """

    fingerprint: str
    vocab_size: int
    ids: Mapping[str, int]

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """Texts -> ids (n,) of each, int64."""

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; sentinels are written out by name."""


class Bytes:
    """One token for every byte of UTF-8, and the sentinels from 256 on."""

    fingerprint = "bytes/1"
    vocab_size = 256 + len(SENTINELS)
    ids: Mapping[str, int] = {name: 256 + i for i, name in enumerate(SENTINELS)}

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """Texts -> their bytes (n,), int64."""
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int64) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD."""
        names = {i: name for name, i in self.ids.items()}
        return b"".join(names[i].encode() if i in names else bytes([i]) for i in map(int, ids)).decode(errors="replace")


class Bpe:
    """A tokenizer.json. SpecError for a file that is none, or that lacks one of SENTINELS."""

    def __init__(self, text: str) -> None:
        try:
            self._inner: Any = _library().Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise SpecError(f"not a tokenizer.json: {error}") from error
        canonical = json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self.fingerprint = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        found = {name: self._inner.token_to_id(name) for name in SENTINELS}
        missing = [name for name, i in found.items() if i is None]
        require(not missing, f"the tokenizer has no {', '.join(missing)}")
        self.ids: Mapping[str, int] = found
        names = [t.content for t in self._inner.get_added_tokens_decoder().values() if len(t.content) > 1]
        self._joint = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names))
        self._starts = {n[:2] for n in names}

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """Texts -> ids (n,) of each, int64. Where a text spells out an added token it is cut inside the name, so that no text can
        end a document or open a hole.
        """
        parts = [self._joint.split(t) if any(s in t for s in self._starts) else [t] for t in texts]
        flat = self._inner.encode_batch([p for some in parts for p in some], add_special_tokens=False)
        ids = iter([np.array(e.ids, np.int64) for e in flat])
        return [np.concatenate([next(ids) for _ in some]) for some in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> text; sentinels are written out by name."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def load_tokenizer(name: str | Path) -> Tokenizer:
    """ "bytes", or a tokenizer.json. SpecError if there is none."""
    if str(name) == "bytes":
        return Bytes()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{name}: cannot be read: {error}; expected `bytes` or a tokenizer.json") from error
    return Bpe(text)


# ---- Training a small one

_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""How V3's tokenizer.json cuts a text before BPE: digits by threes; Chinese characters and kana; words, punctuation with the line
breaks after it, white space.
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE of this size learned from texts, with V3's pre-tokenizer and sentinels -> the text of its tokenizer.json.
    SpecError for texts too small to teach so many.
    """
    lib = _library()
    least = 256 + len(SENTINELS)
    require(vocab_size >= least, f"vocab_size is {vocab_size}; bytes and sentinels alone are {least}")
    inner = lib.Tokenizer(lib.models.BPE())
    cuts = [lib.pre_tokenizers.Split(lib.Regex(pattern), "isolated") for pattern in _SPLITS]
    level = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = lib.pre_tokenizers.Sequence([*cuts, level])
    inner.decoder = lib.decoders.ByteLevel()
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SENTINELS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    found = inner.get_vocab_size()
    require(found == vocab_size, f"the texts teach only {found} tokens, not {vocab_size}")
    text: str = inner.to_str(pretty=True)
    return text


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise SpecError('a BPE needs the library tokenizers: pip install "deepseek-v3-refimpl[text]"') from error
    return tokenizers
