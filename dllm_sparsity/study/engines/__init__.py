"""Engines: who answers the planned batches of a study: this process, one a GPU, a Ray cluster, or SLURM jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dllm_sparsity.errors import UserError, did_you_mean

KINDS = ("local", "ray", "slurm")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Engine:
    """Who does the work; changes no number in float32.

    Args:
        kind: `local`, `ray` or `slurm`.
        address: Of a Ray cluster; None for the one that RAY_ADDRESS names or that runs here, else a new one.
        workers: Workers, or jobs of SLURM; None for one for each GPU, or one where there is none.
        gpus_per_worker: GPUs that each sees; more than one for a model with a device_map.
        options: What SLURM is asked for, as submitit names it: slurm_partition, timeout_min, gpus_per_node, ...

    Raises:
        UserError: There is no such engine, or a number is not positive.
    """

    kind: str = "local"
    address: str | None = None
    workers: int | None = None
    gpus_per_worker: int = 1
    options: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"unknown engine {self.kind!r}{did_you_mean(self.kind, list(KINDS))}",
                "give local, ray, ray://HOST:PORT or slurm",
            )
        if (self.workers is not None and self.workers < 1) or self.gpus_per_worker < 1:
            raise UserError("an engine needs one worker or more, with one GPU or more", "give positive numbers")
        if self.options and self.kind != "slurm":
            raise UserError(f"engine {self.kind} takes no options", "they are for --engine slurm")

    @classmethod
    def parse(
        cls, text: str, workers: int | None = None, gpus_per_worker: int = 1, options: tuple[str, ...] = ()
    ) -> Engine:
        """Read what the command line says.

        Args:
            text: `local`, `ray`, `ray://HOST:PORT` or `slurm`.
            workers: As above.
            gpus_per_worker: As above.
            options: `NAME=VALUE` each.

        Raises:
            UserError: As above, or an option has no `=`.
        """
        kind, slashes, rest = text.partition("://")
        if slashes and (kind != "ray" or not rest):
            raise UserError(f"cannot read engine {text!r}", "give local, ray, ray://HOST:PORT or slurm")
        given: dict[str, str | int] = {}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or not name:
                raise UserError(f"cannot read engine option {option!r}", "give NAME=VALUE, such as timeout_min=120")
            given[name] = int(value) if re.fullmatch(r"\d+", value) else value
        return cls(kind, text if slashes else None, workers, gpus_per_worker, given)


@dataclass(frozen=True)
class Share:
    """One of several equal parts of a study.

    Args:
        number: Of the part, from 0.
        parts: How many there are.
        cells: Folder of the study's sealed cells, none of which is run again.
    """

    number: int = 0
    parts: int = 1
    cells: Path | None = None

    def of(self, work: Sequence[_T]) -> list[_T]:
        """Return this part of a list: neighbours stay together, so that few models are loaded.

        Args:
            work: The list.
        """
        start, stop = (len(work) * edge // self.parts for edge in (self.number, self.number + 1))
        return list(work[start:stop])
