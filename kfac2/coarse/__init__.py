"""The coarse spaces of the second level, one file for each."""

from kfac2.coarse.base import CoarseSpace, FineStep
from kfac2.coarse.directions import Directions
from kfac2.coarse.none import NoSpace
from kfac2.coarse.ones import Ones


def coarse_space(name: str | None, downsample: str) -> CoarseSpace:
    """Return the space of an option `coarse`."""
    if name == "directions":
        return Directions()
    return NoSpace() if name is None else Ones(downsample)


__all__ = ["CoarseSpace", "Directions", "FineStep", "NoSpace", "Ones", "coarse_space"]
