"""Training checkpoints that survive: whole or not at all, summed, by rank, read on any mesh; faults, and how a run goes on."""

from . import mesh, serial
from .facts import check_config, facts
from .keeper import Found, Keeper, Retention
from .snapshot import Saved, Snapshot

__all__ = [
    "Found",
    "Keeper",
    "Retention",
    "Saved",
    "Snapshot",
    "check_config",
    "facts",
    "mesh",
    "serial",
]
