"""Progress of a loop: a live bar per step in a terminal, plain lines in a log.

A step's work may happen in other processes; those write how far they are to progress.json in the run's folder
(lake.progress), which the bar follows.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from lake.progress import read_progress
from lake.runs import RunRecord

POLL_SEC = 0.5


class Progress(Protocol):
    """Shows the steps of a loop as they go."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def started(self, step: str, run_folder: str) -> None:
        """A step begins; `run_folder` is where its processes may write progress.json."""

    def ended(self, step: str, record: RunRecord) -> None:
        """A step is done."""

    def skipped(self, step: str, record: RunRecord) -> None:
        """A step is current and was not repeated."""


def open_progress() -> Progress:
    """Bars where standard error is a terminal, lines where it is not."""
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


class LogProgress:
    """One line when a step begins and ends; what happens in between the jobs log themselves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def started(self, step: str, run_folder: str) -> None:
        """Prints that the step begins."""
        self._print(f"{step} ...")

    def ended(self, step: str, record: RunRecord) -> None:
        """Prints rows and seconds."""
        self._print(f"{step}: {record.rows:,} rows in {record.seconds:.1f} s")

    def skipped(self, step: str, record: RunRecord) -> None:
        """Prints that the step is current."""
        self._print(f"{step}: current ({record.rows:,} rows)")

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class TerminalProgress(logging.Handler):
    """A bar per step; the newest log line of the running step stands beside its bar."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress bars", daemon=True)
        self._folder: str | None = None
        self._task: TaskID | None = None
        self._bars = RichProgress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Self:
        self._bars.start()
        root = logging.getLogger()
        self._others, root.handlers = root.handlers, [self]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        logging.getLogger().handlers = self._others
        self._bars.stop()

    def started(self, step: str, run_folder: str) -> None:
        """Adds a bar without an end yet."""
        self._folder = run_folder
        self._task = self._bars.add_task(step, total=None, note="")

    def ended(self, step: str, record: RunRecord) -> None:
        """Fills the bar."""
        self._folder = None
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1, note=f"{record.rows:,} rows")
            self._bars.stop_task(self._task)
        self._task = None

    def skipped(self, step: str, record: RunRecord) -> None:
        """Adds a full bar."""
        self._bars.add_task(step, total=1, completed=1, note=f"current, {record.rows:,} rows")

    def show(self, done: int, total: int, note: str) -> None:
        """Moves the bar."""
        if self._task is not None:
            self._bars.update(self._task, total=max(total, 1), completed=done, note=note)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SEC):
            state = read_progress(self._folder) if self._folder else None
            if state is not None:
                self.show(*state)

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a log line beside the running bar; warnings and worse stay on screen."""
        if record.levelno >= logging.WARNING:
            self._bars.console.print(record.getMessage(), markup=False)
        elif self._task is not None:
            self._bars.update(self._task, note=record.getMessage()[:80])
