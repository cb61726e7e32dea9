"""What the experiments read from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from arguments import above_zero, below_one, device_name, positive, some_of

from experiments.data import FASHION_MNIST, READERS
from experiments.grid import Grid
from experiments.records import METRICS
from experiments.settings import INVERSES, OPTIMIZERS, SHORTCUTS

RESULTS = Path(__file__).parent.parent / "results"
TITLES = {"deep-linear": "figure 2: the deep linear network", "resnet": "figure 3: a ResNet on images"}


def whole(text: str) -> int:
    """Read a number of at least 0."""
    return 0 if text == "0" else positive(text)


def seed(text: str) -> int:
    """Read a number of at least 0 that a generator can start from."""
    value = whole(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2**32, got {text!r}")
    return value


def list_of(read: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return a reader of a list with commas."""
    return lambda text: list(dict.fromkeys(read(entry.strip()) for entry in text.split(",")))


def milestones(text: str) -> tuple[int, ...]:
    """Read epochs with commas; `none` for none."""
    return () if text == "none" else tuple(sorted(positive(entry.strip()) for entry in text.split(",")))


def rates(text: str) -> dict[str, float]:
    """Read a learning rate for some optimizers, as in `sgd=0.1,adam=1e-3`."""
    result = {}
    for entry in text.split(","):
        name, equals, value = entry.strip().partition("=")
        if name not in OPTIMIZERS or not equals:
            known = ", ".join(OPTIMIZERS)
            raise argparse.ArgumentTypeError(f"must be like sgd=0.1, the name one of {known}, got {entry!r}")
        result[name] = above_zero(value)
    return result


def depth(text: str) -> int:
    """Read the depth of a ResNet."""
    layers = positive(text)
    if layers < 8 or layers % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n + 2 (8, 14, 20, ... 110), got {text!r}")
    return layers


def device(text: str) -> str:
    """Read `cpu` or `cuda`."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    return device_name(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        description="The paper's experiments: run them, search their grids, draw their figures. A command that was "
        "stopped or killed goes on when it is given again; two processes with the same command share its runs."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for problem, title in TITLES.items():
        command = commands.add_parser(problem, help=title, description=title)
        command.set_defaults(problem=problem)
        _add_runs(command, seeds=5)
        _add_problem(command, problem)
        _add_comparison(command)
    command = commands.add_parser("grid", help="the grid search of section 4, for every optimizer alike")
    problems = command.add_subparsers(dest="problem", required=True, metavar="PROBLEM")
    for problem, title in TITLES.items():
        command = problems.add_parser(problem, help=title, description=f"The grid search of {title}")
        _add_runs(command, seeds=1)
        _add_problem(command, problem)
        _add_grid(command)
    command = commands.add_parser("coarse", help="where the gain comes from: the coarse step in a window of steps")
    command.set_defaults(problem="deep-linear")
    _add_runs(command, seeds=5)
    _add_coarse(command)
    for name, title in (("plot", "draw all figures from the records"), ("report", "print all tables from the records")):
        command = commands.add_parser(name, help=title, description=title)
        _add_out(command)
    _add_metric(command)
    return top


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: bench/results)")


def _add_metric(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--by", choices=METRICS, default="train_loss", help="what a grid is won by (default: train_loss)"
    )


def _add_runs(command: argparse.ArgumentParser, seeds: int) -> None:
    _add_out(command)
    command.add_argument("--seeds", type=positive, default=seeds, help=f"runs of each kind (default: {seeds})")
    command.add_argument(
        "--first-seed", type=seed, default=0, metavar="N", help="so that tuned runs see none of their grid's seeds"
    )
    command.add_argument("--epochs", type=positive, help="epochs of each run (default: the paper's)")
    command.add_argument("--train", type=positive, metavar="N", help="training samples (default: all)")
    command.add_argument("--test", type=positive, metavar="N", help="test samples (default: all)")
    command.add_argument(
        "--device", type=device, default="cpu", help="cpu or cuda, without AMP and TF32 (default: cpu)"
    )
    command.add_argument("--threads", type=positive, default=1, help="CPU threads of torch (default: 1)")


def _add_layers(command: argparse.ArgumentParser, problem: str) -> None:
    deep = problem == "deep-linear"
    what = "hidden layers (default: 64)" if deep else "depth, 6n + 2 (default: 110)"
    command.add_argument("--layers", type=positive if deep else depth, help=what)
    what = "units of a layer (default: 10)" if deep else "channels of the first stage (default: 16)"
    command.add_argument("--width", type=positive, help=what)


def _add_problem(command: argparse.ArgumentParser, problem: str) -> None:
    command.add_argument(
        "--optimizers", type=some_of(OPTIMIZERS), default=list(OPTIMIZERS), help=f"some of {', '.join(OPTIMIZERS)}"
    )
    inverses = list(INVERSES) if problem == "deep-linear" else ["cholesky"]
    command.add_argument(
        "--inverses", type=some_of(INVERSES), default=inverses, help=f"of K-FAC (default: {', '.join(inverses)})"
    )
    command.add_argument("--milestones", type=milestones, help="epochs after which the rate is divided by 10, or none")
    command.add_argument("--batch", type=positive, help="samples of a step, for all (default: the paper's)")
    command.add_argument("--cov-every", type=positive, metavar="STEPS", help="steps between statistics")
    command.add_argument("--inv-every", type=positive, metavar="STEPS", help="steps between inverses")
    _add_layers(command, problem)
    if problem == "resnet":
        command.add_argument("--data", choices=READERS, help="the images (default: fashion-mnist)")
        command.add_argument("--folder", type=Path, help=f"where they are (default for fashion-mnist: {FASHION_MNIST})")
        command.add_argument(
            "--shortcut", choices=SHORTCUTS, help="1x1 convolutions (the default), or padding with zeros"
        )
        command.add_argument("--no-augment", action="store_true", help="neither crop nor flip")


def _add_comparison(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rates", type=rates, default={}, help="learning rates other than the paper's: sgd=0.1,adam=1e-3"
    )
    command.add_argument("--tuned", action="store_true", help="take each optimizer's numbers from its grid's winner")
    _add_metric(command)


def _add_coarse(command: argparse.ArgumentParser) -> None:
    _add_layers(command, "deep-linear")
    command.add_argument("--batch", type=positive, help="samples of a step (default: the paper's)")
    command.add_argument(
        "--coarse-from", type=whole, metavar="STEP", help="first step of the window; with neither, four windows are run"
    )
    command.add_argument("--coarse-until", type=whole, metavar="STEP", help="step after the window (default: none)")


def _add_grid(command: argparse.ArgumentParser) -> None:
    _add_metric(command)

    def add(name: str, read: Callable[[str], float], usual: Sequence[float], what: str) -> None:
        shown = ",".join(f"{value:g}" for value in usual)
        command.add_argument(name, type=list_of(read), default=usual, help=f"{what} (default: {shown})")

    add("--etas", above_zero, Grid.rates, "learning rates η")
    add("--momenta", below_one, Grid.momenta, "μ; Adam's β₁")
    add("--dampings", above_zero, Grid.dampings, "λ")
    add("--clips", above_zero, Grid.clips, "κ")
