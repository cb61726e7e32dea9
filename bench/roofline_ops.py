"""What each op reads, writes, computes and launches on a CUDA device, counted from the shapes of its layers.

An op is a list of stages, one after the other; see `roofline` for what makes seconds of them. Launches, tables and
workspaces are those of csrc/kernels, to the byte: tests/test_roofline.py holds them against the launches themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from layer_sets import LayerShape
from roofline_nets import Source
from roofline_tiles import cross_tiles, meeting

from kfac2.ops import Window
from kfac2.ops.gram_matrices import native_tile

FLOAT, DOUBLE = 4, 8
ELEMENT = {"fp32": 4, "tf32": 4, "bf16": 2}  # bytes of an activation, by the precision of the library's products
TABLE_BYTES = 30720  # that one launch brings to the device, csrc/kernels/tables.cu
FOLDED_AT_ONCE = 240  # products, csrc/kernels/fold_products.cu
# sizeof of the tables' entries, csrc/kernels
MAPS_ENTRY, COVARIANCE_ENTRY, PIECE_ENTRY, DIRECTION_ENTRY = 272, 344, 128, 528
FEW_MAPS = 14  # layers that layer_maps takes as a parameter, without a table
MAP_ENTRY, CROSS_TILE, MATRIX_ENTRY, EIGEN_ENTRY, PART_ENTRY, LAYER_ENTRY = 16, 224, 80, 80, 144, 56
PROCESSORS = 132  # of H100 SXM and H200: the data sheets
# Cycles of a warp for 32 positions, by the tile: of 16 instructions that were counted, of others what an H100 takes.
COVARIANCE_ISSUE = {16: 230, 32: 620, 64: 2150}
# Blocks that are wanted for a launch, and positions of a share at least: csrc/kernels/covariance_tables.h.
BLOCKS_WANTED, LEAST_POSITIONS = {16: 4096, 32: 4096, 64: 1584}, {16: 256, 32: 256, 64: 128}
COVARIANCE_BLOCK = 600  # of a warp before and behind these: the table, the sum over slices (an estimate)
# Instructions of a warp for 256 multiply-adds of each thread, and beside them for a chunk and a block: from the
# compiled code, the last an estimate.
CROSS_ISSUE, CROSS_CHUNK, CROSS_BLOCK = 308, 250, 1500
LOAD = 270  # cycles from a load to its number, from the L2 cache (an estimate; about 600 from memory)
SWEEPS = 8  # of Jacobi's method: 6 to 10 are usual (csrc/include/eigendecompose.h)
EIGEN_LARGEST = 128  # of kfac2/ops/eigendecompose.py: above, torch.linalg.eigh


Part = tuple[int, int, bool]  # rows and columns of a gradient, and whether it belongs to a layer


class Stage(NamedTuple):
    """One kernel, or a few alike.

    Attributes:
        kernel: key of `roofline.SHARES`: what part of its peaks it reaches.
        launches: how many.
        bytes: read from and written to memory, each number once.
        flop: multiplications and additions in floating point, those of padded tiles included.
        latency: cycles that chains of dependent work take: those of the longest block, or of all blocks over as many
            as run at once.
    """

    kernel: str
    launches: int = 1
    bytes: float = 0.0
    flop: float = 0.0
    latency: float = 0.0


@dataclass(frozen=True)
class Count:
    """An op of kfac2: its stages, the bytes of its workspace, and the least work that its equation asks for."""

    stages: Sequence[Stage]
    workspace: int
    least_bytes: float
    least_flop: float

    @property
    def launches(self) -> int:
        """Launches of all stages."""
        return sum(stage.launches for stage in self.stages)


def up(number: float, step: int) -> int:
    """Round up to a multiple."""
    return math.ceil(number / step) * step


def tables(*sizes: int) -> tuple[Stage, int]:
    """Return the launches that bring tables of so many bytes to the device, and the bytes that they take there."""
    total = sum(up(size, 16) for size in sizes)
    # Blocks of 64 threads read them from constant memory, the words of a warp one by one.
    return Stage("tables", math.ceil(total / TABLE_BYTES), total, 0.0, 1000 * math.ceil(total / TABLE_BYTES)), total


# -- statistics -----------------------------------------------------------------------------------------------


def layer_maps(sources: Sequence[Source]) -> Count:
    """Read everything once, write one number for each row."""
    stages, held = [], 0
    if len(sources) > FEW_MAPS:
        table, held = tables(MAPS_ENTRY * len(sources))
        stages = [table]
    read, written = sum(s.numbers for s in sources) * FLOAT, sum(s.rows for s in sources) * FLOAT
    flop = sum(s.numbers + s.rows * math.prod(s.window.kernel_size) for s in sources)
    stages.append(Stage("layer_maps", 1, read + written, flop))
    return Count(stages, held, read + written, flop)


def axis_pieces(window: Window, axis: int, extent: int) -> Iterator[tuple[int, int, int]]:
    """Yield difference, positions and pairs of offsets of an axis's pieces: csrc/include/covariance_pieces.h."""
    kernel, step, dilation = window.kernel_size[axis], window.stride[axis], window.dilation[axis]
    low = window.padding[axis][0]
    grid = window.grid((1,) * axis + (extent,) + (1,) * (len(window.kernel_size) - axis - 1))[axis]
    for difference in range(1 - kernel, kernel):
        for phase in range(step):
            held = {}  # offset: positions u that it takes, with u and its partner inside of the map
            for offset in range(max(0, -difference), min(kernel, kernel - difference)):
                if offset * dilation % step != phase:
                    continue
                places = (t * step + offset * dilation - low for t in range(grid))
                both = [u for u in places if 0 <= u < extent and 0 <= u + difference * dilation < extent]
                if both:
                    held[offset] = range(both[0], both[-1] + 1, step)
            cuts = sorted({end for taken in held.values() for end in (taken[0], taken[-1] + step)})
            for begin, end in pairwise(cuts):
                pairs = sum(begin in taken for taken in held.values())
                if pairs > 0:
                    yield difference, (end - begin) // step, pairs


class Piece(NamedTuple):
    """Whether a piece is symmetric, its positions in one sample, and the pairs of kernel offsets that hold it."""

    symmetric: bool
    positions: int
    pairs: int


def pieces(rows: Source) -> list[Piece]:
    """Return the pieces of rows: opposite differences are one."""
    found: list[tuple[tuple[int, ...], int, int]] = [((), 1, 1)]
    for axis, extent in enumerate(rows.extent):
        along = list(axis_pieces(rows.window, axis, extent))
        found = [((*d, more), n * positions, p * pairs) for d, n, p in found for more, positions, pairs in along]
    leading = [(next((d for d in differences if d), 0), n, p) for differences, n, p in found]
    return [Piece(lead == 0, n, p) for lead, n, p in leading if lead >= 0]


def tiles_of(rows: Source) -> tuple[int, int]:
    """Return the channels of a tile, and the tiles along one side."""
    tile = native_tile(rows.channels)
    return tile, math.ceil(rows.channels / tile)


def covariances(sources: Sequence[Source]) -> Count:
    """Multiply pieces by tiles of channels, add up their shares, gather: csrc/kernels/covariances.cu."""
    cut = {tuple(rows): pieces(rows) for rows in sources}
    work = dict.fromkeys(COVARIANCE_ISSUE, 0)  # positions, counted for each tile
    for rows in sources:
        tile, tiles = tiles_of(rows)
        for piece in cut[tuple(rows)]:
            work[tile] += (tiles * (tiles + 1) // 2 if piece.symmetric else tiles**2) * rows.batch * piece.positions
    length = {  # of a share
        tile: max(LEAST_POSITIONS[tile], up(math.ceil(n / BLOCKS_WANTED[tile]), 32)) for tile, n in work.items()
    }
    flop, longest, cycles, moved = (dict.fromkeys(work, 0.0) for _ in range(4))
    scratch, summed, gathered = 0, 0, 0
    for rows in sources:
        tile, tiles = tiles_of(rows)
        side, bias = tile * tiles, int(rows.window.bias != 0)
        # While 32 positions are multiplied the next ones are loaded: a block takes the longer of the two.
        chunk = max(COVARIANCE_ISSUE[tile], LOAD + 100)
        numbers, layer = 0, cut[tuple(rows)]
        for symmetric, count, _ in layer:
            positions = rows.batch * count
            shares = max(1, math.ceil(positions / length[tile]))
            numbers += shares * side * (side + bias)
            summed += (shares + 1) * side * (side + bias) * FLOAT if shares > 1 else 0
            pairs = tiles * (tiles + 1) // 2 if symmetric else tiles**2
            flop[tile] += 2.0 * positions * pairs * tile**2
            longest[tile] = max(longest[tile], math.ceil(min(positions, length[tile]) / 32) * chunk)
            cycles[tile] += (math.ceil(positions / 32) * COVARIANCE_ISSUE[tile] + shares * COVARIANCE_BLOCK) * pairs
        moved[tile] += rows.numbers * FLOAT + numbers * FLOAT
        scratch += up(numbers * FLOAT, 16)
        gathered += len(layer) * side * (side + bias) * FLOAT + rows.numbers_of_triangle * FLOAT
    lists = sum(math.prod(s.window.kernel_size) ** 2 + 1 for s in map(Source._make, cut))
    lists += sum(piece.pairs for layer in cut.values() for piece in layer)
    table, held = tables(COVARIANCE_ENTRY * len(sources), PIECE_ENTRY * sum(map(len, cut.values())), 4 * lists)
    # One launch for each size of tiles. Of a block each scheduler of a multiprocessor has one warp.
    stages = [
        Stage("covariances", 1, moved[size], flop[size], max(longest[size], cycles[size] / PROCESSORS))
        for size in flop if flop[size]
    ]  # fmt: skip
    stages += [Stage("covariances, shares", 1, summed)] if summed else []
    least = sum(s.numbers + s.numbers_of_triangle for s in sources) * FLOAT
    least_flop = 0.0  # of a place with itself each pair of channels once
    for s in sources:
        by_distance = {True: s.channels * (s.channels + 1), False: 2 * s.channels**2}
        least_flop += sum(float(s.batch * piece.positions * by_distance[piece.symmetric]) for piece in cut[tuple(s)])
    return Count([table, *stages, Stage("covariances, gather", 1, gathered)], held + scratch, least, least_flop)


def fold_products(sizes: Sequence[int], element: int = FLOAT) -> Count:
    """Read one triangle of each product and write it folded: csrc/kernels/fold_products.cu."""
    moved = float(sum(size * (size + 1) for size in sizes) * element)
    return Count([Stage("fold", math.ceil(len(sizes) / FOLDED_AT_ONCE), moved)], 0, moved, 0.0)


def directional_derivatives(inputs: Sequence[Source], grads: Sequence[Source]) -> Count:
    """Multiply rows with one direction of each layer and meet the products with g at once."""
    flop, partial, scratch, least, longest, chunks = 0.0, 0, 0, 0, 0, 0
    for rows, grad in zip(inputs, grads, strict=True):
        columns = math.ceil(grad.channels / 64)
        flop += 2.0 * up(rows.rows, 32) * columns * 64 * up(rows.length, 16)
        partial += columns * rows.rows * DOUBLE
        scratch += up(columns * rows.rows * DOUBLE, 16)
        longest = max(longest, math.ceil(rows.length / 16))
        chunks += math.ceil(rows.rows / 32) * columns * math.ceil(rows.length / 16)
        least += (rows.numbers + grad.numbers + rows.length * grad.channels) * FLOAT
    table, held = tables(DIRECTION_ENTRY * len(inputs))
    # For 16 numbers of the rows a thread loads 12 numbers one after the other; each of the 8 directions waits for
    # fields of the table and a 64-bit division before (read off the compiled code).
    latency = max(longest, chunks / (3 * PROCESSORS)) * (20 * LOAD + 700)
    products = Stage("directional_derivatives", 1, least + partial, flop, latency)
    stages = [table, products, Stage("shares", 1, partial)]
    exact = sum(2.0 * rows.rows * rows.length * grad.channels for rows, grad in zip(inputs, grads, strict=True))
    return Count(stages, held + scratch, least, exact)


def cross_layer_sums(grids: Sequence[tuple[int, ...]], batch: int) -> Count:
    """Multiply tiles of up to 64 x 64 pairs of maps: csrc/kernels/cross_layer_sums.cu."""
    tiles = cross_tiles(grids, batch)
    work = [math.ceil(tile.places * tile.rounds / tile.chunk) for tile in tiles]
    shares = [
        max(1, min(math.ceil(768 * own / sum(work)), tile.places // 128))
        for tile, own in zip(tiles, work, strict=True)
    ]  # fmt: skip
    partial = sum(64 * tile.lanes * count * FLOAT for tile, count in zip(tiles, shares, strict=True))
    in_tables = sum(tile.in_tables for tile in tiles) * 8
    table, held = tables(MAP_ENTRY * len(grids), CROSS_TILE * len(tiles))
    maps, result = sum(batch * math.prod(grid) for grid in grids) * FLOAT, len(grids) ** 2 * FLOAT
    # While a chunk is multiplied the next one is loaded. Of a block each scheduler has one warp.
    chunks = [math.ceil(tile.places / tile.chunk) for tile in tiles]
    cycles = [n * (tile.rounds * CROSS_ISSUE + CROSS_CHUNK) for tile, n in zip(tiles, chunks, strict=True)]
    longest = max(n / count + CROSS_BLOCK for n, count in zip(cycles, shares, strict=True))
    chain = max(longest, (sum(cycles) + CROSS_BLOCK * sum(shares)) / PROCESSORS)
    flop = sum(n * tile.rounds for tile, n in zip(tiles, chunks, strict=True)) * 2.0 * 128 * 8 * 8 * 4
    products = Stage("cross_layer_sums", 1, maps + in_tables + partial, flop, chain)
    exact = sum(2.0 * batch * meeting(a, b) for i, a in enumerate(grids) for b in grids[i:])
    places = [Stage("small", 1, in_tables)] if in_tables else []
    stages = [table, *places, products, Stage("shares", 1, partial + result)]
    return Count(stages, held + in_tables + partial, maps + result, exact)


def average_coarse_sums(layers: int) -> Count:
    """Average both matrices of sums and multiply them: csrc/kernels/coarse_fisher.cu."""
    table, held = tables((layers + 1) * 4, layers * 4, layers * DOUBLE, layers * DOUBLE)
    moved = (4 + 2 + 1) * layers**2 * FLOAT
    return Count([table, Stage("small", 1, moved, 12.0 * layers**2)], held, moved, 12.0 * layers**2)


# -- inverses -------------------------------------------------------------------------------------------------


def factored_tikhonov_inverse(pairs: Sequence[tuple[int, int]]) -> Count:
    """Sweep blocks of 64 rows, all matrices side by side: csrc/kernels/factored_tikhonov_inverse.cu."""
    sizes = [size for pair in pairs for size in pair]
    blocks = [math.ceil(size / 64) for size in sizes]
    halves = [size * (size + 1) / 2 * FLOAT for size in sizes]  # only the last sweep writes lower triangles, too
    damped = 2 * sum(halves)
    eliminated, updated = Stage("eliminate", 0), Stage("update", 0, sum(halves))
    for k in range(max(blocks)):
        taken = [(half, count) for half, count in zip(halves, blocks, strict=True) if count > k]
        items, tiles = sum(n for _, n in taken), sum(n * (n + 1) // 2 for _, n in taken)
        z, half = items * 64 * 64 * FLOAT, sum(half for half, _ in taken)
        flop = items * 128 * 64 * 63.0  # 128 columns of a block, of which half a triangle each
        # A chain of 32 steps with a barrier and two pivots, the search for the matrix and the loads before it; of a
        # block, four warps issue some 5,000 instructions each, one on each scheduler.
        cycles = eliminated.latency + max(13000.0, items * 5000 / PROCESSORS)
        eliminated = Stage("eliminate", k + 1, eliminated.bytes + 2 * z, eliminated.flop + flop, cycles)
        updated = Stage("update", k + 1, updated.bytes + z + 2 * half, updated.flop + tiles * 2.0 * 64**3)
    table, held = tables(MATRIX_ENTRY * len(sizes))
    scratch = sum(blocks) * 64 * 64 * FLOAT
    least, least_flop = 2.0 * sum(size**2 for size in sizes) * FLOAT, sum(float(size) ** 3 for size in sizes)
    return Count([table, Stage("damp", 1, damped), eliminated, updated], held + scratch, least, least_flop)


def eigendecompose(stacks: Sequence[tuple[int, int]], element: int = FLOAT) -> Count:
    """Jacobi's method, one block for each matrix (count, size): csrc/kernels/eigendecompose.cu.

    A round is two barriers and 3.5 n² numbers of shared memory, 32 in a cycle, or of the cache, 8 in a cycle.
    """
    fixed, scratch, blocks, flop = 2240 if element == FLOAT else 3328, 0, [], 0.0
    for count, size in stacks:
        n = size + size % 2
        matrix, vectors = n * n * element, up(size * (size | 1) * element, 16)
        matrix_shared, vectors_shared = fixed + matrix <= 98304, fixed + matrix + vectors <= 98304
        scratch += count * ((0 if matrix_shared else matrix) + (0 if vectors_shared else vectors))
        numbers = (1.5 / (32 if matrix_shared else 8) + 2 / (32 if vectors_shared else 8)) * n**2 * element / FLOAT
        blocks += [SWEEPS * (n - 1) * (1000 + numbers)] * count
        flop += count * SWEEPS * (n - 1) * 8.0 * n**2
    table, held = tables(EIGEN_ENTRY * len(stacks))
    moved = sum(count * (2 * size**2 + size) for count, size in stacks) * element
    longest = max(*blocks, sum(blocks) / PROCESSORS)
    return Count([table, Stage("eigendecompose", 1, moved, flop, longest)], held + scratch, moved, flop)


# -- every step -----------------------------------------------------------------------------------------------


def by_size(shapes: Sequence[LayerShape]) -> dict[tuple[int, int], int]:
    """Count the layers of each shape of matrix, (d_out, d_in)."""
    sizes = [(shape.d_out, shape.d_in) for shape in shapes]
    return {size: sizes.count(size) for size in dict.fromkeys(sizes)}


def precondition(shapes: Sequence[LayerShape], stacked: bool = False) -> Count:
    """Multiply from both sides, two batched products for each shape; `stacked`: the lists are stacked before."""
    stages, copied, launches, least = [], 0.0, 0, 0.0
    for (rows, columns), count in by_size(shapes).items():
        grad, left, right = rows * columns, rows**2, columns**2
        for inner, factor in ((rows, left), (columns, right)):
            flop = 2.0 * count * up(rows, 64) * up(columns, 64) * inner
            stages.append(Stage("mm", 1, count * (2 * grad + factor) * FLOAT, flop))
        copied += 2.0 * count * (grad + left + right) * FLOAT
        launches += 3
        least += count * (2 * grad + left + right) * FLOAT
    exact = sum(2.0 * s.d_out * s.d_in * (s.d_out + s.d_in) for s in shapes)
    copies = [Stage("copy", launches, copied)] if stacked else []
    return Count([*copies, *stages], 0, least, exact)


def gather_gradients(parts: Sequence[Part]) -> Count:
    """Copy gradients (rows, columns, whether it belongs to a layer) to the matrices, and look at all."""
    table, held = tables(PART_ENTRY * len(parts))
    moved = sum(rows * columns * (2 if belongs else 1) for rows, columns, belongs in parts) * FLOAT
    return Count([Stage("small", 1, 4), table, Stage("gather", 1, moved)], held, moved, 0.0)


def write_gradients(parts: Sequence[Part]) -> Count:
    """Write the directions over the gradients."""
    table, held = tables(PART_ENTRY * len(parts))
    moved = sum(2.0 * rows * columns for rows, columns, belongs in parts if belongs) * FLOAT
    return Count([table, Stage("write", 1, moved)], held, moved, moved / FLOAT)


def shift_and_scale(sizes: Sequence[int], coarse: bool = True) -> Count:
    """Sum gradients and their products with directions; one block does the rest, a warp for each layer."""
    table, held = tables(LAYER_ENTRY * len(sizes))
    items, numbers = sum(math.ceil(size / 8192) for size in sizes), sum(sizes)
    moved, sums = 2.0 * numbers * FLOAT, items * 48
    rounds = math.ceil(len(sizes) / 16)  # of its warps; each waits for memory: 3 sums over items, and the row of c
    waits = rounds * (3 + (math.ceil(len(sizes) / 32) if coarse else 0)) * 700
    finish = Stage("small", 1, sums + (DOUBLE * len(sizes) ** 2 if coarse else 0), 0.0, waits)
    stages = [table, Stage("sums", 1, moved + sums, 6.0 * numbers), finish]
    return Count(stages, held + sums, moved, 6.0 * numbers)
