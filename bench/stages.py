"""Stages of a check: each is one command in a process of its own, with a time limit and a record of its own.

A stage that crashes or hangs costs that stage. What is known is written after every stage: `<stem>.jsonl` gets a line,
`<stem>.md` is written anew, `<stem>.log` gets the stage's whole output.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from output import slug, table, write

NO_DEVICE = 77  # the exit status of a program that found no CUDA device
LEAST = 5.0  # seconds: with less left of the time for all, a stage is not started
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NONE, SKIPPED, RUNNING = "no device", "skipped", "running"
POLL = 0.05  # seconds between looks at what runs side by side
LINES = 20  # of a stage's output in its record, at its end


def by_status(status: int, output: str) -> str:
    """Judge a stage by its exit status."""
    return {0: PASSED, NO_DEVICE: NONE}.get(status, FAILED)


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: What it is called in the record.
        command: The program and its arguments. A program that is not there skips the stage.
        limit: Seconds, after which the command and all that it started are killed.
        environment: Variables on top of those of this process.
        needs: Names of stages that must have passed.
        probe: A program that looks for the device, with its arguments: if it ends with 77, the command does not run.
        cwd: Where it runs.
        found: A folder to which the command writes `*.json` and `*.md`: they go into the record, whatever the status.
        judge: From exit status and output to "passed", "failed" or "no device".
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    probe: Sequence[str] = ()
    cwd: Path | None = None
    found: Path | None = None
    judge: Callable[[int, str], str] = by_status


@dataclass
class Result:
    """What became of a stage."""

    stage: str
    command: str
    status: str
    limit: float
    seconds: float = 0.0
    why: str = ""
    last_lines: Sequence[str] = ()
    found: Sequence[Any] = ()
    text: str = ""


@dataclass
class Record:
    """The results so far, written after each: the files named above.

    Args:
        folder: Where to.
        stem: The name of the files, without their endings.
        title: The first line of the Markdown.
        about: What the results hold for: the device, versions.
        hidden: Texts that are left out of what is written, such as folders of this machine, and what stands for them.
    """

    folder: Path
    stem: str
    title: str
    about: Mapping[str, Any]
    hidden: Mapping[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def path(self, ending: str) -> Path:
        """Return the file with an ending."""
        return self.folder / f"{self.stem}.{ending}"

    def start(self) -> None:
        """Begin the files anew."""
        self.results.clear()
        write(self.path("jsonl"), self.shown(json.dumps({"about": dict(self.about)})) + "\n")
        write(self.path("log"), "")
        self.write_text([])

    def running(self, stages: Sequence[Stage]) -> None:
        """Write that stages have started: what ends everything happened in them."""
        self.write_text([Result(s.name, " ".join(s.command), RUNNING, s.limit) for s in stages])

    def add(self, result: Result, output: str) -> None:
        """Write what became of a stage."""
        self.results.append(result)
        for ending, text in (("jsonl", json.dumps(asdict(result)) + "\n"), ("log", self.heading(result) + output)):
            with self.path(ending).open("a") as file:
                file.write(self.shown(text))
        self.write_text([])

    @staticmethod
    def heading(result: Result) -> str:
        """Write the line in the log above a stage's output."""
        return f"\n=== {result.stage}: {result.status} after {result.seconds:.1f} s: {result.command}\n"

    def shown(self, text: str) -> str:
        """Leave out what is hidden, longest first."""
        for hidden in sorted(self.hidden, key=len, reverse=True):
            text = text.replace(hidden, self.hidden[hidden])
        return text

    def verdict(self) -> str:
        """Say in one line how it went: every status with its number."""
        counts = {status: sum(r.status == status for r in self.results) for status in dict.fromkeys(self.statuses())}
        return ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing yet"

    def statuses(self) -> list[str]:
        """Return the status of each stage."""
        return [result.status for result in self.results]

    def write_text(self, running: Sequence[Result]) -> None:
        """Write the Markdown: a table of all stages, what was measured, and the last lines of what did not pass."""
        rows = [
            [r.stage, r.status + (f": {r.why}" if r.why else ""), f"{r.seconds:.1f}", f"{r.limit:.0f}"]
            for r in (*self.results, *running)
        ]
        about = "; ".join(f"{name}: {value}" for name, value in self.about.items())
        lines = [f"# {self.title}", "", about + ".", "", f"**{self.verdict()}**", ""]
        lines.append(table(["stage", "status", "seconds", "limit"], rows))
        lines += [f"\n{result.text.strip()}" for result in self.results if result.text]
        for result in self.results:
            shown = [line[:240] for line in result.last_lines[-2 if result.status == PASSED else 0 :]]
            lines += ["", f"## {result.stage}: {result.status}", "", "```", f"$ {result.command}", *shown, "```"]
        write(self.path("md"), self.shown("\n".join(lines) + "\n"))


def run_all(groups: Sequence[Sequence[Stage]], record: Record, logs: Path, seconds: float) -> None:
    """Run stages one after the other, those of one group side by side; after `seconds` no other one starts.

    Args:
        groups: The stages.
        record: Gets the results.
        logs: A folder for the output of the stages that run.
        seconds: For all of them. A stage gets its own limit, or what is left of this.
    """
    record.start()
    deadline = time.monotonic() + seconds
    for group in groups:
        record.running(group)
        started: list[Running] = []
        try:
            for stage in group:
                started.append(Running(stage, record.results, logs, deadline))
            while started:  # each as it ends, so that its seconds are its own
                over = [running for running in started if running.is_over()]
                for running in over:
                    record.add(*running.finish())
                    started.remove(running)
                time.sleep(0 if over else POLL)
        finally:  # what ends this process must not leave others on the device
            for running in started:
                running.end()


class Running:
    """A stage that has been started, or could not be: then `why` says why."""

    def __init__(self, stage: Stage, done: Sequence[Result], logs: Path, deadline: float) -> None:
        self.stage, self.limit = stage, min(stage.limit, deadline - time.monotonic())
        self.log = logs / f"{slug(stage.name)}.log"
        self.begun, self.process, self.status = time.monotonic(), None, SKIPPED
        self.why = self.why_not(done)
        if not self.why:
            clear(stage.found)
            logs.mkdir(parents=True, exist_ok=True)
            with self.log.open("w") as output:
                self.process = self.start(output)

    def why_not(self, done: Sequence[Result]) -> str:
        """Say why the stage does not run, if it does not."""
        passed = {result.stage for result in done if result.status == PASSED}
        for need in self.stage.needs:
            if need not in passed:
                return f"needs '{need}', which did not pass"
        if self.stage.probe and finds_no_device(self.stage.probe):
            self.status = NONE
            return f"as {Path(self.stage.probe[0]).name} says"
        if shutil.which(self.stage.command[0]) is None:
            return f"{Path(self.stage.command[0]).name} is not installed"
        return "" if self.limit >= LEAST else "no time was left"

    def start(self, output: TextIO) -> subprocess.Popen[bytes] | None:
        """Start the command at the head of a process group; its log grows as it runs."""
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **self.stage.environment}
        try:
            return subprocess.Popen(
                list(self.stage.command), cwd=self.stage.cwd, env=variables, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.why = str(error)
            return None

    def is_over(self) -> bool:
        """Tell whether there is nothing to wait for: the command has ended, or has had its time."""
        over = self.process is None or self.process.poll() is not None
        return over or time.monotonic() >= self.begun + self.limit

    def finish(self) -> tuple[Result, str]:
        """Wait for the end, or end it; return what became of it, and its output."""
        command = " ".join(self.stage.command)
        if self.process is None:
            return Result(self.stage.name, command, self.status, self.stage.limit, why=self.why), ""
        why = ""
        try:
            exit_status = self.process.wait(timeout=max(0.0, self.begun + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            exit_status, why = None, f"killed after {self.limit:.0f} s"
        seconds = time.monotonic() - self.begun
        end_all_of(self.process)
        output = self.log.read_text(errors="replace")
        status = TIMED_OUT if exit_status is None else self.stage.judge(exit_status, output)
        if status == FAILED and exit_status is not None:
            why = ended_by(exit_status)
        found, text = read(self.stage.found)
        last = output.splitlines()[-LINES:]
        return Result(self.stage.name, command, status, self.stage.limit, seconds, why, last, found, text), output

    def end(self) -> None:
        """End the command and all that it started, if it runs."""
        if self.process is not None and self.process.returncode is None:
            end_all_of(self.process)


def finds_no_device(probe: Sequence[str]) -> bool:
    """Ask a program whether there is a device. Whatever else is wrong, the stage itself will say."""
    try:
        return subprocess.run(probe, capture_output=True, timeout=20).returncode == NO_DEVICE
    except (OSError, subprocess.TimeoutExpired):
        return False


def end_all_of(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what is left of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended_by(status: int) -> str:
    """Say how a process ended: its exit status, or the signal's name."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def clear(folder: Path | None) -> None:
    """Empty a folder of what an earlier run left."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def read(folder: Path | None) -> tuple[list[Any], str]:
    """Read what a stage wrote: what its JSON files hold; its Markdown, from the first heading of the second level."""
    if folder is None:
        return [], ""
    texts = [path.read_text() for path in sorted(folder.glob("*.md"))]
    parts = [text[text.index("## ") :] for text in texts if "## " in text]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))], "\n".join(parts)
