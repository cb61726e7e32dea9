"""The paper's experiments: run them, search their grids, draw their figures. See `--help`."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from experiments import command_line, pictures, tables
from experiments.data import DataError
from experiments.plans import PlanError, plan_of
from experiments.progress import Bars
from experiments.records import Record, RecordError, load_all, networks
from experiments.runs import CheckpointError, run_all
from experiments.tasks import steps_of_epoch
from measure import into_place
from rich.console import Console


def train(options: argparse.Namespace) -> None:
    """Do the runs of a command, or what is left of them."""
    plan = plan_of(options)
    steps = [steps_of_epoch(settings, plan.images) for settings in plan.runs]
    with Bars(plan.runs, steps, Console(stderr=True)) as bars:
        run_all(plan.runs, plan.images, plan.out, bars.start, bars.step, bars.resumed)


def finished(folder: Path) -> list[Record]:
    """Read the finished records of a folder."""
    return [record for record in load_all(folder) if record.is_done]


def slug(title: str) -> str:
    """Make a title part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace(",", "")).strip("-")


def plot(out: Path) -> list[Path]:
    """Draw every figure that there are records for; return their paths."""
    drawn = {}
    for ending in ("", "-tuned"):
        linear, resnet = (finished(out / (problem + ending)) for problem in command_line.TITLES)
        if linear or resnet:
            drawn[f"figure1{ending}"] = partial(pictures.losses, linear + resnet)
        for number, records in ((2, linear), (3, resnet)):
            for title, some in networks(records).items():
                drawn[f"figure{number}{ending}-{slug(title)}"] = partial(pictures.accuracies, some)
    for title, some in networks(finished(out / "coarse")).items():
        drawn[f"coarse-{slug(title)}"] = partial(pictures.windows, some)
    paths = [out / f"{name}.png" for name in drawn]
    for path, draw in zip(paths, drawn.values(), strict=True):
        draw(path)
    return paths


def report(out: Path, metric: str) -> str:
    """Write every table that there are records for."""
    parts = []
    for ending, what in (("", ""), ("-tuned", ", tuned")):
        parts += [tables.comparison(finished(out / (name + ending)), what) for name in command_line.TITLES]
    parts += [tables.winners(finished(out / f"grid-{name}"), metric) for name in command_line.TITLES]
    coarse = finished(out / "coarse")
    return "\n\n".join(part for part in [*parts, tables.windows(coarse) if coarse else ""] if part)


def main() -> None:
    """Run a command; one that trains also draws, prints and writes down what there is then."""
    parser = command_line.parser()
    options = parser.parse_args()
    try:
        if options.command not in ("plot", "report"):
            train(options)
        drawn = [] if options.command == "report" else plot(options.out)
        text = "" if options.command == "plot" else report(options.out, getattr(options, "by", "train_loss"))
        if text:
            with into_place(options.out / "experiments.md") as part:
                part.write_text(f"# The experiments, from their records\n\n{text}\n")
    except (DataError, PlanError, RecordError, CheckpointError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last whole epoch")
    if options.command in ("plot", "report") and not (drawn or text):
        what = "runs, grids left out," if options.command == "plot" else "runs"
        parser.error(f"argument --out: {options.out} must hold finished records of {what} and there are none")
    if text:
        print(text)
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main()
