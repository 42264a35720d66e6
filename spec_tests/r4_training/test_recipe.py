"""R 4.2 and 4.3 as a recipe: what every schedule says in every step, against the report's own sentences walked step by step."""

import json
import math
import tomllib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.layers import PRESETS
from refimpl.layers.rope import RopeScaling
from refimpl.train.recipe import (
    Piece,
    Schedule,
    amount,
    document,
    load,
    read,
    recipes,
    render,
    rows,
    scaled,
    to_json,
    to_toml,
)
from refimpl.train.recipe.steps import steps_of

T, B = 10**12, 10**9
V3 = load("deepseek-v3")


def pretraining():
    """Every step of pre-training as R 4.2 tells it: tokens before it, batch, learning rate, gamma, lambda."""
    tokens, step = 0, 0
    while tokens < 14_800 * B:
        ramp = Fraction(min(tokens, 469 * B), 469 * B) * (15360 - 3072) + 3072
        batch = math.floor(ramp / 128 + Fraction(1, 2)) * 128
        if step < 2000:
            lr = 2.2e-4 * step / 2000
        elif tokens < 10 * T:
            lr = 2.2e-4
        elif tokens < 14_300 * B:
            way = (tokens - 10 * T) / (4_300 * B)
            lr = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * way))
        else:
            lr = 2.2e-5 if tokens < 14_633 * B else 7.3e-6
        yield tokens, batch, lr, 0.001 if tokens < 14_300 * B else 0.0, 0.3 if tokens < 10 * T else 0.1
        tokens += batch * 4096
        step += 1


@pytest.mark.slow
def test_every_step_of_pretraining_is_what_the_report_says():
    """Catches a piece that begins one step off, a ramp in the wrong unit, a cosine that ends elsewhere, gamma or lambda switched at
    another token. All 242,785 steps; the floats come from the same doubles in another order, hence 1e-12.
    """
    told = list(pretraining())
    steps = V3.phases[0].steps
    assert len(steps) == len(told) == 242_785
    chosen = sorted({*range(0, 16000, 7), *range(len(told) - 9, len(told)), *range(0, len(told), 97), 1999, 2000, 2001})
    for k in chosen:
        s, (tokens, batch, lr, gamma, weight) = V3.at(k), told[k]
        assert (s.tokens, s.batch) == (tokens, batch), k
        np.testing.assert_allclose(
            (s.values["lr"], s.values["gamma"], s.values["mtp_weight"]), (lr, gamma, weight), rtol=1e-12
        )
        assert s.values["aux_weight"] == 1e-4
    for switch in (10 * T, 14_300 * B, 14_633 * B):  # the steps on both sides of every switch
        k = next(k for k, (tokens, *_) in enumerate(told) if tokens >= switch)
        for side in (k - 1, k):
            assert V3.at(side).values["lr"] == pytest.approx(told[side][2], rel=1e-12)
            assert (V3.at(side).values["gamma"], V3.at(side).values["mtp_weight"]) == told[side][3:]


def test_the_context_extension():
    """Catches phases in the wrong order, a batch of the other phase, YaRN on during pre-training (R 4.3)."""
    first, base = len(V3.phases[0].steps), PRESETS["deepseek-v3"]
    assert [(p.sequence, len(p.steps), p.tokens) for p in V3.phases[1:]] == [
        (32768, 1000, 1000 * 1920 * 32768),
        (131072, 1000, 1000 * 480 * 131072),
    ]
    for step, batch in ((first, 1920), (first + 999, 1920), (first + 1000, 480), (first + 1999, 480)):
        assert (V3.at(step).batch, V3.at(step).values["lr"]) == (batch, 7.3e-6)
    assert V3.config(0, base).yarn is None
    assert V3.config(first, base).yarn == base.rope_scaling
    with pytest.raises(SpecError, match=f"step {first + 2000} of deepseek-v3: it has the steps 0 to {first + 1999}"):
        V3.at(first + 2000)


def test_the_extension_alone_is_the_end_of_the_whole_run(capsys):
    """Catches a number that differs between the two recipe files, YaRN's settings other than R 4.3's, stages whose tokens do not
    add up; sqrt(t) = 0.1 ln s + 1, squared, is what the softmax gets.
    """
    alone = load("deepseek-v3-context")
    assert (alone.phases, alone.optimizer, alone.ema) == (V3.phases[1:], V3.optimizer, V3.ema)
    sizes = [1920 * 32768 * 1000, 480 * 131072 * 1000]
    assert [r.tokens for r in rows(alone)] == sizes and alone.tokens == sum(sizes) and len(alone) == 2000
    config = alone.config(0, PRESETS["deepseek-v3"].replace(rope_scaling=None))
    assert config.yarn == RopeScaling(40, 4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
    assert config.softmax_scale * math.sqrt(192) == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-15)
    assert main(["recipe", "deepseek-v3-context"]) == 0
    text = capsys.readouterr().out
    assert text.count("62.91B  1,000") == 4 and "125.8B  2,000" in text


def test_the_extension_scaled_stretches_as_far():
    """Catches an original length that stays at 4,096 when sequences shrink: 64 tokens to 512 and 2,048, as 4K to 32K and 128K."""
    small = read(scaled(load("deepseek-v3-context"), tokens=500_000, sequence=512, batch=8, lr=1e-4))
    yarn = small.config(0, PRESETS["tiny"]).yarn
    assert [p.sequence for p in small.phases] == [512, 2048] and [p.steps.batch(0) for p in small.phases] == [8, 2]
    assert yarn is not None and (yarn.factor, yarn.original_max_position_embeddings) == (40, 64)
    assert small.tokens == 500_000 and len({len(p.steps) for p in small.phases}) == 1


def test_the_table_adds_up():
    """Catches a row that is missing, counted twice or rounded: 14.8 T tokens, and every step in exactly one row."""
    table = rows(V3)
    assert sum(r.tokens for r in table if r.phase == "pre-training") == 14_800 * B
    assert sum(r.steps for r in table) == len(V3) == 244_785
    assert sum(r.tokens for r in table) == V3.tokens
    warm_up = [batch * 4096 for _, (_, batch, *_) in zip(range(2000), pretraining(), strict=False)]
    assert (table[0].steps, table[0].tokens) == (2000, sum(warm_up))
    assert [r.tokens for r in table if r.phase == "pre-training"][2:] == [9_531 * B, 4_300 * B, 333 * B, 167 * B]
    for a, b in pairwise(table):
        assert b.first == (a.first + a.tokens if a.phase == b.phase else 0)
    text = render(V3)
    assert "14.8T" in text and "242,785" in text and "not published" in text
    assert json.loads(to_json(V3))["tokens"] == V3.tokens


def test_a_step_gets_its_recipe():
    """Catches a setting that the recipe file has and the step never sees."""
    early, late = V3.recipe(1000), V3.recipe(240_000)
    assert early.opt.lr == pytest.approx(1.1e-4, rel=1e-12) and late.opt.lr == 2.2e-5
    assert (early.opt.betas, early.opt.weight_decay, early.opt.moments, early.max_norm) == (
        (0.9, 0.95),
        0.1,
        "bf16",
        1.0,
    )
    assert (early.gamma, early.mtp_weight, early.aux_weight, early.plan.name) == (1e-3, 0.3, 1e-4, "fp8")
    assert (late.gamma, late.mtp_weight, late.schedule(7)) == (0.0, 0.1, 1.0)
    assert V3.optimizer.init_std == 0.006


# ---- Scaled-down recipes


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(10**6, 10**9),
    sequence=st.sampled_from([64, 128, 1024]),
    batch=st.sampled_from([40, 160, 1280]),
    lr=st.floats(1e-4, 1e-2),
)
def test_a_scaled_recipe_keeps_the_shape_of_its_curves(tokens, sequence, batch, lr):
    """Catches a warm-up that keeps its 2,000 steps, a piece whose share of the run changes, a ratio of values that does. Equal at
    every part of the run, up to one token of rounding at a boundary, which moves a value by at most `slack`.
    """
    small = read(scaled(V3, tokens=tokens, sequence=sequence, batch=batch, lr=lr))
    for large, p in zip(V3.phases, small.phases, strict=True):
        assert abs(p.tokens - large.tokens * tokens / V3.tokens) <= 0.5
        assert p.sequence == large.sequence * sequence // 4096
        for name in ("lr", "gamma", "mtp_weight", "aux_weight", "batch"):
            a = large.batch if name == "batch" else large.schedules[name]
            b = p.batch if name == "batch" else p.schedules[name]
            factor = {"lr": lr / 2.2e-4, "batch": batch / 15360}.get(name, 1.0)
            for old, new in zip(a.pieces, b.pieces, strict=True):
                floor = 1.0 if name == "batch" else 0.0
                assert (new.shape, new.start, new.end) == (
                    old.shape,
                    pytest.approx(max(floor, old.start * factor)),
                    pytest.approx(max(floor, old.end * factor)),
                )
                if old.steps is None:
                    assert abs(new.last - old.last * tokens / V3.tokens) <= 0.5  # whole tokens
                else:
                    steps = old.steps * (tokens / V3.tokens) / (batch / 15360) / (sequence / 4096)
                    assert new.steps == pytest.approx(steps, rel=1e-12)


def test_a_scaled_run_of_the_same_proportions_has_the_same_steps():
    """Catches batches and sequences that are scaled by the tokens' factor: 1/64 of the sequence, 1/128 of the batch, 1/8192 of the
    tokens are the same steps, each with the same learning rate.
    """
    small = read(scaled(V3, tokens=V3.tokens // 8192, sequence=64, batch=120))
    for large, p in zip(
        V3.phases[:2], small.phases, strict=False
    ):  # the third has 3.75 sequences, that is 4, in a batch
        assert abs(len(p.steps) - len(large.steps)) <= 1  # 14.8T / 8192 is no whole number of tokens
    for k in (0, 1000, 1999, 2000, 90_000, 200_000, 242_700):
        assert small.at(k).batch * 128 == V3.at(k).batch
        assert small.at(k).values["lr"] == pytest.approx(V3.at(k).values["lr"], rel=1e-6)  # boundaries in whole tokens


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_written_is_the_recipe_read(name):
    """Catches a key that the writer forgets, a quote it does not escape: every packaged recipe through TOML and back."""
    run = load(name)
    again = read(tomllib.loads(to_toml(scaled(run))))
    assert again == run


def test_articles_are_named_and_no_default():
    """Catches an article's number that passes for V3's, and a variant that computes something else than its name says."""
    for name in recipes():
        assert ("described in articles, not in V3" in load(name).origin) == (not name.startswith("deepseek-v3"))
    cosine = load("article-cosine")
    warm = len(cosine) * 0.05
    peak = max(range(len(cosine)), key=lambda k: cosine.at(k).values["lr"])
    assert abs(peak - warm) <= 1 and cosine.at(peak).values["lr"] == pytest.approx(3e-5, rel=1e-3)
    half = cosine.at(round(warm + (len(cosine) - warm) / 2))
    assert half.values["lr"] == pytest.approx(1.5e-5, rel=2e-3)  # a step is 0.07 % of the run
    linear = document("article-linear-scaling")
    linear["phase"][0]["batch"] = 64
    assert read(linear).recipe(0).opt.lr == pytest.approx(5e-4 * 64 / 256)
    assert read(linear).recipe(0).opt.weight_decay == 0.01
    fp16 = load("article-fp16").recipe(0)
    assert (fp16.plan.name, fp16.loss_scale) == ("fp16", 65536)


# ---- The command and the figure


def test_the_command(tmp_path, capsys):
    """Catches an option that does not reach the recipe, output that cannot be read again, a wrong exit code."""
    assert main(["recipe"]) == 0
    assert "14.8T" in capsys.readouterr().out
    assert main(["recipe", "--tokens", "20M", "--sequence", "64", "--batch", "40", "--lr", "3e-3", "--toml"]) == 0
    file = tmp_path / "mine.toml"
    file.write_text(capsys.readouterr().out)
    small = load(file)
    assert abs(small.tokens - 20_000_000) <= 2 and small.at(200).values["lr"] == 3e-3
    assert main(["recipe", str(file), "--step", "200"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][-4] == ["lr", "0.003"]
    assert main(["recipe", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == len(small)
    for wrong in (["--tokens", "x"], ["--batch", "0.5"], ["--lr", "-1"], ["--step", "-1"], ["--tokens", "10"]):
        assert main(["recipe", *wrong]) == 3, wrong


def test_the_figure_shows_the_run():
    """Catches a curve that misses a corner between two of its points, points out of order. Needs no matplotlib."""
    from refimpl.train.recipe.plot import points

    found = points(V3, n=50)
    assert found["tokens"] == sorted(found["tokens"])
    assert (
        max(found["lr"]) == 2.2e-4
        and set(found["gamma"]) == {0.0, 0.001}
        and set(found["sequence"]) == {4096, 32768, 131072}
    )
    k = found["mtp_weight"].index(0.1)  # the switch at 10 T is between two neighbouring steps
    assert (
        found["tokens"][k] - found["tokens"][k - 1] == 15360 * 4096
        and found["tokens"][k - 1] < 10 * T <= found["tokens"][k]
    )


def test_the_figure_is_an_svg_and_always_the_same(tmp_path):
    """Catches a date or a random id in a file that one wants to keep in a repository, a panel left out."""
    pytest.importorskip("matplotlib")
    from refimpl.train.recipe.plot import PANELS, svg

    assert main(["recipe", "--plot", str(tmp_path / "r.svg")]) == 0
    text = (tmp_path / "r.svg").read_bytes()
    assert text == svg(V3) and text.startswith(b"<?xml") and all(title.encode() in text for title in PANELS.values())


# ---- Bad input


def broken(*path, **changes):
    """V3's document with values changed at a place; None removes a key."""
    d = document("deepseek-v3")
    at = d
    for key in path:
        at = at[key]
    for key, value in changes.items():
        if value is None:
            del at[key]
        else:
            at[key] = value
    return d


WRONG = [
    (
        broken("phase", 0, "lr", 3, tokens="332B"),
        r"lr does not add up: .* = 14.8T tokens, the phase has 14.8T: 1B too little",
    ),
    (broken("phase", 0, "gamma", 1, tokens="600B"), r"gamma does not add up: 14.3T \+ 600B = 14.9T .*: 100B too much"),
    (
        broken("phase", 0, "lr", 1, until="20B"),
        r"it ends at 20B tokens, but begins at 28.06B\n  in lr, piece 2 of 5\n  in phase",
    ),
    (broken("phase", 0, learning_rate=1), "unknown key 'learning_rate' in a phase; known: "),
    (broken("phase", 0, aux_wieght=1), "unknown key 'aux_wieght' in a phase; did you mean aux_weight?"),
    (broken("phase", 0, "lr", 2, shap="cosine"), "unknown key 'shap' in a piece; did you mean shape?"),
    (broken("optimizer", beta=[0.9, 0.95]), "unknown key 'beta' in the optimizer; did you mean betas?"),
    (broken("optimizer", precision="fp4"), r"precision is 'fp4'; known: fp8, .*\n  in \[optimizer\]"),
    (broken("optimizer", betas=[0.9, 1.0]), "betas is"),
    (broken("optimizer", loss_scale=2.0), "loss_scale goes with precision 'fp16'"),
    (broken("phase", 0, "lr", 2, shape="cosin"), "shape is 'cosin'; known: constant, linear, cosine"),
    (broken("phase", 0, "lr", 2, value=1.0), "either a value, or an end"),
    (broken("phase", 0, "lr", 1, tokens="1T"), "one length, not tokens and until"),
    (broken("phase", 0, "lr", 1, until=None), "a piece that is not the last has a length"),
    (broken("phase", 0, "lr", 0, **{"from": None}), "the first piece has no piece before it"),
    (broken("phase", 0, "lr", 0, steps="1T"), "steps from step 0 on; the phase has 242785"),
    (broken("phase", 0, "batch", 0, tokens=None), "a piece that is not the last has a length"),
    (broken("phase", 0, tokens="14.8X"), "'14.8X' is no amount"),
    (broken("phase", 0, tokens=-5), "-5 is no amount"),
    (broken("phase", 0, tokens="1e99999999"), "'1e99999999' is no amount"),
    (broken("phase", 0, tokens="1e31"), "'1e31' is too large for an amount"),
    (broken("phase", 0, tokens=1e30), "a phase of 1e[+]30 tokens; expected 1 to 2.62"),
    (broken("phase", 0, steps=5), "a phase has a length: either tokens or steps"),
    (broken("phase", 0, sequence=0.5), "sequence is 0.5; expected a whole number"),
    (broken("phase", 0, batch=0), "a batch has at least one sequence"),
    (broken("phase", 1, batch=[{"value": 3}]), "a phase whose length is given in steps has one number as its batch"),
    (broken("phase", 1, config={"n_groups": 1}), r"config keys .*n_groups\n  in config\n  in phase '32K'"),
    (broken("phase", 0, lr=float("nan")), "value is nan"),
    (broken("phase", 0, lr=None), "lr is missing"),
    (broken(phase=[]), "at least one"),
    (broken(ema=1.0), "ema is 1.0"),
    (broken(name=""), "name is ''; expected a text"),
]


@pytest.mark.parametrize(("d", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_a_wrong_recipe_is_refused_and_says_where(d, message):
    """Catches recipes that do not add up, misspelt keys, impossible values: each passes silently if nobody checks."""
    with pytest.raises(SpecError, match=message):
        read(d)


def test_a_recipe_that_is_no_file_or_no_toml(tmp_path):
    """Catches a traceback instead of a sentence."""
    with pytest.raises(SpecError, match="it is none of article-cosine"):
        load("deepseek")
    (tmp_path / "r.toml").write_text("a = [")
    with pytest.raises(SpecError, match="not TOML"):
        load(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("text", "number"), [("14.8T", 14_800 * B), ("0.1K", 100), (2.5e9, 2_500_000_000), ("1_000", 1000)]
)
def test_amounts_are_exact(text, number):
    """Catches binary rounding: 14.8e12 in floats is exact by luck, 333.3B is not."""
    assert amount(text) == number
    assert amount("333.3B") == 333_300_000_000


def step_by_step(batch, sequence, multiple):
    """Steps, tokens and batches where the batch changes: every step taken."""
    found, step, token = [], 0, 0
    while token < batch.tokens:
        size = max(multiple, int(batch.value(token, step) / multiple + 0.5) * multiple)
        if not found or size != found[-1][2]:
            found.append((step, token, size))
        step, token = step + 1, token + size * sequence
    return found


@settings(max_examples=60, deadline=None)
@given(
    ends=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    shape=st.sampled_from(["linear", "cosine"]),
    each=st.integers(20, 900),
    multiple=st.integers(1, 7),
)
def test_a_ramp_has_the_steps_that_it_has_one_by_one(ends, shape, each, multiple):
    """Catches a step left out or too many where a batch grows, falls, stands still or two pieces meet."""
    pieces = [Piece("constant" if a == b else shape, a, b, i * each, each) for i, (a, b) in enumerate(pairwise(ends))]
    batch = Schedule(tuple(pieces))
    found = steps_of(batch, 3, multiple)
    assert [(r.step, r.token, r.batch) for r in found.runs] == step_by_step(batch, 3, multiple)


def test_a_run_of_a_million_times_the_tokens_is_no_more_work(monkeypatch, capsys):
    """Catches steps that are counted one by one: the ramp of V3's run, scaled to 4e18 tokens, has 2e15 of them."""
    asked, before = [], Piece.value
    monkeypatch.setattr(Piece, "value", lambda *at: asked.append(1) or before(*at))
    assert main(["recipe", "--tokens", "4e18"]) == 0
    assert len(asked) < 10**6
    with pytest.raises(SpecError, match="a batch that takes 999999999 values; at most 100,000"):
        steps_of(Schedule((Piece("linear", 1, 1e9, 0, 2**61),)), 1, 1)


def test_batches_that_ranks_can_share():
    """Catches a small recipe whose batches no even number of ranks divides, as the ramp in steps of one sequence has, and a
    multiple that holds in the first phase only.
    """
    small = {"tokens": 2_000_000, "sequence": 64, "batch": 40}
    alone, shared = (read(scaled(load("deepseek-v3"), **small, multiple=m)) for m in (None, 4))
    assert any(alone.at(k).batch % 4 for k in range(len(alone)))
    assert {shared.at(k).batch % 4 for k in range(len(shared))} == {0} and shared.at(200).batch == 40
    with pytest.raises(SpecError, match="multiple is 0; it must be positive"):
        scaled(load("deepseek-v3"), multiple=0)
