"""The paper's experiments: run them, search their grids, draw their figures.

Runs leave a line each in OUT/records/<experiment>.jsonl; a run that is recorded there is not done again, and one that
was stopped starts anew. `figures` draws what the records of a folder hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from arguments import add_some, add_where, positive
from experiments import grid, pictures, records, tables
from experiments.data import FASHION_MNIST, READERS
from experiments.runs import run
from experiments.settings import INVERSES, OPTIMIZERS, Settings, coarse, recipe
from output import slug, write
from rich.console import Console
from rich.progress import Progress

FOLDER = Path(__file__).parent
PROBLEMS = ("deep-linear", "resnet")
# Options that replace an entry of the recipe where they are given; the last two for K-FAC only.
ENTRIES = ("epochs", "train", "test", "layers", "width", "batch", "lr", "milestones", "data", "cov_every", "inv_every")


def plan(options: argparse.Namespace) -> tuple[str, list[Settings]]:
    """Return the name of an experiment and its runs, seed by seed: an early stop leaves whole comparisons."""
    name, bases = options.experiment, coarse()
    if name == "coarse" and (options.grid or options.tuned):
        raise ValueError("coarse has no grid: leave out --grid and --tuned")
    if name != "coarse":
        inverses = options.inverses or (list(INVERSES) if name == "deep-linear" else ["cholesky"])
        kinds = [(o, i) for o in options.optimizers for i in (inverses if o.startswith("kfac") else inverses[:1])]
        bases = [recipe(name, *kind) for kind in kinds]
    bases = [_changed(base, options) for base in bases]
    if options.tuned:
        grids = records.load(options.out / f"records/grid-{name}.jsonl")
        name, bases = f"{name}-tuned", [grid.tuned(base, grids) for base in bases]
    if options.grid:
        name, bases = f"grid-{name}", [point for base in bases for point in grid.points(base)]
    seeds = range(options.first_seed, options.first_seed + (options.seeds or (1 if options.grid else 5)))
    return name, [base.of_seed(seed) for seed in seeds for base in bases]


def _changed(base: Settings, options: argparse.Namespace) -> Settings:
    names = ENTRIES if base.is_kfac else ENTRIES[:-2]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given["milestones"] = tuple(given.get("milestones", base.milestones))
    return replace(base, device=options.device, threads=options.threads, **given)


def do(runs: Sequence[Settings], folder: Path, path: Path) -> None:
    """Do those runs that a file does not hold yet, and add them."""
    print(f"{len(runs)} runs; writing to {path}", file=sys.stderr)
    known = {record.settings for record in records.load(path)}
    left = [settings for settings in runs if settings not in known]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(left))
        for settings in left:
            title = f"{settings.label}, seed {settings.seed}"
            step = progress.add_task(f"steps of {title}", total=None)
            record = run(settings, folder, partial(progress.advance, step))
            records.append(path, record)
            progress.remove_task(step)
            progress.advance(bar)
            progress.console.print(f"{title}: training loss {record.values('train_loss')[-1]:.4f}", highlight=False)


def figures(out: Path) -> str:
    """Draw every figure and write every table that a folder has records for; return the tables and what was drawn."""
    found = {path.stem: records.load(path) for path in sorted((out / "records").glob("*.jsonl"))}
    drawn, parts = {}, []
    for ending, what in (("", ""), ("-tuned", ", tuned")):
        linear, resnet = (found.get(problem + ending, []) for problem in PROBLEMS)
        if linear or resnet:
            drawn[f"figure1{ending}"] = partial(pictures.losses, linear + resnet)
        for number, some in ((2, linear), (3, resnet)):
            for title, same in records.networks(some).items():
                drawn[f"figure{number}{ending}-{slug(title)}"] = partial(pictures.accuracies, same)
            parts.append(tables.comparison(some, what))
    parts += [tables.winners(found.get(f"grid-{problem}", [])) for problem in PROBLEMS]
    for title, same in records.networks(found.get("coarse", [])).items():
        drawn[f"coarse-{slug(title)}"] = partial(pictures.windows, same)
    parts.append(tables.windows(found.get("coarse", [])))
    for name, draw in drawn.items():
        draw(out / f"{name}.png")
    text = "\n\n".join(filter(None, parts))
    write(out / "experiments.md", f"# The experiments, from their records\n\n{text}\n")
    return "\n".join([text, *(str(out / f"{name}.png") for name in drawn)])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__)
    add = result.add_argument
    add("experiment", choices=(*PROBLEMS, "coarse", "figures"))
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="the paper's grid search, for every optimizer alike")
    kind.add_argument("--tuned", action="store_true", help="take each optimizer's numbers from its grid's winner")
    add("--out", type=Path, help="folder of results (default: build/results; for figures bench/results)")
    add("--seeds", type=positive, metavar="N", help="runs of each kind (default: 5; 1 of a grid)")
    add("--first-seed", type=int, default=0, metavar="N", help="so that tuned runs see none of their grid's seeds")
    add_some(result, "--optimizers", OPTIMIZERS, list(OPTIMIZERS))
    add("--inverses", nargs="+", choices=INVERSES, help="of K-FAC (default: the paper's)")
    for name in ("--epochs", "--train", "--test", "--layers", "--width", "--batch", "--cov-every", "--inv-every"):
        add(name, type=positive, metavar="N", help="of each run (default: the paper's)")
    add("--lr", type=float, help="for all optimizers that are run (default: the paper's)")
    add("--milestones", type=positive, nargs="*", metavar="N", help="epochs after which the rate is divided by 10")
    add("--data", choices=READERS, help="a ResNet's images (default: fashion-mnist)")
    add("--folder", type=Path, default=FASHION_MNIST, help=f"where they are (default: {FASHION_MNIST})")
    add_where(result)
    return result


def main() -> None:
    """Run a command; one that trains also draws, prints and writes down what there is then."""
    options = parser().parse_args()
    options.out = options.out or (FOLDER / "results" if options.experiment == "figures" else Path("build/results"))
    try:
        if options.experiment != "figures":
            name, runs = plan(options)
            do(runs, options.folder, options.out / f"records/{name}.jsonl")
        elif not any((options.out / "records").glob("*.jsonl")):
            raise ValueError(f"argument --out: {options.out} must hold records, and there are none")
        print(figures(options.out))
    except (ValueError, OSError) as error:
        parser().error(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the run that was not finished")


if __name__ == "__main__":
    main()
