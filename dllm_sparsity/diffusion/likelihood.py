"""The likelihood bound of a masked-diffusion model: which tokens to mask, and with what weight each loss counts.

For a target of L tokens the bound is  sum over l = 1..L of (1/L) * E[(L/l) * sum of log p(token | unmasked)],  where
l of the L tokens are masked, uniformly. It bounds the log-likelihood from below.

Source: Nie et al. 2025 (LLaDA), equation 6, https://arxiv.org/abs/2502.09992. Differs: the mask counts are stratified
without rounding, so each count is equally likely (the released code rounds half to even and is biased).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_EXACT = 12
"""Longest target that is enumerated: 2**12 - 1 forward passes."""


@dataclass(frozen=True)
class MaskPlan:
    """Masks of one target, and the weight of each masked token's log-probability.

    Args:
        masks: `[masks, length]`, True where masked; no two are equal.
        weights: `[masks]`; the bound is the weighted sum of each mask's summed log-probabilities.
        draws: For each Monte-Carlo draw, the number of its mask; empty where the plan is exact.
    """

    masks: np.ndarray
    weights: np.ndarray
    draws: tuple[int, ...] = ()

    def bound(self, sums: Sequence[float]) -> tuple[float, float]:
        """Return (the bound in nats, its Monte-Carlo standard error).

        The error treats draws as independent; stratification makes the true one smaller.

        Args:
            sums: Summed log-probability of the masked tokens under each mask.
        """
        total = float(np.dot(self.weights, sums))
        length = self.masks.shape[1]
        if not self.draws or length == 1:
            return total, 0.0
        if len(self.draws) == 1:
            return total, math.nan
        per_draw = [length / self.masks[number].sum() * sums[number] for number in self.draws]
        return total, float(np.std(per_draw, ddof=1) / math.sqrt(len(per_draw)))


def exact(length: int) -> MaskPlan:
    """Return every mask of a short target: the bound without Monte Carlo.

    Args:
        length: Tokens of the target, at most `MAX_EXACT`.

    Raises:
        ValueError: The target is longer.
    """
    if length > MAX_EXACT:
        raise ValueError(f"a target of {length} tokens has too many masks to enumerate; at most {MAX_EXACT} tokens")
    masks = np.array(list(itertools.product((False, True), repeat=length)))[1:]
    counts = masks.sum(axis=1)
    subsets = np.array([math.comb(length, count) for count in counts])
    return MaskPlan(masks, 1 / (counts * subsets))  # (1/L) * (1/subsets) * (L/l)


def monte_carlo(length: int, samples: int, seed: Sequence[int]) -> MaskPlan:
    """Draw masks with stratified mask counts; every count from 1 to `length` is equally likely on average.

    Equal masks are merged, so a target of one token costs one forward pass whatever `samples` is.

    Args:
        length: Tokens of the target.
        samples: Draws.
        seed: The same seed gives the same masks, at every strength of a rule: comparisons are paired.
    """
    rng = np.random.default_rng(list(seed))
    share = (np.arange(samples) + rng.random(samples)) / samples
    counts = np.minimum((share * length).astype(int), length - 1) + 1
    order = rng.random((samples, length)).argsort(axis=1).argsort(axis=1)
    masks, draws = np.unique(order < counts[:, None], axis=0, return_inverse=True)
    draws = draws.reshape(-1)
    weights = np.bincount(draws, minlength=len(masks)) / samples * length / masks.sum(axis=1)
    return MaskPlan(masks, weights, tuple(int(number) for number in draws))


def target_seed(seed: int, context: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Return the seed of a target's masks: it depends on the tokens alone, not on the batch or the rule.

    Args:
        seed: The study's seed.
        context: Token ids of the context.
        tokens: Token ids of the target.
    """
    return seed, zlib.crc32(np.array([*context, -1, *tokens], dtype=np.int64).tobytes())
