"""Every op on a CUDA device against kfac2.reference in float64. No hypothesis: shapes drawn from seeds."""

import random
import sys

import pytest
import torch
from compare import assert_equal
from device import DEVICE, IS_CUDA, anywhere, needs_cuda

from kfac2 import ops, reference
from kfac2.ops import applied_directions, gram_matrices
from kfac2.ops.fold_products import Product, fold_products
from kfac2.triangles import packed
from kfac2.window import Window

pytestmark = anywhere
covariances_module = sys.modules["kfac2.ops.covariances"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def drawn(seed, dtype):
    """A tensor on the CPU with a convolution's geometry."""
    draw = random.Random(seed)
    rank = draw.choice([0, 1, 2, 2, 3])
    kernel, dilation, stride = (tuple(draw.randint(1, most) for _ in range(rank)) for most in (4, 2, 3))
    padding = tuple(draw.randint(0, 2) for _ in range(rank))
    spatial = [d * (k - 1) + draw.randint(1, 9) for d, k in zip(dilation, kernel, strict=True)]
    shape = (draw.choice([1, 3, 17]), draw.choice([1, 3, 8, 16, 33, 64]), *spatial)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if draw.random() < 0.5:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, (kernel, stride, padding, dilation, draw.random() < 0.5)


def to_device(x):
    """Copy with strides kept."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("seed", range(24), ids=lambda seed: f"seed{seed:02}")
def test_maps_and_covariances(seed, dtype, monkeypatch):
    """By the kernels: alone, small layers would go to the library."""
    monkeypatch.setattr(covariances_module, "are_faster", lambda tensors, _: [False] * len(tensors))
    x, geometry = drawn(seed, dtype)
    got = to_device(x)
    scale = reference.patch_sums(x.double().abs(), *geometry)
    difference = ops.patch_sums(got, *geometry).cpu().double() - reference.patch_sums(x.double(), *geometry)
    assert_equal(difference + scale, scale, TOLERANCE[dtype])
    covariance = ops.input_covariance(got, *geometry)
    assert torch.equal(covariance, covariance.T)
    assert_equal(covariance.cpu(), reference.input_covariance(x.double(), *geometry), TOLERANCE[dtype])
    assert_equal(ops.grad_covariance(got).cpu(), reference.grad_covariance(x.double()), TOLERANCE[dtype])


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """Torch's precision of float32 products on the device."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, request.param
    yield request.param
    setting.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, kernel", [((40, 260), ()), ((3, 257, 20), (1,)), ((2, 130, 9, 7), (3, 2))])
def test_derivatives_of_wide_layers_among_others(shape, kernel, dtype, precision):
    x, small = torch.randn(shape).to(dtype), torch.randn(5, 3, 4).to(dtype)
    window, other = Window.of(len(kernel), kernel, padding=len(kernel) // 2, bias=1), Window.of(1, 2)
    inputs, windows, grads, directions = [x, small], [window, other], [], []
    for tensor, own, outputs in ((x, window, 140), (small, other, 6)):
        grads.append(torch.randn(len(tensor), outputs, *own.grid(tensor.shape[2:])).to(dtype))
        directions.append(torch.randn(2, 1, outputs, own.row_length(tensor.shape[1])))
    there = [[to_device(t) for t in inputs], windows, [to_device(t) for t in grads], [to_device(t) for t in directions]]
    routes = [applied_directions.is_faster(*layer) for layer in zip(*there, strict=True)]
    assert routes == [IS_CUDA, False]
    got = ops.directional_derivatives(*there)
    doubles = ([t.double() for t in some] for some in (grads, directions))
    expected = ops.directional_derivatives([t.double() for t in inputs], windows, *doubles)
    is_plain = dtype != torch.bfloat16 and len(kernel) < 2  # of convolutions torch allows TF32 unasked
    is_rounded = precision == "tf32" or not is_plain
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.cpu() - theirs).norm() <= (5e-3 if is_rounded else 1e-4) * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("panel", [64, 512])
@pytest.mark.parametrize("shape, kernel", [((400, 260), ()), ((3, 257, 20), (1,)), ((2, 258, 5, 4), (3, 2))])
def test_covariances_of_wide_rows_among_others(shape, kernel, dtype, precision, panel, monkeypatch):
    """By the library's product: exact in half types and strict float32; of rows rounded alike in TF32."""
    x, small = torch.randn(shape).to(dtype), torch.randn(5, 3, 4).to(dtype)
    window, other = Window.of(len(kernel), kernel, padding=len(kernel) // 2, bias=1), Window.of(1, 2)
    for name in ("PANEL", "PANEL_TENSOR_CORES"):
        monkeypatch.setattr(gram_matrices, name, panel)
    monkeypatch.setattr(covariances_module, "are_faster", lambda tensors, _: [x.shape[1] > 256 for x in tensors])
    got, rest = ops.covariances([to_device(x), to_device(small)], [window, other])
    is_rounded = dtype == torch.float32 and precision == "tf32"
    expected = reference.input_covariance(x.double(), kernel, 1, len(kernel) // 2, 1, True)
    assert_equal(got[0].cpu(), expected, 1e-3 if is_rounded else 1e-5)
    assert_equal(rest[0].cpu(), reference.input_covariance(small.double(), 2), 1e-5)
    layers = ([to_device(x), to_device(small)], [window, other])
    averages = ops.covariances(*layers, previous=[got, rest], kept=0.9, scales=[0.1, 0.2])
    for average, sums, scale in zip(averages, (got, rest), (0.1, 0.2), strict=True):
        assert_equal(average, (0.9 + scale) * sums, 1e-5)
    assert torch.equal(got, got.mT)
    values = torch.linalg.eigvalsh(got[0].cpu().double())
    assert values.min() > (-1e-4 if is_rounded else -1e-5) * values.max()  # sums in float32; tensor cores drop bits


def test_layers_go_to_the_library_of_a_device_or_to_the_kernel_together(precision):
    wide, narrow = torch.randn(8192, 256, device=DEVICE), torch.randn(4096, 64, device=DEVICE)
    window = Window.places(0)

    def goes(*tensors):
        return gram_matrices.are_faster(tensors, [window] * len(tensors))

    assert goes(wide.bfloat16(), narrow.bfloat16()) == [IS_CUDA, IS_CUDA]
    assert goes(*[narrow] * 12) == [False] * 12
    assert goes(wide, *[narrow] * 12) == [IS_CUDA and precision == "tf32"] + [False] * 12
    assert goes(wide.double()) == [False]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64] * 20])
@pytest.mark.parametrize("size, rows", [(1, 1), (32, 32), (33, 8), (257, 64), (640, 80)])
def test_products_are_folded(size, rows, dtypes):
    """Of the upper triangle, in panels; with and without a last row, and what was there before."""
    products, smaller, matrices, before = [], [], [], []
    for i, dtype in enumerate(dtypes[: 40 if size < 100 else 2]):
        M, there = (torch.randn(size + 1, size + 1, dtype=dtype) for _ in range(2))
        M, there = M + M.mT, there + there.mT
        upper = M.triu().to(DEVICE)
        panels = [upper[first : min(first + rows, size), first:size] for first in range(0, size, rows)]
        smaller.append(Product(panels))
        products.append(Product(panels, upper[:size, size], float(M[-1, -1])))
        matrices.append(M)
        before.append(there if i % 2 == 0 else None)
    for got, M in zip(fold_products(smaller), matrices, strict=True):
        assert torch.equal(got.cpu(), packed(M[None, :size, :size]))
    previous = [None if there is None else packed(there[None]).to(DEVICE) for there in before]
    scales = [0.3 + i for i in range(len(products))]
    folded = fold_products(products, previous=previous, kept=0.9, scales=scales)
    for got, M, there, scale in zip(folded, matrices, before, scales, strict=True):
        expected = scale * M + (0 if there is None else 0.9 * there)
        assert_equal(got.cpu(), packed(expected[None]), TOLERANCE[M.dtype] / 10)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("seed", range(12), ids=lambda seed: f"seed{seed:02}")
def test_directional_derivatives(seed, dtype):
    x, geometry = drawn(seed, dtype)
    rows, grid = reference.patches(x.double(), *geometry)
    g = torch.randn(x.shape[0], (1, 5, 70)[seed % 3], *grid).to(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = torch.randn(1 + seed % 2, 1, g.shape[1], rows.shape[2], dtype=sums)
    window = Window.of(x.dim() - 2, *geometry[:4], bias=int(geometry[4]))
    there = ([to_device(x)], [window] * 2, [to_device(g)], [matrices.to(DEVICE)])
    got = ops.directional_derivatives(there[0] * 2, there[1], there[2] * 2, there[3] * 2)
    grad_rows, double = reference.grad_rows(g.double())[0], matrices.double()
    expected = reference.directional_derivatives([[rows]], [[grad_rows]], [double])[0]
    scale = reference.directional_derivatives([[rows.abs()]], [[grad_rows.abs()]], [double.abs()])[0]
    # The library multiplies inputs in bfloat16 by directions in bfloat16, which are known to 1/256: of thousands of
    # products the errors cancel, most of them.
    by_library = applied_directions.is_faster(there[0][0], window, there[2][0], there[3][0])
    tolerance = 1e-4 if by_library and dtype == torch.bfloat16 else TOLERANCE[dtype]
    for ours in got:
        assert_equal(ours.cpu() - expected + scale, scale, tolerance)


@pytest.mark.parametrize(
    "shape, kernel", [((2, 3, 224, 224), 7), ((2, 64, 56, 56), 3), ((1, 2, 20000), 9), ((3, 2, 9, 40, 41), 3)]
)
def test_large_maps_are_tiled(shape, kernel):
    x = torch.randn(shape)
    got, window = (
        ops.patch_sums(to_device(x), kernel, padding=kernel // 2, bias=True),
        (kernel, 1, kernel // 2, 1, True),
    )
    scale = reference.patch_sums(x.double().abs(), *window)
    assert_equal(got.cpu().double() - reference.patch_sums(x.double(), *window) + scale, scale, 1e-5)


@pytest.mark.parametrize("downsample", ["nearest", "area"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 80])
def test_cross_layer_sums_and_coarse_fisher(count, dtype, downsample):
    grids = [((), (5,), (8, 4), (4, 8), (7, 9))[i % 5] for i in range(count)]
    maps = [torch.randn(6, *grid, dtype=torch.float64).to(dtype) for grid in grids]
    rows = [m.double().reshape(6, -1, 1) for m in maps]
    previous = torch.eye(count, dtype=dtype)
    got = ops.cross_layer_sums(
        [m.to(DEVICE) for m in maps], downsample, previous=previous.to(DEVICE), kept=0.5, scale=2.0
    )
    assert torch.equal(got, got.T)
    expected = 0.5 * previous.double() + 2 * reference.cross_layer_sums(rows, grids, downsample)
    assert_equal(got.cpu(), expected, TOLERANCE[dtype])
    layer_of_block = [i // 2 for i in range(count)]
    scales = {f"{kind}_scales": torch.rand(count, dtype=torch.float64) for kind in ("input", "grad")}
    options = {"kept": 0.9, "layer_of_block": layer_of_block, **scales}
    finished = ops.average_coarse_sums(got, got, previous=(got * 2, got * 3), **options)
    there = got.cpu().double()
    wanted = ops.average_coarse_sums(there, there, previous=(there * 2, there * 3), **options)
    for ours, theirs in zip(finished, wanted, strict=True):
        assert torch.equal(ours, ours.T)
        assert_equal(ours.cpu(), theirs, TOLERANCE[dtype])
    products = (there * there).cpu()
    assert_equal(ops.coarse_fisher(got, got).cpu(), products, TOLERANCE[dtype])


def test_lists_of_many_layers_and_groups():
    x = [torch.randn(3, 8, 5, 6, dtype=torch.float64) for _ in range(300)]
    windows = [Window.of(2, 3, padding=1, groups=(1, 2, 4)[i % 3], bias=i % 2) for i in range(300)]
    on_device = [to_device(t) for t in x]
    for op in (ops.layer_maps, ops.covariances):
        for ours, theirs in zip(op(on_device, windows), op(x, windows), strict=True):
            assert_equal(ours.cpu(), theirs)


def test_empty_batch():
    x = torch.zeros(0, 3, 4, 4, device=DEVICE)
    assert ops.patch_sums(x, 3).shape == (0, 2, 2)
    assert not ops.input_covariance(x, 3).any()
    assert not ops.cross_layer_sums([x[:, 0]]).any()


def test_solves_follow_the_cpu():
    rows = [torch.randn(9, d, dtype=torch.float64) for d in (3, 5, 3)]
    A, G = [r.T @ r for r in rows], [r[:, :2].T @ r[:, :2] for r in rows]
    grads = [torch.randn(2, len(a), dtype=torch.float64) for a in A]
    there = [[m.to(DEVICE) for m in matrices] for matrices in (A, G, grads)]
    ours, theirs = ops.factored_tikhonov_inverse(*there[:2], 0.1), ops.factored_tikhonov_inverse(A, G, 0.1)
    exact, expected = ops.eigendecompose(*there[:2]), ops.eigendecompose(A, G)
    results = ops.precondition(there[2], *ours[:2]) + ops.precondition_eigh(there[2], *exact[:4], 0.1)
    references = ops.precondition(grads, *theirs[:2]) + ops.precondition_eigh(grads, *expected[:4], 0.1)
    for result, wanted in zip(results, references, strict=True):
        assert_equal(result.cpu(), wanted)


def test_results_are_the_same_each_time():
    x, window = torch.randn(64, 32, 16, 16, device=DEVICE), Window.of(2, 3, padding=1, bias=1)
    maps, directions = ops.layer_maps([x] * 3, [window] * 3), torch.randn(2, 1, 32, 289, device=DEVICE)
    for op in (
        lambda: ops.covariances([x], [window])[0],
        lambda: ops.cross_layer_sums(maps),
        lambda: ops.channel_sums(x),
        lambda: ops.directional_derivatives([x], [window], [x], [directions])[0],
    ):
        first = op()
        assert all(torch.equal(first, op()) for _ in range(5))


@needs_cuda
def test_on_another_stream():
    x = torch.randn(32, 16, 32, 32, device=DEVICE)
    expected = ops.input_covariance(x, 3), ops.channel_sums(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a launch on the default stream would come before this ends
        y = x * 2
        got = ops.input_covariance(y, 3), ops.channel_sums(y)
    stream.synchronize()
    assert_equal(got[0], 4 * expected[0], 1e-5)
    assert_equal(got[1], 2 * expected[1], 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_second_device():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    got = ops.input_covariance(x.to("cuda:1"), 3)
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_equal(got.cpu(), reference.input_covariance(x, 3))


def test_opcheck_of_coarse_fisher():
    sums, scales = torch.eye(3, device=DEVICE), torch.ones(3).double()
    arguments = (sums, sums + 1, scales, None, sums * 2, sums * 3, 0.9, [0, 1, 1], 2)
    torch.library.opcheck(torch.ops.kfac2.coarse_fisher.default, arguments)


@pytest.mark.parametrize("name", ["layer_maps", "covariances"])
def test_opcheck(name):
    tensors = [torch.randn(3, 2, 5, 4, device=DEVICE), torch.randn(2, 6, 7, device=DEVICE)]
    numbers = Window.of(2, 3, padding=1, bias=1).encode() + Window.places(1, groups=2).encode()
    more = ([tensors[0].new_ones(1, 10, 19), tensors[0][:0]], 0.9, [0.1, 2.0]) if name == "covariances" else ()
    torch.library.opcheck(getattr(torch.ops.kfac2, name).default, (tensors, numbers, *more))
