"""The coarse spaces of the second level, one file for each."""

from kfac2.coarse.base import CoarseSpace, FineStep
from kfac2.coarse.none import NoSpace
from kfac2.coarse.ones import Ones


def coarse_space(levels: int, downsample: str) -> CoarseSpace:
    """Return the space of an option `levels`: 1 has none, 2 is the paper's."""
    return NoSpace() if levels == 1 else Ones(downsample)


__all__ = ["CoarseSpace", "FineStep", "NoSpace", "Ones", "coarse_space"]
