"""What runs leave: a file for each experiment, a line of JSON for each run; and groups of runs with their names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from output import write

from experiments.settings import INVERSES, OPTIMIZERS, Settings

Columns = Mapping[str, Sequence[float | None]]  # a number that is not finite is None
_SYMBOLS = {"lr": "η", "momentum": "μ", "damping": "λ", "kl_clip": "κ"}


@dataclass(frozen=True)
class Record:
    """A finished run."""

    settings: Settings
    machine: dict[str, Any]  # what it ran on
    epochs: Columns  # METRICS, `seconds` by the clock that `machine` names, and `wall_seconds` of training so far
    steps: Columns  # what `coarse.Follower` measured; empty without one

    @property
    def has_diverged(self) -> bool:
        """Whether the training loss of any epoch was not finite."""
        return None in self.epochs["train_loss"]

    def values(self, metric: str) -> list[float]:
        """Return a number of each epoch, or of each measured step; NaN for what was not finite."""
        numbers = self.epochs[metric] if metric in self.epochs else self.steps[metric]
        return [math.nan if number is None else number for number in numbers]


Group = Sequence[Record]  # records that differ in the seed only


def columns(rows: Sequence[Mapping[str, float | None]]) -> Columns:
    """Turn rows into columns: names are written once."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def append(path: Path, record: Record) -> None:
    """Add a run to a file, which is written whole or not at all."""
    line = {"key": record.settings.key, **{field.name: getattr(record, field.name) for field in fields(Record)}}
    line["settings"] = asdict(record.settings)
    before = path.read_text() if path.exists() else ""
    write(path, before + json.dumps(line, allow_nan=False) + "\n")


def load(path: Path) -> list[Record]:
    """Read a file, in the order of optimizers, windows and rates, seeds in order; no file is no record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            found = json.loads(line)
            settings = Settings(**{**found["settings"], "milestones": tuple(found["settings"]["milestones"])})
            records.append(Record(settings, found["machine"], found["epochs"], found["steps"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no record of a run: {error!r}") from error
    return sorted(records, key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    s = record.settings
    window = s.coarse_from, math.inf if s.coarse_until is None else s.coarse_until
    optimizer, inverse = list(OPTIMIZERS).index(s.optimizer), [None, *INVERSES].index(s.inverse)
    return s.layers, optimizer, inverse, window, s.lr, s.of_seed(0).key, s.seed


def by_settings(records: Iterable[Record]) -> list[Group]:
    """Group records that differ in nothing but the seed, in the order in which they come."""
    return [*_grouped(records, lambda settings: settings.of_seed(0)).values()]


def networks(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Sort records by network and data, which go into one picture."""
    return _grouped(records, lambda settings: settings.network)


def _grouped(records: Iterable[Record], key: Callable[[Settings], Any]) -> dict[Any, list[Record]]:
    result: dict[Any, list[Record]] = {}
    for record in records:
        result.setdefault(key(record.settings), []).append(record)
    return result


def labels(groups: Sequence[Group], name: Callable[[Settings], str] = lambda settings: settings.label) -> list[str]:
    """Name curves: by `name`, by all that tells two of one name apart, and by what became of the seeds."""
    same_seeds = len({len(group) for group in groups}) == 1
    result = []
    for group in groups:
        one, diverged = group[0].settings, sum(record.has_diverged for record in group)
        alike = [other[0].settings for other in groups if name(other[0].settings) == name(one)]
        parts = [name(one)]
        for field, value in asdict(one).items():
            if field != "seed" and any(getattr(other, field) != value for other in alike):
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                parts.append(f"{_SYMBOLS.get(field, field.replace('_', ' '))} {shown}")
        if not same_seeds:
            parts.append(f"{len(group)} seed" + "s" * (len(group) > 1))
        result.append(", ".join(parts) + (f" ({diverged} of {len(group)} diverged)" if diverged else ""))
    return result


def survivors(group: Group) -> list[Record]:
    """Return the records that did not diverge: means are theirs, and labels say that others did."""
    return [record for record in group if not record.has_diverged]


def clock_of(groups: Iterable[Group]) -> tuple[str, str]:
    """Return which seconds of some groups can be compared, and what they are: wall time where clocks differ."""
    clocks = {record.machine["clock"] for group in groups for record in group}
    return ("seconds", clocks.pop()) if len(clocks) == 1 else ("wall_seconds", "wall time")


def mean_and_half(samples: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means over rows and half the width of their 95 % intervals (Student's t), NaN with a single row."""
    values = np.array(samples, dtype=np.float64)
    count = len(values)
    if count == 1:
        return values[0], np.full(values.shape[1], np.nan)
    return values.mean(0), scipy.stats.t.ppf(0.975, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
