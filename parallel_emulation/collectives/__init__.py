"""Collectives from point-to-point messages in a stated order, their differentiable duals, and the two-hop all-to-all."""

from .collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    bruck_all_to_all,
    pairwise_all_to_all,
    recursive_doubling_all_reduce,
    reduce_scatter,
    ring_all_gather,
    ring_all_reduce,
    ring_all_to_all,
    ring_reduce_scatter,
    shares,
    slices,
)
from .duals import copy_to, gather_from, reduce_from, scatter_to
from .two_hop import Nodes, Route, make_nodes

__all__ = [
    "Nodes",
    "Route",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "bruck_all_to_all",
    "copy_to",
    "gather_from",
    "make_nodes",
    "pairwise_all_to_all",
    "recursive_doubling_all_reduce",
    "reduce_from",
    "reduce_scatter",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_all_to_all",
    "ring_reduce_scatter",
    "scatter_to",
    "shares",
    "slices",
]
