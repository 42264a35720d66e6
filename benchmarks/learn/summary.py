"""The figures and tables of docs/learning.md, from the runs that are finished.

    python benchmarks/learn/summary.py      # reads runs/, writes docs/learning*.svg and the marked parts of docs/learning.md

Needs the extra `plot`. Whatever lies between a mark <!-- NAME: summary.py --> and the next <!-- end --> is written anew.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from runs import HERE, SEEDS, VARIANTS
from spreads import spread, verdict

from refimpl.autograd import Array
from refimpl.checkpoint import Transaction
from refimpl.plotting import drawn
from refimpl.train.run import load_job, records

DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "learning.md"
LATE = 0.2
"""The part of a run, at its end, over which its load is averaged."""


class Finished:
    """A run that is done: its result and its records."""

    def __init__(self, folder: Path) -> None:
        self.result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        self.records = list(records(folder))
        self.job = load_job(folder / "recipe.toml")

    def curve(self, name: str) -> Array:
        """What the records say under a name, by step."""
        return np.array([r[name] for r in self.records])

    @property
    def layers(self) -> list[str]:
        """The layers of experts, as records name them."""
        return [m[1] for key in self.records[-1] if (m := re.fullmatch(r"load/(L\d+)/peak", key))]

    def load(self) -> Array:
        """max / mean of the tokens per expert, mean of the layers, by step."""
        return np.mean([self.curve(f"load/{at}/peak") for at in self.layers], 0)

    def late(self, curve: Array) -> float:
        """The mean of a curve at the end of the run."""
        return float(curve[-round(LATE * len(curve)) :].mean())


def smooth(y: Array, n: int) -> Array:
    """Means of n values in turn, what is left over at the end among the last -> (len / n,)."""
    return np.array([part.mean() for part in np.array_split(y, max(1, len(y) // n))])


def finished(folder: Path) -> dict[str, Finished]:
    """The runs that are done, by name."""
    return {f.parent.name: Finished(f.parent) for f in sorted(folder.glob("*/result.json"))}


# ---- Figures


def draw_main(figure: Any, run: Finished, measured: Mapping[str, Any]) -> None:
    """Loss, load of the experts and how far their biases have moved, over tokens."""
    loss, load, bias = figure.subplots(1, 3)
    tokens = smooth(run.curve("tokens") / 1e6, 20)
    vocab = run.job.config.vocab_size
    loss.axhline(math.log(vocab), color="gray", linewidth=0.8, label=f"ln {vocab}")
    loss.plot(tokens, smooth(run.curve("loss/main"), 20), label="next token")
    loss.plot(tokens, smooth(run.curve("loss/mtp1"), 20), label="the one after (MTP)")
    at = {r["step"]: r["tokens"] / 1e6 for r in run.records} | {0: 0.0}
    held = measured["held_out"]
    loss.plot([at[int(s)] for s in held], [x["main"] for x in held.values()], "k.", label="next token, held-out novel")
    for place in run.layers:
        load.plot(tokens, smooth(run.curve(f"load/{place}/peak"), 20), label=f"layer {place[1:]}")
        bias.plot(tokens, smooth(run.curve(f"bias/{place}/spread"), 20), label=f"layer {place[1:]}")
    loss.set(title="loss, nats a token", xlabel="M tokens")
    load.set(title="busiest expert / mean", xlabel="M tokens", ylim=(1, None))
    bias.set(title="balancing bias, largest - smallest", xlabel="M tokens", ylim=(0, None))
    for axes in (loss, load, bias):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def draw_variants(figure: Any, by_variant: Mapping[str, Sequence[Finished]]) -> None:
    """Loss and load of every variant: the mean of its seeds, and the range."""
    panels: list[tuple[Any, str, Callable[[Finished], Array]]] = []
    loss, load = figure.subplots(1, 2)
    panels.append((loss, "loss of the next token, nats", lambda run: run.curve("loss/main")))
    panels.append((load, "busiest expert / mean, mean of the layers", lambda run: run.load()))
    for axes, title, curve in panels:
        for name, runs in by_variant.items():
            tokens = smooth(runs[0].curve("tokens") / 1e3, 10)
            ys = np.array([smooth(curve(run), 10) for run in runs])
            (line,) = axes.plot(tokens, ys.mean(0), label=f"{name}, {len(runs)} seeds")
            axes.fill_between(tokens, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="K tokens")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


# ---- Tables


def row(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def main_table(run: Finished, measured: Mapping[str, Any]) -> list[str]:
    """What the main run was and came to."""
    c, r, held = run.job.config, run.result, measured["held_out"]
    last = held[max(held, key=int)]
    per_byte = last["main"] * measured["tokens"] / measured["bytes"] / math.log(2)
    facts = {
        "steps, tokens": f"{r['steps']:,}, {r['tokens']:,}",
        "CPU time, one thread": f"{r['cpu_seconds'] / 60:.1f} minutes",
        "loss of the next token, first and last 20 steps": f"{run.curve('loss/main')[:20].mean():.2f}, "
        f"{run.curve('loss/main')[-20:].mean():.2f} nats (ln {c.vocab_size} = {math.log(c.vocab_size):.2f})",
        "the same on the held-out novel, at the end": f"{last['main']:.2f} nats a token, {per_byte:.2f} bits a byte",
        "loss of the MTP module there": f"{last['mtp1']:.2f} nats a token",
        "busiest expert / mean, last fifth of the run": ", ".join(
            [f"{run.late(run.curve(f'load/{at}/peak')):.2f} (layer {at[1:]})" for at in run.layers]
        ),
        "steps in which an expert got no token": sum(
            [any(rec[f"load/{at}/dead"] for at in run.layers) for rec in run.records]
        ),
    }
    return [row("", ""), row("---", "---"), *[row(k, v) for k, v in facts.items()]]


def samples_text(measured: Mapping[str, Any]) -> list[str]:
    """Text at the start, in the middle and at the end, as quotations."""
    lines = []
    for step, found in measured["samples"].items():
        lines += [f"After step {step}:", ""]
        for s in found:
            how = "greedy" if s["temperature"] == 0 else f"T = {s['temperature']}"
            text = " ".join((s["prompt"] + "‖" + s["text"]).split())
            lines += ["```text", *wrapped(f"[{how}] {text}"), "```"]
        lines.append("")
    return lines[:-1]


def wrapped(text: str, width: int = 132) -> list[str]:
    """A text in lines; words that are longer than a line are cut."""
    return re.findall(rf"\S.{{0,{width - 2}}}(?=\s|$)|\S{{1,{width}}}", text)


def variants_table(by_variant: Mapping[str, Sequence[Finished]]) -> list[str]:
    """Means, standard deviations, and differences from the first variant with their 95 % intervals."""
    base = next(iter(by_variant.values()))
    lines = [
        row("variant", "runs", "loss, held-out", "against v3", "busiest / mean", "against v3", "CPU s"),
        row(*["---"] * 7),
    ]
    for name, runs in by_variant.items():
        loss, load = ([f(run) for run in runs] for f in (_held_out, _load))
        against = ["", ""]
        if runs is not base:
            n = min(len(runs), len(base))
            pairs = ((loss, _held_out, 3), (load, _load, 2))
            against = [verdict(x[:n], [f(run) for run in base[:n]], digits) for x, f, digits in pairs]
        cpu = f"{fmean([run.result['cpu_seconds'] for run in runs]):.0f}"
        what = f"**{name}**: {VARIANTS[name].what}"
        lines.append(row(what, len(runs), spread(loss), against[0], spread(load, 2), against[1], cpu))
    return lines


def _held_out(run: Finished) -> float:
    return float(run.result["held_out"]["main"])


def _load(run: Finished) -> float:
    return run.late(run.load())


def drafts_table(measured: Mapping[str, Any]) -> list[str]:
    """What speculation came to."""
    lines = [row("T", "drafts", "stood, by depth", "tokens a run", "time per token, plain = 1"), row(*["---"] * 5)]
    for r in measured["drafting"]:
        stood = ", ".join([f"{100 * s:.0f} %" for s in r["stood"]])
        kind = f"{r['depth']}{', recycled' if r['depth'] > 1 else ''}"
        lines.append(row(r["temperature"], kind, stood, f"{r['tokens_per_step']:.2f}", f"{r['time']:.2f}"))
    a = measured["agreement"]
    said = (
        f"On the held-out text itself: model and module have the same most likely token at {100 * a['same']:.0f} % of the places, "
        f"their distributions share {100 * a['overlap']:.0f} %, and the model's most likely token is the right one at "
        f"{100 * a['right']:.0f} %."
    )
    return [*lines, "", *wrapped(said)]


# ---- The page


def filled(page: str, parts: Mapping[str, Sequence[str]]) -> str:
    """The page with what lies between its marks written anew."""
    for name, lines in parts.items():
        mark = f"<!-- {name}: summary.py -->"
        assert mark in page, f"docs/learning.md has no place for {name}"
        before, _, rest = page.partition(mark)
        page = "\n".join([before + mark, "", *lines, "", "<!-- end -->"]) + rest.partition("<!-- end -->")[2]
    return page


def main() -> None:
    """Read the runs, write figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs", help="folder of the runs (default: beside this file)"
    )
    folder = parser.parse_args().out
    runs, parts, figures = finished(folder), dict[str, Sequence[str]](), dict[str, bytes]()
    by_variant = {v: [runs[f"{v}-{s}"] for s in SEEDS if f"{v}-{s}" in runs] for v in VARIANTS}
    by_variant = {name: found for name, found in by_variant.items() if found}
    if (folder / "main" / "measured.json").exists():
        run, measured = runs["main"], json.loads((folder / "main" / "measured.json").read_text())
        parts |= {
            "main": main_table(run, measured),
            "samples": samples_text(measured),
            "drafts": drafts_table(measured),
        }
        figures["learning.svg"] = drawn(lambda f: draw_main(f, run, measured), size=(12, 4), salt="learning")
    if by_variant:
        parts["variants"] = variants_table(by_variant)
        figures["learning_variants.svg"] = drawn(lambda f: draw_variants(f, by_variant), size=(11, 4), salt="variants")
    page = filled(PAGE.read_text(encoding="utf-8"), parts)
    with Transaction() as files:
        for name, data in (figures | {PAGE.name: page.encode()}).items():
            with files.new(DOCS / name) as f:
                f.write(data)


if __name__ == "__main__":
    main()
