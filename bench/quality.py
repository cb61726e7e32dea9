"""How good the directions of K-FAC, and of what could follow it, are: against the dense Fisher, on small networks.

Each network is trained by `kfac2.KFAC(model)`. At some steps each method takes its direction from one batch, and it is
judged

- in the damped model of that batch: q, the share of the largest decrease that it reaches with its best scale, and what
  it reaches as it is ("unit"; below 0 it overshoots);
- by the loss: its largest decrease over a line of step sizes, on the same batch; and, with everything from a
  mini-batch, on another, larger batch.

A point that is recorded is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import add_some, positive
from dense import Flat, Quadratic, dense_fisher, loss_gradient
from experiments.data import DataError
from output import write
from quality_nets import NETS
from quality_report import METHODS, picture, tables
from timing import configure
from torch import Tensor, nn
from torch.func import functional_call
from untuned_nets import Net

import kfac2

STEPS = (0, 50, 200, 1000)
DAMPINGS = (1e-1, 1e-2, 1e-3)
OWN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times λ: what K-FAC and EKFAC may be damped by
MOST_ROWS = 64  # outputs of a layer that has an unknown for each
LINE = [2 ** (k / 2) for k in range(-16, 7)]  # step sizes, times the model's best
RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


class Point:
    """A network at a step, and what one batch says about it there: its directions at any damping.

    Args:
        net: what it is trained on.
        model: the network, in float64.
        last: the last update of K-FAC's layers on the way here, (p,), or None at the first step.
        x, y: the batch.
        seed: of the labels that are drawn.
    """

    def __init__(self, net: Net, model: nn.Module, last: Tensor | None, x: Tensor, y: Tensor, seed: int) -> None:
        self.net, self.model, self.x, self.y, self.seed = net, model, x, y, seed
        self.curvatures = {
            "kfac": self._curvature(levels=2),  # the weight of whose second level is 0 but where it is asked for
            "exact": self._curvature(fisher="exact"),
            "ekfac": self._curvature(inverse="ekfac"),
        }
        self.flat = Flat(model, self.curvatures["kfac"].layers)
        self.last = last
        self.gradient = loss_gradient(model, self.flat, lambda out: net.prediction.loss(out, y), x)
        torch.manual_seed(seed)
        self.fisher = dense_fisher(model, self.flat, x, net.prediction.distribution)
        self.solve("ekfac", 1.0)  # EKFAC needs a basis before it can see the batch in it
        self._see(self.curvatures["ekfac"])
        self.basis = self.basis_of(self.curvatures["kfac"])

    def _curvature(self, **settings: Any) -> kfac2.Curvature:
        curvature = kfac2.Curvature(self.model, **settings)
        self._see(curvature)
        return curvature

    def _see(self, curvature: kfac2.Curvature) -> None:
        """Let it have the statistics of the batch, with the same labels each time."""
        torch.manual_seed(self.seed)
        curvature.accumulate(self.net.prediction.distribution(self.model(self.x)))

    def basis_of(self, curvature: kfac2.Curvature) -> list[tuple[Tensor, Tensor]]:
        """Return V = V_G ⊗ V_A of each layer, and the second moments in it, the diagonal of VᵀFV."""
        result = []
        for layer, part in zip(self.flat.layers, self.flat.slices, strict=True):
            V_A, V_G = (torch.linalg.eigh(factor)[1].contiguous() for factor in curvature.factors(layer))
            V = torch.kron(V_G, V_A)
            result.append((V, ((self.fisher.matrix[part, part] @ V) * V).sum(0)))
        return result

    def solve(self, kind: str, damping: float, coarse_weight: float = 0.0) -> Tensor:
        """Return the direction of one of kfac2's curvatures, (p,)."""
        curvature = self.curvatures[kind]
        curvature.options.coarse_weight = coarse_weight
        return self.flat.vector(curvature.solve(self.flat.named(self.gradient), damping))

    def solve_in(self, basis: list[tuple[Tensor, Tensor]], damping: float) -> Tensor:
        """Return EKFAC's direction with the second moments that the dense Fisher has in a basis."""
        gradients = [self.gradient[part] for part in self.flat.slices]
        return torch.cat([V @ ((V.mT @ g) / (s + damping)) for (V, s), g in zip(basis, gradients, strict=True)])

    def solve_blocks(self, damping: float) -> Tensor:
        """Return the direction of the exact block of each layer."""
        parts = []
        for part in self.flat.slices:
            damped = self.fisher.matrix[part, part].clone()
            damped.diagonal().add_(damping)
            parts.append(torch.linalg.solve(damped, self.gradient[part]))
        return torch.cat(parts)

    def spaces(self, v: Tensor) -> dict[str, Tensor]:
        """Return the Z, (p, k), that a direction makes; those with the last update where there is one."""
        layers, rows = self.flat.split(v), self.flat.split(v, MOST_ROWS)
        found = {"layers": layers, "rows": rows}
        if self.last is not None:
            last = self.flat.split(self.last)
            found |= {
                "pair": torch.stack([v, self.last], 1),
                "directions": torch.cat([layers, last], 1),
                "rows + d": torch.cat([rows, last], 1),
            }
        return found

    def directions(self, model: Quadratic) -> dict[str, Tensor]:
        """Return the direction of each method, (p,); METHODS says what they are."""

        def best(candidates: Callable[[float], Tensor]) -> tuple[Tensor, float]:
            tried = [(candidates(own * model.damping), own * model.damping) for own in OWN]
            return max(tried, key=lambda one: model.share(one[0]))

        v, own = best(lambda damping: self.solve("kfac", damping))
        ekfac, _ = best(lambda damping: self.solve("ekfac", damping))
        seconds, _ = best(lambda damping: self.solve_in(self.basis, damping))
        blocks, ones = self.solve_blocks(model.damping), self.solve("kfac", own, coarse_weight=1.0)
        found = {
            "full inverse": model.best,
            "one level": v,
            "one level, damped by λ": self.solve("kfac", model.damping),
            "one level, exact labels": best(lambda damping: self.solve("exact", damping))[0],
            "ekfac": ekfac,
            "ekfac, fresh": seconds,
            "exact blocks": blocks,
            "ones": ones,
            "ones, best weight": model.within(torch.stack([v, ones - v], 1)),
        }
        spaces = self.spaces(v)
        found |= {name: model.within(Z) for name, Z in spaces.items()}
        if self.last is not None:
            Z, count = spaces["directions"], len(self.fisher.scores)
            same = torch.arange(Z.shape[1]) % len(self.flat.layers)
            quarter = self.fisher.scores[: count // 4]
            found |= {
                "directions, uncoupled": model.within(Z, same.unsqueeze(1) == same),
                "directions, sampled": model.within_sampled(Z, self.fisher.scores, self.fisher.cases),
                "directions, sampled on ¼": model.within_sampled(Z, quarter, self.fisher.cases * len(quarter) / count),
                "directions on ekfac": model.within(self.spaces(ekfac)["directions"]),
                "directions on blocks": model.within(self.spaces(blocks)["directions"]),
            }
        return found

    def numbers(self, damping: float, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
        """Return q, m(v)/m* and the largest decrease of the loss on a batch, by method."""
        model = Quadratic(self.fisher.matrix, self.gradient, damping)
        result: dict[str, dict[str, float]] = {"q": {}, "unit": {}, "decrease": {}}
        for name, v in self.directions(model).items():
            result["q"][name] = rounded(model.share(v))
            result["unit"][name] = rounded(model.value(v) / model.least)
            result["decrease"][name] = rounded(self.decrease(model.scale(v) * v, x, y))
        return result

    @torch.no_grad()
    def decrease(self, v: Tensor, x: Tensor, y: Tensor) -> float:
        """Return the largest decrease of the loss along −v over a line of step sizes; 0 where it only rises."""
        losses = [self.loss(self.flat.named(size * v), x, y) for size in (0.0, *LINE)]
        return losses[0] - min(loss for loss in losses if math.isfinite(loss))

    @torch.no_grad()
    def loss(self, change: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
        """Return the loss with a change taken away from the parameters."""
        moved = {name: p - change[name] for name, p in self.flat.parameters.items()}
        return self.net.prediction.loss(functional_call(self.model, moved, (x,)), y).item()


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def trajectory(net: Net, seed: int, steps: Sequence[int]) -> Iterator[tuple[int, nn.Module, Tensor | None]]:
    """Train by `KFAC(model)`, and yield a copy of the model at some steps, with the last update of K-FAC's layers."""
    torch.manual_seed(seed)
    model = net.make().double()
    optimizer = kfac2.KFAC(model)
    generator = torch.Generator().manual_seed(seed + 1000)
    flat, last = Flat(model, optimizer.layers), None  # whose parameters are the model's own
    for step in range(max(steps) + 1):
        if step in steps:
            labels = torch.get_rng_state()
            yield step, copy.deepcopy(model), last
            torch.set_rng_state(labels)
        before = flat.vector(flat.parameters)
        x, y = net.draw(net.batch, generator)
        optimizer.zero_grad()
        out = model(x)
        optimizer.accumulate_fisher(net.prediction.distribution(out))
        net.prediction.loss(out, y).backward()
        optimizer.step()
        last = flat.vector(flat.parameters) - before


def records_of(
    net: Net, name: str, seed: int, steps: Sequence[int], dampings: Sequence[float]
) -> Iterator[list[Record]]:
    """Train a network, and yield the records of each of the steps: one for each damping."""
    batch, other = (net.draw(times * net.batch, torch.Generator().manual_seed(seed + 3000)) for times in (2, 8))
    for step, model, last in trajectory(net, seed, steps):
        small = net.draw(net.batch, torch.Generator().manual_seed(seed + 4000 + step))
        whole, part = (Point(net, model, last, *drawn, seed + step) for drawn in (batch, small))
        yield [
            {
                **{"net": name, "seed": seed, "step": step, "damping": damping, "parameters": whole.flat.size},
                "loss": rounded(whole.loss(whole.flat.named(torch.zeros(whole.flat.size)), *batch)),
                "batch": whole.numbers(damping, *batch),
                "minibatch": part.numbers(damping, *other),
            }
            for damping in dampings
        ]


def load(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(nets: Sequence[str], seeds: Sequence[int], steps: Sequence[int], path: Path) -> None:
    """Measure what is not recorded, and record each point as it is done."""
    for seed in seeds:
        for name in nets:
            done = {(record["net"], record["seed"], record["step"]) for record in load(path)}
            missing = [step for step in steps if (name, seed, step) not in done]
            if not missing:
                continue
            start = time.process_time()
            for records in records_of(NETS[name], name, seed, missing, DAMPINGS):
                before = path.read_text() if path.exists() else ""
                write(path, before + "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
                q = records[len(records) // 2]["batch"]["q"]["one level"]
                seconds, start = time.process_time() - start, time.process_time()
                print(f"{name}, seed {seed}, step {records[0]['step']}: q {q:.2f}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Measure, then write tables and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_some(parser, "--nets", list(NETS), list(NETS))
    parser.add_argument("--seeds", type=positive, default=1, help="trainings of each network (default: 1)")
    parser.add_argument("--full", action="store_true", help="three of them")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.jsonl", help="the records")
    options = parser.parse_args()
    configure(threads=1)
    try:
        run(options.nets, range(3 if options.full else options.seeds), STEPS, options.out)
    except DataError as error:
        sys.exit(f"{error}: images are of the Debian package dataset-fashion-mnist (apt-get install it)")
    records = load(options.out)
    write(options.out.with_suffix(".md"), tables(records))
    picture(records, options.out.with_suffix(".png"))
    print(f"{len(METHODS)} methods: {options.out.with_suffix('.md')}, {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
