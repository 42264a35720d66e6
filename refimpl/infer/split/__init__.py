"""Prefill and decode on ranks of their own: KV transfer, redundant experts and their plans, two micro-batches that take turns."""

from .batch import alone, order
from .experts import IN_ORDER, Experts
from .kv import KVFormat
from .moves import Move, migrate, moves
from .residents import choose_residents
from .serve import Served, serve
from .units import Deployment

__all__ = [
    "IN_ORDER",
    "Deployment",
    "Experts",
    "KVFormat",
    "Move",
    "Served",
    "alone",
    "choose_residents",
    "migrate",
    "moves",
    "order",
    "serve",
]
