"""Train a small network on Fashion-MNIST in several processes: `torchrun --nproc-per-node=2 bench/torchrun/train.py`.

Run again, it goes on from its last checkpoint, in as many processes as there are then.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributions import Categorical
from torch.nn.parallel import DistributedDataParallel

import kfac2


def idx(path: Path) -> Tensor:
    """Read one of the data set's files."""
    with gzip.open(path) as file:
        _, axes = struct.unpack(">HxB", file.read(4))
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).reshape(shape)


def data(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) and labels."""
    x = idx(folder / f"{part}-images-idx3-ubyte.gz").unsqueeze(1).float()
    return (x / 255 - 0.29) / 0.35, idx(folder / f"{part}-labels-idx1-ubyte.gz").long()


def network() -> nn.Module:
    """Make a network of three convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to their end, the last one last."""
    return sorted((metadata.parent for metadata in folder.glob("*/.metadata")), key=lambda path: int(path.name))


def save(folder: Path, model: nn.Module, opt: kfac2.KFAC, step: int) -> None:
    """Write a checkpoint to a folder of its own; the ones before it go when it is complete."""
    checkpoint.save({"model": model, "opt": opt.sharded_state()}, checkpoint_id=folder / str(step))
    if distributed.get_rank() == 0:
        for old in complete(folder)[:-1]:
            shutil.rmtree(old)


def as_share(word: str) -> str | float:
    return word if word.isalpha() else float(word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512, help="of all processes together")
    parser.add_argument("--share", default="auto", type=as_share, help="who inverts: all, inverses, gradients, 0.5")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/torchrun"), help="folder")
    options = parser.parse_args()

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = network()
    wrapped = DistributedDataParallel(model)
    opt = kfac2.KFAC(wrapped, share=options.share)
    first = 0
    if found := complete(options.checkpoints):
        checkpoint.load({"model": model, "opt": opt.sharded_state()}, checkpoint_id=found[-1])
        first = int(found[-1].name)

    x, y = data(options.data, "train")
    for step in range(first, options.steps):
        order = torch.Generator().manual_seed(step)  # the same batch in all processes, of which each takes its part
        own = torch.randint(len(x), (options.batch,), generator=order)[rank::size]
        opt.zero_grad()
        out = wrapped(x[own])
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, y[own])
        loss.backward()
        opt.step()
        if (step + 1) % 50 == 0:
            save(options.checkpoints, model, opt, step + 1)
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.3f} on the part of rank 0", flush=True)

    if rank == 0:
        x, y = data(options.data, "t10k")
        with torch.no_grad():
            right = (model(x).argmax(1) == y).double().mean()
        print(f"test accuracy {right:.3f} after {options.steps} steps in {size} processes", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
