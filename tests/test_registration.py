"""The native ops as torch sees them: opcheck, torch.compile, and the layer rules of csrc/."""

import re
from pathlib import Path

import pytest
import torch
from compare import assert_equal

from kfac2 import build_info, ops, reference
from kfac2.window import Window

ROOT = Path(__file__).parent.parent
SCHEMAS = (ROOT / "csrc/torch/registration.cpp").read_text()
NATIVE = re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMAS)
CUDA_ONLY = {"eigendecompose"}  # a CPU has LAPACK's, which is faster: no csrc/cpu, and opcheck in tests/gpu
WINDOWS = [Window.of(2, 3, padding=1, bias=1), Window.places(1, groups=2)]
NUMBERS = [number for window in WINDOWS for number in window.encode()]


def samples(dtype):
    tensors = [torch.randn(3, 2, 5, 4).to(dtype), torch.randn(2, 6, 7).to(dtype)]
    sums = torch.randn(3, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    maps = [sums.new_zeros(4, 3, 2), sums.new_ones(4, 5)]
    spd = torch.eye(3, dtype=sums.dtype).repeat(2, 1, 1)
    gradients, layout = (
        [torch.randn(2, 3).to(dtype), torch.randn(4).to(dtype)],
        torch.tensor([[1, 4, 0, 0], [-1, 0, -1, 1]]),
    )
    matrices, doubles = sums.new_zeros(9), torch.ones(1, dtype=torch.float64)
    clip = (torch.tensor([[0, 9, 9]]), doubles, None, doubles, doubles, doubles.reshape(1, 1))
    none_bad, skipped = torch.tensor([2], dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    return {
        "layer_maps": (tensors, NUMBERS),
        "covariances": (tensors, NUMBERS, [sums.new_ones(1, 10, 19), sums[:0]], 0.9, [0.1, 2.0]),
        "fold_products": (
            [sums[:2], sums[2:, 2:], sums[:2, :2]],
            [2, 1],
            [sums[0], sums[:0]],
            [5.0, 0.0],
            [sums.new_ones(1, 2, 5), sums[:0]],
            0.9,
            [0.1, 2.0],
        ),
        "directional_derivatives": (
            tensors,
            NUMBERS,
            [torch.randn(3, 4, 5, 4).to(dtype), torch.randn(2, 2, 7).to(dtype)],
            [torch.randn(2, 1, 4, 19, dtype=sums.dtype), torch.randn(1, 2, 1, 3, dtype=sums.dtype)],
        ),
        "cross_layer_sums": (maps, True, torch.eye(2, dtype=sums.dtype), 0.9, 0.1),
        "coarse_fisher": (sums, sums.clone(), torch.ones(3).double(), None, sums + 1, sums * 2, 0.9, [0, 1, 1], 2),
        "factored_tikhonov_inverse": ([spd], [spd[:, :2, :2]], 0.1),
        "gather_gradients": (gradients, layout, 1, 2, matrices),
        "shift_and_scale": (matrices, matrices + 1, *clip, none_bad, 2, 1.0, 0.1, skipped, doubles / 3, doubles * 7),
        "write_gradients": (gradients, layout, matrices, doubles, doubles, torch.zeros(1), doubles),
    }


def test_every_native_op_has_samples():
    assert sorted(NATIVE) == sorted([*samples(torch.float32), *CUDA_ONLY])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", samples(torch.float32))
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.kfac2, name).default, samples(dtype)[name])


def public_calls():
    x, g = torch.randn(3, 2, 6, 5), torch.randn(3, 4, 2)
    A, G, grads = (
        [torch.eye(3) * 2, torch.eye(2)],
        [torch.eye(2), torch.eye(4)],
        [torch.randn(2, 3), torch.randn(4, 2)],
    )
    maps = [torch.randn(3, 4), torch.randn(3, 2, 2)]
    sums = torch.randn(3, 3)
    parts = ops.eigendecompose(A, G)
    return {
        "layer_maps": (ops.layer_maps, [x, g], [Window.of(2, 3), Window.places(1)]),
        "covariances": (ops.covariances, [x, g], [Window.of(2, 3), Window.places(1)]),
        "folded_covariances": (ops.folded_covariances, [x, g], [Window.of(2, 3), Window.places(1)]),
        "directional_derivatives": (
            ops.directional_derivatives,
            [x],
            [Window.of(2, 3, bias=1)],
            [torch.randn(3, 4, 4, 3)],
            [torch.randn(2, 1, 4, 19)],
        ),
        "channel_sums": (ops.channel_sums, g),
        "patch_sums": (ops.patch_sums, x, 3, 1, "same"),
        "input_covariance": (ops.input_covariance, x, (3, 2), 1, 1, 1, True),
        "grad_covariance": (ops.grad_covariance, g),
        "cross_layer_sums": (ops.cross_layer_sums, maps, "area"),
        "coarse_fisher": (ops.coarse_fisher, sums, sums, [0, 0, 1]),
        "average_coarse_sums": (lambda *a: ops.average_coarse_sums(*a, previous=(sums, sums), kept=0.9), sums, sums),
        "factored_tikhonov_inverse": (ops.factored_tikhonov_inverse, A, G, 0.1),
        "precondition": (ops.precondition, grads, A, G),
        "eigendecompose": (ops.eigendecompose, A, G),
        "precondition_in_basis": (ops.precondition_in_basis, grads, A, G, grads),
        "precondition_eigh": (ops.precondition_eigh, grads, *parts[:4], 0.1),
    }


def leaves(result):
    return [result] if isinstance(result, torch.Tensor) else [leaf for part in result for leaf in leaves(part)]


@pytest.mark.parametrize("name", public_calls())
def test_compiles_into_one_graph(name):
    function, *arguments = public_calls()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(leaves(compiled(*arguments)), leaves(function(*arguments)), strict=True):
        assert_equal(ours, theirs, 1e-5)


@pytest.mark.slow
def test_compiles_with_inductor():
    def statistics(x):
        return ops.cross_layer_sums([ops.patch_sums(x, 3, padding=1), ops.channel_sums(x * 2)]) + 1

    x = torch.randn(4, 3, 6, 6)
    assert_equal(torch.compile(statistics, fullgraph=True)(x), statistics(x), 1e-5)


def test_every_public_op_is_called_documented_and_has_a_reference():
    functions = {name for name in ops.__all__ if name[0].islower()}
    assert functions == set(public_calls())
    for name in functions:
        doc = getattr(ops, name).__doc__
        assert "Args:" in doc and "Returns:" in doc and "Raises:" in doc, name
        if name not in ("layer_maps", "covariances", "folded_covariances"):  # list ops, whose fronts have them
            assert hasattr(reference, name), name


TORCH, CUDA = r"torch/|ATen|c10/|Python\.h|pybind11", r"cuda_runtime|cuda\.h|cuda/|cub/|compat\.h"


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("cpu", f"{TORCH}|{CUDA}"),
        ("include", f"{TORCH}|{CUDA}"),
        ("kernels", f"{TORCH}|cub/"),
        ("torch", r"\.cuh?$|compat\.h"),
    ],
)
def test_layer_rule(folder, forbidden):
    files = [path for path in (ROOT / "csrc" / folder).iterdir()]
    assert files
    for path in files:
        includes = re.findall(r"#include\s*[<\"](.*)[>\"]", path.read_text())
        assert not [name for name in includes if re.search(forbidden, name)], path


@pytest.mark.parametrize("name", NATIVE)
def test_one_stem_in_every_folder(name):
    places = ["csrc/include/{}.h", "csrc/cpu/{}.cpp", "csrc/kernels/{}.cu", "csrc/torch/{}.cpp", "kfac2/ops/{}.py"]
    for place in places:
        exists = not (name in CUDA_ONLY and "cpu" in place)
        assert (ROOT / place.format(name)).is_file() is exists, place.format(name)


def test_reference_shares_nothing_with_the_ops():
    imports = re.findall(r"^(?:from|import) (\S+)", (ROOT / "kfac2/reference.py").read_text(), re.M)
    assert not [name for name in imports if name.startswith("kfac2")]


def test_no_unfold_in_a_fast_path():
    for path in (ROOT / "kfac2").rglob("*.py"):
        # EKFAC and places of a convolution that are left out need single rows: `kinds.base.formed`.
        if path.relative_to(ROOT / "kfac2").as_posix() not in ("reference.py", "kinds/base.py"):
            assert not re.search(r"\bF\.unfold|nn\.Unfold|\.unfold\(", path.read_text()), path


def test_build_info():
    info = build_info()
    assert set(info) == {"version", "torch", "cuda", "cuda_arch"}
    assert info["cuda"] is bool(info["cuda_arch"])
    assert torch.version.cuda or not info["cuda"]
    assert re.match(r"\d+\.\d+\.\d+", info["version"]) and info["torch"][0].isdigit()


@pytest.mark.parametrize("count", [3, 112])
def test_one_native_call_for_all_layers(count, monkeypatch):
    calls = []
    for name in NATIVE:
        native = getattr(torch.ops.kfac2, name)
        monkeypatch.setattr(
            torch.ops.kfac2, name, lambda *a, native=native, name=name: (calls.append(name), native(*a))[1]
        )
    x = [torch.randn(2, 3, 4, 4) for _ in range(count)]
    windows = [Window.of(2, 3)] * count
    maps = ops.layer_maps(x, windows)
    ops.covariances(x, windows)
    ops.directional_derivatives(x, windows, [torch.randn(2, 1, 2, 2)] * count, [torch.randn(1, 1, 1, 27)] * count)
    sums = ops.cross_layer_sums(maps)
    ops.average_coarse_sums(sums, sums)
    ops.factored_tikhonov_inverse([torch.eye(1 + i % 4) for i in range(count)], [torch.eye(4)] * count, 0.1)
    statistics = ["layer_maps", "covariances", "directional_derivatives", "cross_layer_sums", "coarse_fisher"]
    assert calls == [*statistics, "factored_tikhonov_inverse"]
