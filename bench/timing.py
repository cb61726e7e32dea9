"""The one way to time: a clock for each device, functions in turns, ratios within a round."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

Mark = Callable[[], None]
Work = Callable[[Mark], object]  # calls its argument at its start and after each of its parts
Key = TypeVar("Key", bound=Hashable)


def configure(threads: int) -> None:
    """Set the threads of torch on the CPU, and one kind of arithmetic everywhere: no TF32 (and nothing uses AMP)."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def synchronised() -> float:
    """Return the seconds of wall time so far, all work on the CUDA device done."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Times work: by CPU time with one thread on the CPU, by wall time with several, by events on a CUDA device.

    CPU time leaves out what other processes take from a shared machine. With several threads it would add them up.
    With `cold`, on a CUDA device, the caches are flushed before each measurement, and the host gets a head start, so
    that the device's part alone is timed; else the host's launches count as well.
    """

    def __init__(self, device: str | torch.device, threads: int, cold: bool = False) -> None:
        self.on_cuda = torch.device(device).type == "cuda"
        self.now: Callable[[], float] = time.perf_counter  # seconds so far, all work on the device done
        if self.on_cuda:
            self.now = synchronised
        elif threads == 1:
            self.now = time.process_time
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if cold and self.on_cuda else None
        self.kind = "CPU time" if self.now is time.process_time else "wall time"

    def laps(self, work: Work) -> list[float]:
        """Return the seconds of each part of some work."""
        if not self.on_cuda:
            marks: list[float] = []
            work(lambda: marks.append(self.now()))
            return [b - a for a, b in pairwise(marks)]
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        torch.cuda.synchronize()
        if self.flush is not None:
            self.flush.zero_()
            torch.cuda._sleep(4_000_000)
        work(mark)
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def take_turns(
    works: Mapping[Key, Work], clock: Clock, rounds: int, budget: float = float("inf")
) -> dict[Key, list[list[float]]]:
    """Time works in turns, in a new order each round, so that drift and neighbours hit all alike.

    After `budget` seconds no further round starts; three rounds are run in any case, if so many are asked for.

    Returns:
        For each work the seconds of its parts, in each round.
    """
    order, shuffle, start = list(works), random.Random(0), time.monotonic()
    laps: dict[Key, list[list[float]]] = {key: [] for key in works}
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:
            break
        shuffle.shuffle(order)
        for key in order:
            laps[key].append(clock.laps(works[key]))
    return laps


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    budget: float = float("inf"),
    shortest: float = 2e-3,
) -> dict[str, list[float]]:
    """Return for each function the seconds of one run in each round; see `take_turns`.

    A function that takes less than `shortest` seconds is repeated in each round, except where caches are to be cold.
    """
    works, counts = {}, {}
    for name, function in functions.items():
        function()
        (once,) = clock.laps(partial(_repeated, function, 1))
        counts[name] = max(1, round(shortest / max(once, 1e-7))) if clock.flush is None else 1
        works[name] = partial(_repeated, function, counts[name])
    laps = take_turns(works, clock, rounds, budget)
    return {name: [parts[0] / counts[name] for parts in each] for name, each in laps.items()}


def _repeated(function: Callable[[], object], count: int, mark: Mark) -> None:
    mark()
    for _ in range(count):
        function()
    mark()


class Spread(NamedTuple):
    """A median, with the quartiles beside it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float], below: Sequence[float] | None = None) -> Spread:
        """Summarise values, or their ratios to what was measured in the same rounds."""
        quotients = values if below is None else [a / b for a, b in zip(values, below, strict=True)]
        low, median, high = np.quantile(quotients, (0.25, 0.5, 0.75)).tolist()
        return Spread(median, low, high)

    def __str__(self) -> str:
        """Write it with three digits: median [quartiles]."""
        return f"{digits(self.median)} [{digits(self.low)}, {digits(self.high)}]"


def digits(number: float) -> str:
    """Write a number with three digits, and no exponent."""
    return f"{number:.{sum(abs(number) < bound for bound in (100, 10, 1))}f}"


def machine(device: str, threads: int) -> dict[str, Any]:
    """Describe what the numbers are measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    name = models[0] if models else platform.machine()
    on_cuda = torch.device(device).type == "cuda"
    return {
        "cpu": f"{name}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": Clock(device, threads).kind,
    }
