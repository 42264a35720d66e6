"""The figures and tables of docs/learning.md, from the runs that are finished.

    python benchmarks/learn/summary.py      # reads runs/, writes docs/learning*.svg and the marked parts of docs/learning.md

Needs the extra `plot`. Whatever lies between a mark <!-- NAME: summary.py --> and the next <!-- end --> is written anew.
"""

from __future__ import annotations

import argparse
import gzip
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
from refimpl.train.data import Shards
from refimpl.train.run import load_job, records
from refimpl.train.run.sampling import FILE as SAMPLES

DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "learning.md"
LATE = 0.2
"""The part of a run, at its end, over which its load is averaged."""


class Noted:
    """What `refimpl train` noted of a run."""

    def __init__(self, folder: Path) -> None:
        self.records = list(records(folder))
        self.job = load_job(folder / "recipe.toml")
        self.seconds: float = json.loads((folder / "cpu.json").read_text())
        self.complete: bool = self.records[-1]["step"] == len(self.job)

    def curve(self, name: str) -> Array:
        """What the records say under a name, where they do."""
        return np.array([r[name] for r in self.records if name in r])

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


def finished(folder: Path) -> dict[str, Noted]:
    """The runs that are done, by name."""
    found = {f.parent.name: Noted(f.parent) for f in sorted(folder.glob("*/cpu.json"))}
    return {name: run for name, run in found.items() if run.complete}


def text_bytes(name: str) -> int:
    """UTF-8 bytes of the text of `NAME.jsonl.gz`."""
    lines = gzip.decompress((HERE / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    return sum([len(json.loads(line)["text"].encode()) for line in lines])


# ---- Figures


def draw_main(figure: Any, run: Noted) -> None:
    """Loss, load of the experts and how far their biases have moved, over tokens."""
    loss, load, bias = figure.subplots(1, 3)
    tokens = smooth(run.curve("tokens") / 1e6, 20)
    vocab = run.job.config.vocab_size
    loss.axhline(math.log(vocab), color="gray", linewidth=0.8, label=f"ln {vocab}")
    loss.plot(tokens, smooth(run.curve("loss/main"), 20), label="next token")
    loss.plot(tokens, smooth(run.curve("loss/mtp1"), 20), label="MTP module, / length")
    held = [(r["tokens"] / 1e6, r["eval/main"]) for r in run.records if "eval/main" in r]
    loss.plot(*zip(*held, strict=True), "k.", label="next token, held-out novel")
    for place in run.layers:
        load.plot(tokens, smooth(run.curve(f"load/{place}/peak"), 20), label=f"layer {place[1:]}")
        bias.plot(tokens, smooth(run.curve(f"bias/{place}/spread"), 20), label=f"layer {place[1:]}")
    loss.set(title="loss, nats a token", xlabel="M tokens")
    load.set(title="busiest expert / mean", xlabel="M tokens", ylim=(1, None))
    bias.set(title="balancing bias, largest - smallest", xlabel="M tokens", ylim=(0, None))
    for axes in (loss, load, bias):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def draw_variants(figure: Any, by_variant: Mapping[str, Sequence[Noted]]) -> None:
    """Loss and load of every variant: the mean of its seeds, and the range."""
    panels: list[tuple[Any, str, Callable[[Noted], Array]]] = []
    loss, load = figure.subplots(1, 2)
    panels.append((loss, "loss of the next token, nats", lambda run: run.curve("loss/main")))
    panels.append((load, "busiest expert / mean, mean of the layers", lambda run: run.load()))
    for axes, title, curve in panels:
        for name, runs in by_variant.items():
            tokens = smooth(runs[0].curve("tokens") / 1e3, 10)
            ys = np.array([smooth(curve(run), 10) for run in runs])
            (line,) = axes.plot(tokens, ys.mean(0), label=f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}")
            axes.fill_between(tokens, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="K tokens")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


# ---- Tables


def row(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def main_table(run: Noted) -> list[str]:
    """What the main run was and came to."""
    c, main, last = run.job.config, run.curve("loss/main"), run.records[-1]
    rows = Shards(run.job.evaluation.shards)
    bits = last["eval/main"] / math.log(2) * sum([s.tokens for s in rows.shards]) / text_bytes("held_out")
    even = [f"{run.late(run.curve(f'load/{at}/peak')):.2f} (layer {at[1:]})" for at in run.layers]
    idle = sum([any(r[f"load/{at}/dead"] for at in run.layers) for r in run.records])
    facts = {
        "steps, tokens": f"{last['step']:,}, {last['tokens']:,}",
        "CPU time, one thread, other jobs on the machine": f"{run.seconds / 60:.1f} minutes",
        "loss of the next token, first and last 20 steps": f"{main[:20].mean():.2f}, {main[-20:].mean():.2f} nats",
        "if all tokens were as likely": f"ln {c.vocab_size} = {math.log(c.vocab_size):.2f}",
        "on the held-out novel, at the end": f"{last['eval/main']:.2f} nats a token, {bits:.2f} bits a byte",
        "the MTP module's there, over the length (R eq 24)": f"{last['eval/mtp1']:.2f} nats a token",
        "busiest expert / mean, last fifth of the run": ", ".join(even),
        "steps in which an expert got no token": f"{idle} of {len(main)}",
    }
    return [row("", ""), row("---", "---"), *[row(k, v) for k, v in facts.items()]]


def samples_text(folder: Path) -> list[str]:
    """Text at the start, in the middle and at the end."""
    texts = list(records(folder, SAMPLES))
    steps = sorted({s["step"] for s in texts})
    middle = min(steps, key=lambda step: abs(2 * step - steps[-1]))
    lines = []
    for step in (steps[0], middle, steps[-1]):
        said = [printable(f"{s['prompt']} ‖ {s['text']}") for s in texts if s["step"] == step]
        lines += ["", f"After step {step}:", "", "```text", *[line for text in said for line in wrapped(text)], "```"]
    return lines[1:]


def printable(text: str) -> str:
    """A text on one line, its control characters replaced."""
    return "".join([ch if ch.isprintable() else "�" for ch in " ".join(text.split())])


def wrapped(text: str, width: int = 132) -> list[str]:
    """A text in lines; words that are longer than a line are cut."""
    return re.findall(rf"\S.{{0,{width - 2}}}(?=\s|$)|\S{{1,{width}}}", text)


def variants_table(by_variant: Mapping[str, Sequence[Noted]]) -> list[str]:
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
            same = {run.job.seed: run for run in base}
            pairs = [(run, same[run.job.seed]) for run in runs if run.job.seed in same]
            against = [
                verdict([f(run) for run, _ in pairs], [f(other) for _, other in pairs], digits)
                for f, digits in ((_held_out, 3), (_load, 2))
            ]
        cpu = f"{fmean([run.seconds for run in runs]):.0f}"
        what = f"**{name}**: {VARIANTS[name].what}"
        lines.append(row(what, len(runs), spread(loss), against[0], spread(load, 2), against[1], cpu))
    return lines


def _held_out(run: Noted) -> float:
    return float(run.records[-1]["eval/main"])


def _load(run: Noted) -> float:
    return run.late(run.load())


def drafts_table(found: Mapping[str, Any]) -> list[str]:
    """What speculation came to."""
    lines = [row("T", "drafts", "stood, by depth", "tokens a run", "time per token, plain = 1"), row(*["---"] * 5)]
    for r in found["drafting"]:
        stood = ", ".join([f"{100 * s:.0f} %" for s in r["stood"]])
        kind = f"{r['depth']}{', recycled' if r['depth'] > 1 else ''}"
        lines.append(row(r["temperature"], kind, stood, f"{r['tokens_per_step']:.2f}", f"{r['time']:.2f}"))
    lines += [
        "",
        row("step", "the model's first choice is right", "is the module's too", "sum min(p, q)"),
        row(*["---"] * 4),
    ]
    for step, a in found["agreement"].items():
        lines.append(row(step, *[f"{100 * a[name]:.0f} %" for name in ("right", "same", "overlap")]))
    return lines


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
    if "main" in runs:
        parts |= {"main": main_table(runs["main"]), "samples": samples_text(folder / "main")}
        figures["learning.svg"] = drawn(lambda f: draw_main(f, runs["main"]), size=(12, 4), salt="learning")
    if (folder / "main" / "drafts.json").exists():
        parts["drafts"] = drafts_table(json.loads((folder / "main" / "drafts.json").read_text()))
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
