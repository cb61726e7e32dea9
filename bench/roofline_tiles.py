"""How csrc/kernels/cross_layer_sums.cu cuts all pairs of maps into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


def meeting(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the places of the grid on which two maps meet."""
    return math.prod(map(min, a, b)) if len(a) == len(b) else 1


def is_met(grid: Sequence[int], other: Sequence[int]) -> bool:
    """Tell whether two maps meet on the first one's grid."""
    return len(grid) == len(other) and all(own <= its for own, its in zip(grid, other, strict=True))


class CrossTile(NamedTuple):
    """Threads that multiply, places on which two parts of classes meet and in tables, places of a chunk, its rounds."""

    lanes: int
    places: int
    in_tables: int
    chunk: int
    rounds: int


def cross_tiles(grids: Sequence[tuple[int, ...]], batch: int) -> list[CrossTile]:
    """Return the pairs of parts of classes of maps of one grid."""
    sides = []  # grid, and threads along as many of its maps
    for grid in dict.fromkeys(grids):
        count = grids.count(grid)
        parts = math.ceil(count / 64)
        ends = [count * part // parts for part in range(parts + 1)]
        sides += [(grid, math.ceil((end - begin) / 8)) for begin, end in pairwise(ends)]
    tiles = []
    for i, (rows, row_lanes) in enumerate(sides):
        for j, (cols, col_lanes) in enumerate(sides[i:]):
            places = batch * meeting(rows, cols)
            in_tables = places * (2 - is_met(rows, cols) - is_met(cols, rows))
            most = 512 // (8 * (row_lanes + (col_lanes if j else 0)))
            most = min(most, 16) if in_tables else most
            slices = min(128 // (row_lanes * col_lanes), most)
            rounds = most // slices
            tiles.append(CrossTile(row_lanes * col_lanes, places, in_tables, 4 * slices * rounds, rounds))
    return tiles
