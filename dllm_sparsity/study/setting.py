"""What of a cell a process needs to know to answer the cell's batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparsity.study.config import ModelConfig, RuleConfig
from dllm_sparsity.study.models import make_rule
from dllm_sparsity.study.plan import Cell


@dataclass(frozen=True)
class Setting:
    """How a model is run in a cell; it can be sent to another process.

    Args:
        model: The model.
        seed: The study's seed.
        rule: None when dense.
        strength: The rule's main parameter.
        sites: Primitive sites that are recorded.
        mc: Monte-Carlo draws; None for the model's own.
    """

    model: ModelConfig
    seed: int
    rule: RuleConfig | None
    strength: float | None
    sites: tuple[str, ...]
    mc: int | str | None

    @classmethod
    def of(cls, cell: Cell, seed: int) -> Setting:
        """Return the setting of a cell.

        Args:
            cell: The cell.
            seed: The study's seed.
        """
        folder = Path(cell.model.model).expanduser()
        placed = {"model": str(folder.resolve())} if folder.is_dir() else {}  # workers may stand elsewhere
        return cls(cell.model.model_copy(update=placed), seed, cell.rule, cell.strength, cell.sites, cell.task.mc)

    def make_rule(self) -> Any:
        """Return the rule; None when dense.

        Raises:
            UserError: The rule refuses the strength or a parameter.
        """
        if self.rule is None or self.strength is None:
            return None
        return make_rule(self.rule.name, self.strength, self.rule.parameters)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers that the rule acts on; all when None."""
        return None if self.rule is None else self.rule.layers
