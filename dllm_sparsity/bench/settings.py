"""What a bench is asked for, and what comes of it on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_sparsity import registry
from dllm_sparsity.bench.shapes import Shape, find
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity import sites as site_names
from dllm_sparsity.sparsity.rule import Rule

_LAYERS = 8
_GRAPH_TOKENS = 1024  # up to so many tokens a GPU waits for its host to launch
_ON_GPU = {"shape": "llama-3.1-8b", "batches": ((8, 512), (1, 512), (1, 1)), "dtype": "bfloat16", "repeats": 30}
_ON_CPU = {"shape": "embedded", "batches": ((8, 64), (1, 64), (1, 1)), "dtype": "float32", "repeats": 9}


@dataclass(frozen=True)
class Settings:
    """What to time. What is None or empty is chosen by the device.

    Args:
        shape: Name of a shape.
        layers: Layers of the model.
        batches: (sequences, tokens of each) of each forward pass.
        rule: Name of a rule.
        strength: Its main parameter.
        sites: As for `sparsify`.
        dtype: Name of a torch dtype.
        device: `cpu`, `cuda` or `cuda:0`.
        mode: `eager`, `graph`, or `auto`: graphs for small batches on a GPU.
        repeats: Rounds that count.
        rows: Rows of the kernel part.
        head: Whether the model has its LM head.
        against: A checkout of the paper's code, or None.
    """

    shape: str | None = None
    layers: int | None = None
    batches: tuple[tuple[int, int], ...] = ()
    rule: str = "top_p"
    strength: float = 0.9
    sites: tuple[str, ...] = ("all",)
    dtype: str | None = None
    device: str | None = None
    mode: str = "auto"
    repeats: int | None = None
    rows: tuple[int, ...] = ()
    head: bool = False
    against: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What is timed: `Settings` with nothing left open.

    Args:
        name: The shape's name.
        shape: Its widths.
        layers: As in `Settings`.
        batches: As in `Settings`.
        rule_name: Its registered name.
        rule: What to keep.
        sites: Primitive sites.
        dtype: Of weights and rows.
        device: Where everything runs.
        mode: As in `Settings`.
        repeats: As in `Settings`.
        rows: As in `Settings`.
        head: As in `Settings`.
    """

    name: str
    shape: Shape
    layers: int
    batches: tuple[tuple[int, int], ...]
    rule_name: str
    rule: Rule
    sites: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    mode: str
    repeats: int
    rows: tuple[int, ...]
    head: bool

    def is_graph(self, batch: int, tokens: int) -> bool:
        """Return whether a forward pass is replayed as a CUDA graph.

        Args:
            batch: Sequences.
            tokens: Tokens of each.
        """
        small = self.device.type == "cuda" and batch * tokens <= _GRAPH_TOKENS
        return self.mode == "graph" or (self.mode == "auto" and small)

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "shape": self.name,
            **{f"shape_{name}": value for name, value in vars(self.shape).items()},
            "layers": self.layers,
            "head": self.head,
            "batches": [list(batch) for batch in self.batches],
            "rule": self.rule_name,
            "strength": self.rule.strength,
            "sites": list(self.sites),
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": self.mode,
            "repeats": self.repeats,
            "rows": list(self.rows),
        }


def plan(asked: Settings) -> Plan:
    """Choose what was left open, and refuse what cannot be timed here.

    Args:
        asked: What to time.

    Raises:
        UserError: A name is unknown, a strength is out of range or dense, or the device is not here.
    """
    if asked.shape is not None:
        find(asked.shape)
    sites, make_rule = site_names.expand(asked.sites), registry.get("rules", asked.rule)
    rule: Rule = make_rule(asked.strength)
    if rule.is_dense:
        raise UserError(f"strength {asked.strength:g} is {asked.rule}'s dense setting", "there is nothing to time")
    device = _device(asked.device)
    if asked.mode == "graph" and device.type != "cuda":
        raise UserError("CUDA graphs need a GPU", "leave --mode out, or give --mode eager")
    usual = _ON_GPU if device.type == "cuda" else _ON_CPU
    name = asked.shape or usual["shape"]
    shape = find(name)
    return Plan(
        name=name,
        shape=shape,
        layers=asked.layers or min(_LAYERS, shape.layers),
        batches=asked.batches or usual["batches"],
        rule_name=asked.rule,
        rule=rule,
        sites=sites,
        dtype=getattr(torch, asked.dtype or usual["dtype"]),
        device=device,
        mode=asked.mode,
        repeats=asked.repeats or usual["repeats"],
        rows=asked.rows or (256, 1024, 4096),
        head=asked.head,
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", "give cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"cannot time on device {name}", "give cpu, cuda or cuda:0")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device {name} asked for, but torch sees no GPU", "give --device cpu, or install a CUDA torch")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise UserError(f"no device {name}", f"torch sees cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", number)
