"""Bytes that go over the loopback device as processes train, by kind of step; nothing else may use it meanwhile.

Run by `processes.py`, where it can in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from networks import NETWORKS
from torch import distributed, nn

import kfac2

STEPS = 16
BATCH = 16


def counted(name: str, share: str | float, processes: int) -> dict[str, Any]:
    """Train, and return bytes that one process sends in the mean, by kind of step; and what else is to be told."""
    command = [sys.executable, __file__, name, str(share), str(processes)]
    can_unshare = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    if can_unshare:
        command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise RuntimeError(f"counting failed: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _bytes() -> int:
    """Return what the loopback device has sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("there is no loopback device")


def _between() -> int:
    """Let all processes arrive, and what they sent be counted; return the count."""
    distributed.barrier()
    return _bytes()


def _built(name: str, share: str | float | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(NETWORKS[name].make())
    if share is None:
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, kfac2.KFAC(model, share=share, burn_in=0)


def _train(rank: int, name: str, share: str | float, processes: int, path: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=processes)
    model, opt = _built(name, share)
    sgd_model, sgd = _built(name, None)
    assert isinstance(opt, kfac2.KFAC)
    network = NETWORKS[name]
    counts: dict[str, list[float]] = defaultdict(list)
    torch.manual_seed(1 + rank)
    x, y = network.sample(BATCH, "cpu")
    for step in range(STEPS):
        kind = "inverses" if step % 10 == 0 else "statistics" if step % 5 == 0 else "ordinary"
        begin = time.process_time()
        sgd.zero_grad()
        network.prediction.loss(sgd_model(x), y).backward()
        sgd.step()
        of_sgd = time.process_time() - begin
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(network.prediction.distribution(out))
        empty = _between()
        before = _between()
        network.prediction.loss(out, y).backward()
        after_backward = _between()
        opt.step()
        after = _between()
        if step:
            counts["gradients"].append(after_backward - before - (before - empty))
            counts[kind].append(after - after_backward - (before - empty))
            counts[f"{kind}, time over SGD's"].append((time.process_time() - begin - of_sgd) / of_sgd)
    if rank == 0:
        result: dict[str, object] = {
            key: median(values) / (1 if "time" in key else processes) for key, values in counts.items()
        }
        result["layers"] = [layer.matrix_shape for layer in opt.curvature.layout.layers]
        result["parameters"] = opt.summary().parameters
        print(json.dumps(result), flush=True)
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("share", type=lambda word: word if word.isalpha() else float(word))
    parser.add_argument("processes", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _train,
            (arguments.name, arguments.share, arguments.processes, folder),
            nprocs=arguments.processes,
            start_method="fork",
        )
