"""Progress on stderr: a bar with the time left on a terminal, one line every 30 seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_EVERY_SECONDS = 30


def make_progress() -> Any:
    """Return bars on a terminal, lines elsewhere."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Estimate:
    """Share of the work that is done, and the time left from the speed so far."""

    def __init__(self) -> None:
        self.total, self.before, self.cost, self.part = 1.0, 0.0, 0.0, 0.0
        self.skipped, self.started, self.title = 0.0, time.monotonic(), ""

    def start(self, total: float, done: float) -> None:
        self.total, self.before, self.skipped, self.started = max(total, 1e-9), done, done, time.monotonic()

    def cell(self, title: str, cost: float) -> None:
        self.before += self.cost
        self.title, self.cost, self.part = title, cost, 0.0

    def share(self, done: int, total: int) -> None:
        self.part = done / max(total, 1)

    @property
    def fraction(self) -> float:
        return min(1.0, (self.before + self.cost * self.part) / self.total)

    @property
    def seconds_left(self) -> float | None:
        done = self.fraction * self.total - self.skipped
        spent = time.monotonic() - self.started
        return None if done <= 0 or spent < 2 else spent * (1 - self.fraction) * self.total / done


class _Lines(_Estimate):
    """Lines for logs."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()
        self._stream = sys.stderr  # libraries' output is redirected while a cell runs

    def share(self, done: int, total: int) -> None:
        super().share(done, total)
        if time.monotonic() - self._last >= _LINE_EVERY_SECONDS:
            self._last = time.monotonic()
            self._stream.write(f"{self.fraction:4.0%}  {_left(self.seconds_left)} left  {self.title}\n")
            self._stream.flush()

    def stop(self) -> None:
        pass


class _Bars(_Estimate):
    """Two bars: the study, and the cell that runs."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=sys.stderr)  # this stream, even while stderr is redirected
        columns = (BarColumn(16), TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._study = self._progress.add_task("", total=1.0, note="loading")
        self._cell = self._progress.add_task("", total=1.0, note="")
        self._progress.start()

    def start(self, total: float, done: float) -> None:
        super().start(total, done)
        self._show()

    def cell(self, title: str, cost: float) -> None:
        super().cell(title, cost)
        self._show()

    def share(self, done: int, total: int) -> None:
        super().share(done, total)
        self._show()

    def _show(self) -> None:
        self._progress.update(self._study, completed=self.fraction, note=f"{_left(self.seconds_left)} left")
        self._progress.update(self._cell, completed=self.part, note=self.title[:52])

    def stop(self) -> None:
        self._progress.stop()


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
