"""The statistics ops against kfac2.reference, which forms patches and every A_ij, over drawn shapes."""

import itertools
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compare import assert_equal
from drawn import TOLERANCE, cases, map_sets
from hypothesis import assume, given
from hypothesis import strategies as st

from kfac2 import _C, ops, reference
from kfac2.ops import applied_directions, gram_matrices
from kfac2.ops.fold_products import fold_products
from kfac2.triangles import packed, unpacked
from kfac2.window import Window

covariances_module = sys.modules["kfac2.ops.covariances"]
derivatives_module = sys.modules["kfac2.ops.directional_derivatives"]


@given(cases())
def test_patch_sums(case):
    expected = reference.patch_sums(case.x.double(), *case.geometry)
    got = ops.patch_sums(case.x, *case.geometry)
    assert got.dtype == (torch.float64 if case.x.dtype == torch.float64 else torch.float32)
    # A sum may cancel: the error is measured against the sum of magnitudes.
    scale = reference.patch_sums(case.x.double().abs(), *case.geometry)
    assert_equal(got.double() - expected + scale, scale, TOLERANCE[case.x.dtype])


@given(cases())
def test_input_covariance(case):
    got = ops.input_covariance(case.x, *case.geometry)
    assert got.dtype == (torch.float64 if case.x.dtype == torch.float64 else torch.float32)
    assert_equal(got, reference.input_covariance(case.x.double(), *case.geometry), TOLERANCE[case.x.dtype])
    assert torch.equal(got, got.T)


@given(cases(ranks=(0, 1, 2, 3)), st.sampled_from([1, 300, 2**26]), st.sampled_from([8, 24, 512]))
def test_the_librarys_product_gives_the_same_covariances(case, chunk, panel):
    """The route of wide rows on a CUDA device, taken on the CPU; few samples and few columns at a time as well."""
    window = Window.of(case.x.dim() - 2, *case.geometry[:4], bias=int(case.bias))
    with mock.patch.multiple(gram_matrices, CHUNK=chunk, PANEL=panel, PANEL_TENSOR_CORES=panel):
        product = gram_matrices.row_products(case.x, window)
        assert sum(panel.nbytes for panel in product.panels) == gram_matrices.product_bytes(case.x, window)
    (folded,) = fold_products([product])
    got = unpacked(folded, window.row_length(case.x.shape[1]))
    (native,) = ops.covariances([case.x], [window])
    assert got.dtype == native.dtype and got.shape == native.shape
    assert_equal(got[0], reference.input_covariance(case.x.double(), *case.geometry), TOLERANCE[case.x.dtype])
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("chosen", [(), (1,), (0, 2), (0, 1, 2)])
def test_wide_rows_among_others(monkeypatch, chosen):
    """Each layer goes its own way, and the results keep their order."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, c, 4, 4) for c in (2, 5, 3)]
    windows = [Window.of(2, k, padding=k // 2, bias=1) for k in (1, 3, 2)]
    native = ops.covariances(tensors, windows)
    pointers = {tensors[i].data_ptr() for i in chosen}
    monkeypatch.setattr(
        covariances_module, "are_faster", lambda tensors, _: [x.data_ptr() in pointers for x in tensors]
    )
    for a, b in zip(ops.covariances(tensors, windows), native, strict=True):
        assert_equal(a, b, 1e-5)


@given(cases())
def test_folded_covariances_are_triangles_of_the_whole_ones(case):
    window = Window.of(case.x.dim() - 2, *case.geometry[:4], bias=int(case.bias))
    (whole,), (folded,) = (op([case.x], [window]) for op in (ops.covariances, ops.folded_covariances))
    assert torch.equal(folded, packed(whole))


PRECISION = """
import torch
from unittest.mock import Mock
from kfac2.ops.gram_matrices import are_faster
from kfac2.window import Window

def goes(channels, kernel, dtype=torch.float32, **options):
    x = torch.empty(64, channels, 28, 28, dtype=dtype, device="meta")
    there = Mock(wraps=x, is_cuda=True, dtype=dtype, shape=x.shape)
    return are_faster([there], [Window.of(options.pop("rank", 2), kernel, **options)])[0]

print(goes(512, 1), goes(4096, 1), goes(128, 3), goes(256, 3, torch.bfloat16), end=" ")
refused = [goes(1024, 1, dtype) for dtype in (torch.float64, torch.int64)]
refused += [goes(1024, 1, bias=2), goes(1024, 1, groups=2), goes(1024, 29), goes(1024, 1, rank=1)]
print(any(refused))
"""


@pytest.mark.parametrize("setting, wide", [
    ("", "False True False True False"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "True True False True False"),
    ("torch.set_float32_matmul_precision('high')", "True True False True False"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "True True False True False"),
])  # fmt: skip
def test_which_rows_are_wide_by_every_name_of_the_precision(setting, wide):
    """In a process of its own: torch refuses the older name once the newer was used."""
    script = PRECISION.replace("import torch\n", f"import torch\n{setting}\n", 1)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == wide, done.stderr


def ways(shape, kernel, count, precision):
    """How many of so many layers alike go to the library."""
    step = 2 if kernel == (7, 7) else 1
    window = Window.of(len(kernel), kernel, step, [k // 2 for k in kernel])
    layer = gram_matrices.costs(shape, window, precision, not kernel)
    return sum(gram_matrices.products_are_faster([layer] * count))


@pytest.mark.parametrize("shape, kernel, count, by", [
    ((8192, 64), (), 1, "fp32 tf32 half"),  # two launches in place of five
    ((8192, 64), (), 12, ""),  # these are shared by all layers
    ((8192, 128), (), 12, "tf32 half"),
    ((8192, 256), (), 12, "tf32 half"),
    ((8192, 768), (), 1, "fp32 tf32 half"),
    ((8192, 3072), (), 12, "fp32 tf32 half"),
    ((64, 128, 28, 28), (1, 1), 1, "half"),
    ((64, 256, 14, 14), (3, 3), 12, "half"),
    ((64, 512, 28, 28), (1, 1), 12, "tf32 half"),
    ((64, 1024, 14, 14), (1, 1), 12, "fp32 tf32 half"),
    ((256, 3, 224, 224), (7, 7), 1, "fp32 tf32 half"),  # of 16 channels that the kernel multiplies, 13 are empty
    ((128, 16, 32, 32), (3, 3), 1, ""),
])  # fmt: skip
def test_which_way_is_faster_by_what_was_measured(shape, kernel, count, by):
    taken = {name: ways(shape, kernel, count, name) for name in gram_matrices.MULTIPLY}
    assert set(taken.values()) <= {0, count}
    assert " ".join(name for name, layers in taken.items() if layers) == by


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.one_of(st.integers(1, 60), st.just(float("inf")))), min_size=1, max_size=7
    )
)
def test_no_other_choice_makes_a_call_shorter(layers):
    """Against all 2ⁿ choices, in microseconds."""

    def whole(chosen):
        costs = [1e6 * (library if goes else native) for (native, library), goes in zip(layers, chosen, strict=True)]
        return sum(costs) + gram_matrices.FOLD * any(chosen) + gram_matrices.NATIVE_CALL * (not all(chosen))

    costs = [gram_matrices.Costs(1e6 * native, 1e6 * library) for native, library in layers]
    best = min(map(whole, itertools.product([False, True], repeat=len(layers))))
    assert whole(gram_matrices.products_are_faster(costs)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("sizes, runs", [
    ([5], [1]),
    ([4, 5, 3], [3]),
    ([4, 6, 3], [2, 1]),
    ([30, 1, 2], [1, 2]),  # the first waits for none
    ([1, 30, 2], [2, 1]),
    ([1] * 25, [10, 10, 5]),
    ([], []),
])  # fmt: skip
def test_products_wait_for_each_other_up_to_a_bound(monkeypatch, sizes, runs):
    monkeypatch.setattr(gram_matrices, "WAITING_BYTES", 10)
    assert [len(sizes[part]) for part in gram_matrices.folded_together(sizes)] == runs


@pytest.mark.parametrize("waiting, calls", [(2**24, [4]), (2 * 4 * 9, [2, 2]), (1, [1, 1, 1, 1])])
def test_products_are_folded_in_few_calls(monkeypatch, waiting, calls):
    """Among a layer that stays with the native op."""
    folded, made = covariances_module.fold_products, []

    def counted(products, **options):
        made.append(len(products))
        return folded(products, **options)

    monkeypatch.setattr(covariances_module, "fold_products", counted)
    monkeypatch.setattr(covariances_module, "are_faster", lambda tensors, _: [x.shape[1] == 3 for x in tensors])
    monkeypatch.setattr(gram_matrices, "WAITING_BYTES", waiting)
    tensors = [torch.randn(7, 3 if i != 1 else 2) for i in range(5)]
    got = ops.covariances(tensors, [Window.places(0)] * 5)
    assert made == calls
    for ours, x in zip(got, tensors, strict=True):
        assert_equal(ours[0], x.T @ x, 1e-5)


@pytest.mark.parametrize("width", [1, 8, 511, 513, 768, 1024, 3072, 4096, 4608, 10000])
@pytest.mark.parametrize("precision", gram_matrices.MULTIPLY)
def test_panels_are_few_and_begin_at_multiples_of_8(width, precision):
    shapes = gram_matrices.panel_shapes(width, precision)
    height = shapes[0][0]
    assert sum(rows for rows, _ in shapes) == width and 1 <= len(shapes) <= _C.fold_products_max_panels
    assert [columns for _, columns in shapes] == list(range(width, 0, -height))
    assert all(rows == height for rows, _ in shapes[:-1])
    if len(shapes) > 1:
        assert height % 8 == 0
        assert height >= (gram_matrices.PANEL if precision == "fp32" else gram_matrices.PANEL_TENSOR_CORES)
    assert (len(shapes) > 1) == (width >= (1024 if precision == "fp32" else 3072))


def test_a_gram_matrix_of_rows_rounded_to_tf32_is_semi_definite():
    """11 bits of each factor, both rounded alike, sums exact: what a tensor core does."""
    torch.manual_seed(0)
    rows = torch.randn(20, 64)
    bits = rows.view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    with mock.patch.object(gram_matrices, "PANEL", 16):
        product = gram_matrices.row_products(rounded.double(), Window.places(0))
    gram = unpacked(fold_products([product])[0], 64)[0]
    assert (rounded - rows).abs().max() > 1e-4 and len(product.panels) == 4
    assert torch.linalg.eigvalsh(gram).min() > -1e-12 * gram.diagonal().max()


@given(st.lists(cases(), min_size=1, max_size=4), st.data())
def test_covariances_averaged_with_what_was_there(drawn, data):
    """By the native call and by the library's product; with and without something that was there."""
    tensors = [case.x for case in drawn]
    windows = [Window.of(case.x.dim() - 2, *case.geometry[:4], bias=int(case.bias)) for case in drawn]
    raw = ops.covariances(tensors, windows)
    have, wide = (data.draw(st.lists(st.booleans(), min_size=len(raw), max_size=len(raw))) for _ in range(2))
    previous = [torch.randn_like(sums) if there else None for sums, there in zip(raw, have, strict=True)]
    previous = [None if p is None else p + p.mT for p in previous]
    scales = [0.5 + i for i in range(len(raw))]
    pointers = {id(window) for window, by_library in zip(windows, wide, strict=True) if by_library}
    with mock.patch.object(covariances_module, "are_faster", lambda _, windows: [id(w) in pointers for w in windows]):
        got = ops.covariances(tensors, windows, previous=previous, kept=0.9, scales=scales)
    for ours, before, sums, scale in zip(got, previous, raw, scales, strict=True):
        expected = scale * sums.double() + (0 if before is None else 0.9 * before.double())
        magnitude = scale * sums.double().norm() + (0 if before is None else before.double().norm())
        assert (ours - expected).norm() <= (1e-12 if ours.dtype == torch.float64 else 1e-5) * magnitude
        assert ours.dtype == sums.dtype and torch.equal(ours, ours.mT)


@given(cases())
def test_fronts_for_output_gradients(case):
    assert_equal(ops.grad_covariance(case.x), reference.grad_covariance(case.x.double()), TOLERANCE[case.x.dtype])
    scale = reference.channel_sums(case.x.double().abs())
    shifted = ops.channel_sums(case.x).double() - reference.channel_sums(case.x.double()) + scale
    assert_equal(shifted, scale, TOLERANCE[case.x.dtype])


@given(
    st.lists(cases(dtypes=(torch.float64, torch.float32), ranks=(1, 2), batches=(1, 3)), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_lists_and_groups(drawn, groups):
    tensors, windows, parts = [], [], []
    for case in drawn:
        x = torch.cat([case.x * (q + 1) for q in range(groups)], dim=1)
        rank = x.dim() - 2
        window = Window.of(rank, case.kernel_size, case.stride, case.padding, case.dilation, groups, int(case.bias))
        tensors.append(x)
        windows.append(window)
        parts += [(part, case.geometry) for part in x.chunk(groups, dim=1)]
    maps = ops.layer_maps(tensors, windows)
    blocks = [block for layer in ops.covariances(tensors, windows) for block in layer]
    assert len(maps) == len(blocks) == len(parts)
    for map_of_block, block, (part, geometry) in zip(maps, blocks, parts, strict=True):
        tolerance = TOLERANCE[part.dtype]
        scale = reference.patch_sums(part.double().abs(), *geometry)
        assert_equal(map_of_block.double() - reference.patch_sums(part.double(), *geometry) + scale, scale, tolerance)
        assert_equal(block, reference.input_covariance(part.double(), *geometry), tolerance)


@st.composite
def directional_layers(draw):
    """An input with its window, an output gradient, directions, and the rows of both by block."""
    case, groups = draw(cases(batches=(0, 1, 3))), draw(st.integers(1, 2))
    x = torch.cat([case.x * (q + 1) for q in range(groups)], dim=1)
    window = Window.of(x.dim() - 2, *case.geometry[:4], groups, int(case.bias))
    shape = (x.shape[0], groups * draw(st.sampled_from([1, 3, 16, 35])), *window.grid(x.shape[2:]))
    g = torch.randn(shape).to(x.dtype if x.dtype == torch.float64 else draw(st.sampled_from([x.dtype, torch.float32])))
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    d_out, d_in = shape[1] // groups, window.row_length(x.shape[1])
    matrices = torch.randn(draw(st.integers(1, 3)), d_in, groups, d_out, dtype=sums).permute(0, 2, 3, 1)
    rows = [reference.patches(part.double(), *case.geometry)[0] for part in x.chunk(groups, 1)]
    return x, window, g, matrices, rows, [reference.grad_rows(part.double())[0] for part in g.chunk(groups, 1)]


@given(st.lists(directional_layers(), min_size=1, max_size=3))
def test_directional_derivatives(layers):
    inputs, windows, grads, directions, input_rows, grad_rows = zip(*layers, strict=True)
    got = ops.directional_derivatives(inputs, windows, grads, directions)
    matrices = [d.double() for d in directions]
    expected = reference.directional_derivatives(input_rows, grad_rows, matrices)
    # A sum may cancel: the error is measured against the sum of magnitudes.
    magnitudes = ([[rows.abs() for rows in blocks] for blocks in layer] for layer in (input_rows, grad_rows))
    scales = reference.directional_derivatives(*magnitudes, [d.abs() for d in matrices])
    for x, ours, theirs, scale in zip(inputs, got, expected, scales, strict=True):
        assert ours.dtype == torch.float64
        assert_equal(ours - theirs + scale, scale, 1e-12 if x.dtype == torch.float64 else 1e-5)


@given(directional_layers(), st.sampled_from([1, 300, 2**26]))
def test_the_library_gives_the_same_derivatives(layer, chunk):
    """The route of wide layers on a CUDA device, taken on the CPU; few samples at a time as well."""
    x, window, _, directions, input_rows, grad_rows = layer
    assume(window.kernel_size != () or window.groups == 1)  # others stay with the native op
    (native,) = ops.directional_derivatives(*([part] for part in layer[:4]))
    with mock.patch.object(applied_directions, "CHUNK", chunk):
        got = applied_directions.applied_directions(*layer[:4])
    magnitudes = ([[rows.abs() for rows in blocks]] for blocks in (input_rows, grad_rows))
    scale = reference.directional_derivatives(*magnitudes, [directions.double().abs()])[0]
    assert got.dtype == torch.float64 and got.shape == native.shape
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-7}.get(x.dtype, 1e-5)  # products in bfloat16
    assert_equal(got - native + scale, scale, tolerance)


@pytest.mark.parametrize("chosen", [(), (1,), (0, 2), (0, 1, 2)])
def test_wide_layers_among_others(monkeypatch, chosen):
    torch.manual_seed(0)
    inputs = [torch.randn(3, c, 4, 4) for c in (2, 5, 3)]
    windows = [Window.of(2, k, padding=k // 2, bias=1) for k in (1, 3, 2)]
    grads = [torch.randn(3, 2, *window.grid((4, 4))) for window in windows]
    directions = [
        torch.randn(2, 1, 2, window.row_length(x.shape[1])) for x, window in zip(inputs, windows, strict=True)
    ]
    native = ops.directional_derivatives(inputs, windows, grads, directions)
    pointers = {inputs[i].data_ptr() for i in chosen}
    monkeypatch.setattr(derivatives_module, "is_faster", lambda x, *rest: x.data_ptr() in pointers)
    for ours, theirs in zip(ops.directional_derivatives(inputs, windows, grads, directions), native, strict=True):
        assert_equal(ours, theirs, 1e-5)


def test_layers_that_do_not_fit_are_left_to_the_op_that_says_why():
    """As on a CUDA device, of which tensors only say that they are there."""
    x, g, directions = torch.randn(3, 128, 4), torch.randn(3, 128, 4), torch.randn(2, 1, 128, 129)
    window = Window.places(1, bias=1)

    def goes(x=x, window=window, g=g, directions=directions):
        there = SimpleNamespace(is_cuda=True, dtype=x.dtype, shape=x.shape)
        return applied_directions.is_faster(there, window, g, directions)

    assert goes() and goes(x=x.bfloat16(), g=g.half())
    assert not applied_directions.is_faster(x, window, g, directions)
    for other in (
        {"g": g[:2]},
        {"g": g[:, :2]},
        {"g": g[..., :3]},
        {"g": g.double()},
        {"g": g.long()},
        {"x": x.double()},
        {"directions": directions[..., :128]},
        {"directions": directions[0]},
        {"directions": directions[:0]},
        {"directions": directions.double()},
        {"directions": directions[:, :, :63], "g": g[:, :63]},
        {"window": Window.places(1, bias=2)},
        {"window": Window.of(1, 3)},
    ):
        assert not goes(**other), other
    two = torch.randn(2, 2, 64, 64)
    assert not goes(x=x[..., 0], window=Window.places(0, groups=2), g=g[..., 0], directions=two)
    assert goes(window=Window.places(1, groups=2), directions=two)


def test_patch_order_is_that_of_unfold():
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    rows = F.unfold(x, (3, 2), padding=1).transpose(1, 2).flatten(0, 1)
    assert_equal(ops.input_covariance(x, (3, 2), padding=1), rows.T @ rows)


@given(map_sets(), st.sampled_from(["nearest", "area"]))
def test_cross_layer_sums(drawn, downsample):
    rows, grids = drawn
    maps = [r.sum(2).reshape(r.shape[0], *grid) for r, grid in zip(rows, grids, strict=True)]
    sums = ops.cross_layer_sums(maps, downsample)
    assert_equal(sums, reference.cross_layer_sums(rows, grids, downsample), 1e-9)
    assert torch.equal(sums, sums.T)


@pytest.mark.parametrize("smaller, larger", [(22, 26), (7, 9), (8, 32), (1, 5), (5, 5)])
def test_nearest_takes_the_integer_index(smaller, larger):
    small, large = torch.randn(4, smaller, dtype=torch.float64), torch.randn(4, larger, dtype=torch.float64)
    index = [(t * larger) // smaller for t in range(smaller)]
    assert_equal(ops.cross_layer_sums([small, large])[0, 1], (small * large[:, index]).sum())


def test_area_is_adaptive_average_pooling():
    a = torch.randn(3, 8, 5, dtype=torch.float64)
    b = torch.randn(3, 3, 9, dtype=torch.float64)
    expected = (F.adaptive_avg_pool2d(a, (3, 5)) * F.adaptive_avg_pool2d(b, (3, 5))).sum()
    assert_equal(ops.cross_layer_sums([a, b], "area")[0, 1], expected)


def test_grids_meet_axis_by_axis():
    a, b = torch.randn(2, 8, 4, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    assert_equal(ops.cross_layer_sums([a, b])[0, 1], (a[:, ::2] * b[:, :, ::2]).sum())


@pytest.mark.parametrize("count, batch", [(112, 16), (3, 700)])
def test_cross_layer_sums_of_many_maps_and_samples(count, batch):
    maps = [torch.randn(batch, *((16, 16), (8, 8), (4,), ())[i % 4], dtype=torch.float64) for i in range(count)]
    rows = [m.reshape(batch, -1, 1) for m in maps]
    sums = ops.cross_layer_sums(maps)
    assert_equal(sums, reference.cross_layer_sums(rows, [m.shape[1:] for m in maps]))


def test_half_maps_give_float32_sums():
    maps = [torch.randn(5, 4).to(torch.bfloat16), torch.randn(5, 2).to(torch.bfloat16)]
    sums = ops.cross_layer_sums(maps)
    assert sums.dtype == torch.float32
    assert_equal(sums, ops.cross_layer_sums([m.double() for m in maps]), 1e-6)


@given(st.integers(1, 6), st.booleans())
def test_coarse_fisher(blocks, grouped):
    rows = [[torch.randn(2, 5, d, dtype=torch.float64) for d in (2, 3)[: 1 + i % 2]] for i in range(blocks)]
    flat = [torch.cat(r, dim=2) for r in rows]
    layer_of_block = [i // 2 for i in range(blocks)] if grouped else list(range(blocks))
    pairs = [[reference.cross_covariance(a, (5,), b, (5,)) for b in flat] for a in flat]
    sums = torch.stack([torch.stack([p.sum() for p in row]) for row in pairs])
    expected = reference.coarse_fisher(pairs, pairs, layer_of_block)
    assert_equal(ops.coarse_fisher(sums, sums, layer_of_block), expected)
    assert_equal(ops.coarse_fisher(sums, sums, layer_of_block if grouped else None), expected)


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.float64)])
@pytest.mark.parametrize("given", [(), ("input_scales",), ("previous",), ("input_scales", "grad_scales", "previous")])
@pytest.mark.parametrize("layer_of_block", [None, [0, 1, 1, 0, 2, 2, 2]])
def test_average_coarse_sums(layer_of_block, given, dtypes):
    raw = [torch.randn(7, 7, dtype=torch.float64) for _ in range(4)]
    raw = [(m + m.T).to(dtypes[i // 2]) for i, m in enumerate(raw)]
    scales = [torch.rand(7, dtype=torch.float64) if name in given else None for name in ("input_scales", "grad_scales")]
    previous = tuple(raw[2:]) if "previous" in given else None
    got = ops.average_coarse_sums(
        *raw[:2],
        input_scales=scales[0],
        grad_scales=scales[1],
        previous=previous,
        kept=0.9,
        layer_of_block=layer_of_block,
    )
    expected = [
        reference.average_coarse_sums(raw[i].double(), scales[i], previous and previous[i].double(), 0.9)
        for i in range(2)
    ]
    ones = [[[entry.reshape(1, 1) for entry in row] for row in sums] for sums in expected]
    expected.append(reference.coarse_fisher(*ones, layer_of_block or list(range(7))))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == (dtypes[1] if previous else dtypes[0])
        assert torch.equal(ours, ours.T)
        assert_equal(ours.double(), theirs, 1e-12 if dtypes[0] == torch.float64 else 1e-6)


def test_splitting_work_among_threads_changes_nothing():
    x, window = torch.randn(64, 32, 16, 16), Window.of(2, 3, padding=1, bias=1)
    directions, results = torch.randn(2, 1, 8, 289), []
    average = {"previous": [torch.ones(1, 289, 289)], "kept": 0.9, "scales": [0.1]}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        maps = ops.layer_maps([x, x], [window, window])
        along = ops.directional_derivatives([x, x], [window] * 2, [x[:, :8]] * 2, [directions] * 2)
        averaged = ops.covariances([x], [window], **average)
        results.append(
            [*ops.covariances([x, x], [window] * 2), *averaged, *maps, *along, ops.cross_layer_sums(maps * 30)]
        )
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_equal(results[0][2][0], 0.9 + 0.1 * results[0][0][0], 1e-5)  # shared among tasks, too
    assert_equal(results[0][0][0], reference.input_covariance(x.double(), 3, 1, 1, 1, True), 1e-5)


def test_a_running_average_in_the_same_call():
    maps = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64)]
    previous = torch.randn(2, 2, dtype=torch.float64)
    previous = previous + previous.T
    got = ops.cross_layer_sums(maps, previous=previous, kept=0.9, scale=0.025)
    assert_equal(got, 0.9 * previous + 0.025 * ops.cross_layer_sums(maps))
