"""Something to serve: the tiny case, or a small model, in a worker."""

import pathlib

import numpy as np

import refimpl
from refimpl import Checkpoint, Impl
from refimpl.infer.engine import Engine, Limits, Pages
from refimpl.infer.server import Bounds, Service
from refimpl.spec_tests.strategies.models import make_weights

from .configs import SMALL

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"


def small_impl(precision="float64", **changes):
    config = SMALL.replace(**changes)
    return Impl(precision=precision).load(config, make_weights(config.to_dict(), np.random.default_rng(0)))


def tiny_impl():
    case = Checkpoint.open(TINY)
    return Impl(precision="float64").load(case.config, case)


def service(it, *, blocks=64, size=4, rows=32, tokenizer=None, eos=(), invariant=None, **bounds):
    engine = Engine(it, Pages(it, blocks=blocks, size=size), limits=Limits(rows=rows), invariant=invariant)
    return Service("ours", engine, tokenizer, eos, Bounds(**bounds))


def settled(served):
    """Every command given before has been obeyed: they are obeyed in order, and this one is nothing."""
    served.worker.submit(object(), [], lambda event: None).result(60)


def empty(served):
    """Nothing is left of what was asked."""
    settled(served)
    blocks = served.engine.pages.blocks
    return blocks.free == blocks.count and not len(served.engine) and not served.worker._sinks
