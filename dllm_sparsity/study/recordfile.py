"""A file of records that is only ever added to: what a crash leaves of it is found by length and checksum."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from dllm_sparsity.study.files import remove, sync_folder, writing

_BEGINNING = b"dllm-sparsity records 1\n"
_LENGTH, _DIGEST = 8, 32
_log = logging.getLogger(__name__)


class RecordFile:
    """Byte strings, one behind the other; each with its length and a digest of its number and content.

    What does not match, and all behind it, is cut off when the file is opened, and said.

    Args:
        path: The file; made when it does not exist, with its folder.
        tell: Told what was damaged; the log when None.

    Raises:
        UserError: It cannot be made, read or written to.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] | None = None) -> None:
        self.path, self._tell = path, tell or _log.warning
        self._places: list[tuple[int, int]] = []  # where each record's content begins, and its length
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                self._tell(f"{path}: no file of records, but a folder; it is removed")
                remove(path)
            self._stream = path.open("r+b" if path.exists() else "w+b", buffering=0)
            try:
                self._scan()
            except BaseException:
                self._stream.close()
                raise
            sync_folder(path.parent)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, number: int) -> bytes | None:
        """Return a record, or None where the disk gives back other bytes than were written.

        Args:
            number: Its number, from 0.

        Raises:
            UserError: The file cannot be read.
        """
        start, length = self._places[number]
        with writing(self.path.parent):
            return self._checked(number, start, length)

    def append(self, content: bytes) -> None:
        """Add a record and wait until the disk has it.

        Args:
            content: Any bytes.

        Raises:
            UserError: The disk is full or cannot be written to; the records before stay as they are.
        """
        end = self._end()
        record = len(content).to_bytes(_LENGTH, "little") + _digest(len(self), content) + content
        with writing(self.path.parent):
            try:
                self._write(end, record)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._stream.truncate(end)
                raise
        self._places.append((end + _LENGTH + _DIGEST, len(content)))

    def cut(self, count: int, reason: str, tell: Callable[[str], None] = _log.warning) -> None:
        """Drop all records but the first ones.

        Args:
            count: How many to keep.
            reason: Why.
            tell: Told that; the log where nothing is wrong.

        Raises:
            UserError: The file cannot be written to.
        """
        dropped = self._stream.seek(0, os.SEEK_END) - self._end(count)
        tell(f"{self.path}: {reason}: {dropped} bytes behind record {count} dropped")
        del self._places[count:]
        with writing(self.path.parent):
            self._stream.truncate(self._end())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _end(self, count: int | None = None) -> int:
        """Return where the records, or the first few of them, end."""
        places = self._places[:count]
        return sum(places[-1]) if places else len(_BEGINNING)

    def _scan(self) -> None:
        """Find the records that are whole; cut off what follows them."""
        size = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(0)
        if self._read(len(_BEGINNING)) != _BEGINNING:
            if size:
                self._tell(f"{self.path}: no file of records, or damaged at its beginning: {size} bytes dropped")
            self._stream.truncate(0)
            self._write(0, _BEGINNING)
            return
        start = len(_BEGINNING)
        while start < size:
            self._stream.seek(start)
            length = int.from_bytes(self._read(_LENGTH), "little")
            start += _LENGTH + _DIGEST
            if start + length > size or self._checked(len(self), start, length) is None:
                self.cut(len(self), "cut short, or damaged", self._tell)
                return
            self._places.append((start, length))
            start += length

    def _checked(self, number: int, start: int, length: int) -> bytes | None:
        self._stream.seek(start - _DIGEST)
        digest, content = self._read(_DIGEST), self._read(length)
        return content if _digest(number, content) == digest else None

    def _read(self, length: int) -> bytes:
        parts, missing = [], length
        while missing and (part := self._stream.read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _write(self, start: int, data: bytes) -> None:
        self._stream.seek(start)
        left = memoryview(data)
        while left:
            left = left[self._stream.write(left) :]
        os.fsync(self._stream.fileno())


def _digest(number: int, content: bytes) -> bytes:
    return hashlib.sha256(number.to_bytes(_LENGTH, "little") + content).digest()
