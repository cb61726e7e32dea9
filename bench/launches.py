"""What a step starts on a CUDA device: how many launches, and how long each kernel of it runs.

Kernels that the plain step (SGD's) has, too, are those of the network; what an optimizer adds is the difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from output import table
from timing import digits

SHOWN = 16  # kernels in the table, those that add most
Kernels = dict[str, tuple[int, float]]  # by name: how often, and milliseconds of the device in all


def kernels_of(run: Callable[[], object]) -> Kernels:
    """Return the kernels, copies and fills that a function starts on the device."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]
    return {event.key: (event.count, event.self_device_time_total / 1e3) for event in events}


def launches(kernels: Kernels) -> int:
    """Count the launches."""
    return sum(count for count, _ in kernels.values())


def short(name: str) -> str:
    """Leave out of a kernel's name what says little."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|^void |\s*\([^()]*\)$", "", name)
    return name.replace("|", "/")[:100]


def report(plain: Kernels, by_kind: Mapping[str, Kernels]) -> str:
    """Write what each kind of step adds to the plain step: milliseconds of the device, and launches."""
    names = dict.fromkeys([*plain, *(name for kernels in by_kind.values() for name in kernels)])
    none = (0, 0.0)

    def added(name: str) -> list[float]:
        return [kernels.get(name, none)[1] - plain.get(name, none)[1] for kernels in by_kind.values()]

    def cells(name: str) -> list[str]:
        found = [plain.get(name, none), *(kernels.get(name, none) for kernels in by_kind.values())]
        return [f"{digits(milliseconds)} ({count})" if count else "" for count, milliseconds in found]

    most = sorted(names, key=lambda name: -max(added(name)))[:SHOWN]
    totals = [f"{digits(sum(ms for _, ms in k.values()))} ({launches(k)})" for k in (plain, *by_kind.values())]
    rows: list[Any] = [["all", *totals], *([short(name), *cells(name)] for name in most)]
    return table(["kernels: ms (launches)", "SGD", *by_kind], rows)
