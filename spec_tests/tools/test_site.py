"""What the site's stage pages are made from: every stage has an equation, every dialect point a stage."""

import sys
import tomllib

import pytest

from refimpl.layers import STAGES, Dialect, variants

from .tree import ROOT, in_repository

EQUATIONS = "docs/equations.toml"
OURS = {n for n, s in STAGES.items() if s.fn.__module__.startswith("refimpl.layers")}  # tests make stages too


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
def test_a_stage_page_shows_source_bugs_and_names(monkeypatch):
    """Catches a page of another stage's source, and tables that lost their rows. R01 is the bias that leaks into the weights."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "_ext"), *sys.path])
    page = pytest.importorskip("stage_pages").pages()["router.weights.md"]
    assert "../../layers/router.py\n:language: python\n:pyobject: weights\n" in page
    assert "| R01 | the selection bias leaks" in page and "`topk_denominator_eps` | `1e-20`, `0.0`" in page
    assert "| mlx-lm | mlp.gate[1] |" in page and "test_" in page
