"""Samples that are the same in every run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def evenly_spread(num_rows: int, most: int) -> NDArray[np.int64]:
    """Places of rows [S], S = min(num_rows, most), from the first row to the last at equal distances."""
    return np.linspace(0, num_rows - 1, min(num_rows, most)).astype(np.int64)
