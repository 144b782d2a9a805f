"""The two-line error that users see."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Report something the user can put right, as what is wrong and what to do.

    Args:
        message: What is wrong, with the offending value, on one line.
        hint: What to do about it, a command where there is one.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint:  {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.message, self.__dict__)  # it crosses from one process to another


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
