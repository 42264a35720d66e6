"""Tables and pictures of a run of long_context.py: written into the page, so that no number in it is typed.

    python benchmarks/long_context_page.py long_context.json seed1.json --docs docs

Replaces what stands between the two marks in DOCS/long_context.md, and writes DOCS/long_context_loss.svg and
DOCS/long_context_needles.svg (extra: plot).
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from long_context import BINS, DEPTHS, LENGTHS, METHODS

from refimpl.checkpoint import Transaction
from refimpl.plotting import drawn

BEGIN, END = "<!-- written by benchmarks/long_context_page.py: begin -->", "<!-- end -->"
MARKS = {"YaRN": "o", "plain": "s", "interpolated": "^"}
DASHES = {0: ":", 1: "--", 2: "-"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)])


def spans(edges: Sequence[int]) -> list[str]:
    """Bins of positions in words."""
    return [f"{a:,} to {b - 1:,}" for a, b in itertools.pairwise(edges)]


def text(r: dict[str, Any]) -> str:
    """What stands between the marks."""
    facts, states = r["facts"], [(m, k) for m in METHODS for k in range(3) if f"{m} {k}" in r]
    phases = [
        [p["name"], *[f"{p[k]:,}" for k in ("sequence", "batch", "steps", "tokens")], f"{p['lr']:.3g}"]
        for p in facts["phases"]
    ]
    named = [[m, _stage(facts, k)] for m, k in states]
    parts = [
        f"Seed {facts['seed']}; {facts['rows']} texts for each number below; YaRN's s = {facts['factor']:g} over "
        f"{facts['original']} tokens; all of it took {r['seconds'] / 60:.1f} minutes of one core.",
        table(["phase", "sequence", "largest batch", "steps", "tokens", "largest learning rate"], phases),
        f"Needles found, mean over the depths {', '.join(f'{d:g}' for d in DEPTHS)}, by length "
        f"(guessing among the values: {1 / facts['values']:.1%}; by assignments: {1 / facts['assignments']:.1%}):",
        found(r),
    ]
    for title, key, form in (
        ("Loss of filler", "filler", "{:.2f}"),
        ("Loss of answers", "answers", "{:.2f}"),
        ("Answers that are right", "accuracy", "{:.0%}"),
    ):
        values = [np.array(_at(r, s)["position"][key]) for s in states]
        parts += [f"{title} by position, in texts of {BINS[-1]:,} tokens:", _by(named, spans(BINS), values, form)]
    return "\n\n".join(parts)


def found(r: dict[str, Any]) -> str:
    """The table of needles, by length."""
    states = [(m, k) for m in METHODS for k in range(3) if f"{m} {k}" in r]
    named = [[m, _stage(r["facts"], k)] for m, k in states]
    values = [np.mean(_at(r, s)["grid"], axis=1) for s in states]
    return _by(named, [f"{n:,}" for n in LENGTHS], values, "{:.0%}")


def _at(r: dict[str, Any], state: tuple[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = r[f"{state[0]} {state[1]}"]
    return found


def _stage(facts: dict[str, Any], k: int) -> str:
    return "before" if k == 0 else f"after {facts['phases'][k]['sequence']:,}"


def _by(named: list[list[str]], head: list[str], values: list[Any], form: str) -> str:
    rows = [[*n, *[form.format(v) for v in row]] for n, row in zip(named, values, strict=True)]
    return table(["positions are", "trained", *head], rows)


# ---- Pictures


def needles(r: dict[str, Any]) -> bytes:
    """Needles found by length (across) and depth (down); a row a method, a column a stage."""

    def draw(figure: Any) -> None:
        for i, method in enumerate(METHODS):
            for k in range(3):
                axes = figure.add_subplot(len(METHODS), 3, 3 * i + k + 1)
                found = np.array(r[f"{method} {k}"]["grid"]).T  # (depths, lengths)
                axes.imshow(found, cmap="Greys", vmin=0, vmax=1, aspect="auto")
                for (y, x), v in np.ndenumerate(found):
                    colour = "white" if v > 0.5 else "black"
                    axes.text(x, y, f"{100 * v:.0f}", ha="center", va="center", color=colour, fontsize=8)
                axes.set_xticks(range(len(LENGTHS)), [str(n) for n in LENGTHS], fontsize=7)
                axes.set_yticks(range(len(DEPTHS)), [f"{d:g}" for d in DEPTHS], fontsize=7)
                axes.set_title(f"{method}, {_stage(r['facts'], k)}", fontsize=9)
        figure.supxlabel("tokens in the text")
        figure.supylabel("depth of the needle (0 is the beginning)")
        figure.suptitle("Needles found, %")

    return drawn(draw, size=(10, 7.5), salt="needles")


def loss(r: dict[str, Any]) -> bytes:
    """Loss by position: methods by marker, stages by dash."""
    shown = [(m, k) for m in METHODS for k in (0, 2)]

    def draw(figure: Any) -> None:
        x = range(len(BINS) - 1)
        for i, (key, title) in enumerate((("filler", "filler"), ("answers", "answers"))):
            axes = figure.add_subplot(1, 2, i + 1)
            for m, k in shown:
                style = {"marker": MARKS[m], "linestyle": DASHES[k], "color": str(0.25 * METHODS.index(m))}
                axes.plot(x, r[f"{m} {k}"]["position"][key], label=f"{m}, {_stage(r['facts'], k)}", **style)
            axes.set_xticks(x, spans(BINS), rotation=30, fontsize=7)
            axes.set(title=f"loss of {title}", xlabel="position", ylabel="nats a token", ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.axes[1].legend(fontsize=8)

    return drawn(draw, size=(10, 4.2), salt="loss")


def main() -> None:
    """Write the page's numbers and its pictures, all or nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("more", type=pathlib.Path, nargs="*", help="other seeds: of these only the needles are shown")
    parser.add_argument("--docs", type=pathlib.Path, default=pathlib.Path("docs"))
    args = parser.parse_args()
    r, page = json.loads(args.results.read_text()), args.docs / "long_context.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    others = [json.loads(path.read_text()) for path in args.more]
    parts = [text(r), *[f"Needles found with seed {o['facts']['seed']}:\n\n{found(o)}" for o in others]]
    written = "\n\n".join([before + BEGIN, *parts, END + after]).encode()
    pictures = {"long_context_loss.svg": loss(r), "long_context_needles.svg": needles(r)}
    with Transaction() as files:
        for path, content in [(page, written), *[(args.docs / name, svg) for name, svg in pictures.items()]]:
            with files.new(path) as f:
                f.write(content)


if __name__ == "__main__":
    main()
