"""The file that a run leaves: one line of JSON for its settings and its machine, then one for each epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from measure import write

from experiments.settings import INVERSES, OPTIMIZERS, Settings

Row = dict[str, Any]
_SYMBOLS = {"lr": "η", "momentum": "μ", "damping": "λ", "kl_clip": "κ"}
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Record:
    """A run so far.

    Attributes:
        settings: what was run.
        machine: what it ran on.
        epochs: a row for each epoch: `METRICS`, `epoch`, `lr`, `seconds` of training so far by the clock that
            `machine` names, `wall_seconds`, maybe `steps`. `train_` is the mean over the epoch's steps, before each of
            them and in training mode; `test_` is taken after the epoch, in evaluation mode. A number that is not
            finite is None.
    """

    settings: Settings
    machine: Row
    epochs: Sequence[Row]

    @property
    def is_done(self) -> bool:
        """Whether all epochs are there."""
        return len(self.epochs) >= self.settings.epochs

    @property
    def has_diverged(self) -> bool:
        """Whether the training loss of any epoch was not finite."""
        return any(row["train_loss"] is None for row in self.epochs)

    def values(self, metric: str) -> list[float]:
        """Return a number of each epoch, NaN for what was not finite."""
        return _numbers(self.epochs, metric)

    @property
    def steps(self) -> list[Row]:
        """The steps that were measured, of all epochs."""
        return [step for row in self.epochs for step in row["steps"]]

    def step_values(self, metric: str) -> list[float]:
        """Return a number of each measured step, NaN for what was not finite."""
        return _numbers(self.steps, metric)


Group = Sequence[Record]  # records that differ in the seed only


class RecordError(ValueError):
    """A file is no record of a run."""


def _numbers(rows: Iterable[Row], metric: str) -> list[float]:
    return [math.nan if row[metric] is None else row[metric] for row in rows]


def finite(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return number if math.isfinite(number) else None


def save(path: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    lines = [{"settings": record.settings.as_dict(), "machine": record.machine}, *record.epochs]
    write(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: naming the file, if it is none.
    """
    try:
        head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        record = Record(Settings.of_dict(head["settings"]), head["machine"], rows)
        if any(row["epoch"] != i for i, row in enumerate(rows, start=1)):
            raise ValueError("its epochs are not 1, 2, ...")
        for row in rows:
            for metric in (*METRICS, "seconds", "wall_seconds"):
                row[metric]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is no record of a run: {type(error).__name__}: {error}") from error
    return record


def load_all(folder: Path) -> list[Record]:
    """Read the records of a folder, in the order of optimizers, windows and rates, seeds in order."""
    return sorted(map(load, folder.glob("*.jsonl")), key=lambda record: _order(record.settings))


def _order(settings: Settings) -> tuple[Any, ...]:
    until = math.inf if settings.coarse_until is None else settings.coarse_until
    optimizer, inverse = list(OPTIMIZERS).index(settings.optimizer), [None, *INVERSES].index(settings.inverse)
    window = settings.coarse_from, until
    return settings.layers, optimizer, inverse, window, settings.lr, settings.of_seed(0).name, settings.seed


def by_settings(records: Iterable[Record]) -> list[Group]:
    """Group finished records that differ in nothing but the seed, in the order in which they come."""
    groups: dict[Settings, list[Record]] = {}
    for record in records:
        groups.setdefault(record.settings.of_seed(0), []).append(record)
    return [*groups.values()]


def networks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Sort records by network and data, which go into one picture."""
    result: dict[str, list[Record]] = {}
    for record in records:
        result.setdefault(record.settings.network, []).append(record)
    return result


def labels(groups: Sequence[Group], name: Callable[[Settings], str] = lambda settings: settings.label) -> list[str]:
    """Name curves: by `name`, by all that tells two of one name apart, and by what became of the seeds."""
    settings = [group[0].settings for group in groups]
    same_seeds = len({len(group) for group in groups}) == 1
    result = []
    for group, one in zip(groups, settings, strict=True):
        alike = [other for other in settings if name(other) == name(one)]
        parts = [name(one), *_differences(one, alike)]
        if not same_seeds:
            parts.append(f"{len(group)} seed" + "s" * (len(group) > 1))
        diverged = sum(record.has_diverged for record in group)
        result.append(", ".join(parts) + (f" ({diverged} of {len(group)} diverged)" if diverged else ""))
    return result


def _differences(one: Settings, alike: Sequence[Settings]) -> list[str]:
    """Write those numbers of `one` that not all of `alike` have."""
    parts = []
    for field in fields(Settings):
        value = getattr(one, field.name)
        if field.name != "seed" and any(getattr(other, field.name) != value for other in alike):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{_SYMBOLS.get(field.name, field.name.replace('_', ' '))} {shown}")
    return parts


def survivors(group: Group) -> list[Record]:
    """Return the records that did not diverge: means are theirs, and labels say that others did."""
    return [record for record in group if not record.has_diverged]


def clock_of(groups: Iterable[Group]) -> tuple[str, str]:
    """Return which seconds of some groups can be compared, and what they are: wall time where clocks differ."""
    clocks = {record.machine["clock"] for group in groups for record in group}
    return ("seconds", clocks.pop()) if len(clocks) == 1 else ("wall_seconds", "wall time")
