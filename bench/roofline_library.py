"""The same ops by torch and the vendor's libraries, as lists of stages; `element` is the bytes of an activation.

The ways are those of `plain` in `cases`: shifted planes and one matrix product, Cholesky by size, a product for each
pair of classes of maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from layer_sets import LayerShape
from roofline_nets import Source
from roofline_ops import ELEMENT, FLOAT, Count, Part, Stage, by_size, fold_products, up
from roofline_tiles import meeting

from kfac2.fine.tikhonov import Tikhonov
from kfac2.inverses import LEAST_BYTES, SHARE
from kfac2.ops.applied_directions import CHUNK as CHUNK_OF_PRODUCTS
from kfac2.ops.gram_matrices import CHUNK as CHUNK_OF_ROWS
from kfac2.ops.gram_matrices import folded_together, panel_shapes

BY_PRECISION = {"fp32": "fp32", "tf32": "tf32", "bf16": "half"}  # kfac2's names of them

# Tensors that one launch of a `_foreach` op takes, by the number of its lists; blocks, and numbers of a block
# (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_OF_LAUNCH, BLOCKS_OF_LAUNCH, CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def foreach(sizes: Sequence[int], lists: int, passes: int, element: int = FLOAT) -> Stage:
    """Describe a `_foreach` op over tensors of these sizes that reads or writes so many lists of them."""
    chunks = sum(math.ceil(size / CHUNK) for size in sizes)
    launches = max(math.ceil(len(sizes) / TENSORS_OF_LAUNCH[lists]), math.ceil(chunks / BLOCKS_OF_LAUNCH))
    return Stage("copy", launches, float(passes * element * sum(sizes)))


def product(rows: float, columns: float, inner: float, element: int, count: int = 1) -> Stage:
    """Describe a matrix product, rows and columns filled up to tiles of 64."""
    moved = count * (element * (rows + columns) * inner + FLOAT * rows * columns)
    return Stage("mm", 1, moved, 2.0 * count * up(rows, 64) * up(columns, 64) * inner)


def layer_maps(sources: Sequence[Source], element: int) -> list[Stage]:
    """Sum the channels; then a pool, where there is a kernel."""
    stages = []
    for s in sources:
        stages.append(Stage("reduce", 1, s.numbers * element + s.numbers / s.channels * FLOAT))
        more = int(math.prod(s.window.kernel_size) > 1) + int(s.window.bias != 0)
        stages.append(Stage("copy", more, more * 2.0 * s.rows * FLOAT))
    return stages


def covariances(sources: Sequence[Source], element: int) -> list[Stage]:
    """Pad, stack the shifted planes, multiply; a map of single places is only brought to channels first."""
    stages = []
    for s in sources:
        if math.prod(s.window.kernel_size) > 1:
            stages.append(Stage("copy", 3, 2.0 * element * (s.numbers + s.rows * s.length)))
        elif len(s.extent) == 2:
            stages.append(Stage("copy", 1, 2.0 * element * s.rows * s.channels))
        if s.window.bias:
            stages.append(Stage("reduce", 2, float(element * s.rows * s.length)))
        moved = element * s.rows * s.length + FLOAT * s.length**2  # both operands are the same
        stages.append(Stage("mm", 1, moved, product(s.length, s.length, s.rows, element).flop))
    return stages


def gram_matrices(sources: Sequence[Source], precision: str) -> list[Stage]:
    """What kfac2 itself does by the library's product: kfac2/ops/gram_matrices.py, few samples at a time.

    Products wait for each other to be folded.
    """
    stages: list[Stage] = []
    element, held = ELEMENT[precision], []
    for s in sources:
        width = s.length - bool(s.window.bias)
        numbers = s.rows * width
        parts = math.ceil(s.batch / max(1, CHUNK_OF_ROWS * s.batch // numbers))
        if any(map(any, s.window.padding)):
            stages.append(Stage("copy", parts, 2.0 * element * s.numbers))
        if not is_last(s):
            stages.append(Stage("rows", parts, 2.0 * element * numbers))
        if s.window.bias:  # each part's sums, and their sum
            stages.append(Stage("reduce", 2 * parts - 1, float(element * numbers)))
        panels = panel_shapes(width, BY_PRECISION[precision])
        held.append(FLOAT * sum(rows * columns for rows, columns in panels))
        written = float(parts * held[-1])
        flop = sum(product(rows, columns, s.rows, element).flop for rows, columns in panels)
        stages.append(Stage("mm", parts * len(panels), len(panels) * element * numbers + written, flop))
        stages.append(Stage("copy", (parts - 1) * len(panels), 3.0 * (parts - 1) / parts * written))  # added up
    for part in folded_together(held):
        stages += fold_products([s.length for s in sources[part]]).stages
    return stages


def is_last(s: Source) -> bool:
    """Tell whether rows lie in memory as they are: those of Linear layers, not maps, whose channels are not last."""
    return len(s.extent) < 2 and math.prod((*s.window.kernel_size, *s.window.stride)) == 1


def directional_derivatives(inputs: Sequence[Source], grads: Sequence[Source], element: int) -> list[Stage]:
    """Apply the layer with the direction as its weight, multiply with g, sum."""
    stages = []
    for s, g in zip(inputs, grads, strict=True):
        moved = element * (s.numbers + g.numbers + s.length * g.channels)
        stages.append(Stage("mm", 1, moved, product(s.length, g.channels, 1, element).flop * s.rows))
        stages += [Stage("copy", 1, 3.0 * element * g.numbers), Stage("reduce", 2, float(element * g.numbers))]
    return stages


def applied_directions(inputs: Sequence[Source], grads: Sequence[Source], element: int) -> list[Stage]:
    """What kfac2 itself does of wide layers: kfac2/ops/applied_directions.py, few samples at a time."""
    stages = []
    for s, g in zip(inputs, grads, strict=True):
        parts = math.ceil(s.batch / max(1, CHUNK_OF_PRODUCTS * s.batch // max(g.numbers, s.numbers)))
        if element < FLOAT:
            stages.append(Stage("copy", 1 + parts, float((element + FLOAT) * (s.length * g.channels + g.numbers))))
        moved = element * (s.numbers + g.numbers + parts * s.length * g.channels)
        stages.append(Stage("mm", parts, moved, product(s.length, g.channels, 1, element).flop * s.rows))
        stages.append(Stage("copy", parts, 3.0 * FLOAT * g.numbers))
        stages.append(Stage("reduce", (1 + bool(s.window.bias)) * parts, float(FLOAT * g.numbers)))
    return stages


def cross_layer_sums(grids: Sequence[tuple[int, ...]], batch: int) -> list[Stage]:
    """Stack the maps of each grid; for each pair of grids bring both onto the coarser one, multiply, write twice."""
    classes = {grid: grids.count(grid) for grid in dict.fromkeys(grids)}
    stages = [Stage("copy", 1, 2.0 * FLOAT * batch * math.prod(grid) * n) for grid, n in classes.items()]
    for i, a in enumerate(classes):
        for b in list(classes)[i:]:
            places = batch * meeting(a, b)
            stages.append(Stage("copy", 2, 2.0 * FLOAT * places * (classes[a] + classes[b])))
            stages.append(product(classes[a], classes[b], places, FLOAT))
            stages.append(Stage("copy", 2, 4.0 * FLOAT * classes[a] * classes[b]))
    return stages


def average_coarse_sums(layers: int) -> list[Stage]:
    """Scale, average, multiply: eight small calls."""
    return [Stage("copy", 8, 20.0 * FLOAT * layers**2)]


def factored_tikhonov_inverse(pairs: Sequence[tuple[int, int]]) -> list[Stage]:
    """Factorise by size, then solve for the identity matrix by matrix: 7/3 n³, some 80 us for each matrix at least."""
    stages = []
    for size in (size for pair in pairs for size in pair):
        stages.append(Stage("copy", 3, 6.0 * FLOAT * size**2))
        stages.append(Stage("cholesky", 2, 0.0, 7 / 3 * size**3, 140_000))
    return stages


def eigendecompose(stacks: Sequence[tuple[int, int]]) -> list[Stage]:
    """Reduce to tridiagonal form, some 25 us for each column, and 9 n³ in all, matrix by matrix."""
    stages = []
    for size in (size for count, size in stacks for _ in range(count)):
        stages.append(Stage("small", 1, 0.0, 0.0, 44_000 * size))
        stages.append(Stage("eigh", 1, 3.0 * FLOAT * size**2, 9.0 * size**3))
    return stages


def precondition(shapes: Sequence[LayerShape], element: int) -> list[Stage]:
    """Multiply by batched products from both sides, one for each shape, stacked already."""
    stages = []
    for (rows, columns), count in by_size(shapes).items():
        stages.append(product(rows, columns, rows, element, count))
        stages.append(product(rows, columns, columns, element, count))
    return stages


def gather_gradients(parts: Sequence[Part]) -> list[Stage]:
    """Copy, and take norms to look for what is not finite."""
    sizes = [rows * columns for rows, columns, _ in parts]
    own = [rows * columns for rows, columns, belongs in parts if belongs]
    return [foreach(own, 2, 2), foreach(sizes, 1, 1), Stage("copy", 4)]


def write_gradients(parts: Sequence[Part]) -> list[Stage]:
    """Add, scale and copy."""
    own = [rows * columns for rows, columns, belongs in parts if belongs]
    return [foreach(own, 1, 2), foreach(own, 1, 2), foreach(own, 2, 2)]


def shift_and_scale(sizes: Sequence[int]) -> list[Stage]:
    """Sum, and multiply as vectors, layer by layer; a dozen small calls after that."""
    return [Stage("reduce", 2 * len(sizes) + 12, 3.0 * FLOAT * sum(sizes))]


def sizes_of(shapes: Sequence[LayerShape]) -> list[int]:
    """Return the numbers of each factor."""
    return [d * d for shape in shapes for d in (shape.d_in, shape.d_out)]


def triangles_of(shapes: Sequence[LayerShape]) -> list[int]:
    """Return the numbers of each factor's triangle."""
    return [d * (d + 1) // 2 for shape in shapes for d in (shape.d_in, shape.d_out)]


def by_stacks(shapes: Sequence[LayerShape], passes: float, launches: int, others: int) -> Count:
    """Describe what torch does to the stacks of factors: reads and writes of each number.

    Args:
        shapes: of the layers.
        passes: how often each number of a whole factor is read or written.
        launches: of each stack.
        others: further launches.
    """
    moved = float(passes * FLOAT * sum(sizes_of(shapes)))
    return Count([Stage("copy", 2 * len(by_size(shapes)) * launches + others, moved)], 0, moved, 0.0)


def runs(sizes: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Split stacks into runs that are worked on together: kfac2/triangles.py, `few_at_a_time`.

    Args:
        sizes: numbers of one block of each stack.
        counts: its blocks.

    Returns:
        For each run the sizes of its blocks.
    """
    most = max(size * count for size, count in zip(sizes, counts, strict=True))
    found: list[list[int]] = [[]]
    for size, count in zip(sizes, counts, strict=True):
        if sum(found[-1]) + size * count > most:
            found.append([])
        found[-1] += [size] * count
    return found


def averages(shapes: Sequence[LayerShape]) -> Count:
    """What kfac2 leaves to torch at a statistics update: copies triangles, scales and mixes them, looks for NaNs."""
    sizes, counts = triangles_of(shapes), list(by_size(shapes).values())
    stages = [foreach(sizes, 1, 1)]
    for side in (0, 1):
        blocks = [pair[side] * (pair[side] + 1) // 2 for pair in by_size(shapes)]
        for run in runs(blocks, counts):
            stages += [foreach(run, 2, 2), foreach(run, 1, 2), foreach(run, 2, 3)]
    return Count(stages, 0, 4.0 * FLOAT * sum(sizes), 3.0 * sum(sizes))


def spread(shapes: Sequence[LayerShape]) -> Count:
    """With `damping="auto"`: differences of triangles (3 of half the numbers), norms (1), diagonals of both."""
    return by_stacks(shapes, 2, 3, 28)


def chunks(shapes: Sequence[LayerShape]) -> tuple[int, int]:
    """Return in how many chunks new inverses are made, and of how many parts of batches: kfac2/inverses.py."""
    sizes = {pair: FLOAT * (pair[0] ** 2 + pair[1] ** 2) for pair in by_size(shapes)}
    held = 3 * sum(sizes[pair] * count for pair, count in by_size(shapes).items()) // 2
    most = max(held // SHARE, LEAST_BYTES) // Tikhonov.copies
    made, parts, used = 1, 0, 0
    for pair, count in by_size(shapes).items():
        for layer in range(count):
            begins = used > 0 and used + sizes[pair] > most
            made, used = made + begins, 0 if begins else used
            parts += begins or layer == 0
            used += sizes[pair]
    return made, parts


def by_chunks(shapes: Sequence[LayerShape], passes: float, launches: int, others: int) -> Count:
    """Describe what torch does to the factors of chunks: so many launches of each part, and others of each chunk."""
    made, parts = chunks(shapes)
    moved = float(passes * FLOAT * sum(sizes_of(shapes)))
    return Count([Stage("copy", 2 * parts * launches + made * others, moved)], 0, moved, 0.0)


def unfolds(shapes: Sequence[LayerShape]) -> Count:
    """Triangles into what is inverted: each quarter read and written, two of them twice, a mask for each chunk."""
    return by_chunks(shapes, 3, 6, 2)


def choice(shapes: Sequence[LayerShape]) -> Count:
    """The last inverse where one failed, or is too large: norms, and torch.where (3); flags of each chunk."""
    return by_chunks(shapes, 4, 2, 19)


def scales(shapes: Sequence[LayerShape]) -> Count:
    """With `relative_damping`: mean diagonals, what is divided by them (2), and the inverse likewise (2)."""
    return by_chunks(shapes, 4, 3, 5)
