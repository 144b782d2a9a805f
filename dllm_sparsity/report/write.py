"""Write a report: report.html, summary.json and tables/, each file whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from dllm_sparsity.analysis.loading import Run, load
from dllm_sparsity.errors import UserError
from dllm_sparsity.report.data import from_reading, from_run
from dllm_sparsity.report.html import page
from dllm_sparsity.report.tables import tables_of


def write_report(run_dir: str | Path | Run, out: Path | None = None) -> Path:
    """Write report.html, summary.json and tables/ of a run directory from its sealed cells.

    Args:
        run_dir: The run directory, or a run that was loaded or joined.
        out: Folder that they go to; the run directory when None.

    Returns:
        Path of report.html.

    Raises:
        UserError: It holds no finished cell, a file is damaged, or it cannot be written to.
    """
    run = run_dir if isinstance(run_dir, Run) else load(run_dir)
    data, place = from_run(run), out or run.path
    for name, table in tables_of(data).items():
        _write(place / "tables" / f"{name}.parquet", _parquet(table))
        _write(place / "tables" / f"{name}.csv", _csv(table))
    _write(place / "summary.json", json.dumps(data.summary, indent=1, allow_nan=False).encode())
    return _write(place / "report.html", page(data).encode())


def save_report(reading: Any, path: str | Path, title: str = "Activation sparsity of a recorded loop") -> Path:
    """Write the page of a loop that was not ours: the sections that need step records only.

    Args:
        reading: What `tracker.read()` returned, or column name -> values in the step schema.
        path: Where the page goes.
        title: Its heading.

    Returns:
        The path.

    Raises:
        UserError: A column is missing, or the file cannot be written.
    """
    return _write(Path(path), page(from_reading(reading, title)).encode())


def _write(path: Path, content: bytes) -> Path:
    """Write a file under another name and move it into place, so that a reader never sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            # mkstemp makes private files; a report is for whoever may read the folder
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        hint = "choose a folder that you may write to with --out"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, then run the same command again; all cells are kept"
        if error.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTDIR):
            hint = "something else stands there: move it away, then run the same command again; all cells are kept"
        raise UserError(f"cannot write {path}: {error.strerror}", hint) from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _csv(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pcsv.write_csv(table, sink)
    return sink.getvalue()
