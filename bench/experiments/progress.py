"""Progress of a list of runs, with the time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.settings import Settings


class Bars:
    """One bar for the run at work, one for all of them, both in steps; to be used in a `with`.

    Args:
        runs: all of them.
        steps: of an epoch of each.
        console: where to write; a line for each run where that is no terminal.
    """

    def __init__(self, runs: Sequence[Settings], steps: Sequence[int], console: Console) -> None:
        columns = [TextColumn("{task.description:<46}"), BarColumn(20), MofNCompleteColumn()]
        self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._steps = dict(zip(runs, steps, strict=True))
        self._left = sum(settings.epochs * count for settings, count in self._steps.items())
        self._all = self._bars.add_task(f"{len(runs)} runs", total=self._left)
        self._one = self._bars.add_task("", total=None)
        self._now = runs[0]
        self._number = 0

    def start(self, settings: Settings) -> None:
        """Begin with a run."""
        self._now, self._number = settings, self._number + 1
        total = settings.epochs * self._steps[settings]
        description = f"{settings.label}, seed {settings.seed}"
        self._bars.reset(self._one, total=total, description=description)
        if not self._bars.console.is_terminal:
            self._bars.console.print(f"run {self._number} of {len(self._steps)}: {description}")

    def resumed(self, epochs: int) -> None:
        """Leave out the epochs of a run that are done already, so that they do not count as fast ones."""
        steps = epochs * self._steps[self._now]
        self._left -= steps
        self._bars.update(self._all, total=self._left)
        self._bars.update(self._one, total=self._now.epochs * self._steps[self._now] - steps)

    def step(self) -> None:
        """Count a step."""
        self._bars.advance(self._all)
        self._bars.advance(self._one)

    def __enter__(self) -> Bars:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them as they are."""
        self._bars.stop()
