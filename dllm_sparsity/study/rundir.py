"""The run directory: sealed cells that a crash, a full disk or an interrupt cannot damage. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import StudyConfig


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
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file", "give another --out")
        if path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not empty and holds no study", "give an empty folder with --out")
        with writing(path):
            (path / "cells").mkdir(parents=True, exist_ok=True)
            for draft in (path / "cells").glob(".*"):
                if not _is_running(draft.suffix.removeprefix(".")):
                    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
            fields = config.model_dump(mode="json", exclude_unset=True)
            _replace(path / "config.yaml", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))

    def write_plan(self, plan: list[dict[str, Any]], environment: dict[str, Any]) -> None:
        """Write what is known before anything runs.

        Args:
            plan: One entry a cell.
            environment: Versions and machine.
        """
        with writing(self.path):
            _replace(self.path / "plan.json", json.dumps(plan, indent=1))
            _replace(self.path / "environment.json", json.dumps(environment, indent=1, sort_keys=True))

    def is_sealed(self, fingerprint: str) -> bool:
        """Tell whether a cell is there, whole.

        Args:
            fingerprint: The cell's.
        """
        return (self.path / "cells" / fingerprint / "DONE").is_file()

    def seal(self, fingerprint: str, record: dict[str, Any], samples: pa.Table, steps: pa.Table) -> None:
        """Write a cell beside its place and move it there, so that it is whole or not there at all.

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
                (draft / "DONE").write_text("")
                if place.exists():
                    shutil.rmtree(place)
                os.replace(draft, place)
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
                "free some, then run the same command again: finished cells are kept",
            ) from error
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}", "give another folder with --out"
        ) from error


def _is_running(number: str) -> bool:
    if not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
