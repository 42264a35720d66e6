"""The mesh: every rank of a run has a place on each axis, and the groups of a run are lines and planes of it (R 3.2).

Ranks are numbered with tp fastest and pp slowest, so that those who talk most are neighbours. V3 was trained on
pp 16, dp 2, ep 64: the 128 ranks of a stage are data-parallel ranks for dense weights (`data`), and two for each expert.
With tensor parallelism experts are spread over tp too (`experts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refimpl.autograd import require
from refimpl.parallel_emulation.comm.communicator import Comm, spans, split_into
from refimpl.parallel_emulation.pipeline import Layout

Ranks = tuple[int, ...]


class Place(NamedTuple):
    """Where a rank is, counted from 0."""

    pp: int
    dp: int
    ep: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """Pipeline ranks, copies of the experts, ranks that share out one copy, tensor-parallel ranks."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        require(min(self.shape) >= 1, f"a mesh has at least one place on every axis, not {self}")

    def __str__(self) -> str:
        return " x ".join([f"{axis} {n}" for axis, n in zip(Place._fields, self.shape, strict=True)])

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """'pp=4,ep=2' -> Mesh(pp=4, ep=2). SpecError for anything else."""
        sizes: dict[str, int] = {}
        for word in text.split(","):
            axis, _, n = word.partition("=")
            good = axis in Place._fields and axis not in sizes and n.isascii() and n.isdigit()
            require(good, f"{word!r} in mesh {text!r}; expected pp, dp, ep, tp at most once each, as in pp=4,ep=2")
            sizes[axis] = int(n)
        return cls(**sizes)

    @property
    def shape(self) -> Place:
        """The sizes of the axes."""
        return Place(self.pp, self.dp, self.ep, self.tp)

    @property
    def size(self) -> int:
        """How many ranks it takes."""
        return math.prod(self.shape)

    def place(self, rank: int) -> Place:
        """Where a rank is.  SpecError for a rank that the mesh does not have."""
        require(0 <= rank < self.size, f"rank {rank} on a mesh of {self.size}")
        found = []
        for n in reversed(self.shape):
            rank, at = divmod(rank, n)
            found.append(at)
        return Place(*reversed(found))

    def groups(self, *axes: str, pipes: Sequence[Ranks] | None = None) -> list[Ranks]:
        """The ranks that differ in `axes` only, in rank order, group by group; every rank is in one.

        `pipes`: groups of pipeline ranks that belong together besides. SpecError if those overlap or leave one out.
        """
        unknown = set(axes) - set(Place._fields)
        require(not unknown, f"axis {', '.join(sorted(unknown))}; a mesh has {', '.join(Place._fields)}")
        if pipes is None:
            pipes = [tuple(range(self.pp))] if "pp" in axes else [(p,) for p in range(self.pp)]
        members = sorted(itertools.chain(*pipes))
        require(
            members == list(range(self.pp)), f"groups of pipeline ranks {pipes} overlap or leave out some of {self.pp}"
        )
        pipe_of = {p: i for i, group in enumerate(pipes) for p in group}
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            at = self.place(rank)._asdict()
            key = (pipe_of[at["pp"]], *[at[axis] for axis in ("dp", "ep", "tp") if axis not in axes])
            found.setdefault(key, []).append(rank)
        return [tuple(found[key]) for key in sorted(found)]


@dataclass(frozen=True)
class Groups:
    """One rank's groups on a mesh."""

    mesh: Mesh
    world: Comm
    place: Place
    pp: Comm  # my pipeline
    tp: Comm  # the ranks that share my heads and channels
    experts: Comm  # those that share out one copy of the experts: ep and tp
    data: Comm  # those with other sequences and the same dense weights: dp and ep


def enter(world: Comm, mesh: Mesh) -> Groups:
    """My groups. SpecError unless the run has as many ranks as the mesh."""
    require(world.size == mesh.size, f"the mesh {mesh} takes {mesh.size} ranks, the run has {world.size}")

    def line(name: str, *axes: str) -> Comm:
        return split_into(world, mesh.groups(*axes), f"mesh.{name}")

    groups = line("pp", "pp"), line("tp", "tp"), line("experts", "ep", "tp"), line("data", "dp", "ep")
    return Groups(mesh, world, mesh.place(world.rank), *groups)


# ---- Who holds what along the pipeline


def holders(layout: Layout, held: Sequence[Collection[str]]) -> dict[Ranks, list[str]]:
    """Pipeline ranks -> names of the weights that just these hold; held[s] are the names that stage s uses.

    DualPipe has every stage on two ranks; an embedding used at both ends is on the first and on the last stage's rank,
    which in DualPipe and DualPipeV are the same (R 3.2.3).
    """
    require(len(held) == layout.n_stages, f"names of {len(held)} stages, the schedule has {layout.n_stages}")
    of: dict[str, set[int]] = {}
    for rank, stages in enumerate(layout.stages):
        for name in itertools.chain(*[held[s] for s in stages]):
            of.setdefault(name, set()).add(rank)
    found: dict[Ranks, list[str]] = {}
    for name, ranks in of.items():
        found.setdefault(tuple(sorted(ranks)), []).append(name)
    return found


def mirror(layout: Layout, rank: int) -> Ranks:
    """The pipeline ranks that hold the same stages as this one: in DualPipe itself and P-1-r, elsewhere itself."""
    return tuple([r for r, stages in enumerate(layout.stages) if set(stages) == set(layout.stages[rank])])


def divisions(held: Mapping[Ranks, Sequence[str]], n: int) -> list[dict[Ranks, Sequence[str]]]:
    """Who holds what as a few lists of groups, in each of which every one of n ranks is exactly once.

    A communicator can only be divided into groups that do not overlap, so each list is one division. Ranks that have
    nothing to share in a division are alone in it, with no names.
    """
    found: list[dict[Ranks, Sequence[str]]] = []
    for group in sorted(held, key=lambda g: (g[0], len(g), g)):
        require(all(0 <= r < n for r in group), f"pipeline ranks {spans(group)} of {n}")
        free = [d for d in found if not set(group) & set(itertools.chain(*d))]
        if not free:
            found.append({})
        (free or found[-1:])[0][group] = held[group]
    for division in found:
        taken = set(itertools.chain(*division))
        division |= {(r,): () for r in range(n) if r not in taken}
    return found
