"""The process protocol's other end, for implementations in Python: `python -m refimpl.conformance.serve pkg.mod:Impl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint, json_object
from refimpl.checkpoint.names import SCALE

from .process import Lacking
from .subject import Subject, subject
from .wire import put, take


class _Server:
    """What a subject answers, with the caches by name."""

    def __init__(self, of: Subject) -> None:
        self.of, self.folder, self.caches, self.files = of, Path(), dict[str, Any](), [1 << 30]

    def answer(self, message: dict[str, Any]) -> Any:
        """The result of one message."""
        do = message.pop("do")
        message.pop("seq")
        if do == "info":
            self.folder = Path(message["folder"])
            return self.of.info
        if do == "load":
            case = Path(message["folder"])
            checkpoint = Checkpoint.open(case)
            self.of.call("load", json_object(case / "config.json"), _as_stored(checkpoint))
            return None
        given = take(message, self.folder)
        if given.get("cache") is not None:
            given["cache"] = self.caches.setdefault(given["cache"], {})
        method = given.pop("name", None)
        found = self.of.call(do, method, **given) if do == "stage" else self.of.call(do, **given)
        return put(found, self.folder, self.files)


def _as_stored(checkpoint: Checkpoint) -> dict[str, Array]:
    """Every tensor; FP8 codes as they are, with their scales beside them."""
    raw = {n: checkpoint.raw(n) for n in checkpoint}
    scales = {n + SCALE: s for n, (_, s) in raw.items() if s is not None}
    return {n: codes for n, (codes, _) in raw.items()} | scales


def serve(of: Subject, source: TextIO, out: TextIO) -> None:
    """Answer lines until "stop" or the end."""
    server = _Server(of)
    for line in source:
        message = json.loads(line)
        seq = message["seq"]
        if message["do"] == "stop":
            return
        try:
            told = {"status": "ok", "result": server.answer(message)}
        except Lacking as error:
            told = {"status": "lacking", "text": str(error)}
        except Exception as error:  # whatever it is, it is the answer
            told = {"status": "error", "text": f"{type(error).__name__}: {error}"}
        print(json.dumps({"seq": seq, **told}), file=out, flush=True)


def main(argv: list[str]) -> int:
    """Serve the implementation that is named."""
    require(len(argv) == 1, "usage: python -m refimpl.conformance.serve pkg.mod:Impl")
    out, sys.stdout = sys.stdout, sys.stderr  # what the implementation prints is no answer
    serve(subject(argv[0]), sys.stdin, out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SpecError as error:
        sys.exit(f"refimpl: {error}")
