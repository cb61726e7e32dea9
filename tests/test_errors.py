"""Every refusal, by message: it names the argument, what it got and what would be right."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from paper import KFAC, Preconditioner
from torch.distributions import Categorical

from kfac2 import ops
from kfac2.ops.fold_products import Product, fold_products
from kfac2.window import Window


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


HYPER_PARAMETERS = [
    ({"lr": -1.0}, ValueError, "lr must be a number of at least 0, got -1.0"),
    ({"lr": "fast"}, TypeError, "lr must be a number of at least 0, got 'fast' of type str"),
    ({"momentum": -0.1}, ValueError, "momentum must be a number of at least 0"),
    ({"weight_decay": -1e-3}, ValueError, "weight_decay must be a number of at least 0"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov must be False without momentum"),
    ({"nesterov": 1}, TypeError, "nesterov must be True or False"),
    ({"damping": 0.0}, ValueError, "damping must be a number above 0, or 'auto', got 0.0"),
    ({"damping": float("nan")}, ValueError, "damping must be a number above 0"),
    ({"damping": None}, TypeError, "damping must be a number above 0, or 'auto', got None"),
    ({"kl_clip": 0.0}, ValueError, "kl_clip must be a number above 0, or None"),
    ({"levels": 3}, ValueError, "levels must be one of 1, 2, got 3"),
    ({"levels": "two"}, TypeError, "levels must be one of 1, 2"),
    ({"inverse": "qr"}, ValueError, "inverse must be one of 'cholesky', 'eigh', 'ekfac', got 'qr'"),
    ({"fisher": "true"}, ValueError, "fisher must be one of 'mc', 'exact', 'empirical'"),
    ({"stat_decay": 1.0}, ValueError, r"stat_decay must be a number in \[0, 1\), got 1.0"),
    ({"cov_every": 0}, ValueError, "cov_every must be an int of at least 1"),
    ({"cov_every": 1.5}, TypeError, "cov_every must be an int of at least 1, got 1.5"),
    ({"inv_every": True}, TypeError, "inv_every must be an int"),
    ({"downsample": "bilinear"}, ValueError, "downsample must be one of 'nearest', 'area'"),
    ({"coarse_weight": float("inf")}, ValueError, "coarse_weight must be a finite number"),
    ({"coarse_damping": -1.0}, ValueError, "coarse_damping must be a number above 0, or None"),
    ({"coarse_max_groups": 0}, ValueError, "coarse_max_groups must be an int of at least 1"),
    ({"inverse_dtype": torch.float16}, ValueError, "inverse_dtype must be torch.float32, torch.float64, or None"),
    ({"inverse_dtype": "float64"}, TypeError, "inverse_dtype must be torch.float32, torch.float64, or None"),
    ({"cases": 0}, ValueError, "cases must be an int of at least 1, 'rows', 'samples', or None"),
    ({"cases": "tokens"}, ValueError, "cases must be an int of at least 1, 'rows', 'samples', or None, got 'tokens'"),
    ({"samples": 0}, ValueError, "samples must be an int of at least 1, got 0"),
    ({"batch_dim": 2}, ValueError, "batch_dim must be one of 0, 1, got 2"),
    ({"check_every": -1}, ValueError, "check_every must be an int of at least 0"),
    ({"step_precision": "bf16"}, ValueError, "step_precision must be 'ieee', 'tf32', or None, got 'bf16'"),
    ({"step_precision": 32}, TypeError, "step_precision must be 'ieee', 'tf32', or None, got 32"),
    ({"skip": ("nothing",)}, ValueError, "skip must name modules of the model in full, got 'nothing'"),
    ({"skip": (3,)}, TypeError, "skip must hold names or regular expressions, got 3"),
    ({"skip": (".*",)}, ValueError, "model must have a Linear or Conv layer"),
]


@pytest.mark.parametrize("options, error, message", HYPER_PARAMETERS)
def test_hyper_parameters(options, error, message):
    with pytest.raises(error, match=message):
        KFAC(net(), **options)


def test_models():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        KFAC([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        Preconditioner([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"must have a Linear or Conv layer .* got none in BatchNorm1d"):
        KFAC(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="all handled layers on one device, got 0 on cpu and 2 on meta"):
        KFAC(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, device="meta")))
    with pytest.raises(TypeError, match="dampning is no option of kfac2; the options are levels"):
        Preconditioner(net(), dampning=1.0)


def test_options_during_training():
    opt = KFAC(net())
    opt.options.damping = 1.0
    with pytest.raises(ValueError, match="damping must be a number above 0, or 'auto', got -1"):
        opt.options.damping = -1
    assert opt.options.damping == 1.0
    with pytest.raises(ValueError, match=r"levels is fixed at construction \(2\), got 1"):
        opt.options.levels = 1
    with pytest.raises(AttributeError, match="kfac2 has no option 'dampning'"):
        opt.options.dampning = 1.0


def test_groups():
    opt = KFAC(net())
    with pytest.raises(ValueError, match="lr must be a number of at least 0, got -2"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": -2})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0})
    assert opt.param_groups[1]["momentum"] == 0.9


def test_distributions():
    model = net()
    opt = KFAC(model)
    out = model(torch.randn(5, 3))
    with pytest.raises(TypeError, match=r"must be a torch.distributions.Distribution, a list of them, or .* got tuple"):
        opt.accumulate_fisher([(out, out)])
    with pytest.raises(ValueError, match="distribution must hold at least one head, got an empty list"):
        opt.accumulate_fisher([])
    with pytest.raises(ValueError, match="distribution must carry the model's graph, got log-probabilities"):
        opt.accumulate_fisher(out.detach())
    with pytest.raises(ValueError, match="distribution must carry the model's graph, got a Categorical of detached"):
        opt.accumulate_fisher(Categorical(logits=out.detach()))
    other = nn.Linear(3, 2)(torch.randn(5, 3))
    with pytest.raises(ValueError, match="distribution must come from a forward pass of the model"):
        opt.accumulate_fisher(Categorical(logits=other))


def test_missing_statistics():
    model = net()
    opt = KFAC(model, cov_every=2)
    x, y = torch.randn(5, 3), torch.arange(5) % 2

    def step(call):
        opt.zero_grad()
        out = model(x)
        if call:
            opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"no statistics at all: call accumulate_fisher before step\(\)"):
        step(False)
    assert opt.preconditioner.iteration == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for call in (True, False):
        step(call)
    with pytest.warns(RuntimeWarning, match="accumulate_fisher was not called in an iteration that wants statistics"):
        step(False)
    for _ in range(4):
        step(False)  # warned once
    empirical = KFAC(net(), fisher="empirical")
    assert not empirical.needs_fisher
    with pytest.raises(RuntimeError, match=r"call backward\(\) with grad enabled"):
        empirical.step()


def test_reading_statistics():
    opt = KFAC(net())
    with pytest.raises(KeyError, match=r"one of the handled layers .*got 'fc'"):
        opt.factors("fc")
    with pytest.raises(RuntimeError, match="0 has no statistics yet: take some first"):
        opt.factors("0")
    with pytest.raises(RuntimeError, match="there are no statistics yet"):
        opt.coarse_fisher()
    one = KFAC(net(), levels=1)
    for read in (one.coarse_fisher, one.coarse_sums):
        with pytest.raises(RuntimeError, match="no coarse sums without the space of ones"):
            read()


def test_preconditioner_rates():
    preconditioner = Preconditioner(net())
    with pytest.raises(ValueError, match="lr must be given, since the KL clip depends on it; got None"):
        preconditioner.step()
    with pytest.raises(ValueError, match="lr must be a number of at least 0, got -1"):
        preconditioner.step(lr=-1)
    with pytest.raises(KeyError, match="2"):
        preconditioner.step(lr={"0": 0.1})


X, G = torch.randn(3, 2, 5, 4), torch.randn(3, 4, 6)
EYE = torch.eye(2)
DIRECTIONS = torch.randn(1, 1, 2, 5)


def folded(counts, panels, last=(), corners=(), previous=(), scales=()):
    lists = (list(given) for given in (last, corners, previous))
    return torch.ops.kfac2.fold_products(panels, counts, *lists, 1.0, list(scales))


def derivatives(**other):
    fitting = {"inputs": [G], "windows": [Window.places(1, bias=1)], "grads": [G[:, :2]], "directions": [DIRECTIONS]}
    return ops.directional_derivatives(**{**fitting, **other})


OPS = [
    (lambda: ops.patch_sums(X, 3.5), TypeError, "kernel_size must be an int or a sequence of ints|'float' object"),
    (lambda: ops.patch_sums(X, (3, 3, 3)), ValueError, "kernel_size must have one number for each of the 2 spatial axes"),
    (lambda: ops.patch_sums(X, 0), ValueError, "kernel_size must be at least 1, got 0"),
    (lambda: ops.patch_sums(X, 3, stride=0), ValueError, "stride must be at least 1, got 0"),
    (lambda: ops.patch_sums(X, 3, padding=-1), ValueError, "padding must be at least 0, got -1"),
    (lambda: ops.patch_sums(X, 3, padding="full"), ValueError, "padding must be 'same', 'valid' or numbers, got 'full'"),
    (lambda: ops.patch_sums(X, 3, 2, "same"), ValueError, "padding='same' must go with stride 1, got stride=2"),
    (lambda: ops.patch_sums(X, 3, dilation=(1, 0)), ValueError, r"dilation must be at least 1, got \(1, 0\)"),
    (lambda: ops.patch_sums(X, 6), RuntimeError, r"kernel of window 0 to fit into its padded tensor, got .*\[3, 2, 5, 4\]"),
    (lambda: ops.patch_sums(torch.randn(3), 1), ValueError, r"x must have shape \(N, C\) with up to three .*, got \(3,\)"),
    (lambda: ops.channel_sums(torch.zeros(1, 1, 1, 1, 1, 1)), ValueError, "g must have shape"),
    (lambda: ops.grad_covariance(torch.ones(3, 2, dtype=torch.int64)), RuntimeError, "covariances: expected tensor 0 to be float32"),
    (lambda: ops.layer_maps([], []), ValueError, "tensors must hold at least one tensor, got an empty list"),
    (lambda: ops.layer_maps(X, []), TypeError, "tensors must be a list of tensors, got Tensor"),
    (lambda: ops.layer_maps([X], []), ValueError, "windows must have one entry for each of the 1 entries of tensors, got 0"),
    (lambda: ops.covariances([X], [Window.places(2, groups=3)]), RuntimeError, "divisible by groups = 3"),
    (lambda: ops.covariances([X], [Window.places(2, bias=2)]), RuntimeError, "a bias of 0 or 1 in window 0, got 2"),
    (lambda: ops.covariances([X], [Window.places(2)], previous=[]), ValueError, "previous must have one entry for each of the 1 entries of tensors, got 0"),
    (lambda: ops.covariances([X], [Window.places(2)], scales=[1, 2]), ValueError, "scales must have one entry for each of the 1 .*got 2"),
    (lambda: ops.covariances([X], [Window.places(2)], previous=[EYE]), RuntimeError, r"previous.0. must have shape .1, 2, 2., got .2, 2."),
    (lambda: ops.covariances([X], [Window.places(2)], previous=[EYE[None].double()]), RuntimeError, r"got .1, 1, 3. of another dtype"),
    (lambda: torch.ops.kfac2.covariances([X], Window.places(2).encode(), [EYE] * 2, 1.0, []), RuntimeError, "as many previous as tensors, 1, or none, got 2"),
    (lambda: torch.ops.kfac2.covariances([X], Window.places(2).encode(), [], 1.0, [1.0] * 2), RuntimeError, "as many scales as tensors, 1, or none, got 2"),
    (lambda: ops.covariances([X, X.to("meta")], [Window.places(2)] * 2), ValueError, r"tensors\[1\] must be on the device of"),
    (lambda: fold_products([]), ValueError, "products must hold at least one product, got an empty list"),
    (lambda: fold_products([Product([EYE])], previous=[]), ValueError, "previous must have one entry for each of the 1 entries of products, got 0"),
    (lambda: fold_products([Product([EYE])], scales=[1, 2]), ValueError, "scales must have one entry for each of the 1 .*got 2"),
    (lambda: fold_products([Product([EYE] * 9)]), RuntimeError, "expected 1 to 8 panels in product 0, got 9"),
    (lambda: fold_products([Product([EYE]), Product([EYE.long()])]), RuntimeError, "panels of dtype float32 or float64, those of product 1 have another"),
    (lambda: fold_products([Product([EYE, EYE])]), RuntimeError, r"from the diagonal on, .* panel 1 of product 0 has shape .2, 2."),
    (lambda: fold_products([Product([EYE[0]])]), RuntimeError, r"panel 0 of product 0 has shape .2."),
    (lambda: fold_products([Product([EYE]), Product([EYE[:1]])]), RuntimeError, r"panel 0 of product 1 has shape .1, 2."),
    (lambda: fold_products([Product([EYE[:1], EYE[1:, 1:].double()])]), RuntimeError, "the dtype of panel 0, panel 1 of product 0 has another"),
    (lambda: fold_products([Product([EYE], EYE)]), RuntimeError, r"last 0 with 2 numbers in the dtype of its panels, got .2, 2."),
    (lambda: fold_products([Product([EYE], EYE[0].double())]), RuntimeError, r"last 0 with 2 numbers .* got .2. of another dtype"),
    (lambda: fold_products([Product([EYE])] * 2, previous=[None, EYE]), RuntimeError, r"previous 1 with the shape and dtype of its result, .1, 1, 3., got .2, 2."),
    (lambda: folded([], [EYE[:0]]), RuntimeError, "expected at least one product, got none"),
    (lambda: folded([1, 1], [EYE]), RuntimeError, "as many panels as all counts, got 1"),
    (lambda: folded([1], [EYE] * 2), RuntimeError, "as many panels as all counts, 1, got 2"),
    (lambda: folded([1], [EYE], [EYE] * 2), RuntimeError, "as many last as counts, 1, or none, got 2"),
    (lambda: folded([1], [EYE], [], [1.0] * 2), RuntimeError, "as many corners as counts, 1, or none, got 2"),
    (lambda: folded([1], [EYE], [], [], [EYE] * 2), RuntimeError, "as many previous as counts, 1, or none, got 2"),
    (lambda: folded([1], [EYE], [], [], [], [1.0] * 2), RuntimeError, "as many scales as counts, 1, or none, got 2"),
    (lambda: derivatives(inputs=[]), ValueError, "inputs must hold at least one tensor"),
    (lambda: derivatives(grads=G), TypeError, "grads must be a list of tensors, got Tensor"),
    (lambda: derivatives(directions=[DIRECTIONS] * 2), ValueError, "directions must have one entry for each of the 1 entries of inputs, got 2"),
    (lambda: derivatives(windows=[]), ValueError, "windows must have one entry for each of the 1 entries of inputs, got 0"),
    (lambda: derivatives(grads=[G.to("meta")]), ValueError, "grads must be on the device of inputs"),
    (lambda: derivatives(windows=[Window.places(1, bias=2)]), RuntimeError, "a bias of 0 or 1 in window 0, got 2"),
    (lambda: derivatives(windows=[Window.of(1, 3)]), RuntimeError, r"gradient 0 to have the samples and the places .* input 0, of shape .3, 4, 6., got .3, 2, 6."),
    (lambda: derivatives(grads=[G[:2, :2]]), RuntimeError, r"the samples and the places of .*got .2, 2, 6."),
    (lambda: derivatives(grads=[G[:, :2].double()]), RuntimeError, "gradient 0 to be summed in the same type as input 0: both float64, or neither"),
    (lambda: derivatives(grads=[G[:, :2].long()]), RuntimeError, "tensor 0 to be float32, float64, float16 or bfloat16"),
    (lambda: derivatives(directions=[DIRECTIONS[0]]), RuntimeError, r"directions 0 of shape .K, 1, 2, 5. with K of at least 1, got .1, 2, 5."),
    (lambda: derivatives(directions=[DIRECTIONS[..., :4]]), RuntimeError, r"directions 0 of shape .*got .1, 1, 2, 4."),
    (lambda: derivatives(directions=[DIRECTIONS[:0]]), RuntimeError, r"K of at least 1, got .0, 1, 2, 5."),
    (lambda: derivatives(directions=[DIRECTIONS.double()]), RuntimeError, "directions 0 to be float32, as the rows are summed in"),
    (lambda: torch.ops.kfac2.directional_derivatives([X], Window.places(2).encode(), [], []), RuntimeError, "as many gradients and directions as inputs, 1, got 0 and 0"),
    (lambda: torch.ops.kfac2.layer_maps([X], [1, 2]), RuntimeError, "expected 17 window numbers for each of 1 tensors, got 2"),
    (lambda: ops.cross_layer_sums([]), ValueError, "maps must hold at least one tensor"),
    (lambda: ops.cross_layer_sums([G], "cubic"), ValueError, "downsample must be 'nearest' or 'area', got 'cubic'"),
    (lambda: ops.cross_layer_sums([G, G[:2]]), RuntimeError, r"all maps to have N = 3, map 1 has shape \[2, 4, 6\]"),
    (lambda: ops.cross_layer_sums([G, G.double()]), RuntimeError, "dtype of map 0, map 1 has another"),
    (lambda: ops.cross_layer_sums([torch.ones(2, dtype=torch.int32)]), RuntimeError, "maps of dtype float32 or float64"),
    (lambda: ops.cross_layer_sums([torch.zeros(1, 1, 1, 1, 1, 1)]), RuntimeError, "at most 4 grid axes, got .1, 1, 1, 1, 1, 1."),
    (lambda: ops.cross_layer_sums([G], previous=EYE), RuntimeError, r"previous of shape \[B, B\] with B = 1 .*got \[2, 2\]"),
    (lambda: ops.cross_layer_sums([G, G], previous=EYE.double()), RuntimeError, "previous to have the dtype of the maps"),
    (lambda: ops.cross_layer_sums([G, G], previous=EYE.to("meta")), ValueError, "previous must be on the device of maps"),
    (lambda: ops.coarse_fisher(EYE, torch.eye(3)), ValueError, r"grad_sums must have the shape of input_sums, \(2, 2\), got \(3, 3\)"),
    (lambda: ops.coarse_fisher(EYE, EYE.double()), TypeError, "grad_sums must have the dtype of input_sums, torch.float32, got torch.float64"),
    (lambda: ops.coarse_fisher(EYE, EYE, [0, -1]), RuntimeError, r"layer_of_block in \[0, 1\), got -1"),
    (lambda: ops.coarse_fisher(EYE, EYE.to("meta")), ValueError, "grad_sums must be on the device of input_sums"),
    (lambda: ops.average_coarse_sums(EYE, torch.eye(3)), RuntimeError, r"shape \[B, B\] with B = 2 .*got \[3, 3\]"),
    (lambda: ops.average_coarse_sums(EYE, EYE.double()), RuntimeError, "all sums of one dtype"),
    (lambda: ops.average_coarse_sums(EYE, EYE, previous=EYE), TypeError, "previous must be a list of tensors, got Tensor"),
    (lambda: ops.average_coarse_sums(EYE, EYE, previous=(EYE,)), ValueError, r"previous must have one entry for each of the 2 entries of \(input_sums, grad_sums\), got 1"),
    (lambda: ops.average_coarse_sums(EYE, EYE, previous=(EYE, EYE[:1])), RuntimeError, r"shape \[B, B\] with B = 2 .*got \[1, 2\]"),
    (lambda: ops.average_coarse_sums(EYE, EYE, previous=(EYE.to("meta"),) * 2), ValueError, r"previous must be on the device of input_sums"),
    (lambda: ops.average_coarse_sums(EYE, EYE, grad_scales=torch.ones(2)), RuntimeError, "scales to be 2 float64 numbers on the CPU"),
    (lambda: ops.average_coarse_sums(EYE, EYE, input_scales=torch.ones(3).double()), RuntimeError, r"scales to be 2 float64 .*got shape \[3\]"),
    (lambda: ops.factored_tikhonov_inverse([], [], 0.1), ValueError, "A_list must hold at least one tensor"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE] * 2, 0.1), ValueError, "G_list must have one entry for each of the 1"),
    (lambda: ops.factored_tikhonov_inverse([EYE[:1]], [EYE], 0.1), ValueError, r"A_list\[0\] must have shape \(d, d\) .*got \(1, 2\)"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE.double()], 0.1), TypeError, r"G_list\[0\] must have the dtype of A_list\[0\]"),
    (lambda: ops.factored_tikhonov_inverse([EYE.half()], [EYE], 0.1), TypeError, r"A_list\[0\] must be float32 or float64"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE], -1.0), ValueError, "damping must be a finite number of at least 0, got -1.0"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE], float("inf")), ValueError, "damping must be a finite number of at least 0, got inf"),
    (lambda: ops.factored_tikhonov_inverse([EYE, EYE.double()], [EYE, EYE], 0.1), TypeError, r"G_list\[1\] must have the dtype of A_list\[1\]"),
    (lambda: torch.ops.kfac2.factored_tikhonov_inverse([torch.ones(2, 2, 2)], [EYE], 0.1), RuntimeError, r"with one q, got \[2, 2, 2\] and \[2, 2\]"),
    (lambda: torch.ops.kfac2.factored_tikhonov_inverse([EYE[None]], [EYE[None].double()], 0.1), RuntimeError, "all factors of one dtype"),
    (lambda: torch.ops.kfac2.factored_tikhonov_inverse([EYE[None]], [EYE[None]], -0.1), RuntimeError, "damping of at least 0, got -0.1"),
    (lambda: torch.ops.kfac2.factored_tikhonov_inverse([EYE[None]], [], 0.1), RuntimeError, "as many A as G, at least one, got 1 and 0"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE], "1"), TypeError, "damping must be a float, got str"),
    (lambda: ops.factored_tikhonov_inverse([EYE], [EYE.to("meta")], 0.1), ValueError, "G_list must be on the device of A_list"),
    (lambda: ops.eigendecompose([torch.stack([EYE] * 2)], [EYE]), ValueError, r"G_list\[0\] must have as many blocks as A_list\[0\], 2"),
    (lambda: ops.precondition([torch.ones(2, 3)], [EYE], [EYE]), ValueError, r"A_inv\[0\] must have shape \(3, 3\) for a gradient"),
    (lambda: ops.precondition([EYE], [EYE], [EYE.double()]), TypeError, r"G_inv\[0\] must have the dtype of grads\[0\]"),
    (lambda: ops.precondition_eigh([EYE], [torch.ones(3)], [EYE], [torch.ones(2)], [EYE], 0.1), ValueError, r"A_values\[0\] must have shape \(2,\), got \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPS)))
def test_ops(number):
    call, error, message = OPS[number]
    with pytest.raises(error, match=message):
        call()
