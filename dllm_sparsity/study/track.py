"""Tell an experiment tracker of a study: each cell when it is sealed, and what the study found."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dllm_sparsity.errors import UserError, did_you_mean, shorten
from dllm_sparsity.study.config import StudyConfig
from dllm_sparsity.study.offline import is_offline

TRACKERS = ["trackio", "wandb"]
PROJECT = "dllm-sparsity"
_PATIENCE_SECONDS = 30.0
_KEPT = "tracked.json"
_SENDS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class ExperimentTracker(Protocol):
    """What keeps the numbers of a study: one of the packages in `TRACKERS`, or an object of one's own."""

    def log(self, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of one cell, or at the end those of the study, by name."""

    def finish(self) -> None:
        """End, whether the study was finished or not."""


class Tracking:
    """Passes a study's progress on, and tells a tracker what was sealed meanwhile.

    A tracker that fails is told of and left alone: the study goes on.

    Args:
        tracker: One of `TRACKERS`, an object of one's own, or None for none.
        study: The study; its fields are the run's config.
        path: The run directory.
        progress: What the engine's progress is passed on to.
        numbers: Gives the numbers of a sealed cell's folder.

    Raises:
        UserError: There is no such tracker, it is not installed, or it would use a network that is not to be used.
    """

    def __init__(
        self,
        tracker: str | ExperimentTracker | None,
        study: StudyConfig,
        path: Path,
        progress: Any,
        numbers: Callable[[Path], Mapping[str, float]],
    ) -> None:
        self._study, self._path, self._progress, self._numbers = study, path, progress, numbers
        self._named, self._tracker = tracker, None if isinstance(tracker, str) else tracker
        self._told: set[str] = set()
        self._before: dict[str, Any] = {"cells": [], "study": None}
        self._begun, self._last, self._said = False, 0.0, ""
        if isinstance(tracker, str):
            check_tracker(tracker)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker is not None:
            self._safely(self._tracker.finish)
        self._say()

    def start(self, total: float, done: float) -> None:
        """Begin; cells that an earlier run sealed are told first, so that the tracker has the whole study.

        A package that was told of the whole study before is opened when there is something new.
        """
        self._before = self._read_before()
        self._begun = True
        self._tell()
        self._progress.start(total, done)

    def cell(self, title: str, cost: float) -> None:
        """Begin a cell: the one before is sealed."""
        self._tell()
        self._progress.cell(title, cost)

    def share(self, done: int, total: int) -> None:
        """Report requests; engines that run several cells at once say no more than that."""
        if time.monotonic() - self._last > _PATIENCE_SECONDS:
            self._tell(aloud=False)
        self._progress.share(done, total)

    def stop(self) -> None:
        """End of the cells."""
        self._progress.stop()
        self._tell()

    def end(self, numbers: Mapping[str, float]) -> None:
        """Tell what the study found.

        Args:
            numbers: By name.
        """
        found = dict(numbers)
        if isinstance(self._named, str) and self._tracker is None:
            if found == self._before["study"]:
                self._said = f"{self._named} was told of this study before; without {self._path / _KEPT} it is again"
                return
            self._safely(self._tell_sealed, True)
        if self._tracker is not None:
            self._safely(self._tracker.log, found)
        if self._tracker is not None and isinstance(self._named, str):
            self._safely(self._keep, found)

    def _read_before(self) -> dict[str, Any]:
        """Return which cells and what of the study the package was told before."""
        try:
            kept = self._kept()[self._named]
            return {"cells": list(kept["cells"]), "study": dict(kept["study"])}
        except (ValueError, LookupError, TypeError):
            return {"cells": [], "study": None}

    def _kept(self) -> dict[Any, Any]:
        """Return what each package was told, as it was written down; nothing where that is no such file."""
        try:
            found = json.loads((self._path / _KEPT).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self, numbers: dict[str, float]) -> None:
        """Write down what the package was told; half of a file is read as none."""
        told = {**self._kept(), str(self._named): {"cells": sorted(self._told), "study": numbers}}
        (self._path / _KEPT).write_text(json.dumps(told, indent=1), encoding="utf-8")

    def _open(self) -> None:
        package = import_module(str(self._named))
        fields = self._study.model_dump(mode="json")
        common = {"project": PROJECT, "group": self._study.name, "config": fields}
        if self._named == "trackio":
            package.init(**common, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        else:
            mode = "offline" if is_offline() else None
            settings = package.Settings(console="off")
            package.init(**common, dir=str(self._path), mode=mode, settings=settings)
        self._tracker = (
            package  # whose own log and finish go to the run that was begun; its end at exit then says nothing
        )

    def _tell(self, aloud: bool = True) -> None:
        self._last = time.monotonic()
        if self._begun and self._named is not None:
            self._safely(self._tell_sealed)
        if aloud:
            self._say()

    def _say(self) -> None:
        """Warn, where warnings are not sent to the log."""
        if self._said:
            logging.getLogger(__name__).warning("%s", self._said)
            self._said = ""

    def _tell_sealed(self, again: bool = False) -> None:
        """Tell of sealed cells that were not told of; a package that has them all is not opened for them again."""
        try:
            plan = json.loads((self._path / "plan.json").read_bytes())
        except (OSError, ValueError):
            return
        planned = (self._path / "cells" / entry["fingerprint"] for entry in plan)
        sealed = [folder for folder in planned if folder.name not in self._told and (folder / "DONE").is_file()]
        if self._tracker is None and (again or not {folder.name for folder in sealed} <= set(self._before["cells"])):
            self._open()
        if self._tracker is not None:
            for folder in sealed:
                self._told.add(folder.name)
                self._tracker.log(dict(self._numbers(folder)))

    def _safely(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be one JSON object
                call(*arguments)
        except Exception as error:
            who = self._named if isinstance(self._named, str) else type(self._tracker).__name__
            said = shorten(f"{type(error).__name__}: {error}")
            self._named = self._tracker = None
            self._said = f"{who} failed, the study goes on without it: {said}"


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used, before the study runs.

    Args:
        name: One of `TRACKERS`.

    Raises:
        UserError: There is no such tracker, it cannot be imported, or it would use a network that is not to be used.
    """
    if name not in TRACKERS:
        raise UserError(f"unknown tracker {name!r}{did_you_mean(name, TRACKERS)}", f"there are: {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise UserError(f"{name} is not installed", f"pip install '.[{name}]'")
    sends = next((variable for variable in _SENDS if os.environ.get(variable)), None)
    if name == "trackio" and sends and is_offline():
        raise UserError(f"trackio would send to {os.environ[sends]}, and the study is offline", f"unset {sends}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import_module(name)
    except Exception as error:  # whatever its own imports raise
        why = shorten(f"{type(error).__name__}: {error}")
        raise UserError(f"{name} cannot be imported: {why}", f"pip install -U '.[{name}]'") from error
