"""The run directory: sealed cells that a crash, a full disk or an interrupt cannot damage. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout

from dllm_sparsity.errors import UserError
from dllm_sparsity.study.changes import changes
from dllm_sparsity.study.config import StudyConfig
from dllm_sparsity.study.records import SEALED_FILES, checksums, find_damage

_LOCK = ".lock"


class RunDir:
    """A folder with the study's configuration, its sealed cells and its report.

    Args:
        path: The folder; made when it does not exist.
        config: The study; written before anything else.

    Raises:
        UserError: It cannot be made or written to.
    """

    def __init__(self, path: Path, config: StudyConfig) -> None:
        self.path = path
        self._said: list[str] = []
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file", "give another --out")
        if path.is_dir() and not (path / "config.yaml").is_file() and not all(map(_is_first, path.iterdir())):
            raise UserError(f"{path} is not empty and holds no study", "give an empty folder with --out")
        with writing(path):
            (path / "cells").mkdir(parents=True, exist_ok=True)
            self._lock: FileLock | None = _lock(path)
        try:
            with writing(path):
                for draft in (path / "cells").glob(".*"):
                    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
                for draft in path.glob(".*.*.[0-9]*"):
                    draft.unlink(missing_ok=True)
                fields = config.model_dump(mode="json", exclude_unset=True)
                _replace(path / "config.yaml", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
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
        if text in self._said:
            return
        self._said.append(text)
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")

    def say(self) -> None:
        """Show on the terminal what was told."""
        for text in self._said:
            logging.getLogger(__name__).warning("%s", text)
        self._said.clear()

    def write_plan(self, plan: list[dict[str, Any]], environment: dict[str, Any]) -> None:
        """Write what is known before anything runs.

        Args:
            plan: One entry a cell.
            environment: Versions and machine.
        """
        for text in changes(_read(self.path / "plan.json"), plan):
            self.tell(text)
        with writing(self.path):
            _replace(self.path / "plan.json", json.dumps(plan, indent=1))
            _replace(self.path / "environment.json", json.dumps(environment, indent=1, sort_keys=True))

    def is_sealed(self, fingerprint: str) -> bool:
        """Tell whether a cell is there, whole; one that is damaged is told of, and no longer counts as sealed.

        Args:
            fingerprint: The cell's.

        Raises:
            UserError: The folder cannot be written to.
        """
        folder = self.path / "cells" / fingerprint
        if not (folder / "DONE").exists():
            return False
        damage = find_damage(folder)
        with writing(self.path):
            if damage is None:
                self.journal_path(fingerprint).unlink(missing_ok=True)  # of a run that was killed just behind the seal
                return True
            self.tell(f"cell {fingerprint}: {damage}; it is computed again")
            (folder / "DONE").unlink()
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
                path.unlink(missing_ok=True)
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
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                (draft / "cell.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
                pq.write_table(samples, draft / "samples.parquet", compression="zstd")
                pq.write_table(steps, draft / "steps.parquet", compression="zstd")
                (draft / "DONE").write_text(json.dumps(checksums(draft)))
                for name in (*SEALED_FILES, "DONE"):
                    _sync(draft / name)
                if place.exists():
                    shutil.rmtree(place)
                os.replace(draft, place)
                sync_folder(place.parent)
                self.journal_path(fingerprint).unlink(missing_ok=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @property
    def log(self) -> Path:
        """Where the libraries' own output goes."""
        return self.path / "log.txt"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into two lines.

    Args:
        path: Folder that is written to, for the message.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {path}",
                "free some, then run the same command again: what is finished is kept",
            ) from error
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}", "give another folder with --out"
        ) from error


def _is_first(entry: Path) -> bool:
    """Tell whether a run that was killed before it wrote its study left this behind."""
    if entry.name == "cells":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name.startswith((_LOCK, ".config.yaml."))


def _lock(path: Path) -> FileLock:
    """Keep other processes out; the same process may come in again."""
    lock, owner = FileLock(path / _LOCK, timeout=0, is_singleton=True), path / f"{_LOCK}.owner"
    try:
        lock.acquire()
    except Timeout as error:
        who = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise UserError(
            f"{path} is in use by {who}", "wait until it has ended, or give another folder with --out"
        ) from error
    try:
        _replace(owner, f"process {os.getpid()} on {platform.node()}\n")
    except BaseException:
        lock.release()
        raise
    return lock


def _read(path: Path) -> Any:
    """Return what a JSON file holds; None where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's list of files, where the system can.

    Args:
        path: The folder.
    """
    with contextlib.suppress(OSError):  # not on every system is a folder something to open
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
