"""compare(): run a study, analyse it, write its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparsity.study.config import StudyConfig, build_config, read_config

EMBEDDED_STUDY = Path(__file__).parent / "pair" / "study.yaml"


@dataclass(frozen=True)
class Comparison:
    """What a study found.

    Args:
        path: The run directory.
        report: The HTML report.
        summary: What summary.json holds.
    """

    path: Path
    report: Path
    summary: dict[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """Return the main table: one row per task, site and paradigm."""
        from dllm_sparsity.analysis import headline

        return headline(self.summary)

    def _repr_html_(self) -> str:
        from html import escape

        rows = self.table()
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0]) if rows else ""
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{escape(str(self.report))}</p>"


def compare(
    config: StudyConfig | Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    progress: Any = None,
) -> Comparison:
    """Compare the activation sparsity of autoregressive and diffusion language models.

    Args:
        config: A study, its fields, or its YAML file; None runs the embedded study.
        out: The run directory; `runs/<name>` when None. The same directory continues where an earlier run stopped.
        progress: Told what happens; nothing is shown when None.

    Returns:
        Where everything is, and the summary.

    Raises:
        UserError: Something in the study, a model or a task is wrong; finished cells stay.

    Example:
        >>> compare().table()  # doctest: +SKIP
    """
    from dllm_sparsity.report import write_report
    from dllm_sparsity.study.engines.local import run_study

    study = as_config(config)
    rundir = run_study(study, Path(out) if out is not None else Path("runs") / study.name, progress or _Silent())
    return finish(rundir.path, write_report(rundir.path))


def finish(path: Path, report: Path) -> Comparison:
    """Read a finished report back.

    Args:
        path: The run directory.
        report: Its report.
    """
    import json

    report = report.resolve()
    if report.is_relative_to(Path.cwd()):
        report = report.relative_to(Path.cwd())
    return Comparison(path, report, json.loads((path / "summary.json").read_text(encoding="utf-8")))


def as_config(config: StudyConfig | Mapping[str, Any] | str | Path | None) -> StudyConfig:
    """Return a validated study, whatever form it is given in.

    Args:
        config: As in `compare`.
    """
    if isinstance(config, StudyConfig):
        return build_config(config.model_dump(exclude_unset=True))
    if isinstance(config, Mapping):
        return build_config(dict(config))
    return read_config(config if config is not None else EMBEDDED_STUDY)


class _Silent:
    """Progress that shows nothing."""

    def start(self, total: float, done: float) -> None: ...

    def cell(self, title: str, cost: float) -> None: ...

    def share(self, done: int, total: int) -> None: ...

    def stop(self) -> None: ...
