"""What a rank is doing, in words: the lines of a deadlock report, the same on the simulator and on MPI."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from .communicator import Meta, spans

_ENGINE = str(Path(__file__).parent) + os.sep
_LIBRARY = Path(__file__).parents[1]


def frames_of_threads() -> dict[int, FrameType]:
    """Thread -> what it runs. No garbage collection meanwhile: CPython 3.11 can then wait for itself for ever (gh-106883)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def joined_text(meta: Meta, ranks: Sequence[int], absent: Sequence[int]) -> str:
    """A rank in a collective: `allgather 'x' of float32[4] on ranks 0-3, waits for rank 2`."""
    return f"{meta} on {_ranks(ranks)}" + (f", waits for {_ranks(absent)}" if absent else "")


def ticket_text(meta: Meta, ranks: Sequence[int], to: Sequence[int], source: Sequence[int]) -> str:
    """A rank in send, recv or exchange: `exchange 'x' on ranks 0-3, waits to send to rank 1 and to receive ...`."""
    waits = [f"to send to {_ranks(to)}"] if to else []
    waits += [f"to receive from {_ranks(source)}"] if source else []
    return f"{meta} on {_ranks(ranks)}" + (f", waits {' and '.join(waits)}" if waits else "")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {spans(sorted(set(ranks)))}"


def source_line(frame: FrameType | None) -> str:
    """`, at program.py:12 in step`: the innermost line outside the engine, and the caller of a library collective."""
    places = []
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_ENGINE):
            places.append(f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}")
            if _LIBRARY not in Path(file).parents:
                break
        frame = frame.f_back
    if not places:
        return ""
    inner, outer = places[0], places[-1]
    return f", at {inner}" if inner == outer else f", at {inner}, called at {outer}"


def table(doing: Mapping[int, str]) -> str:
    """One line per thing that ranks are doing, in the order of the first rank that does it."""
    lines: dict[str, list[int]] = {}
    for rank, what in doing.items():
        lines.setdefault(what, []).append(rank)
    return "\n".join([f"  {_ranks(ranks)}: {what}" for what, ranks in lines.items()])
