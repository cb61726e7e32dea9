"""What the kernels do on a device: time, bandwidth, and plain torch beside them, each checked before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, covariance_by_paper
from problems import ResNet
from torch import Tensor, nn

from kfac2 import ops
from kfac2.layers import find_layers
from kfac2.ops import Window
from kfac2.statistics import RawSums, Rows

RESNET_110 = [32] * 37 + [16] * 37 + [8] * 38  # maps of its 112 layers, square


@dataclass
class Measured:
    """One line of the record.

    Attributes:
        name: what was timed.
        microseconds: median.
        versus: the other side of the comparison, and its microseconds; or None.
        target: what the issue asks for, in words.
        reached: the figure to hold against the target.
    """

    name: str
    microseconds: float
    versus: tuple[str, float] | None
    target: str
    reached: str


class Timer:
    """Medians of single runs with a cold cache, timed by events on a device and by the clock on a CPU.

    Args:
        device: where the functions run.
        rounds: timed runs of each.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self._device = device
        self._rounds = rounds
        self._flush = torch.empty(2**28 if device.type == "cuda" else 2**10, dtype=torch.int8, device=device)

    def __call__(self, *functions: Callable[[], object]) -> list[float]:
        """Time functions in turn, so that a drift hits all alike; microseconds."""
        for function in functions:
            for _ in range(3):
                function()
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(self._rounds):
            for function, record in zip(functions, times, strict=True):
                record.append(self._once(function))
        return [statistics.median(record) for record in times]

    def _once(self, function: Callable[[], object]) -> float:
        self._flush.zero_()
        if self._device.type != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # the host is ahead when the clock starts: what is timed is the device's part
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


def measure_sums(timer: Timer, device: torch.device, batch: int) -> list[Measured]:
    """Bandwidth of channel_sums against a copy on the same device."""
    x = torch.randn(batch, 64, 128, 128, device=device)
    torch.testing.assert_close(ops.channel_sums(x), x.sum(1), rtol=1e-4, atol=1e-3)
    y, size = torch.empty_like(x), x.numel() * 4
    copy, ours, theirs = timer(lambda: y.copy_(x), lambda: ops.channel_sums(x), lambda: x.sum(1))
    bandwidth, copied = (size + size / 64) / ours / 1e3, 2 * size / copy / 1e3
    reached = f"{bandwidth:.0f} GB/s, {bandwidth / copied:.0%} of a copy's {copied:.0f}"
    return [
        Measured(
            f"channel_sums, {size / 1e6:.0f} MB", ours, ("x.sum(1)", theirs), "85 % of a copy's bandwidth", reached
        )
    ]


def measure_cross_layer_sums(timer: Timer, device: torch.device, batch: int) -> list[Measured]:
    """All pairs of the 112 layers of ResNet-110, and of 3 layers."""
    maps = [torch.randn(batch, extent, extent, device=device) for extent in RESNET_110]
    torch.testing.assert_close(
        ops.cross_layer_sums(maps).cpu(), ops.cross_layer_sums([m.cpu() for m in maps]), rtol=1e-3, atol=1e-1
    )
    ours, few = timer(lambda: ops.cross_layer_sums(maps), lambda: ops.cross_layer_sums(maps[::40]))
    versus = ("3 layers", few)
    return [Measured(f"cross_layer_sums, ResNet-110, batch {batch}", ours, versus, "below 100 µs", f"{ours:.0f} µs")]


def measure_covariances(timer: Timer, device: torch.device, batch: int) -> list[Measured]:
    """Three stages of a ResNet against unfold and one product."""
    result = []
    window = Window.of(2, 3, padding=1)
    for channels, extent in CONVOLUTIONS.values():
        x = torch.randn(batch, channels, extent, extent, device=device)
        calls = partial(ops.input_covariance, x, 3, padding=1), partial(covariance_by_paper, x, window)
        torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-3, atol=1e-1)
        ours, theirs = timer(*calls)
        name = f"input_covariance, 3x3, {channels}x{extent}x{extent}, batch {batch}"
        versus = ("unfold, one product", theirs)
        result.append(Measured(name, ours, versus, "3 times faster", f"{theirs / ours:.1f} times faster"))
    return result


def captured_rows(model: nn.Module, x: Tensor) -> tuple[list[Rows], Callable[[], object]]:
    """Rows of one pass of every layer, and a function that runs the backward pass again."""
    layers = find_layers(model, list(model.parameters()), (), 32)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for layer in layers:

        def keep(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = layer.name) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles.append(layer.module.register_forward_hook(keep))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # so that the outputs stand for themselves
    loss = F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device))
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(loss, [outputs[layer.name] for layer in layers], retain_graph=True)
    rows = [Rows(layer, inputs[layer.name], g) for layer, g in zip(layers, grads, strict=True)]
    return rows, lambda: torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def measure_statistics(timer: Timer, device: torch.device, batch: int, n: int) -> list[Measured]:
    """The whole statistics pass of a ResNet, both levels, against one backward pass of it."""
    model = ResNet(n).to(device)
    rows, backward = captured_rows(model, torch.randn(batch, 3, 32, 32, device=device))
    layers = [r.layer for r in rows]

    def statistics_pass(levels: int) -> None:
        RawSums().add_pass(rows, layers, batch, float(batch), levels, "nearest")

    two, one, back = timer(lambda: statistics_pass(2), lambda: statistics_pass(1), backward)
    name, reached = f"statistics of ResNet-{6 * n + 2}, batch {batch}", f"{two / back:.2f} of a backward pass"
    return [
        Measured(f"{name}, two levels", two, ("backward pass", back), "below one backward pass", reached),
        Measured(f"{name}, one level", one, ("two levels", two), "", f"second level: {two / one - 1:+.1%}"),
    ]
