"""Whole training steps on a device, eager and in a CUDA graph, and the inverses of all layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import DAMPING, inverses_by_paper, inverses_by_torch
from gpu_kernels import Measured, Timer
from problems import ResNet, deep_linear
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

import kfac2
from kfac2 import ops

ALWAYS, NEVER = 1, 10**9
RESNET_110 = [(1, 27, 16), (36, 144, 16), (1, 144, 32), (1, 16, 32), (35, 288, 32)]
RESNET_110 += [(1, 288, 64), (1, 32, 64), (35, 576, 64), (1, 65, 10)]  # layers, d_in, d_out


@dataclass
class Net:
    """One network in training, with what a step needs."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    distribution: Callable[[Tensor], Distribution]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forward, backward, step."""
        optimizer.zero_grad()
        out = self.model(self.x)
        # Only where it is wanted: the distribution's own checks of its arguments wait for the device.
        if isinstance(optimizer, kfac2.KFAC) and optimizer.needs_fisher:
            optimizer.accumulate_fisher(self.distribution(out))
        self.loss(out, self.y).backward()
        optimizer.step()


def networks(device: torch.device, small: bool) -> list[Callable[[], Net]]:
    """Builders of ResNet-110 and of the deep linear network."""

    def resnet() -> Net:
        torch.manual_seed(0)
        n, batch = (1, 4) if small else (18, 128)
        x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
        name, model = f"ResNet-{6 * n + 2}, batch {batch}", ResNet(n).to(device)
        return Net(name, model, x, y, F.cross_entropy, lambda out: Categorical(logits=out))

    def linear() -> Net:
        problem = deep_linear(0, 512, 8)
        x, y = (part.to(device) for part in problem.train)
        return Net("deep linear, batch 512", problem.model.to(device), x, y, problem.loss, problem.distribution)

    return [resnet, linear]


def set_kind(optimizer: kfac2.KFAC, kind: str) -> None:
    """Make the next step one with statistics (a), with statistics and inverses (b), or an ordinary one (c)."""
    optimizer.options.cov_every = NEVER if kind == "c" else ALWAYS
    optimizer.options.inv_every = ALWAYS if kind == "b" else NEVER
    optimizer.preconditioner.iteration = 1


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Wall-clock time of one run, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graph_of(net: Net, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Capture an ordinary step; return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.step(optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net.step(optimizer)
    return graph.replay


def launches_of(run: Callable[[], None]) -> int:
    """Count the kernels, copies and fills that a function starts on the device."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type != torch.autograd.DeviceType.CPU)


def measure_steps(build: Callable[[], Net], device: torch.device, rounds: int) -> list[Measured]:
    """Times of the kinds of steps of both levels beside SGD's, interleaved; ratios are medians of rounds."""
    runs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}  # what is timed, what comes before
    name = ""
    for levels in (0, 1, 2):  # 0: SGD
        net = build()
        name = net.name
        sgd = torch.optim.SGD(net.model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        if levels == 0:
            runs["SGD"] = (partial(net.step, sgd), lambda: None)
            continue
        opt = kfac2.KFAC(net.model, lr=1e-3, levels=levels)
        net.step(opt)
        for kind in "abc":
            runs[f"{levels}{kind}"] = (partial(net.step, opt), partial(set_kind, opt, kind))
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (run, before) in runs.items():
            before()
            run()
            before()  # an ordinary step moves the count on; the repeats of the others are of the same kind anyway
            times[key].append(seconds_of(run, 5, device))
    return _lines(name, times) + _graphs(build, device, rounds)


def _lines(name: str, times: dict[str, list[float]]) -> list[Measured]:
    ratio = {
        key: statistics.median(t / base for t, base in zip(values, times["SGD"], strict=True))
        for key, values in times.items()
    }
    sgd = statistics.median(times["SGD"]) * 1e6
    kinds = {"a": "statistics step", "b": "inverse step", "c": "ordinary step"}
    lines = []
    for key, values in times.items():
        if key == "SGD":
            continue
        target = "at most 1.10 of SGD's" if key == "2c" and name.startswith("ResNet") else ""
        level = "two levels" if key[0] == "2" else "one level"
        label = f"{name}: {kinds[key[1]]}, {level}"
        versus = ("SGD's step", sgd)
        lines.append(Measured(label, statistics.median(values) * 1e6, versus, target, f"{ratio[key]:.3f} of SGD's"))
    for cov, inv, target in ((10, 100, "at most 1.3"), (200, 2000, "at most 1.12")):
        mean = ratio["2c"] + (1 / cov - 1 / inv) * (ratio["2a"] - ratio["2c"]) + (ratio["2b"] - ratio["2c"]) / inv
        label = f"{name}: mean at {cov}/{inv}, two levels"
        lines.append(Measured(label, mean * sgd, ("SGD's step", sgd), target, f"{mean:.3f} of SGD's"))
    return lines


def _graphs(build: Callable[[], Net], device: torch.device, rounds: int) -> list[Measured]:
    """An ordinary step in a CUDA graph, and its launches, beside SGD's."""
    if device.type != "cuda":
        return []
    replays, counts, name, shapes = [], [], "", 0
    for levels in (0, 2):
        net = build()
        opt: torch.optim.Optimizer = torch.optim.SGD(net.model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        if levels:
            opt = kfac2.KFAC(net.model, lr=1e-3, cov_every=NEVER, inv_every=NEVER)
            modules = [net.model.get_submodule(layer) for layer in opt.layers]
            name, shapes = net.name, len({(m.weight.shape, m.bias is None) for m in modules})
        net.step(opt)
        replays.append(graph_of(net, opt))
        counts.append(launches_of(opt.step))
    times = [[seconds_of(replay, 5, device) for replay in replays] for _ in range(rounds)]
    sgd_time, ours = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    limit = f"at most 25 + 3 for each of {shapes} shapes: {25 + 3 * shapes}"
    found = f"{counts[1]} (SGD foreach: {counts[0]})"
    return [
        Measured(f"{name}: ordinary step in a CUDA graph", ours, ("SGD's", sgd_time), "", f"{ratio:.3f} of SGD's"),
        Measured(f"{name}: launches of an ordinary step, forward and backward left out", 0.0, None, limit, found),
    ]


def _factors(shapes: list[tuple[int, int, int]], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    A: list[Tensor] = []
    G: list[Tensor] = []
    for count, d_in, d_out in shapes:
        for matrices, d in ((A, d_in), (G, d_out)):
            rows = torch.randn(count, 2 * d, d, device=device)
            matrices += list(rows.mT @ rows / (2 * d))
    return A, G


def measure_inverses(timer: Timer, device: torch.device, small: bool) -> list[Measured]:
    """36 inverses of 577x577 with their 64x64 partners, and all of ResNet-110."""
    lines = []
    pairs = [(2, 20, 8)] if small else [(36, 577, 64)]
    sets = (("36 x (577, 64)", pairs, "3 times faster than the loop"), ("ResNet-110", RESNET_110, "below 5 ms"))
    for name, shapes, target in sets[: 1 if small else 2]:
        A, G = _factors(shapes, device)
        got = ops.factored_tikhonov_inverse(A, G, DAMPING)
        exact = ops.factored_tikhonov_inverse([A[0].double()], [G[0].double()], DAMPING)
        torch.testing.assert_close(got.A_inv[0].double(), exact.A_inv[0], rtol=1e-3, atol=1e-3)
        ours, batched = timer(partial(ops.factored_tikhonov_inverse, A, G, DAMPING), partial(inverses_by_torch, A, G))
        loop = statistics.median(seconds_of(partial(inverses_by_paper, A, G), 1, device) for _ in range(5)) * 1e6
        reached = (
            f"{ours / 1e3:.2f} ms; {loop / ours:.1f} times faster than the loop, {batched / ours:.1f} than batched"
        )
        lines.append(Measured(f"inverses, {name}", ours, ("batched Cholesky", batched), target, reached))
    return lines


def measure_eigendecompositions(timer: Timer, device: torch.device, small: bool) -> list[Measured]:
    """Jacobi's method for many small matrices, and for one coarse Fisher, against torch.linalg.eigh."""
    sizes = (
        [(4, 6, torch.float32)]
        if small
        else [(132, 10, torch.float32), (72, 64, torch.float32), (72, 128, torch.float32)]
    )
    lines = []
    for count, d, dtype in (*sizes, (1, 12 if small else 112, torch.float64)):
        rows = torch.randn(count, 2 * d, d, device=device, dtype=dtype)
        stack = rows.mT @ rows / (2 * d)
        (values,), (vectors,), status = torch.ops.kfac2.eigendecompose([stack])
        assert not status.any()
        torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, stack, rtol=1e-3, atol=1e-4)
        ours, theirs = timer(partial(torch.ops.kfac2.eigendecompose, [stack]), partial(torch.linalg.eigh, stack))
        name = f"eigendecompose, {count} x {d} x {d}, {str(dtype).removeprefix('torch.')}"
        reached = f"{theirs / ours:.1f} times faster"
        lines.append(Measured(name, ours, ("torch.linalg.eigh", theirs), "faster", reached))
    return lines
