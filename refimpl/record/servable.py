"""A case as a folder that inference engines load and serve: their names of files, weights in one dtype, a tokenizer.

The tokenizer is byte-level BPE in which a text says its ids and nothing else does: ids below 256 are bytes, of which those below
128 are ASCII; ids from 256 are the characters from U+0100, each the one merge of its two bytes. No merge crosses a character, so
tokens become text and text becomes the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction
from refimpl.checkpoint.names import BIAS, layer_of
from refimpl.checkpoint.safetensors import write_into
from refimpl.diff import Case

from . import gguf_weights
from .candidate import library, plain_only, written

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
"""What weights may be stored in; float32 holds what a case has exactly, and is all that MLX's CPU backend runs."""
END = 0
"""The id that ends a text: engines want one. It is drawn for no case of ours."""
_ASCII, _BYTES, _PAIRS = 128, 256, 0x800
"""Ids below are ASCII, bytes, characters of two bytes; beyond, names that no text gives."""


def servable(case: Case, out: str | Path, *, dtype: str = "float32", gguf: bool = False) -> Path:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and tokens.json; with
    `gguf` model.gguf too, in float32. MTP layers are left out. The folder is a case itself. SpecError without PyPI's `tokenizers`
    (extra `text`), with `gguf` without that library.
    """
    require(dtype in DTYPES, f"weights in {dtype!r}; expected {' or '.join(DTYPES)}")
    plain_only(case, "an engine behind its server")
    out, c, vocabulary = Path(out), case.config, tokens_of(case.config.vocab_size)
    weights = {n: w.astype(_held(n, dtype)) for n, w in case.weights().items() if _served(n, c.num_hidden_layers)}
    texts = _texts(case, vocabulary, dtype)
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
    if gguf:
        merges = merges_of(vocabulary) or [
            (_letters()[0xC4], _letters()[0x80])
        ]  # llama.cpp wants one; ASCII has no such pair
        gguf_weights.write(case, out / "model.gguf", vocabulary=(vocabulary, merges, END))
    with Transaction() as files:
        write_into(files, out / "model.safetensors", weights)
        for name, text in texts.items():
            with files.new(out / name) as f:
                f.write(text.encode())
    return out


def _texts(case: Case, vocabulary: Sequence[str], dtype: str) -> dict[str, str]:
    """The folder's JSON files, by name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": case.config.max_position_embeddings,
        "eos_token": vocabulary[END],
    }
    return {
        "tokenizer.json": tokenizer(vocabulary).to_str(pretty=True),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({"do_sample": False, "eos_token_id": END}),
        "tokens.json": (case.path / "tokens.json").read_text(encoding="utf-8"),
        "config.json": _json(_config(case, dtype)),
    }


def readable(vocab_size: int) -> Array:
    """The ids that a text can give, without END."""
    ids = np.arange(vocab_size)
    return ids[((ids < _ASCII) | (ids >= _BYTES)) & (ids < _PAIRS) & (ids != END)]


def tokens_of(vocab_size: int) -> list[str]:
    """Every id's token, as byte-level BPE writes it: a printable character for each byte."""
    letters = _letters()
    found = letters[:vocab_size]
    for i in range(_BYTES, vocab_size):
        found.append("".join(letters[b] for b in chr(i).encode()) if i < _PAIRS else f"<|{i}|>")
    return found


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The two bytes of each character."""
    return [(t[0], t[1]) for t in tokens[_BYTES:_PAIRS]]


def tokenizer(tokens: Sequence[str]) -> Any:
    """PyPI's `tokenizers.Tokenizer` of these tokens."""
    made = library("tokenizers", "text")
    inner = made.Tokenizer(made.models.BPE({t: i for i, t in enumerate(tokens)}, merges_of(tokens)))
    inner.pre_tokenizer = made.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = made.decoders.ByteLevel()
    return inner


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printable, else the next character from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(rest)) for b in range(_BYTES)]


def _served(name: str, layers: int) -> bool:
    return (layer_of(name) or 0) < layers


def _held(name: str, dtype: str) -> Any:
    """The selection bias is float32, as released."""
    return np.float32 if name.endswith(BIAS) else DTYPES[dtype]


def _config(case: Case, dtype: str) -> dict[str, Any]:
    """config.json with what engines look for; the weights are no codes any more."""
    kept = {k: v for k, v in case.raw_config.items() if k != "quantization_config"}
    mine = {"architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": dtype, "hidden_act": "silu", "eos_token_id": END}
    return kept | mine | {"num_nextn_predict_layers": 0}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
