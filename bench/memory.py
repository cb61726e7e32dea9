"""Peaks of memory: SGD's step, K-FAC's kinds of steps, and a refresh of inverses, in bytes of live tensors.

What torch's allocator hands out is counted from its own events, not what the process holds: the same on every run and
machine, and the temporaries inside of torch's functions are in it. Native ops keep a few matrices of scratch of their
own on a CPU, which are not.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import add_some, positive
from networks import BasicBlock, ResNet, initialised
from output import table, write
from torch import Tensor, nn
from torch.distributions import Categorical

import kfac2.estimates

KINDS = ("ordinary", "statistics", "statistics and inverses")
SETTINGS: dict[str, dict[str, Any]] = {
    "one level": {"kl_bound": None},
    "default": {},
    "two levels": {"levels": 2},
    "eigh": {"kl_bound": None, "inverse": "eigh"},
}


def resnet_18() -> nn.Module:
    """ResNet-18 for small images: widths 64 to 512, whose largest factors have 4,608 rows."""
    blocks, before = [], 64
    for width in (64, 128, 256, 512):
        blocks += [BasicBlock(before, width, 1 if width == 64 else 2), BasicBlock(width, width, 1)]
        before = width
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETS: Mapping[str, Callable[[], nn.Module]] = {"resnet-110": lambda: ResNet(110), "resnet-18": resnet_18}


class Meter:
    """Counts live bytes while `counting` is open, and their peak in each part that `part` has named."""

    def __init__(self) -> None:
        self.begins: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from here on: tensors that were there before are none."""
        with torch.profiler.profile(profile_memory=True) as profile:
            yield
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        live, open_parts = 0, [e for e in events if e.name().startswith("part: ")]
        for event in events:
            if event.name() == "[memory]":
                live += event.nbytes()
                for one in open_parts:
                    if one.start_ns() <= event.start_ns() <= one.start_ns() + one.duration_ns():
                        name = one.name().removeprefix("part: ")
                        self.begins.setdefault(name, live - event.nbytes())
                        self.peaks[name] = max(self.peaks.get(name, 0), live)

    @staticmethod
    def part(name: str) -> torch.profiler.record_function:
        """Open a part."""
        return torch.profiler.record_function(f"part: {name}")


def measured(net: str, batch: int, settings: Mapping[str, Any] | None) -> dict[str, int]:
    """Measure an optimizer: SGD, or K-FAC with `settings`.

    Returns:
        Peaks of each kind of step; of K-FAC also `held` (factors and inverses), and `refresh above`: by how much a
        refresh of inverses goes above what was live before it.
    """
    gc.collect()  # what the last optimizer left in cycles would be freed in the middle of the count
    meter = Meter()
    with meter.counting():
        torch.manual_seed(0)
        model = initialised(NETS[net](), torch.Generator().manual_seed(0))
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        if settings is None:
            opt: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            kinds = ["first", "step"]
        else:
            opt = kfac2.KFAC(
                model, lr=1e-3, momentum=0.9, burn_in=0, rest="sgd",
                cov_every=lambda k: 1 if k in (0, 2, 3) else 10**6, inv_every=lambda k: 1 if k in (0, 3) else 10**6,
                **settings,
            )  # fmt: skip
            kinds = ["first", *KINDS]
        for kind in kinds:
            with meter.part(kind), _refreshes_as(meter, f"refresh of {kind}"):
                _step(model, opt, x, y, settings is not None)
    numbers = {kind: meter.peaks[kind] for kind in kinds[1:]}
    if settings is not None:
        curvature = opt.curvature
        stacks = [*curvature.averages.A, *curvature.averages.G, *curvature.inverses.tensors()]
        numbers["held"] = sum(stack.numel() * stack.element_size() for stack in stacks)
        numbers["refresh above"] = meter.peaks[f"refresh of {kinds[-1]}"] - meter.begins[f"refresh of {kinds[-1]}"]
    return numbers


def _step(model: nn.Module, opt: Any, x: Tensor, y: Tensor, is_kfac: bool) -> None:
    opt.zero_grad()
    output = model(x)
    if is_kfac:
        opt.accumulate_fisher(Categorical(logits=output))
    F.cross_entropy(output, y).backward()
    opt.step()


@contextmanager
def _refreshes_as(meter: Meter, name: str) -> Iterator[None]:
    """Make each refresh of inverses a part of that name."""
    inverted = kfac2.estimates.inverted

    def in_part(*args: Any, **kwargs: Any) -> Any:
        with meter.part(name):
            return inverted(*args, **kwargs)

    kfac2.estimates.inverted = in_part
    try:
        yield
    finally:
        kfac2.estimates.inverted = inverted


def _told(net: str, name: str, numbers: Mapping[str, int], sgd: int) -> list[str]:
    """Return a row of the record, in MB, and as shares."""
    peaks = [f"{numbers[kind] / 1e6:.0f} ({numbers[kind] / sgd:.2f})" for kind in KINDS]
    above = numbers["refresh above"]
    return [net, name, *peaks, f"{numbers['held'] / 1e6:.0f}", f"{above / 1e6:.0f} ({above / numbers['held']:.2f})"]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=128, help="of ResNet-110; a quarter of it for ResNet-18")
    parser.add_argument("--out", type=Path, help="where to write (default: print only)")
    add_some(parser, "--settings", SETTINGS, list(SETTINGS))
    add_some(parser, "--nets", NETS, list(NETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for net in arguments.nets:
        batch = arguments.batch if net == "resnet-110" else max(1, arguments.batch // 4)
        sgd = measured(net, batch, None)["step"]
        for name in arguments.settings:
            rows.append(
                _told(f"{net}, batch {batch}, SGD {sgd / 1e6:.0f}", name, measured(net, batch, SETTINGS[name]), sgd)
            )
            print(*rows[-1], sep=" | ", flush=True)
    header = ["network", "setting", *KINDS, "factors and inverses", "a refresh, above what was there"]
    if arguments.out is not None:
        write(arguments.out, table(header, rows) + "\n")


if __name__ == "__main__":
    main()
