"""What dispatch and combine move, and how long DeepEP's kernels take: copies per token, then max(NVLink, IB).

A token goes once to each node that has one of its experts (IB, to the GPU with its own number there) and from there
once to each rank (NVLink), however many of its experts live there (R 2.1.2, R 3.2.2; DeepEP dd758ca).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require

from .cluster import Cluster, Link

FP8_BLOCK, SCALE_BYTES = 128, 4


def fp8_row(hidden: int) -> int:
    """Bytes of one token in FP8: hidden codes and a float32 scale for each 128 of them."""
    return hidden + -(-hidden // FP8_BLOCK) * SCALE_BYTES


def bf16_row(hidden: int) -> int:
    """Bytes of one token in BF16."""
    return 2 * hidden


@dataclass(frozen=True)
class Copies:
    """Copies of a token, averaged over tokens."""

    ranks: float  # distinct ranks that need it, its own included
    nodes: float  # distinct nodes, its own included
    remote_nodes: float  # IB copies
    nvlink: float  # copies from the GPU a token arrives at (or starts from) to another one of that node


def count_copies(
    ids: NDArray[np.int64], source: NDArray[np.int64], experts: int, ep: int, gpus_per_node: int = 8
) -> Copies:
    """ids (T, K) chosen experts, source (T,) rank of each token -> Copies; expert e is on rank e // (experts / ep).

    -1 is no expert. Raises SpecError where sizes do not divide or an id or a rank does not exist.
    """
    _check_ep(experts, ep, gpus_per_node)
    known = ids.size and ids.min() >= -1 and ids.max() < experts and source.min() >= 0 and source.max() < ep
    require(known, f"expert ids must lie in -1...{experts - 1} and source ranks in 0...{ep - 1}, at least one of each")
    tokens = np.arange(len(ids))
    to_rank = np.zeros((len(ids), ep + 1), bool)  # the last column takes the -1
    np.put_along_axis(to_rank, np.where(ids < 0, ep, ids // (experts // ep)), True, 1)
    to_rank = to_rank[:, :ep]
    per_node = min(gpus_per_node, ep)
    by_node = to_rank.reshape(len(ids), -1, per_node)
    to_node: NDArray[np.bool_] = np.logical_or.reduce(by_node, axis=2)
    relay = by_node[tokens, :, source % per_node]  # (T, nodes): the arriving GPU itself needs it
    remote = to_node.sum() - to_node[tokens, source // per_node].sum()
    counts = to_rank.sum(), to_node.sum(), remote, to_rank.sum() - relay.sum()
    return Copies(*(float(count) / len(ids) for count in counts))


def _check_ep(experts: int, ep: int, gpus_per_node: int) -> None:
    require(ep >= 1 and experts % ep == 0, f"expert parallelism over {ep} ranks does not divide {experts} experts")
    aligned = gpus_per_node >= 1 and (ep % gpus_per_node == 0 or gpus_per_node % ep == 0)
    require(aligned, f"expert parallelism over {ep} ranks does not fit nodes of {gpus_per_node} GPUs")


def uniform_choices(
    rng: np.random.Generator, tokens: int, experts: int, k: int, nodes: int, node_limit: int
) -> NDArray[np.int64]:
    """(tokens, k) experts of uniform scores: the `node_limit` nodes with the best expert, then the best k in them.

    This is the routing of DeepEP's own benchmark, whose tables are the check.
    """
    scores = rng.random((tokens, nodes, experts // nodes))
    limit = min(nodes, node_limit)
    require(1 <= k <= limit * (experts // nodes), f"top {k} of {limit} nodes with {experts // nodes} experts each")
    kept = np.argsort(-scores.max(axis=2), axis=1)[:, :limit]
    allowed = np.zeros((tokens, nodes), bool)
    np.put_along_axis(allowed, kept, True, 1)
    masked = np.where(allowed[:, :, None], scores, -1.0).reshape(tokens, experts)
    return np.argpartition(-masked, k - 1, axis=1)[:, :k]


def uniform_copies(
    ep: int, *, experts: int = 256, k: int = 8, gpus_per_node: int = 8, node_limit: int = 4, tokens: int = 8192
) -> Copies:
    """Copies per token for uniform scores, from a fixed sample of `tokens` tokens (standard error about 0.01)."""
    _check_ep(experts, ep, gpus_per_node)
    rng = np.random.default_rng(0)
    ids = uniform_choices(rng, tokens, experts, k, max(1, ep // gpus_per_node), node_limit)
    return count_copies(ids, np.arange(tokens) % ep, experts, ep, gpus_per_node)


def normal_time(cluster: Cluster, copies: Copies, tokens: int, row_bytes: int) -> float:
    """max(remote nodes / IB, ranks / NVLink) * tokens * row_bytes, in seconds: dispatch or combine, normal kernels."""
    ib = cluster.ib.time(copies.remote_nodes * tokens * row_bytes)
    return max(ib, cluster.nvlink.time(copies.ranks * tokens * row_bytes))


def normal_bandwidth(cluster: Cluster, copies: Copies, tokens: int, row_bytes: int) -> float:
    """Bytes per second as DeepEP reports them: logical, a token's own node included (inside one node: per rank)."""
    counted = copies.nodes if copies.remote_nodes else copies.ranks
    return counted * tokens * row_bytes / normal_time(cluster, copies, tokens, row_bytes)


LOW_LATENCY_DISPATCH = Link(34.6e-6, 46.4e9)
LOW_LATENCY_COMBINE = Link(5.7e-6, 39.9e9)
"""Least-squares lines through the published EP >= 16 values, remote bytes only."""


def low_latency_time(link: Link, ep: int, tokens: int, k: int, row_bytes: int, gpus_per_node: int = 8) -> float:
    """alpha + remote bytes * beta in seconds; each (token, choice) is a message of its own, straight to its rank.

    Only across nodes: on one node the kernels are NVLink-bound and the fit says nothing (SpecError).
    """
    require(ep > gpus_per_node, f"the low-latency line holds across nodes; EP {ep} fits a node of {gpus_per_node}")
    return link.time(tokens * k * row_bytes * (1 - gpus_per_node / ep))


def low_latency_row(hidden: int) -> int:
    """Bytes of one low-latency dispatch message: FP8 row, scales and 16 bytes of source metadata."""
    return fp8_row(hidden) + 16
