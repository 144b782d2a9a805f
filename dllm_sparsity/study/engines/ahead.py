"""What an engine would be, before a study runs: how many workers, and what the run would refuse."""

from __future__ import annotations

from pathlib import Path

from dllm_sparsity.errors import UserError
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


def check_first(engine: Engine, config: StudyConfig) -> None:
    """Refuse bad engines, devices, rules and missing models before a file is written or a weight is loaded.

    Args:
        engine: Who is to answer.
        config: The study.

    Raises:
        UserError: The run cannot be.
    """
    from dllm_sparsity.study.fetch import check_weights
    from dllm_sparsity.study.models import make_rule, make_sampler

    workers_ahead(engine, config, 1)
    for rule in config.rules:
        for strength in rule.strengths:
            if make_rule(rule.name, strength, rule.parameters).is_dense:
                raise UserError(
                    f"strength {strength:g} of {rule.name} is its dense setting", "leave it out: every study runs dense"
                )
    for model in config.models:
        if model.paradigm == "diffusion":
            make_sampler(model)
        check_weights(model)
