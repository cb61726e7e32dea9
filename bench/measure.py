"""Times in turns, ratios of pairs, tables, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Seconds: of CPU time with one thread on the CPU, else of wall time with the device synchronised.

    CPU time leaves out what other processes take from a shared machine. With several threads it would add
    them up, and on a device it would miss the device.

    Args:
        device: where the work is done.
        threads: of torch on the CPU.
    """

    def __init__(self, device: str | torch.device, threads: int) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._read = time.process_time if threads == 1 and not self._cuda else time.perf_counter
        self.kind = "CPU time" if self._read is time.process_time else "wall time"

    def __call__(self) -> float:
        """Return the seconds so far."""
        if self._cuda:
            torch.cuda.synchronize()
        return self._read()


@dataclass(frozen=True)
class Spread:
    """A median, with the quartiles beside it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise values."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def __str__(self) -> str:
        """Write it with three digits: median [quartiles]."""
        return f"{digits(self.median)} [{digits(self.low)}, {digits(self.high)}]"


def digits(number: float) -> str:
    """Write a number with three digits, and no exponent."""
    places = next((places for bound, places in ((100, 0), (10, 1), (1, 2)) if abs(number) >= bound), 3)
    return f"{number:.{places}f}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide what was measured in the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    budget: float = float("inf"),
    shortest: float = 2e-3,
) -> dict[str, list[float]]:
    """Time functions in turns, in a new order each round, so that drift and neighbours hit all alike.

    Args:
        functions: what to time, by name; each is run once before.
        clock: what is read.
        rounds: at most.
        budget: seconds of wall time, after which no further round starts; three rounds are run in any case.
        shortest: seconds; a function that takes less is repeated in each round.

    Returns:
        For each function the seconds of one run in each round.
    """
    repeats = {}
    for name, function in functions.items():
        function()
        begin = clock()
        function()
        repeats[name] = max(1, round(shortest / max(clock() - begin, 1e-7)))
    order, shuffle = list(functions), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:
            break
        shuffle.shuffle(order)
        for name in order:
            function, count = functions[name], repeats[name]
            begin = clock()
            for _ in range(count):
                function()
            times[name].append((clock() - begin) / count)
    return times


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table whose columns are aligned for reading as it is."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def machine(device: str, threads: int) -> dict[str, Any]:
    """Tell what the numbers were measured on."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    on_cuda = torch.device(device).type == "cuda"
    return {
        "cpu": f"{name}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": Clock(device, threads).kind,
    }


def write(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


@contextmanager
def into_place(path: Path) -> Iterator[Path]:
    """Yield a path of this process's own to write to; what is there then takes the place of `path`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    os.replace(part, path)


def write_json(path: Path, data: object) -> None:
    """Write data as JSON, whole or not at all."""
    write(path, json.dumps(data, indent=1) + "\n")
