"""Progress on stderr: a bar with the time left on a terminal, one line every 30 seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_EVERY_SECONDS = 30
_ROUNDING = 1e-6


def make_progress() -> Any:
    """Return bars on a terminal, lines elsewhere."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Estimate:
    """Share of the work that is done, and the time left from the speed so far; None once a search outruns its guess."""

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
    def fraction(self) -> float | None:
        done = (self.before + self.cost * self.part) / self.total
        return None if done > 1 + _ROUNDING else min(1.0, done)

    @property
    def percent(self) -> str:
        """Rounded down, so that 100 % is said when all is done."""
        return "" if self.fraction is None else f"{int(100 * (self.fraction + _ROUNDING)):3d}%"

    @property
    def left(self) -> str:
        if self.fraction is None:
            return "more than was expected"
        done = self.fraction * self.total - self.skipped
        spent = time.monotonic() - self.started
        seconds = None if done <= 0 or spent < 2 else spent * (1 - self.fraction) * self.total / done
        return f"{_time(seconds)} left"


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
            self._stream.write("  ".join(part for part in (self.percent, self.left, self.title) if part) + "\n")
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
        columns = (BarColumn(16), TextColumn("{task.fields[percent]}"), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._study = self._progress.add_task("", total=1.0, percent="", note="loading")
        self._cell = self._progress.add_task("", total=1.0, percent="", note="")
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
        self._progress.update(self._study, completed=self.fraction, percent=self.percent, note=self.left)
        self._progress.update(self._cell, completed=self.part, percent=f"{self.part:4.0%}", note=self.title[:52])

    def stop(self) -> None:
        self._progress.stop()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
