"""An implementation in another process, of any language: one JSON object a line in and out, arrays by path (`wire`).

{"seq": 1, "do": "info", "protocol": "refimpl-impl/1", "folder": "/tmp/x"}   -> {"seq": 1, "status": "ok", "result": {"name": ...}}
{"seq": 2, "do": "load", "folder": "/tmp/x/case"}    config.json and weights.safetensors lie there
{"seq": 3, "do": "forward", "tokens": ARRAY, "taps": ["*"], "cache": "c1", ...}
{"seq": 4, "do": "step", "token": ARRAY, "cache": "c1"}                      "c1" was filled by a forward
{"seq": 5, "do": "stage", "name": "attn_norm", "inputs": {"x": ARRAY, "w": ARRAY}, "params": {"eps": 1e-6}}
{"seq": 6, "do": "ranks", "tokens": ARRAY, "axes": {"tp": 2}, "taps": ["*"]}  the answer is a list, of every rank
{"seq": 7, "do": "stop"}

The answer repeats seq, and is "ok" with a result, "lacking" with a text (not implemented), or "error" with a text. Files of
answers go into `folder`. Standard error is the implementation's own.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require
from refimpl.checkpoint import Transaction
from refimpl.checkpoint.safetensors import write_into

from .wire import put, take

PROTOCOL = "refimpl-impl/1"
"""The name of this version."""
SECONDS = 120.0
"""An answer that takes longer is none."""


class Lacking(Exception):
    """The implementation does not have what was asked for."""


class Process:
    """The methods of the protocol, each a line to the process and a line back."""

    def __init__(self, command: str, *, seconds: float = SECONDS) -> None:
        """Start the command. SpecError if it cannot be, or does not answer."""
        self.command, self.seconds = command, seconds
        self._lines: queue.Queue[str] = queue.Queue()
        self._seq, self._files, self._caches = 0, [0], 0
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        except (OSError, ValueError) as error:
            raise SpecError(f"command {command!r} cannot be started: {error}") from None
        self._folder = tempfile.TemporaryDirectory(prefix="refimpl-impl-")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def folder(self) -> Path:
        """Where arrays lie."""
        return Path(self._folder.name)

    def info(self) -> dict[str, Any]:
        """What it says of itself."""
        told = self._ask("info", protocol=PROTOCOL, folder=str(self.folder))
        require(isinstance(told, dict), f"{self.command}: info is {told!r}; expected an object")
        return dict(told)

    def load(self, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Write a case's two files and say where they are."""
        case = self.folder / "case"
        case.mkdir(exist_ok=True)
        with Transaction() as files:
            write_into(files, case / "weights.safetensors", dict(weights))
            with files.new(case / "config.json") as f:
                f.write(json.dumps(config).encode())
        self._ask("load", folder=str(case))

    def forward(
        self,
        tokens: Any,
        positions: Any = None,
        cache: MutableMapping[str, Any] | None = None,
        taps: Iterable[str] = (),
        **inputs: Any,
    ) -> Any:
        """{tap: array}. A cache is a dict that remembers the name under which the process keeps it."""
        kept = None if cache is None else cache.setdefault("process", self._new_cache())
        given = {"tokens": tokens, "positions": positions, "cache": kept, "taps": list(taps), **inputs}
        return self._ask("forward", **given)

    def step(self, token: Any, cache: Mapping[str, Any], taps: Iterable[str] = ()) -> Any:
        """{tap: array}; the cache grows."""
        return self._ask("step", token=token, cache=cache.get("process"), taps=list(taps))

    def loss_and_grads(self, tokens: Any, labels: Any, taps: Iterable[str] = (), **weights: float) -> Any:
        """{"loss", "grad/<name>"}."""
        return self._ask("loss_and_grads", tokens=tokens, labels=labels, taps=list(taps), **weights)

    def stage(self, name: str, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
        """One stage's output."""
        return self._ask("stage", name=name, inputs=inputs, params=params)

    def ranks(self, tokens: Any, axes: Mapping[str, int], taps: Iterable[str] = ()) -> Any:
        """[{tap: array}] of every rank."""
        return self._ask("ranks", tokens=tokens, axes=dict(axes), taps=list(taps))

    def close(self) -> None:
        """Ask it to stop; end it if it does not."""
        if self._process.poll() is None:
            try:
                self._send({"seq": self._seq + 1, "do": "stop"})
                self._process.wait(timeout=5)
            except (SpecError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._reader.join()
        self._folder.cleanup()

    def _new_cache(self) -> str:
        self._caches += 1
        return f"c{self._caches}"

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            self._lines.put(line)
        self._lines.put("")

    def _send(self, message: dict[str, Any]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except (OSError, ValueError) as error:
            raise SpecError(f"{self.command} has ended and takes no more input: {error}") from None

    def _ask(self, do: str, **given: Any) -> Any:
        self._seq += 1
        self._send({"seq": self._seq, "do": do} | {k: put(v, self.folder, self._files) for k, v in given.items()})
        try:
            line = self._lines.get(timeout=self.seconds)
        except queue.Empty:
            self._process.kill()
            raise SpecError(f"{self.command} did not answer {do!r} within {self.seconds:g} s") from None
        require(line, f"{self.command} ended (exit code {self._process.poll()}) instead of answering {do!r}")
        return self._answer(do, line)

    def _answer(self, do: str, line: str) -> Any:
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            raise SpecError(f"{self.command} answered {do!r} with what is no JSON: {line[:80]!r}") from None
        sound = isinstance(told, dict) and told.get("seq") == self._seq
        require(sound, f"{self.command} answered {do!r} with {line[:80]!r}; expected seq {self._seq}")
        status, text = told.get("status"), str(told.get("text", ""))
        if status == "lacking":
            raise Lacking(text if text.startswith(do) else f"{do}: {text}")
        require(status == "ok", f"{self.command} answered {do!r} with {status}: {text}")
        return take(told.get("result"), self.folder)
