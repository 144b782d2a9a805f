"""Send what libraries print to a log file, so that the terminal shows progress and results only."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dllm_sparsity.study.files import writing

_NOISY = ("dllm_sparsity", "lm_eval", "transformers", "datasets", "huggingface_hub", "httpx", "submitit")


@contextlib.contextmanager
def _appended(log: Path) -> Iterator[IO[str]]:
    """Open the log; a disk that fills up under it must not hide the error that matters."""
    with writing(log.parent):
        stream = log.open("a", encoding="utf-8", errors="replace")
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Redirect both streams and the libraries' loggers.

    Args:
        log: File that is appended to.
    """
    with _appended(log) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handler = logging.StreamHandler(stream)
        loggers = [logging.getLogger(name) for name in _NOISY]
        before = [(logger.handlers[:], logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
