"""Who inverts where nobody has said it: by what inverting and sending take here, which all processes measure once."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from kfac2.division import owners_of, work_of
from kfac2.fine import Damping, FineSolver
from kfac2.inverses import Solvers
from kfac2.layout import Layout
from kfac2.processes import Processes
from kfac2.sent_fields import sent_bytes
from kfac2.triangles import packed, packed_shape, unpacked

LITTLE = 1e7
"""Σ n³ below which nothing is measured: a CPU inverts it in milliseconds, which a few messages take, too."""
LONG_ENOUGH = (
    2.5e-3  # seconds of an inverse whose rate is taken: one of twice as many rows takes up to eight times this
)
FEWEST_ROWS = 128
MATRICES, ROWS = 2, 512  # that are sent to see how fast that goes
TRIES = 2  # the fastest counts: what else a machine does makes it slower only


class Measured(NamedTuple):
    """What the slowest of all processes has measured.

    Attributes:
        cube: seconds that inverting takes for each n³.
        byte: seconds that sending takes for each byte, to all, and the copies that are made for it.
        message: seconds of a message of a few bytes.
    """

    cube: float
    byte: float
    message: float


class Costs(NamedTuple):
    """Seconds of an update of inverses.

    Attributes:
        alone: each process inverts everything.
        share: each inverts its own share.
        sending: what it sends for that.
    """

    alone: float
    share: float
    sending: float

    @property
    def best(self) -> str:
        """The share that takes least."""
        return "inverses" if self.share + self.sending < self.alone else "all"


def settle_share(solvers: Solvers, layout: Layout, dtype: torch.dtype | None) -> None:
    """Fix who inverts; all processes call it together, and come to the same.

    Args:
        solvers: fine, the processes, and the division of the work among them.
        layout: of the layers.
        dtype: the factors are inverted in; None: their own.
    """
    division, fine, processes = solvers.division, solvers.fine, solvers.processes
    share, work = division.share, sum(map(work_of, layout.layers))
    if share != "auto":
        division.settle(share, "as asked")
    elif work < LITTLE:
        division.settle("all", f"Σ n³ of {work:.2g} is too little to be shared out")
    else:
        measured = measure(processes, layout, fine, dtype)
        costs = costs_of(layout, fine, processes.size, measured)
        times = [f"{1e3 * seconds:.3g} ms" for seconds in costs]
        division.settle(
            costs.best,
            f"inverting everything takes {times[0]}, a share {times[1]} and sending {times[2]}, "
            f"at Σ n³ of {1 / measured.cube:.2g} and {1e-6 / measured.byte:.3g} MB a second, measured",
        )


def costs_of(layout: Layout, fine: FineSolver, size: int, measured: Measured) -> Costs:
    """Return what an update of inverses takes by who inverts.

    Args:
        layout: of the layers.
        fine: the solver.
        size: how many processes there are.
        measured: of them.
    """
    work = [work_of(layer) for layer in layout.layers]
    owners = owners_of(work, size)
    loads = [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in set(owners)]
    sending = sent_bytes(layout, fine) * measured.byte + (len(loads) + 1) * measured.message
    return Costs(sum(work) * measured.cube, max(loads) * measured.cube, sending)


def measure(processes: Processes, layout: Layout, fine: FineSolver, dtype: torch.dtype | None) -> Measured:
    """Measure, and take the slowest process's numbers: so all have the same. Some 30 ms of a CPU."""
    cube = _seconds_of_cube(layout, fine, dtype)
    message, byte = _seconds_of_sending(processes, layout, fine)
    own = {"cube": cube, "byte": byte, "message": message}
    told = processes.meet("share", dict, own).numbers
    return Measured(*(max(told[name]) for name in Measured._fields))


def _seconds_of_cube(layout: Layout, fine: FineSolver, dtype: torch.dtype | None) -> float:
    """Invert a pair of more and more rows, until that takes long enough to tell, or no factor has more."""
    most = max(max(batch.d_in, batch.d_out) for batch in layout.batches)
    rows = min(FEWEST_ROWS, most)
    while True:
        factor = torch.full((1, rows, rows), 0.1, dtype=dtype or layout.dtype, device=layout.device)
        factor.diagonal(dim1=1, dim2=2).add_(1)
        invert = partial(fine.invert, [factor], [factor], Damping(0.1))
        seconds = min(_seconds(layout.device, invert) for _ in range(TRIES))
        if seconds > LONG_ENOUGH or rows == most:
            return seconds / (2 * rows**3)
        rows = min(2 * rows, most)


def _seconds_of_sending(processes: Processes, layout: Layout, fine: FineSolver) -> tuple[float, float]:
    """Return seconds of a small message, and for each byte of a large one, each until all have it.

    Whoever inverts a share also gathers its factors and last inverses, packs the new ones, and unpacks all: copies that
    take as long as what is sent within a machine does.
    """
    stack = torch.zeros(MATRICES, ROWS, ROWS, dtype=layout.dtype, device=layout.device)
    flag = torch.zeros(1, dtype=torch.float64, device=layout.device)
    is_packed = len(fine.symmetric) > 0

    def meet() -> object:
        return processes.added("a number, to see how long that takes", [flag])

    def send() -> int:
        _, new = stack.clone(), stack.clone()
        flat = (packed(new) if is_packed else new).flatten()
        processes.send("matrices, to see how long that takes", flat, 0)()
        stack.copy_(unpacked(flat.view(MATRICES, *packed_shape(ROWS)), ROWS) if is_packed else flat.view_as(stack))
        meet()
        return flat.nbytes

    size = send()  # connections are made
    small = min(_seconds(layout.device, meet) for _ in range(TRIES))
    large = min(_seconds(layout.device, send) for _ in range(TRIES))
    return small, max(large - small, large / 10) / size


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    """Return how long something takes, the device's work with it."""
    _wait_for(device)
    begin = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
