"""What is split over ranks, an axis a module: data, tensor, sequence, vocabulary, experts; `mesh` holds them together."""

from . import data, expert, expert_layout, expert_wire, mesh, placed, sequence, tensor, vocabulary

__all__ = [
    "data",
    "expert",
    "expert_layout",
    "expert_wire",
    "mesh",
    "placed",
    "sequence",
    "tensor",
    "vocabulary",
]
