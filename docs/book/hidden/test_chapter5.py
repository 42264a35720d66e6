"""Chapter 5's exercises."""

import numpy as np


def test_busiest(mine):
    """Catches the largest count given for its index."""
    assert mine.busiest(np.array([[0, 2], [2, 1]]), 4) == 2
