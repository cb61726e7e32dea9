"""Train five networks with `kfac2.KFAC(model)`, nothing tuned, beside AdamW and SGD at four rates each.

AdamW and SGD are drawn at their best rate, which is picked by the final loss of these very runs, and AdamW as it comes
(1e-3) as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from arguments import positive
from matplotlib.axes import Axes
from output import into_place
from rich.progress import track
from untuned import BLOCK, RATES, Job, Record, attempt, best, comparison

TITLES = {
    "mlp-16-relu": "MLP, 16 layers, ReLU, no norm",
    "mlp-12-tanh": "MLP, 12 layers, tanh",
    "cnn-6": "CNN on Fashion-MNIST",
    "autoencoder-8-tanh": "deep autoencoder",
    "transformer": "character model of Python's sources",
}
COLORS = {
    "KFAC(model)": "#d55e00",
    "AdamW(model)": "#999999",
    "AdamW, best of 4": "#0072b2",
    "SGD, best of 4": "#009e73",
}


def jobs(net: str, seeds: int, steps: int) -> list[Job]:
    """Return the runs of a network."""
    result = []
    for seed in range(seeds):
        result.append(Job(net, "kfac2", "default", seed, steps, {}))
        for name in ("adamw", "sgd"):
            result += [Job(net, name, f"{rate:g}", seed, steps, {"lr": rate}) for rate in RATES[name]]
    return result


def curves(records: list[Record]) -> dict[str, list[Record]]:
    """Return what is drawn of one network: by name the runs of all seeds."""

    def of(optimizer: str, label: str) -> list[Record]:
        return [run for run in records if (run["optimizer"], run["label"]) == (optimizer, label)]

    net = records[0]["net"]
    tuned = (best(records, net, optimizer, None) for optimizer in ("adamw", "sgd"))
    groups = (of("kfac2", "default"), of("adamw", "0.001"), *tuned)
    return dict(zip(COLORS, groups, strict=True))


def draw(axes: tuple[Axes, Axes], groups: dict[str, list[Record]]) -> None:
    """Draw medians over seeds, by step above and by time below."""
    for name, runs in groups.items():
        whole = [run for run in runs if not run["diverged"]]
        if not whole:
            continue
        losses = np.median([run["losses"] for run in whole], axis=0)
        steps = BLOCK * (np.arange(len(losses)) + 0.5)
        seconds = np.median([run["seconds"] for run in whole]) * steps / (BLOCK * len(losses))
        label = name if name != "AdamW, best of 4" and name != "SGD, best of 4" else f"{name} ({runs[0]['label']})"
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, losses, color=COLORS[name], label=label, linewidth=2.2 if name == "KFAC(model)" else 1.4)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("seconds (CPU time)")
    axes[1].legend(fontsize=8)


def picture(records: list[Record], nets: Sequence[str], path: Path) -> None:
    """Draw a column for each network."""
    figure, axes = plt.subplots(2, len(nets), figsize=(4 * len(nets), 7), squeeze=False, layout="constrained")
    for net, (above, below) in zip(nets, axes.T, strict=True):
        above.set_title(TITLES[net])
        draw((above, below), curves([record for record in records if record["net"] == net]))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("training loss")
    with into_place(path) as part:
        figure.savefig(part, format="png", dpi=110)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=positive, default=400, help="of each run (default: 400)")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each setting (default: 1)")
    parser.add_argument("--nets", nargs="+", choices=list(TITLES), default=list(TITLES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: demo.png)")
    options = parser.parse_args()
    todo = [job for net in options.nets for job in jobs(net, options.seeds, options.steps)]
    records = [record for job in track(todo, "training") if (record := attempt(job)) is not None]
    print(comparison(records))
    picture(records, options.nets, options.out)
    print(f"\nTraining loss by step and by time: {options.out}")


if __name__ == "__main__":
    main()
