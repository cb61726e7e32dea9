"""Memory of the process that has most, by strategy, in bytes of live tensors (`memory.Meter`), beside the plan's."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from arguments import add_some, positive
from memory import KINDS, Meter
from networks import NETWORKS
from output import table
from processes_plan import FLOAT, Share, Work, factors_of, held, held_by, holders_of, shares_of
from torch import distributed, nn

import kfac2

NETS = ("transformer", "resnet-20")
BATCH = 16
PEAKS = [f"peak, {kind}, MB" for kind in KINDS]
HEADER = ["network", "processes", "share", "factors and inverses, MB", "planned, MB", *PEAKS]


def planned(work: Work, share: Share, processes: int) -> float:
    """Return bytes of factors and inverses of the process that has most."""
    columns = processes // holders_of(share, processes)
    return FLOAT * (sum(map(factors_of, work.layers)) + max(held(work, processes, columns, held_by)))


def measured(name: str, share: Share, processes: int) -> dict[str, float]:
    """Train, and return the most bytes that a process has: `held` at the end, peaks by kind of step, and the plan's."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (name, share, processes, folder)
        torch.multiprocessing.start_processes(_train, arguments, nprocs=processes, start_method="fork")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return {key: max(one[key] for one in found) for key in found[0]}


def _train(rank: int, name: str, share: Share, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
    network, meter = NETWORKS[name], Meter()
    gc.collect()
    with meter.counting():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(network.make())
        torch.manual_seed(1 + rank)
        x, y = network.sample(BATCH, "cpu")
        opt = kfac2.KFAC(
            model, share=share, burn_in=0, kl_bound=None,
            cov_every=lambda k: 1 if k in (0, 2, 3) else 10**6, inv_every=lambda k: 1 if k in (0, 3) else 10**6,
        )  # fmt: skip
        for kind in ("first", *KINDS):
            with meter.part(kind):
                opt.zero_grad()
                out = model(x)
                opt.accumulate_fisher(network.prediction.distribution(out))
                network.prediction.loss(out, y).backward()
                opt.step()
        del out
    averages, inverses = opt.curvature.averages, opt.curvature.inverses
    assert inverses is not None
    fields = [stack for stacks in inverses.fields.values() for stack in stacks]
    work = Work(name, [layer.matrix_shape for layer in opt.curvature.layout.layers], opt.summary().parameters)
    result: dict[str, float] = {kind: meter.peaks[kind] for kind in KINDS}
    result["held"] = sum(stack.nbytes for stack in [*averages.A, *averages.G, *fields])
    result["planned"] = planned(work, share, processes)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    del model, opt
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def told(nets: Sequence[str], sizes: Sequence[int]) -> str:
    """Measure, and write the table."""
    rows = []
    for name in nets:
        for processes in sizes:
            for share in shares_of(processes):
                found = measured(name, share, processes)
                numbers = [found[key] for key in ("held", "planned", *KINDS)]
                rows.append([name, str(processes), str(share), *(f"{number / 1e6:.2f}" for number in numbers)])
    return table(HEADER, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--nets", NETWORKS, NETS)
    parser.add_argument("--processes", nargs="*", type=positive, default=[2, 4])
    options = parser.parse_args()
    print(told(options.nets, options.processes))
