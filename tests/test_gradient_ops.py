"""The native calls of every step, against torch: where gradients go, what is computed, what is written back."""

import math

import pytest
import torch
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from kfac2 import reference
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.shift_and_scale import ShiftAndScale, shift_and_scale
from kfac2.ops.write_gradients import write_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SKIPPED = torch.zeros(2, dtype=torch.int64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def weights(dtype):
    """One weight in several layouts: plain, channels last, transposed, every second number, without columns."""
    plain = torch.randn(4, 6, 3, 2).to(dtype)
    last = plain.to(memory_format=torch.channels_last)
    transposed = torch.randn(3, 5).to(dtype).T
    return [plain, last, transposed, torch.randn(4, 12).to(dtype)[:, ::2], torch.randn(7).to(dtype)]


@pytest.mark.parametrize("total", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype, total):
    gradients = weights(dtype)
    rows, begin = [], 0
    for i, gradient in enumerate(gradients):
        length = gradient.numel() // gradient.shape[0] + 1  # with a column for a bias that is not there
        rows.append((begin, length, i, i))
        begin += gradient.shape[0] * length
    layout, layers = torch.tensor(rows), len(rows)
    matrices = torch.full((begin,), -7.0, dtype=total)
    assert int(gather_gradients(gradients, layout, layers, 9, matrices)) == 9
    for (place, length, *_), gradient in zip(rows, gradients, strict=True):
        part = matrices[place : place + gradient.shape[0] * length].view(-1, length)
        assert torch.equal(
            part[:, :-1], gradient.flatten(1).to(total) if gradient.dim() > 1 else gradient[:, None].to(total)
        )
        assert (part[:, -1] == -7).all()
    usable = torch.ones(layers, dtype=torch.float64)
    usable[2] = 0
    before = [gradient.clone() for gradient in gradients]
    halves = torch.full((layers,), 0.5, dtype=torch.float64)
    halves[2] = 1
    step = ShiftAndScale(torch.arange(layers).double(), numbers(0.5, 0), torch.zeros(1), halves, halves)
    write_gradients(gradients, layout, matrices, step, usable)
    for i, (gradient, old) in enumerate(zip(gradients, before, strict=True)):
        wanted = old if i == 2 else (0.5 * (old.to(total) + i)).to(dtype)
        assert_equal(gradient.double(), wanted.double(), 1e-2 if dtype.itemsize == 2 else 1e-6)
    halves[2] = 0.25
    write_gradients(
        gradients, layout, matrices, step, usable
    )  # without an inverse the gradient is scaled where it lies
    assert_equal(gradients[2].double(), before[2].double() / 4, 1e-2 if dtype.itemsize == 2 else 1e-6)
    write_gradients(gradients, layout, matrices, step._replace(found=torch.ones(1)), usable)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_bad_gradient_is_found_wherever_it_lies(dtype, value):
    for bad in range(5):
        gradients = weights(dtype)
        for later in range(bad, 5):
            gradients[later][-1].reshape(-1)[-1:].fill_(value)
            gradients[later].select(0, -1).fill_(value)
        layout = torch.full((5, 4), -1)
        layout[:, 3] = torch.arange(5) + 2
        assert int(gather_gradients(gradients, layout, 0, 9, torch.zeros(0))) == bad + 2
    assert int(gather_gradients([], torch.zeros(0, 4, dtype=torch.int64), 0, 3, torch.zeros(0))) == 3


def test_many_elements_are_shared_among_threads():
    torch.set_num_threads(2)
    gradients = [torch.randn(300, 300) for _ in range(4)] + [torch.randn(100, 1000)]
    places = torch.tensor([0, *[g.numel() for g in gradients]]).cumsum(0)
    layout = torch.stack(
        [places[:-1], torch.tensor([g.shape[1] for g in gradients]), torch.arange(5), torch.arange(5)], 1
    )
    matrices = torch.zeros(int(places[-1]))
    assert int(gather_gradients(gradients, layout, 5, 5, matrices)) == 5
    assert torch.equal(matrices, torch.cat([g.flatten() for g in gradients]))
    gradients[3][0, 0] = float("inf")
    assert int(gather_gradients(gradients, layout, 5, 5, matrices)) == 3
    torch.set_num_threads(1)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e9])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_and_scale(dtype, coarse, clip):
    sizes = [3, 5000, 1, 40]
    ends = torch.tensor(sizes).cumsum(0)
    spans = torch.stack([ends - torch.tensor(sizes), ends, torch.tensor(sizes)], 1)
    gradients, directions = torch.randn(2, int(ends[-1]), dtype=torch.float64).to(dtype)
    rates, in_coarse, usable = numbers(0.1, 0.2, 0.0, 0.3), numbers(1, 1, 0, 1), numbers(1, 0, 1, 1)
    inverse = torch.randn(4, 4, dtype=torch.float64)
    none_bad, skipped = torch.tensor([9], dtype=torch.int32), SKIPPED.clone()
    arguments = (spans, rates, None, in_coarse, usable, inverse if coarse else None, none_bad, 9, 0.5, clip, skipped)
    shifts, scale, found, factors, norms = shift_and_scale(gradients, directions, *arguments)
    y = torch.stack([part.double().sum() for part in gradients.split(sizes)]) * in_coarse * usable
    c = 0.5 * (inverse @ y) * in_coarse * usable if coarse else torch.zeros(4, dtype=torch.float64)
    dots = [
        ((v.double() + shift) * g.double()).sum().abs()
        for v, g, shift in zip(directions.split(sizes), gradients.split(sizes), c, strict=True)
    ]
    total = (rates**2 * torch.stack(dots) * usable).sum()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert_equal(shifts, c, tolerance)
    assert_equal(scale[1], total, tolerance)
    nu = 1.0 if clip is None else min(1.0, math.sqrt(clip / total))
    assert_equal(scale[0], torch.tensor(nu, dtype=torch.float64), tolerance)
    assert found.item() == 0 and not skipped.any() and norms.shape == (0,)
    assert torch.equal(factors, torch.where(usable > 0, scale[0], 1.0))
    halved = shift_and_scale(gradients, directions, spans, rates, numbers(0.5, 0.5, 0.5, 0.5), *arguments[3:])
    assert_equal(halved.scale[1], total / 4, tolerance)


@st.composite
def drawn_steps(draw):
    """Layers that are in the coarse space or not, usable or not, with a limit or none, some of several thousand numbers."""
    layers = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = [(draw(st.sampled_from([1, 3, 40])), draw(st.sampled_from([1, 2, 7, 150]))) for _ in range(layers)]
    tensors = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2)]
    tensors[1] = [v + draw(st.sampled_from([0.0, 3.0])) for v in tensors[1]]
    flags = [[draw(st.integers(0, 3)) > 0 for _ in shapes] for _ in range(2)]
    rates = [draw(st.sampled_from([0.0, 0.1, 1.0])) for _ in shapes]
    square = torch.randn(layers, layers, generator=generator, dtype=torch.float64)
    inverse = square @ square.T if draw(st.booleans()) else None
    clip = draw(st.sampled_from([None, 1e-3, 1e9]))
    limits = [draw(st.sampled_from([1e-3, 0.5, 20.0, math.inf])) for _ in shapes] if draw(st.integers(0, 3)) else None
    pads = [draw(st.integers(0, 3)) for _ in shapes]
    return pads, (*tensors, rates, *flags, inverse, 0.7, clip, limits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(drawn_steps())
def test_clip_then_limit_against_the_reference(dtype, step):
    pads, drawn = step
    gradients, directions, rates, in_coarse, usable, inverse, weight, clip, limits = drawn
    wanted, norms, nu = reference.shift_and_scale(*drawn)
    mine = [gradient.to(dtype) for gradient in gradients]
    padded = [torch.nn.functional.pad(v, (0, pad)) for v, pad in zip(directions, pads, strict=True)]
    sizes, ends = torch.tensor([g.numel() for g in mine]), torch.tensor([v.numel() for v in padded]).cumsum(0)
    begins = ends - torch.tensor([v.numel() for v in padded])
    rows = [(int(begin), v.shape[1], i, i) for i, (begin, v) in enumerate(zip(begins, padded, strict=True))]
    matrices, count = torch.zeros(int(ends[-1]), dtype=dtype), len(mine)
    first_bad = gather_gradients(mine, torch.tensor(rows), count, count, matrices)
    flat = torch.cat([v.flatten() for v in padded]).to(dtype)
    flags = numbers(*in_coarse), numbers(*usable)
    step = shift_and_scale(
        matrices, flat, torch.stack([begins, ends, sizes], 1), numbers(*rates), None, *flags, inverse, first_bad, count, weight,
        clip, SKIPPED.clone(), None if limits is None else numbers(*limits),
    )  # fmt: skip
    write_gradients(mine, torch.tensor(rows), flat, step, flags[1])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    assert step.found.item() == 0
    assert_equal(step.scale[0], torch.tensor(nu, dtype=torch.float64), tolerance)
    for ours, theirs in zip(mine, wanted, strict=True):
        assert_equal(ours, theirs, tolerance)
    if limits is None:
        assert step.norms.shape == (0,)
    else:
        assert_equal(step.norms, numbers(*norms), tolerance)
        for gradient, limit in zip(mine, limits, strict=True):
            assert gradient.norm() <= limit * (1 + tolerance)


@pytest.mark.parametrize("shift", [0.0, 5e3])
def test_what_would_overflow_once_written_is_found(shift):
    """A direction is finite in float32; in float16 it is not, unless the clip or the limit shortens it."""
    directions, gradients, spans = (
        torch.tensor([1.0, -7e4, 3.0]),
        torch.tensor([1e-6, 0.0, 0.0]),
        torch.tensor([[0, 3, 3]]),
    )
    none_bad, one, half = torch.tensor([1], dtype=torch.int32), numbers(1), numbers(torch.finfo(torch.float16).max)
    inverse = numbers(shift * 1e6).reshape(1, 1)

    def found(largest, clip=None, limits=None, usable=one, directions=directions):
        skipped = SKIPPED.clone()
        step = shift_and_scale(
            gradients, directions, spans, one, None, one, usable, inverse, none_bad, 1, 1.0, clip, skipped, limits, largest
        )  # fmt: skip
        assert skipped.tolist() == [int(step.found.item()), int(step.found.item())]
        written = torch.zeros(1, 3, dtype=torch.float16)
        if usable.item():
            write_gradients([written], torch.tensor([[0, 3, 0, 0]]), directions, step, usable)
            assert written.isfinite().all() or largest is not half
        return step.found.item()

    assert found(half) == (shift == 0)  # with the shift it is -65,000
    assert found(None) == 0 and found(numbers(math.inf)) == 0
    assert found(half, directions=-directions) == 1 and found(half, directions=directions / 2) == 0
    assert found(half, usable=numbers(0)) == 0
    assert found(half, limits=numbers(6e4)) == 0
    assert found(half, clip=1e-14) == 0  # ν is about 1/10 or less


def test_what_is_not_finite_is_found_and_counted():
    gradients = torch.ones(4)
    spans, one = torch.tensor([[0, 2, 2], [2, 4, 2]]), numbers(1, 1)
    none_bad, first_bad = torch.tensor([[3], [1]], dtype=torch.int32)
    skipped = SKIPPED.clone()

    def found(directions, first=none_bad, usable=one, inverse=None, rates=one, limits=None):
        arguments = (spans, rates, None, one, usable, inverse, first, 3, 1.0, 0.1, skipped, limits)
        return shift_and_scale(gradients, torch.tensor(directions), *arguments).found.item()

    fine = [1.0, 1.0, 1.0, 1.0]
    assert found(fine) == 0 and not skipped.any()
    assert found(fine, first_bad) == 1 and skipped.tolist() == [1, 1]
    assert found([1.0, float("nan"), 1.0, 1.0]) == 1 and skipped.tolist() == [2, 1]
    assert found([1.0, float("nan"), 1.0, 1.0], usable=numbers(0, 1)) == 0  # a layer that takes no part
    assert found([1.0, 1.0, 1.0, float("inf")], rates=numbers(0, 0)) == 1
    assert found(fine, inverse=torch.full((2, 2), 1e300, dtype=torch.float64)) == 1  # not a float32
    assert found([0.0] * 4) == 0  # the sum under the root is 0
    huge = [1e30, 0.0, 0.0, 0.0]  # its squared norm is no float32
    assert (
        found(huge) == 0 and found(huge, limits=numbers(1, 1)) == 1 and found(huge, limits=numbers(torch.inf, 1)) == 0
    )


def test_bad_input_changes_nothing():
    gradient, matrices, layout = torch.randn(2, 3), torch.zeros(6), torch.tensor([[0, 3, 0, 0]])
    step, one = ShiftAndScale(numbers(0), numbers(1, 0), torch.zeros(1), numbers(1), numbers()), numbers(1)
    spans, none_bad = torch.tensor([[0, 6, 6]]), torch.tensor([1], dtype=torch.int32)
    rest = (one, None, one, one, None, none_bad, 1, 1.0, 0.1, SKIPPED)
    cases = [
        (lambda: gather_gradients([gradient], layout[:, :2], 1, 1, matrices), r"layout .* of shape \[1, 4\], got \[1, 2\]"),
        (lambda: gather_gradients([gradient], layout.int(), 1, 1, matrices), "layout to be int64"),
        (lambda: gather_gradients([gradient.int()], layout, 1, 1, matrices), "tensor 0 to be float32"),
        (lambda: gather_gradients([gradient], layout + 1, 9, 9, matrices), "to lie in 6 elements of 9 layers; got offset 1"),
        (lambda: gather_gradients([gradient], layout, 0, 1, matrices), "to lie in 6 elements of 0 layers"),
        (lambda: gather_gradients([gradient], torch.tensor([[0, 2, 0, 0]]), 1, 1, matrices), "got offset 0, row length 2"),
        (lambda: gather_gradients([gradient], layout, 1, 1, matrices.half()), "matrices in one contiguous dimension"),
        (lambda: gather_gradients([gradient, gradient[:, :, None, None, None, None]], layout, 1, 1, matrices), r"\[2, 4\]"),
        (lambda: gather_gradients([gradient[:, :1].expand(2, 3)], layout, 1, 1, matrices), "memory for each of its elements"),
        (lambda: write_gradients([gradient], layout, matrices, step._replace(shifts=numbers()), one), "of 0 layers"),
        (lambda: write_gradients([gradient], layout, matrices, step._replace(shifts=step.shifts.float()), one), "to be float64"),
        (lambda: write_gradients([gradient], layout, matrices, step._replace(found=torch.zeros(2)), one), r"found .*got shape \[2\]"),
        (lambda: write_gradients([gradient], layout, matrices, step, numbers(1, 1)), r"usable of shape \[1\], got \[2\]"),
        (lambda: write_gradients([gradient], layout, matrices, step._replace(factors=numbers()), one), r"factors .*\[1\], got \[0\]"),
        (lambda: shift_and_scale(matrices, matrices[:5], spans, *rest), r"of one size, dtype and device, .*\[6\] and \[5\]"),
        (lambda: shift_and_scale(matrices, matrices, spans + 1, *rest), "the span of layer 0 within 6 elements, .* got 1 to 7 and 7"),
        (lambda: shift_and_scale(matrices, matrices, spans[0, :1], *rest), r"spans to be contiguous, of 3 integer .*\[1\]"),
        (lambda: shift_and_scale(matrices, matrices, spans, *rest[:8], -1.0, SKIPPED), "kl_clip above 0, got -1"),
        (lambda: shift_and_scale(matrices, matrices, spans, *rest, limits=numbers(1, 1)), r"limits .* 1 float64 .*got shape \[2\]"),
        (lambda: shift_and_scale(matrices, matrices, spans, *rest, largest=numbers()), r"largest .* 1 float64 .*the CPU.*\[0\]"),
    ]  # fmt: skip
    before = gradient.clone()
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert torch.equal(gradient, before) and not matrices.any() and not SKIPPED.any()


def test_axes_that_do_not_merge():
    backwards = torch.randn(2, 2, 3, 2, 3, 2).permute(0, 5, 4, 3, 2, 1)
    matrices = torch.zeros(backwards.numel())
    with pytest.raises(RuntimeError, match="at most 4 axes of strides that do not merge"):
        gather_gradients([backwards], torch.tensor([[0, 72, 0, 0]]), 1, 1, matrices)
    fewer = backwards[:, 0]
    gather_gradients([fewer], torch.tensor([[0, 36, 0, 0]]), 1, 1, matrices)
    assert torch.equal(matrices[:72].view(2, -1), fewer.flatten(1))
