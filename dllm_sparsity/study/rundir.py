"""The run directory: sealed cells that a crash, a full disk or an interrupt cannot damage. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout

from dllm_sparsity.errors import UserError
from dllm_sparsity.study.changes import changes, plan_of
from dllm_sparsity.study.config import StudyConfig
from dllm_sparsity.study.files import read_json, remove, sync, sync_folder, write_whole, writing
from dllm_sparsity.study.records import SEALED_FILES, checksums, find_damage

_LOCK = ".lock"
_POLL_SECONDS = 1.0
_CELL = re.compile(r"[0-9a-f]{16}")
_DRAFTS = {
    "": re.compile(
        r"\.(search\.json|(config\.yaml|plan\.json|environment\.json|lock\.owner|summary\.json|report\.html|search\.json)"
        r"\.(\d+|[a-z0-9_]{8}))"
    ),
    "cells": re.compile(r"\.[0-9a-f]{16}\.\d+"),
    "tables": re.compile(r"\.\w+\.(csv|parquet)\.[a-z0-9_]{8}"),
}
"""What a run that was killed leaves behind, by folder: the name of a file or cell with a process or eight letters."""
_FOUND = ("report.html", "summary.json", "search.json")
"""What is made of the cells of a study, and is of no other."""


class RunDir:
    """A folder with the study's configuration, its sealed cells and its report.

    Args:
        path: The folder; made when it does not exist. What it holds of another study stays until `write_plan`.
        config: The study.
        patient: Whether to wait where another process works on it.

    Raises:
        UserError: It cannot be made or written to, is no run directory, or another process works on it.
    """

    def __init__(self, path: Path, config: StudyConfig, patient: bool = False) -> None:
        self.path, self.config = path, config
        self._said: list[str] = []
        self._told: set[str] = set()
        self._before: list[dict[str, Any]] | None = None  # the plan that was found here
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file", "give another --out")
        if path.is_dir() and not _is_ours(path):
            raise UserError(f"{path} is not empty and holds no study", "give an empty folder with --out")
        with writing(path):
            (path / "cells").mkdir(parents=True, exist_ok=True)
            self._lock: FileLock | None = _lock(path, patient)
        try:
            with writing(path):
                for folder, names in _DRAFTS.items():
                    for draft in (path / folder).glob(".*"):
                        if names.fullmatch(draft.name):
                            remove(draft)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other processes work on this folder."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                (self.path / "journals").rmdir()  # where no cell is open
            lock.release()

    def tell(self, text: str) -> None:
        """Write a line to the log, and keep it for the terminal until `say`.

        Args:
            text: One line; the same one is told once.
        """
        if text in self._told:
            return
        self._told.add(text)
        self._said.append(text)
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")

    def say(self) -> None:
        """Show on the terminal what was told."""
        for text in self._said:
            logging.getLogger(__name__).warning("%s", text)
        self._said.clear()

    def write_plan(self, plan: list[dict[str, Any]], environment: dict[str, Any]) -> None:
        """Write what is known before anything runs; first, say what is here of another study, and that it is damaged.

        Args:
            plan: One entry a cell.
            environment: Versions and machine.
        """
        is_first, searches = self._before is None, self.config.search is not None
        if self._before is None:
            self._before = self._found()
        told = changes(self._before, plan, searches)
        for text in told:
            self.tell(text)
        with writing(self.path):
            if is_first:
                self._write_config(bool(told))
            write_whole(self.path / "plan.json", json.dumps(plan, indent=1))
            write_whole(self.path / "environment.json", json.dumps(environment, indent=1, sort_keys=True))

    def _found(self) -> list[dict[str, Any]]:
        """Return the plan that is here, and name what is damaged of the files that are written anew."""
        plan = plan_of(read_json(self.path / "plan.json"))
        whole = {
            "config.yaml": isinstance(_read_yaml(self.path / "config.yaml"), dict),
            "plan.json": plan is not None,
            "environment.json": isinstance(read_json(self.path / "environment.json"), dict),
        }
        is_new = not any((self.path / name).exists() for name in whole)
        for name, is_whole in whole.items():
            if not is_whole and not is_new:
                state = "damaged" if (self.path / name).exists() else "missing"
                self.tell(f"{self.path / name} is {state}; it is written anew")
        return plan or []

    def _write_config(self, is_changed: bool) -> None:
        """Write config.yaml, and remove what was made of another study."""
        fields = self.config.model_dump(mode="json", exclude_unset=True)
        text, place = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), self.path / "config.yaml"
        is_changed |= not place.is_file() or place.read_bytes() != text.encode()
        stale = [name for name in _FOUND if is_changed or (name == "search.json" and self.config.search is None)]
        if removed := [name for name in stale if (self.path / name).exists()]:
            self.tell(f"{', '.join(removed)} of the study before removed from {self.path}; its cells stay")
        for name in removed:
            remove(self.path / name)
        write_whole(place, text)

    def is_sealed(self, fingerprint: str) -> bool:
        """Tell whether a cell is there, whole; one that is damaged is told of, and no longer counts as sealed.

        Args:
            fingerprint: The cell's.

        Raises:
            UserError: The folder cannot be written to.
        """
        folder = self.path / "cells" / fingerprint
        if not folder.is_dir() and os.path.lexists(folder):
            self.tell(f"cell {fingerprint}: no folder, but something else in its place; it is computed again")
        if not (folder / "DONE").exists():
            return False
        damage = find_damage(folder)
        with writing(self.path):
            if damage is None:
                remove(self.journal_path(fingerprint))  # of a run that was killed just behind the seal
                return True
            self.tell(f"cell {fingerprint}: {damage}; it is computed again")
            remove(folder / "DONE")
        return False

    def journal_path(self, fingerprint: str) -> Path:
        """Return where the batches of a cell stand until it is sealed.

        Args:
            fingerprint: The cell's.
        """
        return self.path / "journals" / f"{fingerprint}.journal"

    def drop_journals(self, planned: Collection[str]) -> None:
        """Remove what cells of an earlier study had begun, and say so.

        Args:
            planned: Fingerprints of the cells that may go on.

        Raises:
            UserError: The folder cannot be written to.
        """
        others = [path for path in (self.path / "journals").glob("*.journal") if path.stem not in planned]
        with writing(self.path):
            for path in others:
                remove(path)
        if others:
            self.tell(f"{len(others)} cells that an earlier run began are not in this study; their batches are removed")

    def seal(self, fingerprint: str, record: dict[str, Any], samples: pa.Table, steps: pa.Table) -> None:
        """Write a cell beside its place and move it there, so that it is whole or not there at all; drop its journal.

        Args:
            fingerprint: The cell's.
            record: cell.json.
            samples: samples.parquet.
            steps: steps.parquet.

        Raises:
            UserError: The disk is full or the folder cannot be written.
        """
        place = self.path / "cells" / fingerprint
        draft = self.path / "cells" / f".{fingerprint}.{os.getpid()}"
        try:
            with writing(self.path):
                remove(draft)
                draft.mkdir()
                (draft / "cell.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
                pq.write_table(samples, draft / "samples.parquet", compression="zstd")
                pq.write_table(steps, draft / "steps.parquet", compression="zstd")
                (draft / "DONE").write_text(json.dumps(checksums(draft)))
                for name in (*SEALED_FILES, "DONE"):
                    sync(draft / name)
                remove(place)
                os.replace(draft, place)
                sync_folder(place.parent)
                remove(self.journal_path(fingerprint))
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @property
    def log(self) -> Path:
        """Where the libraries' own output goes."""
        return self.path / "log.txt"


def _is_ours(path: Path) -> bool:
    """Tell whether a folder holds a study, or what a run that was killed before it wrote its study left behind."""
    if (path / "config.yaml").is_file() or any(_CELL.fullmatch(done.parent.name) for done in path.glob("cells/*/DONE")):
        return True
    return all(map(_is_first, path.iterdir()))


def _is_first(entry: Path) -> bool:
    if entry.name == "cells":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name == "log.txt" or entry.name.startswith((_LOCK, ".config.yaml."))


def _lock(path: Path, patient: bool) -> FileLock:
    """Keep other processes out; the same process may come in again."""
    lock, owner = FileLock(path / _LOCK, timeout=0, is_singleton=True), path / f"{_LOCK}.owner"
    try:
        lock.acquire()
    except Timeout as error:
        who = "another process"
        if owner.is_file():
            who = owner.read_text(encoding="utf-8", errors="replace").strip()
        if not patient:
            raise UserError(
                f"{path} is in use by {who}", "wait until it has ended, or give another folder with --out"
            ) from error
        logging.getLogger(__name__).warning("%s is in use by %s: waiting until it has ended", path, who)
        lock.acquire(timeout=-1, poll_interval=_POLL_SECONDS)
    try:
        write_whole(owner, f"process {os.getpid()} on {platform.node()}\n")
    except BaseException:
        lock.release()
        raise
    return lock


def is_in_use(path: Path) -> bool:
    """Tell whether another process works on a run directory.

    Args:
        path: The directory.

    Raises:
        OSError: That cannot be seen.
    """
    if not (path / _LOCK).is_file():
        return False
    try:
        with FileLock(path / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
