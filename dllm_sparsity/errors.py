"""The two-line error that users see."""

from __future__ import annotations

import re
from typing import Any


class UserError(Exception):
    """Report something the user can put right, as what is wrong and what to do.

    Args:
        message: What is wrong, with the offending value, on one line.
        hint: What to do about it, a command where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint:  {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.message, self.__dict__)  # it crosses from one process to another


class Interrupted(UserError):
    """Say what an interrupt left behind."""

    exit_code = 130


def _again(kind: type[UserError], message: str, fields: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, message)
    error.__dict__.update(fields)
    return error


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to a mistyped one, or nothing.

    Args:
        name: What was typed.
        known: The names that would have been accepted.
    """
    import difflib

    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def shorten(text: object, length: int = 200) -> str:
    """Return foreign text on one line, cut behind its first sentence or at a word, and with `…` where it is cut.

    Args:
        text: An error of a library, or what it says.
        length: Characters, about; a first sentence may have twice as many.
    """
    line = " ".join(str(text).split())
    if len(line) <= length:
        return line
    first = re.split(r"(?<=[.!?]) ", line, maxsplit=1)[0]
    if length < len(first) <= 2 * length:
        return first if first == line else f"{first} …"
    kept, _, rest = line[: length + 1].rpartition(" ")
    return f"{kept or rest[:length]} …"
