"""Whether the sums of an iteration gain from being on their way while others are still packed: two gloo processes.

The same sums are added up in two ways. `kfac2.exchange` packs all halves of the factors, and sends one message for
each dtype. The other way sends each part of the factors as soon as it is packed, and unpacks it while the next one is
on its way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from arguments import add_some, positive
from networks import NETWORKS
from output import table
from torch import Tensor, distributed

import kfac2
from kfac2.exchange import exchanged
from kfac2.layout import Layout
from kfac2.processes.packing import packed, unpacked
from kfac2.statistics import Sums

BATCH = 16
NETS = ("resnet-20", "transformer")
FIRST = "one message for each dtype (as it is)"
HEADER = ["network", "way", "ms, median", "over the first: median, quartiles"]


def early(stacks: Sequence[Tensor], parts: int) -> list[Tensor]:
    """Add up symmetric matrices in so many parts, each on its way while the next is packed."""
    most = sum(stack.numel() for stack in stacks) / parts
    buckets: list[list[Tensor]] = [[]]
    for stack in stacks:
        if sum(own.numel() for own in buckets[-1]) >= most:
            buckets.append([])
        buckets[-1].append(stack)
    sent = []
    for bucket in buckets:
        halves = [packed(stack) for stack in bucket]
        flat = torch.cat([half.reshape(-1) for half in halves])
        sent.append((bucket, halves, flat, distributed.all_reduce(flat, async_op=True)))
    result = []
    for bucket, halves, flat, work in sent:
        work.wait()
        pieces = flat.split([half.numel() for half in halves])
        for stack, half, piece in zip(bucket, halves, pieces, strict=True):
            result.append(unpacked(piece.view(half.shape), stack.shape[-1]))
    return result


def stacks_of(layout: Layout, sums: Sums) -> list[Tensor]:
    """Return both factors' sums by batch, as `exchanged` lays them out."""
    result = []
    for side, own in (("d_in", sums.A), ("d_out", sums.G)):
        stacks = layout.stacks(lambda batch, side=side: (getattr(batch, side),) * 2)  # type: ignore[misc]
        views = layout.views(stacks)
        torch._foreach_copy_([views[layout.number(layer)] for layer in own], list(own.values()))
        result += stacks
    return result


def _ways(opt: kfac2.KFAC) -> dict[str, Callable[[], object]]:
    curvature = opt.curvature
    layout, sums, processes = curvature.layout, curvature.iteration.sums, curvature.solvers.processes
    counts = torch.zeros(5 * len(layout.layers) + 2, dtype=torch.float64)
    flat = torch.cat([packed(stack).reshape(-1) for stack in stacks_of(layout, sums)])

    def in_parts(parts: int) -> list[Tensor]:
        work = distributed.all_reduce(counts.clone(), async_op=True)
        result = early(stacks_of(layout, sums), parts)
        work.wait()
        return result

    return {
        FIRST: lambda: exchanged(processes, layout, sums, curvature.solvers.coarse, False, (), False),
        "2 parts": lambda: in_parts(2),
        "4 parts": lambda: in_parts(4),
        "nothing but packing and unpacking": lambda: [
            unpacked(packed(stack), stack.shape[-1]) for stack in stacks_of(layout, sums)
        ],
        "nothing but the message": lambda: distributed.all_reduce(flat.clone()),
    }


def _measure(rank: int, name: str, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make()
    opt = kfac2.KFAC(model)
    x, y = network.sample(BATCH, "cpu")
    out = model(x)
    opt.accumulate_fisher(network.prediction.distribution(out))
    network.prediction.loss(out, y).backward()
    opt.curvature.iteration.settle()
    ways = _ways(opt)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            distributed.barrier()
            begin = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begin)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(seconds))
    distributed.barrier()
    distributed.destroy_process_group()


def told(nets: Sequence[str], repeats: int) -> str:
    """Measure, and write the table."""
    rows = []
    for name in nets:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(_measure, (name, repeats, folder), nprocs=2, start_method="fork")
            seconds = json.loads(Path(folder, "seconds").read_text())
        for way, own in seconds.items():
            low, middle, high = quantiles([a / b for a, b in zip(own, seconds[FIRST], strict=True)])
            rows.append([name, way, f"{1e3 * median(own):.3g}", f"{middle:.2f}, {low:.2f} to {high:.2f}"])
    return table(HEADER, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_some(parser, "--nets", NETWORKS, NETS)
    parser.add_argument("--repeats", type=positive, default=200)
    options = parser.parse_args()
    print(told(options.nets, options.repeats))
