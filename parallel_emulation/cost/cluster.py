"""A cluster as links: alpha + bytes * beta for each class, NVLink inside a node, InfiniBand (IB) between nodes.

Transfers on the two classes overlap, so a phase takes the longer of the two (R 3.2.2): max(NVLink, IB).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.autograd.errors import SpecError, require


@dataclass(frozen=True)
class Link:
    """`latency` seconds per message, `bandwidth` bytes per second and GPU. Raises SpecError unless both make sense."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        require(0 <= self.latency < float("inf"), f"latency is {self.latency} s; expected a finite number >= 0")
        require(0 < self.bandwidth < float("inf"), f"bandwidth is {self.bandwidth} bytes/s; expected a number > 0")

    def time(self, n_bytes: float, messages: int = 1) -> float:
        """alpha * messages + bytes * beta in seconds; nothing to send takes no time."""
        return self.latency * messages + n_bytes / self.bandwidth if n_bytes else 0.0


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of `gpus_per_node`, numbered node by node. The defaults are H800 nodes.

    Bandwidths are effective ones: 44 of 50 GB/s IB and 153 of 160 GB/s NVLink reproduce the public DeepEP table.
    """

    gpus: int = 2048
    gpus_per_node: int = 8
    nvlink: Link = Link(3.33e-6, 153e9)
    ib: Link = Link(3.7e-6, 44e9)
    peak: float = 989e12  # FLOP/s, dense BF16
    memory: float = 80e9  # bytes
    memory_bandwidth: float = 3.35e12  # bytes/s

    def __post_init__(self) -> None:
        require(self.gpus >= 1, f"a cluster of {self.gpus} GPUs; at least 1")
        require(self.gpus_per_node >= 1, f"{self.gpus_per_node} GPUs per node; at least 1")
        whole = self.gpus % self.gpus_per_node == 0 or self.gpus < self.gpus_per_node
        require(whole, f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}")
        for name in ("peak", "memory", "memory_bandwidth"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} is {value}; expected a number > 0")

    def same_node(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
        """Whether GPUs a and b (arrays broadcast) sit in one node."""
        return np.asarray(np.asarray(a) // self.gpus_per_node == np.asarray(b) // self.gpus_per_node)


@dataclass(frozen=True)
class Traffic:
    """Bytes per GPU on each link class: what it sends and what it receives, each (n,)."""

    nvlink_out: NDArray[np.float64]
    nvlink_in: NDArray[np.float64]
    ib_out: NDArray[np.float64]
    ib_in: NDArray[np.float64]

    @property
    def nvlink(self) -> float:
        """The busiest GPU's bytes on NVLink; links are full duplex, so the larger direction counts."""
        return float(max(self.nvlink_out.max(), self.nvlink_in.max()))

    @property
    def ib(self) -> float:
        """The busiest GPU's bytes on IB."""
        return float(max(self.ib_out.max(), self.ib_in.max()))

    def time(self, cluster: Cluster, messages: int = 1) -> float:
        """max(NVLink, IB) of the busiest GPU in seconds; `messages` start-ups on each."""
        return max(cluster.nvlink.time(self.nvlink, messages), cluster.ib.time(self.ib, messages))


def traffic(cluster: Cluster, matrix: ArrayLike) -> Traffic:
    """matrix (n, n): bytes from rank i to rank j (a run's `log.matrix(n)`), rank i on GPU i -> bytes per link class.

    The diagonal does not count. Raises SpecError unless the matrix is square, non-negative and fits the cluster.
    """
    m = np.array(matrix, np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or not m.size:
        raise SpecError(f"a byte matrix of shape {m.shape}; expected (n, n)")
    require(len(m) <= cluster.gpus, f"a byte matrix of {len(m)} ranks for {cluster.gpus} GPUs")
    require((m >= 0).all(), "a byte matrix with negative or undefined entries")
    np.fill_diagonal(m, 0)
    ranks = np.arange(len(m))
    local = cluster.same_node(ranks[:, None], ranks[None, :])
    inside, across = np.where(local, m, 0), np.where(local, 0, m)
    return Traffic(inside.sum(1), inside.sum(0), across.sum(1), across.sum(0))
