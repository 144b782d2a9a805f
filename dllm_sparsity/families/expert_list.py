"""expert_list: mixtures of experts that are a list of gated FFNs: LLaDA-MoE, LLaDA2 and their like.

An expert is called with the tokens that were routed to it and is not told which they are. They are found again by
their content: each row that an expert gets is a row of the layer's input, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparsity.errors import UserError
from dllm_sparsity.families import Family, any_parameter
from dllm_sparsity.families.gated import Gated
from dllm_sparsity.sparsity.hooks import hook
from dllm_sparsity.sparsity.sites import FFN, Act, Routed, SitePoint
from dllm_sparsity.sparsity.transfer import Poll


class ExpertList(Family):
    """A module with `experts`, a ModuleList of gated FFNs of one width, and a router beside it."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the expert layer that a module holds, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.

        Raises:
            UserError: Its experts are of another form, or differ in width.
        """
        experts = module._modules.get("experts")
        if not isinstance(experts, nn.ModuleList) or not len(experts):
            return None
        found = [Gated.match(f"{name}.experts.{n}", layer, expert) for n, expert in enumerate(experts)]
        shapes = {None if ffn is None else (ffn.d_model, ffn.d_ffn) for ffn in found}
        if len(shapes) > 1 or None in shapes:
            raise UserError(f"{name}.experts are no gated FFNs of one width", "this form of experts is not covered")
        ffns = [ffn for ffn in found if ffn is not None]
        first, tracer = ffns[0], _Tracer(module, list(experts))
        points = {
            site: SitePoint(
                experts,
                "inside",
                point.width,
                attach=partial(tracer.attach, [ffn.points[site] for ffn in ffns]),
            )
            for site, point in first.points.items()
        }
        return FFN(
            layer,
            f"{name}.experts",
            points,
            first.d_model,
            first.d_ffn,
            True,
            any_parameter(experts),
            first.missing,
            experts=len(experts),
        )


class _Tracer:
    """Tell which token each row of an expert is; its hooks stand while something is attached.

    Args:
        block: The module that routes; its input holds all tokens.
        experts: Its experts.
    """

    def __init__(self, block: nn.Module, experts: list[nn.Module]) -> None:
        self._block, self._experts = block, experts
        self._users = 0
        self._handles: list[Any] = []
        self._tokens = 0
        self._sorted = self._places = self._code = torch.empty(0, dtype=torch.long)
        self._now: dict[int, Routed] = {}
        self._strange = Poll()

    def attach(self, points: list[SitePoint], act: Act) -> Callable[[], None]:
        """Let an act work on one site of every expert; what is returned detaches it.

        Args:
            points: The site's place in each expert.
            act: What works on it.
        """
        if not self._users:
            first: dict[str, Any] = {"with_kwargs": True, "prepend": True}  # before any rule of another tracker
            self._handles = [self._block.register_forward_pre_hook(self._see_block, **first)]
            self._handles += [
                expert.register_forward_pre_hook(partial(self._see_expert, number), **first)
                for number, expert in enumerate(self._experts)
            ]
        self._users += 1
        undos = [
            hook(point, lambda rows, number=number: act(rows, routed=self._now.get(number)))
            for number, point in enumerate(points)
        ]

        def undo() -> None:
            for each in undos:
                each()
            self._users -= 1
            if not self._users:
                for handle in self._handles:
                    handle.remove()
                self._now.clear()

        return undo

    def _see_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        codes = self._codes(_first(args, kwargs))
        self._tokens = len(codes)
        self._sorted, self._places = codes.sort(stable=True)

    def _see_expert(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find an expert's tokens; those of equal content stand in the same order in both places."""
        codes = self._codes(_first(args, kwargs))
        mine, order = codes.sort(stable=True)
        among_equals = torch.arange(len(mine), device=mine.device) - torch.searchsorted(mine, mine)
        place = torch.searchsorted(self._sorted, mine) + among_equals
        place = place.clamp(max=max(0, self._tokens - 1))
        if len(mine) and self._strange.says((self._sorted[place] != mine).any()):  # on a GPU known some calls late
            raise UserError("an expert was given rows that are not its layer's input", "this form is not covered")
        token = torch.empty_like(order)
        token[order] = self._places[place]
        self._now[number] = Routed(token, number, self._tokens)

    def _codes(self, rows: Tensor) -> Tensor:
        """Return a number for each row that depends on its bits alone."""
        rows = rows.detach().reshape(-1, rows.shape[-1]).contiguous()
        bits = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long()
        if len(self._code) != rows.shape[-1] or self._code.device != rows.device:
            generator = torch.Generator().manual_seed(0)
            code = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator)
            self._code = (2 * code + 1).to(rows.device)
        return (bits * self._code).sum(-1)


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
