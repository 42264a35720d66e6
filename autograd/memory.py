"""What the C library does with memory that is freed."""

from __future__ import annotations

import numpy as np


def keep_freed() -> None:
    """Tell the allocator, in the one way it listens to, that large arrays come and go: free one, whose pages nobody touched.

    glibc gives a freed array's pages back to the system unless one as large was freed before (mallopt(3), "dynamic mmap threshold",
    up to 32 MiB); taking and clearing them anew cost a prompt of 512 tokens a quarter of its time. Elsewhere this does nothing.
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)
