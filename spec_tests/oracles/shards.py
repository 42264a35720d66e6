"""Whose token is whose in shards, token by token from the spans."""

import numpy as np


def documents_of(shards):
    """Of all rows (N, S): the number of the piece in its row that each token belongs to, -1 for padding."""
    found = []
    for k, shard in enumerate(shards.shards):
        owner = [-1] * (shard.rows * shards.length)
        for first, last in zip(*shards.spans(k).tolist(), strict=True):
            row = first // shards.length
            before = owner[row * shards.length : first]
            number = max(before, default=-1) + 1
            for i in range(first, last):
                owner[i] = number
        found.append(np.array(owner).reshape(shard.rows, shards.length))
    return np.concatenate(found)
