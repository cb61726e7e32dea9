"""The calls that a step of kfac2 makes for a network, each beside torch in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import cases
import roofline_library as library
import roofline_ops as ops
from layer_sets import LayerShape
from roofline_nets import Net, Source, grads_of, inputs_of
from roofline_ops import Count, Stage

from kfac2.coarse.ones import MAP_NUMBERS
from kfac2.divergence import quarter
from kfac2.ops import Window
from kfac2.ops.applied_directions import CROSSOVER as WIDE_LAYER
from kfac2.ops.gram_matrices import costs, products_are_faster

Pairs = Sequence[tuple[int, int]]


class Call(NamedTuple):
    """A call of an op.

    Attributes:
        own: what kfac2 does in strict fp32.
        library: torch in its place, given the bytes of an activation; None: the same.
        own_at: what kfac2 does in fp32, TF32 or bf16, and the precision of its products; None: always the same.
    """

    own: Count
    library: Callable[[int], Sequence[Stage]] | None = None
    own_at: Callable[[str], tuple[Sequence[Stage], str]] | None = None


@dataclass(frozen=True)
class Op:
    """An op of a network.

    Attributes:
        name: as in `cases`, or in words what kfac2 leaves to torch.
        when: in which steps: every, statistics, inverses.
        alone: one call as `cases` makes it.
        calls: those of a step, if they are others.
        paper: whether the paper's method with two levels has it: what `contenders` measures.
        default: whether `KFAC(model)` has it.
    """

    name: str
    when: str
    alone: Call
    calls: Sequence[Call] = ()
    paper: bool = True
    default: bool = True

    @property
    def in_step(self) -> Sequence[Call]:
        """The calls of a step."""
        return self.calls or [self.alone]


def of_samples(sources: Sequence[Source], samples: int) -> list[Source]:
    """Keep so many samples."""
    return [source._replace(batch=samples) for source in sources]


def second_level(net: Net) -> tuple[list[Call], list[Call]]:
    """Return the calls of layer_maps and cross_layer_sums: few samples at a time, one kind after the other."""
    numbers = sum(shape.rows for shape in net.shapes)
    share = max(1, net.batch * MAP_NUMBERS["cuda"] // numbers)
    maps, sums = [], []
    for sources in (inputs_of(net.shapes), grads_of(net.shapes)):
        for begin in range(0, net.batch, share):
            some = of_samples(sources, min(share, net.batch - begin))
            maps.append(maps_of(some))
            sums.append(sums_of([source.grid for source in some], some[0].batch))
    return maps, sums


def maps_of(sources: Sequence[Source]) -> Call:
    return Call(ops.layer_maps(sources), partial(library.layer_maps, sources))


def are_wide(sources: Sequence[Source], precision: str) -> list[bool]:
    """Tell of each layer of a call whether kfac2 gives its rows to the library's product: ops/gram_matrices.py."""
    name = library.BY_PRECISION[precision]
    return products_are_faster([
        costs((rows.batch, rows.channels, *rows.extent), rows.window, name, library.is_last(rows)) for rows in sources
    ])  # fmt: skip


def is_wide_layer(rows: Source, grads: Source) -> bool:
    """Tell whether kfac2 applies a direction of the layer by the library: kfac2/ops/applied_directions.py."""
    return min(rows.length, grads.channels // rows.window.groups) >= WIDE_LAYER


def covariances_of(sources: Sequence[Source]) -> Call:
    """Multiply wide rows by the library, all others in one native call."""

    def own_at(precision: str) -> tuple[Sequence[Stage], str]:
        routes = are_wide(sources, precision)
        wide, others = ([s for s, goes in zip(sources, routes, strict=True) if goes == own] for own in (True, False))
        native = ops.covariances(others).stages if others else []
        return [*native, *library.gram_matrices(wide, precision)], precision

    whole = ops.covariances(sources)
    return Call(replace(whole, stages=own_at("fp32")[0]), partial(library.covariances, sources), own_at)


def sums_of(grids: Sequence[tuple[int, ...]], batch: int) -> Call:
    return Call(ops.cross_layer_sums(grids, batch), lambda _: library.cross_layer_sums(grids, batch))


def derivatives_of(shapes: Sequence[LayerShape], samples: int) -> Call:
    inputs, grads = of_samples(inputs_of(shapes), samples), of_samples(grads_of(shapes), samples)
    pairs = list(zip(inputs, grads, strict=True))
    wide, others = ([pair for pair in pairs if is_wide_layer(*pair) == here] for here in (True, False))
    native = ops.directional_derivatives(*zip(*others, strict=True)).stages if others else []

    def own_at(precision: str) -> tuple[Sequence[Stage], str]:
        own_inputs, own_grads = [rows for rows, _ in wide], [g for _, g in wide]
        applied = library.applied_directions(own_inputs, own_grads, ops.ELEMENT[precision])
        return [*native, *applied], precision

    own = replace(ops.directional_derivatives(inputs, grads), stages=own_at("fp32")[0])
    return Call(own, partial(library.directional_derivatives, inputs, grads), own_at)


def inverses_of(pairs: Pairs) -> Call:
    return Call(ops.factored_tikhonov_inverse(pairs), lambda _: library.factored_tikhonov_inverse(pairs))


def decompositions_of(stacks: Pairs, element: int = ops.FLOAT, limit: int = ops.EIGEN_LARGEST) -> Call:
    """Decompose (count, size): small matrices by the kernel, the others by torch, as kfac2 does."""
    small, large = ([s for s in stacks if (s[1] <= limit) == here] for here in (True, False))
    least = sum(count * (2.0 * size**2 + size) for count, size in stacks) * element
    flop = sum(9.0 * count * size**3 for count, size in stacks)
    own = ops.eigendecompose(small, element) if small else Count([], 0, 0.0, 0.0)
    whole = Count([*own.stages, *library.eigendecompose(large)], own.workspace, least, flop)
    return Call(whole, lambda _: library.eigendecompose(stacks))


def parts_of(net: Net) -> list[ops.Part]:
    """Return the gradients of a step: weights and biases of the layers, then what is not handled."""
    own: list[ops.Part] = []
    for shape in net.shapes:
        bias = int(shape.input_window.bias)
        own += [(shape.d_out, shape.d_in - bias, True), *([(shape.d_out, 1, True)] if bias else [])]
    return own + [(1, number, False) for number in net.others]


def every_step(net: Net) -> list[Op]:
    """Return the ops of an ordinary step."""
    shapes, parts = net.shapes, parts_of(net)
    sizes = [shape.d_in * shape.d_out for shape in shapes]
    by_mm = partial(library.precondition, shapes)
    stacked, plain = ops.precondition(shapes, stacked=True), ops.precondition(shapes)

    def follows(count: Count) -> Callable[[str], tuple[Sequence[Stage], str]]:  # torch's switch for products of fp32
        return lambda precision: (count.stages, "fp32" if precision == "fp32" else "tf32")

    alone = Call(stacked, lambda element: [stacked.stages[0], *by_mm(element)], follows(stacked))
    return [
        Op("gather_gradients", "every", Call(ops.gather_gradients(parts), lambda _: library.gather_gradients(parts))),
        Op("precondition", "every", alone, [Call(plain, by_mm, follows(plain))]),
        Op("shift_and_scale", "every", Call(ops.shift_and_scale(sizes), lambda _: library.shift_and_scale(sizes))),
        Op("write_gradients", "every", Call(ops.write_gradients(parts), lambda _: library.write_gradients(parts))),
    ]  # fmt: skip


def ops_of(net: Net) -> list[Op]:
    """Return the ops of kfac2 for a network."""
    shapes, batch, count = net.shapes, net.batch, len(net.shapes)
    pairs = [(shape.d_in, shape.d_out) for shape in shapes]
    maps, sums = second_level(net)
    both = [*inputs_of(shapes), *grads_of(shapes)]
    average = Call(ops.average_coarse_sums(count), lambda _: library.average_coarse_sums(count))
    few = cases.every(pairs, cases.SAMPLED_LAYERS)
    stacks = [[(1, pair[place]) for place in (0, 1) for pair in some] for some in (few, pairs)]
    return [
        *every_step(net),
        Op("covariances", "statistics", covariances_of(both)),
        Op("averages of factors (torch)", "statistics", Call(library.averages(shapes))),
        Op("spread of factors (torch)", "statistics", Call(library.spread(shapes)), paper=False),
        Op("directional_derivatives", "statistics", derivatives_of(shapes, batch),
           [derivatives_of(shapes, min(batch, quarter(batch)))], paper=False),
        Op("layer_maps", "statistics", maps_of(both), maps, default=False),
        Op("cross_layer_sums", "statistics", sums[0] if len(sums) == 2 else
           sums_of([s.grid for s in inputs_of(shapes)], batch), sums, default=False),
        Op("average_coarse_sums", "statistics", average, default=False),
        Op("factors of triangles (torch)", "inverses", Call(library.unfolds(shapes))),
        Op("factored_tikhonov_inverse", "inverses", inverses_of(pairs)),
        Op("choice of inverses (torch)", "inverses", Call(library.choice(shapes))),
        Op("scales of inverses (torch)", "inverses", Call(library.scales(shapes)), paper=False),
        Op("coarse inverse, float64", "inverses", decompositions_of([(1, count)], ops.DOUBLE, 256), default=False),
        Op("eigendecompose", "inverses", decompositions_of(stacks[0]), [decompositions_of(stacks[1])], False, False),
    ]  # fmt: skip


def single(case: str) -> Call | None:
    """Return the call of a case of `cases.SINGLE`, by its title; None if it is none."""
    numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in case).split()]
    if case.startswith("channel_sums, "):
        batch, channels, *extent = numbers
        return maps_of([Source(batch, channels, tuple(extent), Window.places(2))])
    if case.startswith("input_covariance, "):
        kernel, _, channels, *extent, batch = numbers
        return covariances_of([Source(batch, channels, tuple(extent), Window.of(2, kernel, padding=kernel // 2))])
    return None


# -- what the model costs without K-FAC ---------------------------------------------------------------------------


def passes_of(net: Net, products: int, share: float, element: int) -> list[Stage]:
    """Describe so many products of each layer, with a share of the work between layers."""
    stages = [Stage("mm", 8, 0.0, products * net.other_flop)] if net.other_flop else []
    for shape in net.shapes:
        x, g = math.prod(shape.x), math.prod(shape.g)
        d_in = shape.d_in - int(shape.input_window.bias)
        flop = products * library.product(shape.d_out, d_in, 1, element).flop * shape.rows
        stages.append(Stage("mm", products, float(products * element * (x + g + shape.d_in * shape.d_out)), flop))
        stages.append(Stage("copy", round(8 * share), share * net.passes * g * element))
    return stages


def forward_backward(net: Net, element: int) -> list[Stage]:
    """Describe forward and backward pass: three products of each layer, and some eight kernels between layers."""
    return passes_of(net, 3, 1.0, element)


def sampled_backward(net: Net, element: int) -> list[Stage]:
    """Describe the backward pass of sampled labels, which forms no gradient of a weight."""
    return passes_of(net, 1, 0.6, element)


def adamw(net: Net) -> list[Stage]:
    """AdamW as torch runs it (foreach): nine ops that read or write 21 numbers for each parameter."""
    sizes = [rows * columns for rows, columns, _ in parts_of(net)]
    one = library.foreach(sizes, 3, 21)
    return [one._replace(launches=9 * one.launches)]


def sgd(net: Net, fused: bool = True) -> list[Stage]:
    """SGD with momentum and weight decay: kfac2's own is fused (5 numbers for each parameter), else four ops and 11."""
    sizes = [rows * columns for rows, columns, _ in parts_of(net)]
    one = library.foreach(sizes, 3, 5 if fused else 11)
    return [one if fused else one._replace(launches=4 * one.launches)]
