"""llama.cpp through llama-cpp-python: the nodes of its graph as the evaluation callback shows them, one sequence a run.

float32 cache, no flash attention, the whole prompt in one batch; on the CPU unless the library was built otherwise.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace

from . import gguf_weights
from .candidate import Candidate, Recorded, deliver, library, record_runs
from .tapmap import read
from .watch import Watch

_TYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 26: np.int32, 30: ml_dtypes.bfloat16}
"""ggml's number of a type -> ours."""
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
Nodes = dict[tuple[str, int], Array]
"""(name, which of that name, from 1) -> what the node holds, slowest axis first."""


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


def record(case_dir: str | Path, out: str | Path, *, gguf: str | Path | None = None) -> Recorded:
    """Run the case through llama.cpp and write its trace. gguf: a file of the case's model; without it one is made of the case."""
    case = Case.read(case_dir)
    library("llama_cpp", "llamacpp")
    require(case.valid is None, "the case has padding, which is not put into llama.cpp's batch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.gguf" if gguf is None else Path(gguf)
        if gguf is None:
            gguf_weights.write(case, path)
        held = gguf_weights.read(path, case.config)
        with loaded(path) as model:
            return deliver(trace_of(model, case, held), out)


def trace_of(model: Any, case: Case, held: Mapping[str, Array] | None) -> Trace:
    """The trace of a loaded model: three runs, of which two are watched. held: its weights under checkpoint names."""
    map_ = read("llama_cpp")
    names: dict[str, None] = {}

    def watch() -> Watch:
        found = Watch(map_, case)
        names.update(dict.fromkeys(path for path, _ in found.keys))
        return found

    def run(seen: Watch | None) -> Array:
        rows = [
            _run(model, tokens, case.positions[b] if case.positions else range(len(tokens)), seen, names)
            for b, tokens in enumerate(case.tokens)
        ]
        for name, nth in rows[0][1] if seen else ():
            parts = [nodes.get((name, nth)) for _, nodes in rows]
            shown = [p for p in parts if p is not None]
            if seen and len(shown) == len(parts):
                seen.see((name, ""), [], {}, np.concatenate(shown))
        return np.stack([logits for logits, _ in rows])

    return record_runs(case, map_, run, watch, Candidate(model, weights=held), storage="float32")


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    """llama.cpp's model of a GGUF file. SpecError where it cannot be loaded."""
    llama = library("llama_cpp", "llamacpp")
    said: list[str] = []

    def keep(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR:
            said.append(text.decode(errors="replace"))

    kept = llama.llama_log_callback(keep)  # held while llama.cpp may call it
    llama.llama_log_set(kept, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    try:
        require(model, f"{path}: llama.cpp cannot load it: {' '.join(' '.join(said).split())}")
        yield model
    finally:
        if model:
            llama.llama_model_free(model)
        llama.llama_log_set(llama._logger.llama_log_callback, None)  # the package's own


def _run(
    model: Any, tokens: list[int], positions: Any, seen: Watch | None, names: Mapping[str, None]
) -> tuple[Array, Nodes]:
    """One sequence -> logits (S, V), and the nodes of these names if the run is watched."""
    llama, nodes = library("llama_cpp", "llamacpp"), Nodes()
    callback = llama.ggml_backend_sched_eval_callback(_callback(nodes, names))  # held until the run is over
    context = new_context(model, len(tokens), callback if seen else None)
    try:
        return decoded(model, context, tokens, positions), nodes
    finally:
        llama.llama_free(context)


def new_context(model: Any, length: int, callback: Any = None) -> Any:
    """llama.cpp's context for one sequence of up to so many tokens, to be given to `llama_free`."""
    llama = library("llama_cpp", "llamacpp")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, length)
    settings.n_threads = settings.n_threads_batch = 1
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = 0  # float32
    if callback is not None:
        settings.cb_eval = callback
    context = llama.llama_init_from_model(model, settings)
    require(context, "llama.cpp cannot make a context for this model")
    return context


def decoded(model: Any, context: Any, tokens: Sequence[int], positions: Iterable[int]) -> Array:
    """Logits (S, V) of tokens behind those that the context holds."""
    llama, length = library("llama_cpp", "llamacpp"), len(tokens)
    batch = llama.llama_batch_init(length, 0, 1)
    try:
        batch.n_tokens = length
        for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 1
            batch.seq_id[i][0] = 0
        require(llama.llama_decode(context, batch) == 0, "llama.cpp cannot run these tokens")
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(length, vocabulary)).copy()
    finally:
        llama.llama_batch_free(batch)


def _callback(nodes: Nodes, names: Mapping[str, None]) -> Any:
    """What llama.cpp calls before (ask) and after every node of its graph: keep those of these names."""
    base, count = _ggml(), Counter[str]()

    def call(tensor: int, ask: bool, data: Any) -> bool:
        name = base.ggml_get_name(tensor).decode()
        if ask or name not in names:
            return True
        count[name] += 1
        head = _Tensor.from_address(tensor)
        if head.type in _TYPES:
            nodes[name, count[name]] = _array(base, tensor, head)
        return True

    return call


def _array(base: Any, tensor: int, head: _Tensor) -> Array:
    """The node's numbers, slowest axis first, whatever its strides."""
    size = base.ggml_nbytes(tensor)
    data = ctypes.create_string_buffer(size)
    base.ggml_backend_tensor_get(tensor, data, 0, size)
    flat = np.frombuffer(data.raw, _TYPES[head.type])
    return np.lib.stride_tricks.as_strided(flat, tuple(head.ne)[::-1], tuple(head.nb)[::-1]).copy()


def _ggml() -> Any:
    """The library that holds ggml's tensors, with the signatures that are used here."""
    folder = Path(library("llama_cpp", "llamacpp").__file__).parent / "lib"
    found = sorted(folder.glob("*ggml-base*"))
    require(found, f"no ggml-base library in {folder}")
    base = ctypes.CDLL(str(found[0]))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return base
