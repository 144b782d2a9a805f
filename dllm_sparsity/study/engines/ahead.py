"""What an engine would be, before a study runs: how many workers, and what the run would refuse."""

from __future__ import annotations

from pathlib import Path

from dllm_sparsity.study.config import StudyConfig
from dllm_sparsity.study.engines import Engine


def workers_ahead(engine: Engine, config: StudyConfig, cells: int) -> int | None:
    """Return how many workers a run would have; None where only a cluster tells. None is started or asked.

    Args:
        engine: Who is to answer.
        config: The study.
        cells: Cells that it plans; those that share forward passes are one.

    Raises:
        UserError: The run would refuse the engine: an extra, a device or GPUs are missing.
    """
    if engine.kind == "ray":
        from dllm_sparsity.study.engines.ray import check_ray

        check_ray(engine, config.device)
        return engine.workers
    if engine.kind == "slurm":
        from dllm_sparsity.study.engines import slurm

        slurm.make_executor(engine, Path())
        return slurm.count_jobs(engine, cells)
    from dllm_sparsity.lm.loading import find_device
    from dllm_sparsity.study.engines.local import count_workers
    from dllm_sparsity.study.models import choose_device

    find_device(choose_device(config.device))
    return count_workers(engine, config.device)[0]
