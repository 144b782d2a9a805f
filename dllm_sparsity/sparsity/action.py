"""What a hook does with one site's tensor: apply the rule, count, and hand the tensor on."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from dllm_sparsity.sparsity.clock import Clock, FreeClock, TokenState
from dllm_sparsity.sparsity.kernels import fused, naive, operator
from dllm_sparsity.sparsity.rule import Rule, Where

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.clock import Frame
    from dllm_sparsity.sparsity.kernels.fused import Producer
    from dllm_sparsity.sparsity.ledger import Ledger
    from dllm_sparsity.sparsity.rule import Cut
    from dllm_sparsity.sparsity.sites import FFN, Routed, SitePoint


class Action:
    """The rule and the counters of one layer and site.

    Args:
        number: Place of the layer and site in the ledger.
        ffn: The layer.
        site: The site's name.
        point: Where it is.
        rule: What to keep; None only counts.
        clock: Says where the forward pass stands.
        ledger: Counts.
    """

    def __init__(
        self, number: int, ffn: FFN, site: str, point: SitePoint, rule: Rule | None, clock: Clock, ledger: Ledger
    ) -> None:
        self.number, self.point, self.clock, self.ledger = number, point, clock, ledger
        self._layer, self._site = ffn.layer, site
        self.use(rule)

    def use(self, rule: Rule | None) -> None:
        """Change the rule.

        Args:
            rule: As at the class.
        """
        self.rule = rule
        self._cut = None if rule is None else rule.fused(self.point.width)

    @property
    def fuses(self) -> bool:
        """Whether the kernel can find what to keep by itself."""
        return self.rule is None or self._cut is not None

    def __call__(self, tensor: Tensor, producer: Producer | None = None, routed: Routed | None = None) -> Tensor:
        """Return the tensor after the rule.

        Args:
            tensor: What the hooked module takes or gives, `[..., width]`, or wider where the site is a part of it.
            producer: What makes the site's rows out of `tensor`; only where `fuses` said yes.
            routed: What the rows are in an expert layer.
        """
        whole = tensor.shape[-1] == self.point.width
        part = tensor if whole else tensor[..., self.point.start : self.point.start + self.point.width]
        rows = part.reshape(-1, self.point.width)
        frame = self.clock.rows(len(rows) if routed is None else routed.tokens, rows.device)
        if routed is not None and frame is not None:
            frame = self.ledger.frame(self.number, frame, routed)
        needs_grad = rows.requires_grad and torch.is_grad_enabled()
        by_kernel = producer is not None or fused.takes(rows)
        one_operator = by_kernel or (torch.compiler.is_compiling() and not needs_grad)
        if producer is not None or (one_operator and self.ledger.fusable):
            kept_rows = self._fused(rows, part, frame, producer, self._cut if by_kernel else None)
        else:
            kept_rows = self._plain(rows, part, frame)
        if self.rule is None and producer is None:
            return tensor
        result = kept_rows.view(part.shape)
        if whole:
            return result
        rest = self.point.start + self.point.width
        return torch.cat([tensor[..., : self.point.start], result, tensor[..., rest:]], dim=-1)

    def _keep(self, rows: Tensor, part: Tensor, frame: Frame | None) -> Tensor:
        if frame is not None and not isinstance(self.clock, FreeClock):
            sequence, counted = frame.sequence, frame.states != TokenState.PAD
        else:
            sequence, counted = _sequences(part), None
        where = Where(self._layer, self._site, self.point.weight, sequence, counted)
        return cast("Rule", self.rule).keep(rows, where)

    def _fused(
        self, rows: Tensor, part: Tensor, frame: Frame | None, producer: Producer | None, cut: Cut | None
    ) -> Tensor:
        with torch.no_grad():
            counters = None
            if self.clock.counting and frame is not None:
                counters = self.ledger.counters(self.number, rows, frame)
            mask = None if self.rule is None or cut is not None else self._keep(rows, part, frame)
            return operator.apply(rows, cut, mask, counters, producer)

    def _plain(self, rows: Tensor, part: Tensor, frame: Frame | None) -> Tensor:
        kept_rows = rows
        nonfinite = naive.nonfinite_rows(rows)
        if self.rule is not None:
            with torch.no_grad():
                mask = naive.or_rows(self._keep(rows, part, frame), nonfinite)  # a NaN goes on to the read-out
            kept_rows = naive.zero_out(rows, mask)
        if self.clock.counting and frame is not None:
            self.ledger.add(self.number, rows.detach(), kept_rows.detach().bool(), nonfinite, frame)
        return kept_rows


def _sequences(part: Tensor) -> Tensor:
    """Number the sequences of a [batch, seq, width] tensor, one number a row; anything else is one sequence."""
    batch = part.shape[0] if part.dim() == 3 else 1
    rows = part.numel() // part.shape[-1]
    return torch.arange(batch, device=part.device).repeat_interleave(rows // batch)
