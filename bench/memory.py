"""Peak memory of training with each optimizer, and what the second level keeps beside the activations."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import add_where, positive
from contenders import BUILDERS, build
from layer_sets import LayerSet
from networks import NETWORKS, torch_batch
from torch import Tensor

from kfac2 import ops
from kfac2.statistics import MAP_NUMBERS


def _resident(field: str) -> int:
    """Read bytes of this process's own memory: VmRSS now, VmHWM at its highest.

    `resource.getrusage` would do where /proc is missing, but its peak counts the parent's memory from before exec.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def own_peak(net: str, batch: int, name: str, device: str) -> int:
    """Take a step of each kind; return the bytes at the peak beyond network and batch."""
    contender = build(name, NETWORKS[net], device)
    x, y = torch_batch(NETWORKS[net], batch, device)
    on_cuda = x.is_cuda
    before = torch.cuda.memory_allocated() if on_cuda else _resident("VmRSS")
    for prepare in contender.at.values():
        prepare()
        contender.step(x, y, lambda: None)
    return (torch.cuda.max_memory_allocated() if on_cuda else _resident("VmHWM")) - before


def peaks(net: str, batch: int, names: Sequence[str], device: str, threads: int) -> dict[str, float]:
    """Measure each optimizer's peak in a fresh process, in MB; those of other frameworks are left out."""
    result = {}
    for name in names:
        if name in BUILDERS:
            command = [sys.executable, __file__, "--net", net, "--batch", str(batch), "--optimizer", name]
            where = ["--device", device, "--threads", str(threads)]
            done = subprocess.run([*command, *where], check=True, capture_output=True, text=True)
            result[name] = json.loads(done.stdout.splitlines()[-1]) / 1e6
    return result


def activations(net: str, batch: int, device: str = "cpu") -> int:
    """Count the bytes that a forward pass saves for its backward pass, parameters left out, each storage once."""
    network = NETWORKS[net]
    model = network.make().to(device)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, y = torch_batch(network, batch, device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network.loss(model(x), y)
    sizes = [tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own]
    del loss
    return sum(sizes)


def second_level(net: str, batch: int, device: str = "cpu") -> dict[str, Any]:
    """Count the bytes of maps that are alive at a time, and of the matrices that stay, beside the activations.

    Maps of inputs and of gradients come one after the other, and of large batches a share of the samples at a time.
    """
    layers = LayerSet(net, batch, device)
    maps = ops.layer_maps(layers.inputs, layers.input_windows)  # those of gradients are as large
    map_bytes = min(sum(values.untyped_storage().nbytes() for values in maps), MAP_NUMBERS * maps[0].element_size())
    matrices = 2 * 2 + 1  # two matrices of raw sums, their averages, the coarse inverse
    kept = map_bytes + matrices * len(layers.shapes) ** 2 * maps[0].element_size()
    saved = activations(net, batch, device)
    return {"net": net, "batch": batch, "maps_and_sums": kept, "activations": saved, "share": kept / saved}


def main() -> None:
    """Print the peak of one optimizer, in bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=NETWORKS, required=True)
    parser.add_argument("--batch", type=positive, required=True)
    parser.add_argument("--optimizer", choices=BUILDERS, required=True)
    add_where(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(own_peak(args.net, args.batch, args.optimizer, args.device))


if __name__ == "__main__":
    main()
