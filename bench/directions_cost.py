"""What the space of directions costs: whole steps beside one level's, and each of its parts.

All variants take turns in one process, each with a model of its own, in iterations that are neither of statistics nor
of inverses, which cost the same for all. Ratios are of one round, to one level's ordinary step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import add_some, positive
from output import table, write
from study_problems import PROBLEMS, StudyProblem
from timing import Clock, Mark, Spread, configure, machine, take_turns
from torch import Tensor, nn

import kfac2
from kfac2.directed import PER_LAYER

USUAL = ["autoencoder-1024", "autoencoder-8192", "tanh-13", "relu-16-256", "relu-16-2048", "cnn-12", "transformer"]
PARTS = ("statistics", "forward", "backward", "step")
BETWEEN = 3  # an iteration in which neither statistics nor inverses are due


@dataclass
class Variant:
    """An optimizer with a model and a batch of its own."""

    problem: StudyProblem
    model: nn.Module
    x: Tensor
    y: Tensor
    optimizer: kfac2.KFAC
    has_own_pass: bool
    is_left: bool = False  # noise is taken to be large: its steps are one level's

    @staticmethod
    def of(name: str, samples: int | None, has_own_pass: bool, is_left: bool = False, **settings: Any) -> Variant:
        """Build one, and take steps until all state is there."""
        problem = PROBLEMS[name]
        torch.manual_seed(0)
        model = problem.make()
        x, y = problem.draw(problem.batch, torch.Generator().manual_seed(0))
        settings = {"lr": 1e-3, "cov_every": 10, "inv_every": 10, "coarse_samples": samples, **settings}
        variant = Variant(problem, model, x, y, kfac2.KFAC(model, **settings), has_own_pass, is_left)
        for iteration in (0, 1, 2):
            variant.optimizer.preconditioner.iteration = iteration
            variant.step(lambda: None)
        return variant

    def between(self, mark: Mark) -> None:
        """Take an ordinary step."""
        signal = self.optimizer._whole_step.directed.signal
        signal.is_new, signal.is_on, signal._measured = False, not self.is_left, []
        self.optimizer.preconditioner.iteration = BETWEEN
        self.step(mark)

    def step(self, mark: Mark) -> None:
        """Take a step; `mark` is called at the start and after each of `PARTS`."""
        distribution = self.problem.prediction.distribution
        self.optimizer.zero_grad()
        mark()
        if self.has_own_pass:
            self.optimizer.accumulate_fisher(lambda part: distribution(self.model(self.x[part])), samples=len(self.x))
        mark()
        out = self.model(self.x)
        mark()
        self.problem.prediction.loss(out, self.y).backward(retain_graph=not self.has_own_pass)
        mark()
        if not self.has_own_pass:
            self.optimizer.accumulate_fisher(distribution(out))
        self.optimizer.step()
        mark()


def variants(name: str, layers: int) -> dict[str, Callable[[], Variant]]:
    """Return what is compared on a problem, one level first; a pass of its own where the batch is large enough."""
    batch, usual = PROBLEMS[name].batch, PER_LAYER * layers
    of = partial(Variant.of, name)
    result: dict[str, Callable[[], Variant]] = {
        "one level": partial(of, None, False),
        "left for noise": partial(of, None, False, True, coarse="directions"),
        "rows of the whole batch": partial(of, batch, False, coarse="directions"),
        f"rows of {min(usual, batch)} samples": partial(of, usual, False, coarse="directions"),
    }
    for count in (usual // 2, usual):
        if count < batch:
            result[f"a pass of its own of {count} samples"] = partial(of, count, True, coarse="directions")
    return result


def measure(name: str, rounds: int) -> str:
    """Measure one problem; return its table."""
    layers = len(kfac2.KFAC(PROBLEMS[name].make()).layers)
    made = {title: make() for title, make in variants(name, layers).items()}
    laps = take_turns({title: variant.between for title, variant in made.items()}, Clock("cpu", 1), rounds)
    below = [sum(parts) for parts in laps["one level"]]
    rows = []
    for title, each in laps.items():
        parts = [f"{Spread.of([lap[i] for lap in each], below).median:.2f}" for i in range(len(PARTS))]
        rows.append([title, str(Spread.of([sum(lap) for lap in each], below)), *parts])
    size = f"{layers} layers, {1e3 * Spread.of(below).median:.1f} ms a step"
    return f"### {name}: {PROBLEMS[name].title}; {size}\n\n" + table(["", "whole step", *PARTS], rows)


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_some(parser, "--problems", list(PROBLEMS), USUAL)
    parser.add_argument("--rounds", type=positive, default=15, help="default: 15")
    parser.add_argument("--out", type=Path, default=Path("bench/results/study/cost.md"))
    options = parser.parse_args()
    configure(threads=1)
    parts = []
    for name in options.problems:
        parts.append(measure(name, options.rounds))
        print(parts[-1], end="\n\n", flush=True)
    what = (
        "# What the space of directions costs\n\nWritten by `python bench/directions_cost.py`: steps that are neither "
        "of statistics nor of inverses, as a share of one\nlevel's, medians [quartiles] of ratios within a round. "
        "*Statistics* is the forward pass of its own with its sampled backward\npass; where there is none, the sampled "
        "backward pass of the whole batch is part of *step*, with the derivatives, the solve and\nthe move.\n\n"
        f"{machine('cpu', 1)}"
    )
    write(options.out, "\n\n".join([what, *parts]) + "\n")


if __name__ == "__main__":
    main()
