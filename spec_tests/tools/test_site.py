"""What the site's stage pages are made from: every stage has an equation, every dialect point a stage."""

import re
import tomllib

import numpy as np
import pytest

from refimpl.layers import STAGES, Dialect, variants
from refimpl.plotting import drawn

from .tree import ROOT, in_repository

EQUATIONS = "docs/equations.toml"
OURS = {n for n, s in STAGES.items() if s.fn.__module__.startswith("refimpl.layers")}  # tests make stages too


@pytest.fixture(scope="module")
def pages():
    """File name -> stage page, as the site's build writes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs" / "_ext")
        return pytest.importorskip("stage_pages").pages()


@in_repository
def test_every_stage_has_its_equation():
    """Catches a new stage without a page, and an equation of a stage that is gone."""
    assert variants.__doc__
    assert set(tomllib.loads((ROOT / EQUATIONS).read_text(encoding="utf-8"))["stages"]) == OURS


@in_repository
def test_every_dialect_point_has_its_stages():
    """Catches a point of difference that no page speaks of, or that names a stage that is not there."""
    points = tomllib.loads((ROOT / EQUATIONS).read_text(encoding="utf-8"))["dialect"]
    assert set(points) == set(Dialect.choices())
    assert set().union(*points.values()) <= OURS


@in_repository
@pytest.mark.slow  # CI builds the site besides
def test_a_stage_page_shows_source_bugs_and_names(pages):
    """Catches a page of another stage's source, and tables that lost their rows. R01 is the bias that leaks into the weights."""
    page = pages["router.weights.md"]
    assert "../../layers/router.py\n:language: python\n:pyobject: weights\n" in page
    assert "| R01 | the selection bias leaks" in page and "`topk_denominator_eps` | `1e-20`, `0.0`" in page
    assert "| mlx-lm | mlp.gate[1] |" in page and "test_" in page


@in_repository
def test_a_stage_page_says_its_dtypes_and_its_tests_ids(pages):
    """Catches a plan left out or another stage's, integers said to be rounded, an id that is another test's. V3's router stays in
    float32, its experts' products run in FP8 (R 3.3.1), ids are integers.
    """
    rows = {
        n: [x for x in pages[f"{n}.md"].split("\n") if "`fp8`" in x]
        for n in ("router.weights", "moe.down", "router.ids")
    }
    assert rows["router.weights"] == ["| `float32`, `bf16`, `fp8`, `fp8_hopper`, `fp8_ue8m0` | float32 | float32 |"]
    assert (
        len(rows["moe.down"]) == 1
        and "rounded to bfloat16" in rows["moe.down"][0]
        and "FP8: exact" in rows["moe.down"][0]
    )
    assert rows["router.ids"] == [] and "no plan rounds it" in pages["router.ids.md"]
    told = dict(
        line.split(" ", 1) for line in (ROOT / "spec_tests" / "ids.txt").read_text(encoding="utf-8").split("\n") if line
    )
    assert not [name for name, page in pages.items() if page.rstrip().endswith("## Tests that mention it")]
    shown = re.findall(r"^- `\S+/test_(\w+)\.py::test_(\w+)` \((\S+)\)$", "\n".join(pages.values()), re.M)
    assert len(shown) > 200 and all(told[id] == f"{file}::{name}" for file, name, id in shown)


def test_lines_of_a_figure_differ_without_their_colours():
    """Catches curves that one cannot tell apart in grey: six lines have six patterns of dashes."""
    pytest.importorskip("matplotlib")  # in the extra `plot`
    svg = drawn(lambda f: f.subplots().plot(np.outer([0, 1], range(6))), size=(4, 3), salt="six").decode()
    styles = re.findall(r'style="fill: none; (stroke-dasharray.*?)?stroke: #(?!000000)', svg)
    dashes = [style.split(";")[0] for style in styles]
    assert len(dashes) == len(set(dashes)) == 6


@in_repository
def test_no_figure_of_the_pages_is_told_apart_by_colour_alone():
    """Catches a figure drawn past `refimpl.plotting`, with matplotlib's own colours, whose lines are all solid."""
    plain = {
        f.name
        for f in (ROOT / "docs").glob("*.svg")
        if re.search("#(1f77b4|ff7f0e|2ca02c)", f.read_text(encoding="utf-8"))
    }
    assert not plain
