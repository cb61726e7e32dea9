"""Train a deep linear network and a small ResNet with SGD, Adam, one- and two-level K-FAC; draw the losses."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import torch
from arguments import device_name, positive
from problems import Problem, deep_linear, digits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from training import Epoch, MakeOptimizer, train

import kfac2

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# K-FAC's settings on the deep linear network are the paper's, and Adam's rate there was not tuned; the other
# learning rates were the best of two or three.
_PAPER = {
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "damping": 1e-2,
    "kl_clip": 1e-3,
    "cov_every": 10,
    "inv_every": 100,
    "inverse": "eigh",
}
_SMALL = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-3, "damping": 1e-2, "cov_every": 5, "inv_every": 20}

Problems = dict[str, tuple[Callable[[int], Problem], dict[str, MakeOptimizer]]]
Runs = dict[str, list[list[Epoch]]]  # by optimizer, one list of epochs for each seed

PROBLEMS: Problems = {
    "Deep linear network": (
        deep_linear,
        {
            "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
            "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3),
            "K-FAC, one level": lambda m: kfac2.KFAC(m, levels=1, **_PAPER),  # type: ignore[arg-type]
            "K-FAC, two levels": lambda m: kfac2.KFAC(m, **_PAPER),  # type: ignore[arg-type]
        },
    ),
    "ResNet-8 on handwritten digits": (
        digits,
        {
            "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
            "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=3e-3),
            "K-FAC, one level": lambda m: kfac2.KFAC(m, levels=1, **_SMALL),  # type: ignore[arg-type]
            "K-FAC, two levels": lambda m: kfac2.KFAC(m, **_SMALL),  # type: ignore[arg-type]
        },
    ),
}
# Okabe and Ito's colours, told apart by colour-blind readers; line styles beside them for print.
STYLES = {
    "SGD": ("#999999", ":"),
    "Adam": ("#E69F00", "-."),
    "K-FAC, one level": ("#56B4E9", "--"),
    "K-FAC, two levels": ("#D55E00", "-"),
}


def run_all(epochs: int, seeds: int, device: str, console: Console) -> dict[str, Runs]:
    """Train everything, with one progress bar for each optimizer and problem."""
    columns = [TextColumn("{task.description:<38}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()]
    results: dict[str, Runs] = {}
    with Progress(*columns, console=console) as progress:
        for title, (make_problem, optimizers) in PROBLEMS.items():
            results[title] = {}
            for name, make_optimizer in optimizers.items():
                problem = make_problem(0)
                steps = -(-len(problem.train[0]) // problem.batch) * epochs * seeds
                bar = progress.add_task(f"{title.split(' on ')[0]}: {name}", total=steps)
                step = partial(progress.advance, bar)
                results[title][name] = [
                    list(train(make_problem(seed), make_optimizer, epochs, seed, device, step)) for seed in range(seeds)
                ]
    return results


def table_of(title: str, runs: Runs) -> Table:
    """Return the last epoch of each optimizer: medians over seeds."""
    table = Table(
        Column("optimizer", no_wrap=True),
        "train loss",
        "train acc.",
        "test loss",
        "test acc.",
        "seconds",
        title=title,
    )
    for name, seeds in runs.items():
        last = [epochs[-1] for epochs in seeds]
        numbers = [
            f"{statistics.median(getattr(epoch, field) for epoch in last):{spec}}"
            for field, spec in (
                ("train_loss", ".4f"),
                ("train_accuracy", ".1%"),
                ("test_loss", ".4f"),
                ("test_accuracy", ".1%"),
                ("seconds", ".1f"),
            )
        ]
        table.add_row(name, *numbers)
    return table


def draw(results: dict[str, Runs], path: Path) -> None:
    """Draw training loss by epoch: the median over seeds, and a band from the least to the greatest."""
    figure, axes = plt.subplots(1, len(results), figsize=(11, 4.2), constrained_layout=True)
    for axis, (title, runs) in zip(axes, results.items(), strict=True):
        for name, seeds in runs.items():
            losses = torch.tensor([[epoch.train_loss for epoch in epochs] for epochs in seeds])
            epochs_axis = range(1, losses.shape[1] + 1)
            colour, line = STYLES[name]
            axis.plot(epochs_axis, losses.median(0).values, color=colour, linestyle=line, linewidth=2, label=name)
            axis.fill_between(epochs_axis, losses.amin(0), losses.amax(0), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="epoch", ylabel="training loss", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=positive, default=10, help="epochs of each run (default: 10)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each optimizer (default: 3)")
    parser.add_argument("--device", type=device_name, default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: demo.png)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    console = Console()
    results = run_all(arguments.epochs, arguments.seeds, arguments.device, console)
    console.print(f"\nEpoch {arguments.epochs}, medians over {arguments.seeds} seeds; seconds of training.")
    for title, runs in results.items():
        console.print(table_of(title, runs))
    draw(results, arguments.out)
    console.print(f"Training loss by epoch: {arguments.out}")


if __name__ == "__main__":
    main()
