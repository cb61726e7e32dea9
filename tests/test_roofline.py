"""The model of time: its counts against brute force, against what torch counts, and against the launches themselves."""

import itertools
import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cases
import contenders
import kernels
import pytest
import roofline
import roofline_calls as calls
import roofline_library as library
import roofline_nets as nets
import roofline_ops as ops
import roofline_time as time
import steps
import torch
from layer_sets import LayerSet
from networks import NETWORKS
from roofline_nets import Source, grads_of, inputs_of
from roofline_tiles import meeting
from torch.utils.flop_counter import FlopCounterMode

import kfac2
from kfac2 import inverses
from kfac2.fine.tikhonov import Tikhonov
from kfac2.ops import Window, precondition
from kfac2.ops import applied_directions as applied
from kfac2.ops.gram_matrices import are_faster, folded_together, native_products, product_bytes, row_products
from kfac2.statistics import A_shape, G_shape
from kfac2.triangles import few_at_a_time

ROOT = Path(__file__).parent.parent
SMALL = ["deep-linear", "resnet-8", "transformer"]


def counted(function):
    """What torch counts of a function: multiplications and additions of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# -- networks -----------------------------------------------------------------------------------------------------


def test_networks_have_the_published_numbers():
    resnet_110, resnet_50, gpt2 = nets.published()
    assert [len(net.shapes) for net in (resnet_110, resnet_50, gpt2)] == [112, 54, 48]
    # torchvision's ResNet-50, the GPT-2 of 124 M; ResNet-110 with 1x1 shortcuts (1,727,962 without)
    assert [net.parameters for net in (resnet_110, resnet_50, gpt2)] == [1730714, 25557032, 124439808]
    products = sum(s.rows * s.d_in * s.d_out for s in resnet_50.shapes) / resnet_50.batch
    assert products == pytest.approx(4.09e9, rel=2e-3)  # "4.1 GFLOPs"
    assert sorted({s.d_in for s in gpt2.shapes}) == [769, 3073] and max(s.d_in for s in resnet_50.shapes) == 4608
    assert resnet_110.title == LayerSet("resnet-110", 128).title


@pytest.mark.parametrize("name", [*SMALL, "resnet-110"])
def test_known_networks_have_all_parameters(name):
    with torch.device("meta"):
        model = NETWORKS[name].make()
    assert nets.known(name, 2).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["deep-linear", "resnet-20"])
def test_a_forward_and_backward_pass_has_three_products(name):
    with torch.device("meta"):
        model = NETWORKS[name].make()
    x = NETWORKS[name].sample(4, "meta")[0]
    net = nets.known(name, 4)
    forward = sum(2 * s.rows * s.d_in * s.d_out for s in net.shapes if not s.input_window.bias)
    forward += sum(2 * s.rows * (s.d_in - 1) * s.d_out for s in net.shapes if s.input_window.bias)
    first = net.shapes[0]
    assert counted(lambda: model(x)) == forward
    # the data's own gradient is not formed
    assert counted(lambda: model(x).sum().backward()) == 3 * forward - 2 * first.rows * first.d_in * first.d_out
    modelled = sum(stage.flop for stage in calls.forward_backward(net, 4))
    assert modelled >= 3 * forward


def test_shapes_written_down_are_those_of_modules():
    with torch.device("meta"):
        for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2), (7, 2)):
            shape = nets.convolution(2, 28, 5, 6, kernel, stride)
            layer = torch.nn.Conv2d(5, 6, kernel, stride, kernel // 2, bias=False)
            assert layer(torch.empty(shape.x)).shape == shape.g
            assert layer.weight.numel() == shape.d_in * shape.d_out
        shape = nets.linear((2, 7), 5, 6)
        layer = torch.nn.Linear(5, 6)
        assert layer(torch.empty(shape.x)).shape == shape.g and shape.rows == 14
        assert shape.d_in * shape.d_out == sum(p.numel() for p in layer.parameters())


# -- bytes and operations -------------------------------------------------------------------------------------------


def drawn_source(draw):
    extent = draw.randint(3, 9), draw.randint(3, 9)
    kernel = draw.randint(1, 3), draw.randint(1, 3)
    window = Window.of(2, kernel, draw.randint(1, 3), draw.randint(0, 2), bias=draw.randint(0, 1))
    return Source(draw.randint(1, 3), draw.randint(1, 40), extent, window)


def distinct_products(rows):
    """Pairs of positions whose numbers meet in some row, each once, without the mirrored ones."""
    window, met = rows.window, set()
    offsets = list(itertools.product(*map(range, window.kernel_size)))
    for place in itertools.product(*map(range, rows.grid)):
        for first, second in itertools.product(offsets, offsets):
            if second < first:
                continue
            pair = [
                tuple(
                    t * s + o - low for t, s, o, (low, _) in zip(place, window.stride, at, window.padding, strict=True)
                )
                for at in (first, second)
            ]
            if all(0 <= u < e for at in pair for u, e in zip(at, rows.extent, strict=True)):
                met.add(tuple(pair))
    return met


@pytest.mark.parametrize("seed", range(12))
def test_pieces_hold_each_product_once(seed):
    rows = drawn_source(random.Random(seed))
    count = ops.covariances([rows])
    met = distinct_products(rows)
    assert sum(piece.positions for piece in ops.pieces(rows)) == len(met)
    channels = rows.channels  # whose pairs are met twice where a place meets itself
    products = sum(channels * (channels + 1) // 2 if a == b else channels**2 for a, b in met)
    assert count.least_flop == 2 * rows.batch * products
    assert sum(stage.flop for stage in count.stages) >= count.least_flop
    x = torch.empty(rows.batch, rows.channels, *rows.extent)
    d = cases.form_rows(x, rows.window).shape[1]
    assert rows.length == d and count.least_bytes == 4 * (x.numel() + d * (d + 1) // 2)


@pytest.mark.parametrize("name", SMALL)
def test_products_are_those_that_torch_counts(name):
    layers = LayerSet(name, 2)
    net = nets.known(name, 2)
    own = ops.precondition(net.shapes)
    grads, factors = layers.grad_matrices, layers.factors
    assert own.least_flop == counted(lambda: precondition(grads, *factors))
    sources = [*inputs_of(net.shapes), *grads_of(net.shapes)]
    rows = sum(2 * s.rows * s.length**2 for s in sources)
    by_torch = counted(
        lambda: [cases.covariance_by_torch(x, w) for x, w in zip(layers.tensors, layers.windows, strict=True)]
    )
    assert by_torch == rows
    padded = sum(2 * s.rows * (math.ceil(s.length / 64) * 64) ** 2 for s in sources)
    assert sum(stage.flop for stage in library.covariances(sources, 4)) == padded
    assert sum(s.numbers for s in sources) == sum(x.numel() for x in layers.tensors)
    assert ops.layer_maps(sources).least_bytes == 4 * sum(
        x.numel() + m.numel()
        for x, m in zip(layers.tensors, map(cases.map_by_torch, layers.tensors, layers.windows), strict=True)
    )


def test_directions_are_those_that_torch_counts():
    shapes = nets.known("resnet-8", 2).shapes[:-1]  # without a bias, which is no product to torch
    layers = LayerSet("resnet-8", 2)
    own = calls.derivatives_of(shapes, 2).own
    directions = [matrix[None, None] for matrix in layers.grad_matrices]
    entries = list(zip(layers.tensors, layers.windows, layers.tensors[len(layers.shapes) :], directions, strict=False))
    assert own.least_flop == counted(lambda: [cases.along_by_torch(*entry) for entry in entries[: len(shapes)]])


def test_pairs_of_maps_meet_on_the_coarser_grid():
    grids = [(8, 8), (8, 8), (4, 4), (), (6,)]
    maps = [torch.ones(3, *grid) for grid in grids]
    met = cases.cross_by_torch([m for m in maps if m.dim() == 3])  # ones: an entry counts its products
    own = ops.cross_layer_sums(grids[:3], 3)
    assert own.least_flop == 2 * met.triu().sum()
    assert meeting((8, 8), (4, 16)) == 32 and meeting((6,), (8, 8)) == 1 and meeting((), ()) == 1
    assert own.least_bytes == 4 * (sum(m.numel() for m in maps[:3]) + 9)


def test_sweeps_do_about_n_cubed_operations():
    for size in (64, 100, 640):
        count = ops.factored_tikhonov_inverse([(size, size)])
        updates = 0  # tile by tile, as update_kernel has them
        blocks = math.ceil(size / 64)
        for _, i, j in itertools.product(range(blocks), repeat=3):
            updates += 2 * 64**3 if i <= j else 0
        by_name = {stage.kernel: stage for stage in count.stages}
        assert by_name["update"].flop == 2 * updates and count.least_flop == 2 * size**3
        assert by_name["update"].launches == by_name["eliminate"].launches == blocks
    assert by_name["update"].flop == pytest.approx(2 * 640**3, rel=0.11)


def test_a_round_of_jacobi_rotates_each_element_twice():
    size, rotation = 32, 8  # operations of a rotation of two numbers
    pairs = size // 2
    a_round = rotation * (4 * pairs * (pairs - 1) // 2 + pairs * size)
    assert ops.eigendecompose([(1, size)]).least_flop == pytest.approx(ops.SWEEPS * (size - 1) * a_round, rel=0.05)


def test_gradients_are_moved_once():
    net = nets.gpt2_small()
    parts = calls.parts_of(net)
    assert sum(rows * columns for rows, columns, _ in parts) == net.parameters
    assert ops.write_gradients(parts).least_bytes == 2 * 4 * net.weights
    assert ops.gather_gradients(parts).least_bytes == 4 * (net.parameters + net.weights)


@pytest.mark.parametrize("name", ["resnet-20", "resnet-110", "transformer"])
def test_stacks_are_put_together_and_cut_as_kfac2_does(name):
    layout = kfac2.Curvature(NETWORKS[name].make()).layout
    shapes = nets.known(name, 2).shapes
    found = list(inverses.chunks(layout, Tikhonov(), None))
    assert library.chunks(shapes) == (len(found), sum(map(len, found)))
    for side, shape_of in enumerate((G_shape, A_shape)):
        stacks = layout.stacks(shape_of)
        sizes = [pair[side] * (pair[side] + 1) // 2 for pair in ops.by_size(shapes)]
        expected = [sum(map(torch.numel, stacks[part])) for part in few_at_a_time(stacks)]
        assert [sum(run) for run in library.runs(sizes, list(ops.by_size(shapes).values()))] == expected


def test_foreach_cuts_lists_as_torch_does():
    assert library.foreach([1] * 110, 1, 1).launches == 1 and library.foreach([1] * 111, 1, 1).launches == 2
    assert library.foreach([65536 * 320], 3, 1).launches == 1 and library.foreach([65536 * 320 + 1], 3, 1).launches == 2
    assert library.foreach([7, 5], 2, 3).bytes == 3 * 4 * 12


# -- launches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches_of(tmp_path_factory):
    """Count launches and bytes of workspace of calls written as text, by the kernels' own host code."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("launches") / "count_launches"
    emulation, kernel_files = ROOT / "tests/emulation", sorted((ROOT / "csrc/kernels").glob("*.cu"))
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-DKFAC2_EMULATE", "-w", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/kernels",
         f"-I{emulation}", "-o", program, emulation / "count_launches.cpp", emulation / "cuda_emulation.cpp",
         "-xc++", *kernel_files], check=True,
    )  # fmt: skip

    def run(texts):
        done = subprocess.run([program], input="\n".join(texts), text=True, capture_output=True, check=True)
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return run


def as_text(rows):
    missing = 3 - len(rows.extent)
    axes = [(1,) * missing + rows.extent]
    axes += [(1,) * missing + values for values in (rows.window.kernel_size, rows.window.stride)]
    axes.append((0,) * missing + tuple(low for low, _ in rows.window.padding))
    numbers = [rows.batch, rows.channels, *itertools.chain(*axes), rows.window.bias]
    return " ".join(map(str, numbers))


def texts_of(op, entries, *first):
    return " ".join(map(str, [op, len(entries), *first, *itertools.chain(*entries)]))


def counts_of(net):
    """Each op of a network as text for the driver, and as the model counts it."""
    inputs, grads = inputs_of(net.shapes), grads_of(net.shapes)
    both, pairs = [*inputs, *grads], [(s.d_in, s.d_out) for s in net.shapes]
    parts, sizes = calls.parts_of(net), [s.d_in * s.d_out for s in net.shapes]
    grids = [s.grid for s in inputs]
    small = [(2, size) for pair in pairs for size in pair if size <= 256]
    layers = [(as_text(x), as_text(g)) for x, g in zip(inputs, grads, strict=True)]
    decomposed = {"eigendecompose": ops.FLOAT, "eigendecompose_double": ops.DOUBLE} if small else {}
    return {
        **{texts_of(name, small): ops.eigendecompose(small, element) for name, element in decomposed.items()},
        texts_of("layer_maps", [(as_text(s),) for s in both]): ops.layer_maps(both),
        texts_of("covariances", [(as_text(s),) for s in both]): ops.covariances(both),
        texts_of("directional_derivatives", layers): ops.directional_derivatives(inputs, grads),
        texts_of("cross_layer_sums", [(len(g), *g) for g in grids], net.batch): ops.cross_layer_sums(grids, net.batch),
        texts_of("fold_products", [(s.d_in,) for s in net.shapes]): ops.fold_products([s.d_in for s in net.shapes]),
        f"average_coarse_sums {len(sizes)}": ops.average_coarse_sums(len(sizes)),
        texts_of("factored_tikhonov_inverse", pairs): ops.factored_tikhonov_inverse(pairs),
        texts_of("gather_gradients", [part[:2] for part in parts]): ops.gather_gradients(parts),
        texts_of("write_gradients", [part[:2] for part in parts]): ops.write_gradients(parts),
        texts_of("shift_and_scale", [(size,) for size in sizes]): ops.shift_and_scale(sizes),
    }  # fmt: skip


def held_against_the_kernels(launches_of, expected):
    for text, count, found in zip(expected, expected.values(), launches_of(expected), strict=True):
        assert found == (count.launches, count.workspace), text[:200]


@pytest.mark.parametrize("number", range(3))
def test_launches_and_workspaces_of_the_published_networks(launches_of, number):
    held_against_the_kernels(launches_of, counts_of(nets.published()[number]))


@pytest.mark.parametrize("name", SMALL)
def test_launches_and_workspaces_of_small_networks(launches_of, name):
    held_against_the_kernels(launches_of, counts_of(nets.known(name, 128)))


def test_launches_and_workspaces_of_drawn_shapes(launches_of):
    draw = random.Random(0)
    expected = {}
    for _ in range(60):
        sources = [drawn_source(draw)._replace(batch=draw.choice([1, 700])) for _ in range(draw.randint(1, 9))]
        text = [(as_text(s),) for s in sources]
        expected[texts_of("covariances", text)] = ops.covariances(sources)
        expected[texts_of("layer_maps", text)] = ops.layer_maps(sources)
        grids = [(draw.randint(1, 9),) * draw.randint(0, 3) for _ in range(draw.randint(1, 99))]
        batch = draw.randint(1, 2000)
        expected[texts_of("cross_layer_sums", [(len(g), *g) for g in grids], batch)] = ops.cross_layer_sums(
            grids, batch
        )
        pairs = [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(draw.randint(1, 500))]
        expected[texts_of("factored_tikhonov_inverse", pairs)] = ops.factored_tikhonov_inverse(pairs)
        sizes = [a for a, _ in pairs]
        expected[texts_of("fold_products", [(size,) for size in sizes])] = ops.fold_products(sizes)
    held_against_the_kernels(launches_of, expected)


# -- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return roofline.predicted(None)


def test_no_prediction_is_below_its_floor(found):
    for net in found["nets"]:
        h100, h200 = net["ops"].values()
        for rows in (h100, h200):
            for row in rows:
                assert row["kfac2"]["fp32"] > row["floor"] >= 0 and row["launches"] > 0, row["op"]
                assert row["moved"] > 0 and row["in_step"]["fp32"] > 0 and row["measured"] is None
        assert all(b["kfac2"][p] <= a["kfac2"][p] for a, b in zip(h100, h200, strict=True) for p in roofline.PRECISIONS)
        for row in (*net["steps"]["H100 SXM"], *net["steps"]["H200"]):
            assert row["mean"] == pytest.approx(row["every"] + row["statistics"] / 10 + row["inverses"] / 100)
            assert row["over_adamw"] > 0.9


def test_every_kernel_has_shares_that_are_possible():
    assert all(0 < share <= 1 for shares in time.SHARES.values() for share in shares)
    assert all(0 < share <= 1 for share in time.PRODUCT_SHARE.values())


@pytest.fixture
def product_switch():
    before = torch.backends.cuda.matmul.allow_tf32
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = before


def test_wide_rows_go_where_kfac2_sends_them(product_switch):
    went = set()
    shapes = [(8192, 64), (8192, 128), (8192, 256), (64, 96, 30), (64, 256, 30)]
    shapes += [(64, channels, 28, 28) for channels in (3, 64, 128, 256, 1024)]
    for precision, is_half, allowed in (("fp32", False, False), ("tf32", False, True), ("bf16", True, False)):
        product_switch.allow_tf32 = allowed
        for shape, kernel, groups in itertools.product(shapes, (1, 3, 7), (1, 2)):
            window = Window.of(len(shape) - 2, kernel, padding=kernel // 2, groups=groups if shape[1] > 3 else 1)
            dtype = torch.bfloat16 if is_half else torch.float32
            x = torch.empty(shape, dtype=dtype, device="meta")
            if len(shape) == 3:  # tokens, whose features are last
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            there = Mock(wraps=x, is_cuda=True, dtype=dtype, shape=x.shape)
            for count in (1, 12):
                wide = calls.are_wide([Source(shape[0], shape[1], shape[2:], window)] * count, precision)
                went |= {(precision, goes) for goes in wide}
                assert wide == are_faster([there] * count, [window] * count), (precision, shape, kernel, groups)
    assert len(went) == 6


@pytest.mark.parametrize(
    "channels, extent, kernel, stride", [(3, 224, 7, 2), (16, 32, 3, 1), (64, 56, 3, 2), (80, 56, 3, 1), (40, 56, 1, 1)]
)
def test_products_are_those_of_the_kernels_pieces(channels, extent, kernel, stride):
    rows = Source(1, channels, (extent, extent), Window.of(2, kernel, stride, kernel // 2))
    tile, tiles = ops.tiles_of(rows)
    of = {True: tiles * (tiles + 1) / 2 * tile**2, False: (tiles * tile) ** 2}
    expected = sum(piece.positions * of[piece.symmetric] for piece in ops.pieces(rows))
    assert native_products(channels, rows.window) * math.prod(rows.grid) == pytest.approx(expected, rel=0.1)


def test_wide_layers_go_where_kfac2_sends_them():
    for channels, outputs, kernel in itertools.product((7, 8, 63, 64), (63, 64), (1, 3)):
        window = Window.of(2, kernel, padding=kernel // 2)
        rows, grads = Source(2, channels, (9, 9), window), Source(2, outputs, (9, 9), Window.places(2))
        x = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(2, channels, 9, 9))
        g, directions = torch.empty(2, outputs, 9, 9), torch.empty(1, 1, outputs, rows.length)
        assert calls.is_wide_layer(rows, grads) == applied.is_faster(x, window, g, directions), (channels, outputs)


def test_products_of_wide_layers_are_those_that_torch_counts():
    rows, grads = Source(2, 128, (6, 6), Window.of(2, 3, padding=1)), Source(2, 192, (6, 6), Window.places(2))
    x, g, directions = torch.randn(2, 128, 6, 6), torch.randn(2, 192, 6, 6), torch.randn(1, 1, 192, 9 * 128)
    modelled = sum(stage.flop for stage in library.applied_directions([rows], [grads], 4))
    assert modelled == counted(lambda: applied.applied_directions(x, rows.window, g, directions))


def test_products_are_folded_as_few_at_a_time_as_kfac2_does():
    widths = [768, 768, 3072, 64, 1024, 2048, 2048, 5, 5]
    sources = [Source(4, width, (), Window.places(0)) for width in widths]
    folded = [stage for stage in library.gram_matrices(sources, "fp32") if stage.kernel == "fold"]
    sizes = [product_bytes(torch.empty(4, width, device="meta"), Window.places(0)) for width in widths]
    runs = [widths[part] for part in folded_together(sizes)]
    assert runs == [[768, 768, 3072], [64, 1024, 2048, 2048], [5, 5]]
    assert folded == [stage for run in runs for stage in ops.fold_products(run).stages]


def test_own_products_of_wide_rows_are_those_that_torch_counts():
    rows = Source(3, 128, (6, 6), Window.of(2, 3, padding=1, bias=1))
    x = torch.randn(3, 128, 6, 6)
    modelled = sum(stage.flop for stage in library.gram_matrices([rows], "fp32"))
    assert modelled == counted(lambda: row_products(x, rows.window))  # the bias is no product


def test_a_stage_takes_the_longest_of_its_bounds():
    device = time.DEVICES[0]
    launch = time.LAUNCH
    assert time.seconds([ops.Stage("copy", 1, 0.9 * 3.35e12)], device) == pytest.approx(1 + launch)
    assert time.seconds([ops.Stage("mm", 1, 1.0, 67e12 * 0.75)], device) == pytest.approx(1 + launch)
    assert time.seconds([ops.Stage("mm", 1, 1.0, 494.7e12 * 0.7)], device, "tf32") == pytest.approx(1 + launch)
    assert time.seconds([ops.Stage("copy", 1, 1.0, 1.0, 1.755e9)], device) == pytest.approx(1 + launch)
    assert time.seconds([ops.Stage("copy", 1000, 1.0)], device) == pytest.approx(1000 * time.ISSUE)  # the host


def test_the_committed_table_is_what_the_model_says(found):
    committed = json.loads((ROOT / "bench/results/roofline.json").read_text())
    text = (ROOT / "bench/results/roofline.md").read_text()
    for entry in committed["nets"]:
        assert f"## {entry['title']}" in text
        for rows in entry["ops"].values():
            for row in rows:
                row.update(measured=None, verdict="")  # a record adds only these
    assert {**committed, "record": None} == json.loads(json.dumps(roofline.rounded(found)))


# -- records --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    """A record as report.py writes it, of a tiny run on the CPU that says it was an H100."""
    names = [name for name in cases.OPS if name != "eigendecompose"]
    compared = [kernels.compare(build, 1, 0.01, "cpu", 1) for build in kernels.all_cases(names, ["resnet-8"], 2, "cpu")]
    measured = steps.measure("resnet-8", 2, 1, contenders.OWN, "cpu", 1)
    machine = {"device": "NVIDIA H100 80GB HBM3"}
    return json.loads(json.dumps({"machine": machine, "kernels": compared, "steps": [measured], "failed": []}))


def with_times(record, factor):
    """The same record, each time a multiple of its prediction."""
    device = time.DEVICES[0]
    predictions = {row["case"]: row["predicted"] for row in roofline.case_rows(record, device, [])}
    changed = json.loads(json.dumps(record))
    for case in changed["kernels"]:
        case["milliseconds"]["kfac2"] = [factor * predictions[case["case"]] / 1e3, 0, 0]
    return changed


def test_each_case_of_a_report_has_a_prediction(record):
    rows = roofline.case_rows(record, time.DEVICES[0], [])
    assert len(rows) == len(record["kernels"]) and all(row["predicted"] > 0 for row in rows)
    for factor, words in (
        (1.0, ""),
        (1.9, ""),
        (3.0, "3.0 times the prediction"),
        (0.25, "4.0 times faster than predicted"),
    ):
        rows = roofline.case_rows(with_times(record, factor), time.DEVICES[0], [])
        assert {row["verdict"] for row in rows} == {words}
    unknown = [{"case": "new_op, ResNet-8, batch 2", "milliseconds": {"kfac2": {"median": 1.0}}}]
    (row,) = roofline.case_rows({"kernels": unknown}, time.DEVICES[0], [])
    assert row["verdict"] == "unknown" and row["predicted"] is None


def test_whole_steps_have_predictions(record):
    rows = roofline.whole_rows(record, time.DEVICES[0], [])
    assert [row["case"].split(", ")[1:3] for row in rows] == [
        ["sgd", "c"],
        ["kfac2-2", "c"],
        ["kfac2-2", "a"],
        ["kfac2-2", "b"],
    ]
    times = [row["predicted"] for row in rows]
    assert times == sorted(times)
    (result,) = record["steps"]
    assert rows[0]["measured"] == pytest.approx(1e3 * result["sgd_milliseconds"][0])


def test_all_ops_of_a_report_are_known():
    net = nets.known("resnet-8", 2)
    assert set(cases.BY_LAYERS) <= {op.name for op in calls.ops_of(net)}
    assert calls.single("channel_sums, 128x64x64x64").own.least_bytes == 4 * (128 * 64**3 + 128 * 64**2)
    single = calls.single("input_covariance, 3x3, 16x32x32, batch 128")
    assert single.own.least_flop == ops.covariances([Source(128, 16, (32, 32), Window.of(2, 3, padding=1))]).least_flop


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_record_fills_the_measured_column(record, tmp_path, monkeypatch, capsys, wrapped):
    measured = {"case": "covariances, ResNet-110, batch 128",
                "milliseconds": {"kfac2": {"median": 40.0}, "torch": {"median": 30.0}}}  # fmt: skip
    content = {**with_times(record, 1.0), "steps": record["steps"]}
    content["kernels"] = [*content["kernels"], measured]
    path = tmp_path / ("record.jsonl" if wrapped else "record.json")
    stages = [{"about": {}}, *({"stage": part, "found": [{**content, "kernels": [], "steps": [], part: content[part]}]}
                               for part in ("steps", "kernels"))]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, stages)) if wrapped else json.dumps(content))
    monkeypatch.setattr("sys.argv", ["roofline.py", "--record", str(path), "--out", str(tmp_path)])
    roofline.main()
    written = json.loads((tmp_path / "roofline.json").read_text())
    rows = {row["op"]: row for row in written["nets"][0]["ops"]["H100 SXM"]}
    assert rows["covariances"]["measured"] == 40000 and "times the prediction" in rows["covariances"]["verdict"]
    assert rows["layer_maps"]["measured"] is None
    assert all(row["measured"] is None for row in written["nets"][0]["ops"]["H200"])
    text = (tmp_path / "roofline.md").read_text()
    assert text in capsys.readouterr().out and "## Measured on NVIDIA H100 80GB HBM3" in text and "40,000" in text


def test_a_record_of_another_device_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"machine": {"device": "cpu"}, "kernels": [], "steps": []}))
    monkeypatch.setattr("sys.argv", ["roofline.py", "--record", str(path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="H100 SXM or H200, got one of 'cpu'"):
        roofline.main()
    assert not (tmp_path / "roofline.json").exists()
