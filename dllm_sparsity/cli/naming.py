"""Put the name of the study's file where a hint names a command for it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError


def named(text: str, path: Path | None) -> str:
    """Return a text with the name of the study's file in its commands.

    Args:
        text: What users read.
        path: The file; None where the study was given in another way.
    """
    from dllm_sparsity.lm.hub import FETCH

    return text if path is None else text.replace(FETCH, FETCH.replace("CONFIG", shlex.quote(str(path))))


def names_config(command: Callable[..., None]) -> Callable[..., None]:
    """Let the hints of a command's errors name its argument `config`.

    Args:
        command: A function that takes `config`, a path or None.
    """

    @functools.wraps(command)
    def run(*arguments: Any, config: Path | None, **options: Any) -> None:
        try:
            command(*arguments, config=config, **options)
        except UserError as error:
            error.hint = named(error.hint, config)
            raise

    return run
