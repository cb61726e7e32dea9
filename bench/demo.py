"""Train a deep linear network and a small ResNet with SGD, Adam, one- and two-level K-FAC; draw the losses.

K-FAC's settings on the deep linear network are the paper's; the other learning rates were the best of two or three.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from arguments import device_name, positive
from experiments import pictures, tables
from experiments.runs import run
from experiments.settings import OPTIMIZERS, Settings, recipe
from rich.progress import track


def settings_of(optimizer: str) -> list[Settings]:
    """Return the settings of both networks."""
    linear, digits = recipe("deep-linear", optimizer), recipe("resnet", optimizer)
    digits = replace(digits, layers=8, data="digits", milestones=(), batch=64)
    if optimizer == "sgd":
        return [replace(linear, lr=0.1), replace(digits, lr=0.1)]
    if optimizer == "adam":
        return [linear, replace(digits, lr=3e-3)]
    return [linear, replace(digits, damping=1e-2, cov_every=5, inv_every=20)]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=positive, default=10, help="epochs of each run (default: 10)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each optimizer (default: 3)")
    parser.add_argument("--device", type=device_name, default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: demo.png)")
    options = parser.parse_args()
    runs = [
        replace(settings, seed=seed, epochs=options.epochs, device=options.device)
        for seed in range(options.seeds)
        for optimizer in OPTIMIZERS
        for settings in settings_of(optimizer)
    ]
    found = [run(settings) for settings in track(runs, "training")]
    print(tables.comparison(found))
    pictures.losses(found, options.out, pictures.medians)
    print(f"\nTraining loss by epoch and by time: {options.out}")


if __name__ == "__main__":
    main()
