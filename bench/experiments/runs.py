"""One run, epoch by epoch, which may be killed at any moment and started again.

After each epoch a checkpoint is put in place of the last one, in one move, and then the record is written anew from
it. Whatever a kill leaves, the next start goes on from the last whole epoch, with the generators as they were.
"""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import Clock, machine

import kfac2
from experiments import records
from experiments.coarse import Follower, weight_at
from experiments.records import Record, Row, finite
from experiments.settings import Settings
from experiments.tasks import optimizer_of, task_of

_TEST_BATCH = 1000
OnStep = Callable[[], None]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read."""


class Training:
    """The state of a run: model, optimizer, generators, and the rows of the epochs so far."""

    def __init__(self, settings: Settings, folder: Path | None) -> None:
        self.settings = settings
        self.task = task_of(settings, folder)
        self.model = self.task.problem.model
        self.optimizer = optimizer_of(settings, self.model)
        self.rows: list[Row] = []
        self._step = 0
        # Streams of their own: the weights' generator, and the drawn data's, started from the seed itself.
        torch.manual_seed(settings.seed + 1000)  # the labels that K-FAC draws, on any device
        self._order = torch.Generator().manual_seed(settings.seed + 2000)
        self._augment = torch.Generator(settings.device).manual_seed(settings.seed + 3000)
        self._clock = Clock(settings.device, settings.threads)
        self._follower: Follower | None = None
        if settings.follow:
            assert isinstance(self.optimizer, kfac2.KFAC)
            self._follower = Follower(self.model, self.optimizer, settings)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the epochs to come depend on."""
        return {
            "rows": self.rows,
            "step": self._step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.settings.device == "cuda" else None,
            "order": self._order.get_state(),
            "augment": self._augment.get_state(),
            "follower": self._follower.state_dict() if self._follower else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.rows, self._step = state["rows"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        self._order.set_state(state["order"])
        self._augment.set_state(state["augment"])
        if self._follower:
            self._follower.load_state_dict(state["follower"])

    def epoch(self, on_step: OnStep) -> None:
        """Train one more epoch, and add its row."""
        number = len(self.rows) + 1
        rate = self.settings.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, y = self.task.problem.train
        losses, right = [], []
        start, wall_start = self._clock(), time.perf_counter()
        for batch in torch.randperm(len(x), generator=self._order).to(x.device).split(self.settings.batch):
            loss, hits = self._take_step(x[batch], y[batch])
            losses.append(loss * len(batch))
            right.append(hits)
            on_step()
        train_loss, train_accuracy = (torch.stack(parts).sum().item() / len(x) for parts in (losses, right))
        seconds, wall_seconds = self._clock() - start, time.perf_counter() - wall_start
        test_loss, test_accuracy = self._test()
        row: Row = {
            "epoch": number,
            "lr": rate,
            "train_loss": finite(train_loss),
            "train_accuracy": train_accuracy,
            "test_loss": finite(test_loss),
            "test_accuracy": test_accuracy,
            "seconds": seconds + (self.rows[-1]["seconds"] if self.rows else 0.0),
            "wall_seconds": wall_seconds + (self.rows[-1]["wall_seconds"] if self.rows else 0.0),
        }
        if self._follower:
            row["steps"], self._follower.rows = self._follower.rows, []
        self.rows.append(row)

    def _take_step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step; return the loss before it and how many outputs were right."""
        problem, optimizer = self.task.problem, self.optimizer
        optimizer.zero_grad()
        out = self.model(self.task.prepare(self.task.augment(x, self._augment)))
        if isinstance(optimizer, kfac2.KFAC):
            optimizer.options.coarse_weight = weight_at(self.settings, self._step)
            optimizer.accumulate_fisher(problem.distribution(out))
        loss = problem.loss(out, y)
        loss.backward()
        if self._follower:
            self._follower.before()
        optimizer.step()
        if self._follower:
            self._follower.after(self._step, out.detach())
        self._step += 1
        return loss.detach().double(), problem.correct(out.detach(), y).sum()

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        problem = self.task.problem
        loss, right = 0.0, 0
        self.model.eval()
        for x, y in zip(*(part.split(_TEST_BATCH) for part in problem.test), strict=True):
            out = self.model(self.task.prepare(x))
            loss += problem.loss(out, y).item() * len(x)
            right += int(problem.correct(out, y).sum())
        self.model.train()
        count = len(problem.test[0])
        return loss / count, right / count


def run(settings: Settings, folder: Path | None, out: Path, on_step: OnStep, on_resume: Callable[[int], None]) -> None:
    """Do a run, or what is left of it.

    Args:
        settings: of the run.
        folder: where the images are; None for data that is drawn.
        out: the folder of records.
        on_step: called after each step.
        on_resume: called with how many epochs an earlier start has done.

    Raises:
        DataError: if a file of data is missing or wrong.
        RecordError: if there is a record that cannot be read.
        CheckpointError: if there is a checkpoint that cannot be read.
    """
    path = out / f"{settings.name}.jsonl"
    checkpoint = path.with_suffix(".pt")
    if path.exists() and records.load(path).is_done:
        checkpoint.unlink(missing_ok=True)
        on_resume(settings.epochs)
        return
    _configure(settings)
    training = Training(settings, folder)
    if checkpoint.exists():
        _load(checkpoint, training)
    on_resume(len(training.rows))
    about = machine(settings.device, settings.threads)
    while len(training.rows) < settings.epochs:
        training.epoch(on_step)
        _save(checkpoint, training.state_dict())
        records.save(path, Record(settings, about, training.rows))
    records.save(path, Record(settings, about, training.rows))  # killed between the two: the record lags behind
    checkpoint.unlink(missing_ok=True)


def run_all(
    runs: Sequence[Settings],
    folder: Path | None,
    out: Path,
    on_start: Callable[[Settings], None],
    on_step: OnStep,
    on_resume: Callable[[int], None],
) -> None:
    """Do runs one after another. Several processes may do the same list side by side: each run is one's alone.

    Args:
        runs: what to run.
        folder: see `run`.
        out: see `run`.
        on_start: called before each run.
        on_step: see `run`.
        on_resume: see `run`.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = list(runs)
    for wait in (False, True):  # what another process is at comes last
        left = []
        for settings in waiting:
            with _locked(out / f"{settings.name}.lock", wait) as locked:
                if locked:
                    on_start(settings)
                    run(settings, folder, out, on_step, on_resume)
                else:
                    left.append(settings)
        waiting = left


def _configure(settings: Settings) -> None:
    """One kind of arithmetic everywhere, sums in one order: no TF32; and nothing here uses AMP."""
    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    warnings.filterwarnings("ignore", "kfac2: .* the step is skipped")  # thousands; the record says that it diverged


def _save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _load(path: Path, training: Training) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        training.load_state_dict(state)
    except Exception as error:  # a damaged file raises nearly anything
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({what}); without it the run starts anew") from error


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it was got."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)
