"""llama.cpp as an implementation to test, through a GGUF file of the weights; the end of a process that speaks the line protocol:

refimpl conform --cmd "python -m refimpl.conformance.serve refimpl.conformance.ports.llama_cpp:Impl"
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace
from refimpl.record import gguf_weights, llamacpp
from refimpl.record.candidate import library

from .engine import Cache, Engine, without_codes

LONGEST = 256
"""Tokens for which a cache has room."""


class Impl(Engine):
    """One sequence a context, with a float32 cache and without flash attention."""

    package = "llama_cpp_python"
    layouts: ClassVar[Mapping[str, str]] = {"mla": "absorbed"}

    def __init__(self) -> None:
        super().__init__()
        self._open = ExitStack()

    def make(self, case: Case) -> Any:
        """Without MTP layers, which are not in the file."""
        self.close()
        path = Path(self._open.enter_context(tempfile.TemporaryDirectory())) / "case.gguf"
        gguf_weights.write(without_codes(case), path)
        return self._open.enter_context(llamacpp.loaded(path))

    def run(self, case: Case) -> Array:
        """Each sequence in a context of its own."""
        self._unpadded(case)
        rows = []
        for b, tokens in enumerate(case.tokens):
            context = llamacpp.new_context(self.model, len(tokens))
            try:
                places = case.positions[b] if case.positions else range(len(tokens))
                rows.append(llamacpp.decoded(self.model, context, tokens, places))
            finally:
                library("llama_cpp", "llamacpp").llama_free(context)
        return np.stack(rows)

    def more(self, tokens: Array, cache: Cache) -> Array:
        """On contexts that stay until the model is let go."""
        if "contexts" not in cache:
            cache.update(contexts=[self._context() for _ in tokens], length=0)
        first = cache["length"]
        cache["length"] = first + tokens.shape[1]
        places = range(first, cache["length"])
        return np.stack(
            [
                llamacpp.decoded(self.model, context, row.tolist(), places)
                for context, row in zip(cache["contexts"], tokens, strict=True)
            ]
        )

    def watched(self, case: Case) -> Trace:
        """Its recorder's."""
        self._unpadded(case)
        return llamacpp.trace_of(self.model, case, None)

    def close(self) -> None:
        """Free contexts, model and file."""
        self.model = None
        self._open.close()

    def _context(self) -> Any:
        context = llamacpp.new_context(self.model, LONGEST)
        self._open.callback(library("llama_cpp", "llamacpp").llama_free, context)
        return context

    @staticmethod
    def _unpadded(case: Case) -> None:
        if case.valid is not None:
            raise NotImplementedError("padding")
