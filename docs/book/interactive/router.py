"""The router simulator: the same batches of affinities, any bias speed, with groups or without; all in whole thousandths.

The affinities are made here; the page chooses, counts and moves biases itself. Whole numbers make its arithmetic exact, so a
test holds every step against the stages (`history`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _shell import document

from refimpl.layers import router

EXPERTS, GROUPS, KEPT, CHOSEN, TOKENS, BATCHES = 16, 4, 2, 4, 64, 12
UNIT = 1000


def affinities() -> Any:
    """BATCHES batches of TOKENS tokens -> (BATCHES, TOKENS, EXPERTS) int, thousandths; low expert numbers are popular."""
    rng = np.random.default_rng(0)
    liked = np.linspace(1.2, -1.2, EXPERTS)[rng.permutation(EXPERTS)]
    z = rng.normal(size=(BATCHES, TOKENS, EXPERTS)) + liked
    return np.rint(router.scores(z, func="sigmoid") * UNIT).astype(int)


def one_batch(s: Any, b: Any, *, grouped: bool) -> Any:
    """Tokens of each expert, by the stages.  s (TOKENS, EXPERTS) int, b (EXPERTS,) int -> (EXPERTS,) int."""
    a = router.choice(s[None].astype(float), b.astype(float))
    kept = router.groups(router.group_scores(a, n_group=GROUPS, best=2), topk_group=KEPT) if grouped else None
    return router.counts(router.ids(a, kept, k=CHOSEN, n_group=GROUPS, fill=-np.inf), n_experts=EXPERTS)


def history(steps: int, gamma: int, *, grouped: bool) -> list[tuple[list[int], list[int]]]:
    """What the page must show: (load of the batch, biases under which it was routed), for each step."""
    pool, b, seen = affinities(), np.zeros(EXPERTS), []
    for step in range(steps):
        load = one_batch(pool[step % BATCHES], b, grouped=grouped)
        seen.append((load.tolist(), [int(x) for x in b]))
        b = router.bias_update(b, load, gamma=gamma, zero_sum=False)
    return seen


def _shade(expert: int) -> str:
    """Neighbouring groups apart."""
    return ("dark", "warm")[expert // (EXPERTS // GROUPS) % 2]


def _bars(name: str, label: str, top: int) -> str:
    """EXPERTS bars to be moved by the script, their numbers below, a caption."""
    bars = "".join(
        f'<rect id="{name}{i}" x="{10 + 36 * i}" y="{top + 100}" width="24" height="0" class="{_shade(i)}"/>'
        f'<text id="{name}says{i}" x="{22 + 36 * i}" y="{top + 96}" text-anchor="middle"></text>'
        for i in range(EXPERTS)
    )
    return f'<text x="0" y="{top + 8}">{label}</text>{bars}'


def picture(load: list[int], b: list[int], label: str) -> str:
    """The picture for readers without scripts."""
    mean = sum(load) / EXPERTS
    cells = []
    for i, (n, bias) in enumerate(zip(load, b, strict=True)):
        h = 80 * n / TOKENS
        cells.append(
            f'<rect x="{10 + 36 * i}" y="{100 - h:.1f}" width="24" height="{h:.1f}" class="{_shade(i)}"/>'
            f'<text x="{22 + 36 * i}" y="{95 - h:.1f}" text-anchor="middle">{n}</text>'
            f'<text x="{22 + 36 * i}" y="115" text-anchor="middle">{bias / UNIT:+.2f}</text>'
        )
    line = 100 - 80 * mean / TOKENS
    return (
        f'<svg viewBox="0 0 590 122" role="img" aria-label="{label}: loads of 16 experts, biases below">{"".join(cells)}'
        f'<path class="line" stroke-dasharray="4 3" d="M5 {line:.1f}H585"/></svg>'
    )


def page() -> str:
    """The HTML document."""
    start, end = history(1, 0, grouped=True)[0], history(81, 10, grouped=True)[-1]
    marks = "".join(f'<text x="{22 + 36 * i}" y="262" text-anchor="middle">{i}</text>' for i in range(EXPERTS))
    body = f"""
<p>64 tokens a step choose 4 of 16 experts each. Experts differ in popularity. After every step each expert's bias goes up by
&gamma; if it had less than the mean, down by &gamma; if it had more. Neighbours of one shade are one group (a node).</p>
<div id="live" hidden>
<div class="controls">
<button id="step">Step</button> <button id="ten">10 steps</button> <button id="run" aria-pressed="false">Run</button>
<button id="reset">Start again</button>
<label>&gamma; <input id="gamma" type="range" min="0" max="60" value="10"> <output id="gammasays" for="gamma"></output></label>
<label><input id="grouped" type="checkbox" checked> at most 2 of 4 groups a token</label>
</div>
<p class="says" id="says" aria-live="polite"></p>
<svg viewBox="0 0 590 268" role="img" aria-labelledby="says">{_bars("load", "tokens (dashed: mean)", 0)}
<path id="mean" class="line" stroke-dasharray="4 3" d=""/>{_bars("bias", "bias", 120)}
<path class="line" d="M5 190H585"/>{marks}</svg>
<svg viewBox="0 0 590 130" role="img" aria-label="Busiest expert over mean load, step by step">
<text x="0" y="10">busiest / mean</text><path class="line" d="M30 115H585M30 115V15"/>
<text x="24" y="118" text-anchor="end">1</text><text x="24" y="68" text-anchor="end">2</text>
<text x="24" y="22" text-anchor="end">3</text>
<polyline id="past" class="line" stroke-width="2" points=""/></svg>
</div>
<div id="still"><p>Without scripts: the first batch, no balancing; and the 81st, after 80 steps of &gamma; = 0.010.</p>
{picture(*start, "first batch")}{picture(*end, "81st batch")}</div>
"""
    sizes = {"E": EXPERTS, "G": GROUPS, "M": KEPT, "K": CHOSEN, "N": TOKENS}
    return document(
        "Router simulator",
        body,
        sizes | {"pool": affinities().tolist()},
        Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
    )
