"""What a training run tells, step by step: a table that stays in place where a person watches, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from refimpl.train.run.journal import Record

Tell = Callable[["Record"], None]


@contextmanager
def told(every: int, steps: int, *, alone: bool = True) -> Iterator[Tell]:
    """What to give the records of a run of so many steps to; lines too where this process is not `alone` on the screen."""
    if not (alone and sys.stdout.isatty()):
        yield lambda r: print(line(r, steps), flush=True) if r["step"] % every == 0 or r["step"] == steps else None
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), refresh_per_second=4) as live:
        yield lambda r: live.update(table(r, steps))


def line(r: Record, steps: int) -> str:
    """A step in words."""
    held = f"  held out {r['eval/main']:.4f}" if "eval/main" in r else ""
    speed = f"{r['tokens/s']:,.0f} tokens/s  mfu {r['mfu']:.1%}  {size(r['peak_bytes'])}"
    return f"step {r['step']}/{steps}  loss {r['loss']:.4f}{held}  norm {r['norm']:.4g}  lr {r['lr']:.4g}  {speed}"


def table(r: Record, steps: int) -> Table:
    """A step on a screen: the run, its loss by part, its speed, and a row for every layer of experts."""
    from rich.table import Table

    left = (steps - r["step"]) * r["seconds"]
    title = f"step {r['step']} of {steps}, {r['phase']}, {r['tokens']:,} tokens; about {left / 60:.0f} min left"
    out = Table(title=title, box=None, title_justify="left", header_style="dim")
    for name in ("", "", "layer", "load max/mean", "entropy", "dead", "bias drift"):
        out.add_column(name, justify="left" if name in ("", "layer") else "right")
    facts = [*_facts(r)]
    layers = [name.split("/")[1] for name in r if name.startswith("load/") and name.endswith("/peak")]
    for i in range(max(len(facts), len(layers))):
        out.add_row(*(facts[i] if i < len(facts) else ("", "")), *(_layer(r, layers[i]) if i < len(layers) else ()))
    return out


def _facts(r: Record) -> Iterator[tuple[str, str]]:
    for name in r:
        if name in ("loss", "norm", "lr") or name.startswith(("loss/", "eval/")):
            yield name, f"{r[name]:.5g}"
    yield "tokens/s", f"{r['tokens/s']:,.0f}"
    yield "mfu", f"{r['mfu']:.1%}"
    yield "peak memory", size(r["peak_bytes"])
    if "links/bytes" in r:
        yield "links", f"{size(r['links/bytes'])} in {r['links/messages']:,} messages"


def _layer(r: Record, place: str) -> tuple[str, ...]:
    found: dict[str, Any] = {n: r[f"load/{place}/{n}"] for n in ("peak", "entropy", "dead")}
    drift = r.get(f"bias/{place}/drift")
    bias = "" if drift is None else f"{drift:.4f}"
    return place, f"{found['peak']:.2f}", f"{found['entropy']:.3f}", str(found["dead"]), bias


def size(n: float) -> str:
    """Bytes as people say them."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if n >= _UNITS[u]), "B")
    return f"{n / _UNITS[unit]:.3g} {unit}"


_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
