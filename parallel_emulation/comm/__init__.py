"""The communicator: blocking messages between ranks, on a deterministic simulator and on MPI, with a log and a launcher."""

from .communicator import Comm, Meta, Recv, Send, split_into
from .counted import Tally, counted
from .faults import RankFault, mortal
from .launcher import launch, simulate
from .log import Log, Record
from .simulator import SimComm, spmd

__all__ = [
    "Comm",
    "Log",
    "Meta",
    "RankFault",
    "Record",
    "Recv",
    "Send",
    "SimComm",
    "Tally",
    "counted",
    "launch",
    "mortal",
    "simulate",
    "split_into",
    "spmd",
]
