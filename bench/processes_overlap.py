"""Whether the sums of an iteration gain from being on their way while others are still packed: two gloo processes.

What is compared adds up the same sums with the same messages, but for their number: `kfac2.exchange` packs all halves of
the factors, and sends one message for each dtype; here each part of the factors is sent as soon as it is packed, and
unpacked while the next is on its way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from networks import NETWORKS
from torch import Tensor, distributed

import kfac2
from kfac2.exchange import exchanged
from kfac2.layout import Layout
from kfac2.processes.group import Group
from kfac2.processes.packing import packed, unpacked
from kfac2.statistics import Sums

BATCH = 16


def early(group: Group, stacks: Sequence[Tensor], parts: int) -> list[Tensor]:
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
        sent.append((bucket, halves, flat, group._begin("all_reduce", "all-reduce", flat)))
    result = []
    for bucket, halves, flat, wait in sent:
        wait()
        pieces = flat.split([half.numel() for half in halves])
        result += [
            unpacked(piece.view(half.shape), stack.shape[-1])
            for stack, half, piece in zip(bucket, halves, pieces, strict=True)
        ]
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


def _measure(rank: int, name: str, repeats: int, path: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make()
    opt = kfac2.KFAC(model)
    x, y = network.sample(BATCH, "cpu")
    begin = time.perf_counter()
    out = model(x)
    opt.accumulate_fisher(network.prediction.distribution(out))
    network.prediction.loss(out, y).backward()
    curvature = opt.curvature
    curvature.iteration.settle()
    whole = time.perf_counter() - begin
    group, layout, sums = curvature.solvers.processes, curvature.layout, curvature.iteration.sums
    assert isinstance(group, Group)
    counts = torch.zeros(5 * len(layout.layers) + 2, dtype=torch.float64)

    def now() -> None:
        exchanged(group, layout, sums, curvature.solvers.coarse, False, (), False)

    def in_parts(parts: int) -> Callable[[], None]:
        def run() -> None:
            wait = group._begin("all_reduce", "all-reduce", counts.clone())
            early(group, stacks_of(layout, sums), parts)
            wait()

        return run

    def only_packing() -> None:
        for stack in stacks_of(layout, sums):
            unpacked(packed(stack), stack.shape[-1])

    ways = {"one message for each dtype": now, "2 parts": in_parts(2), "4 parts": in_parts(4), "packing": only_packing}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            distributed.barrier()
            begin = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begin)
    if rank == 0:
        first = seconds["one message for each dtype"]
        print(f"{name}: forward, backward and sums {1e3 * whole:.0f} ms once; medians of {repeats}, in turns:")
        for way, own in seconds.items():
            ratio = median(a / b for a, b in zip(own, first, strict=True))
            low, high = sorted(own)[len(own) // 4], sorted(own)[3 * len(own) // 4]
            print(f"  {way}: {1e3 * median(own):.2f} ms (quartiles {1e3 * low:.2f} to {1e3 * high:.2f}), x{ratio:.2f}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet-20", choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _measure, (arguments.net, arguments.repeats, folder), nprocs=2, start_method="fork"
        )
