"""The file that a run leaves: one line of JSON for its settings and its machine, then one for each epoch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import write

from experiments.settings import INVERSES, OPTIMIZERS, Settings

Row = dict[str, Any]
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Record:
    """A run so far.

    Attributes:
        settings: what was run.
        machine: what it ran on.
        epochs: a row for each epoch: `METRICS`, `epoch`, `lr`, `seconds` of training by the clock that `machine`
            names, `wall_seconds`, maybe `steps`. A number that is not finite is None.
    """

    settings: Settings
    machine: Row
    epochs: Sequence[Row]

    @property
    def is_done(self) -> bool:
        """Whether all epochs are there."""
        return len(self.epochs) >= self.settings.epochs

    def values(self, metric: str) -> list[float]:
        """Return a number of each epoch, NaN for what was not finite."""
        return [math.nan if row[metric] is None else row[metric] for row in self.epochs]


Group = Sequence[Record]  # records that differ in the seed only


class RecordError(ValueError):
    """A file is no record of a run."""


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
    return settings.layers, optimizer, inverse, window, -settings.lr, settings.of_seed(0).name, settings.seed


def by_settings(records: Iterable[Record]) -> list[Group]:
    """Group records that differ in nothing but the seed (and are finished), in the order in which they come."""
    groups: dict[Settings, list[Record]] = {}
    for record in records:
        if record.is_done:
            groups.setdefault(record.settings.of_seed(0), []).append(record)
    return [*groups.values()]


def networks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Sort records by network and data, which go into one picture."""
    result: dict[str, list[Record]] = {}
    for record in records:
        result.setdefault(record.settings.network, []).append(record)
    return result


def labels(groups: Sequence[Group]) -> list[str]:
    """Name curves: by optimizer, and by what tells two of one optimizer apart."""
    settings = [group[0].settings for group in groups]
    counts = Counter(s.label for s in settings)
    return [s.label + (f", {_numbers(s)}" if counts[s.label] > 1 else "") for s in settings]


def _numbers(settings: Settings) -> str:
    parts = [f"η {settings.lr:g}", f"μ {settings.momentum:g}"]
    if settings.is_kfac:
        parts += [f"λ {settings.damping:g}", f"κ {settings.kl_clip:g}"]
    return ", ".join([*parts, f"batch {settings.batch}", f"{settings.epochs} epochs"])
