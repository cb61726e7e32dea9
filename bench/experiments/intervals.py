"""Means over seeds with their 95 % confidence intervals (Student's t)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom; the normal distribution's beyond.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960


def mean_and_half(samples: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of the columns, and half the width of their intervals; NaN for a single sample.

    Args:
        samples: a row for each seed.
    """
    values = np.array(samples, dtype=np.float64)
    count = len(values)
    if count == 1:
        return values[0], np.full(values.shape[1], np.nan)
    quantile = _QUANTILES[count - 2] if count - 2 < len(_QUANTILES) else _NORMAL
    return values.mean(0), quantile * values.std(0, ddof=1) / np.sqrt(count)
