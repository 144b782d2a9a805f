"""Files that are whole or not there: written beside their place, moved there, with errors of the disk in two lines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError

_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENOENT)


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
        why, culprit, hint = error.strerror or str(error), error.filename2 or error.filename, "give another folder"
        if error.errno in _IN_THE_WAY and isinstance(culprit, str | Path):
            files = [each for each in Path(culprit).parents if each.is_file()]
            why, hint = f"{why}: {files[0] if files else culprit}", "move that away, or give another folder"
        raise UserError(f"cannot write to {path}: {why}", f"{hint} with --out") from error


def remove(path: Path) -> None:
    """Remove whatever stands at a place, a folder with all in it; nothing where there is nothing.

    Args:
        path: The place.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there.

    Args:
        path: The place.
        text: What it holds.

    Raises:
        OSError: The disk is full, or a folder stands there.
    """
    draft = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; None where it is missing or damaged.

    Args:
        path: The file.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def sync(path: Path) -> None:
    """Wait until the disk has a file.

    Args:
        path: The file.

    Raises:
        OSError: The disk is full.
    """
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
