"""Share of an FFN's multiplications that the zeros of a site would save."""

from __future__ import annotations

from collections.abc import Mapping


def ffn_flops_saved(site: str, sparsity: Mapping[str, float], gated: bool) -> float | None:
    """Return the share of the FFN's FLOPs that a kernel could skip, in [0, 1].

    A gated FFN is three equal matrices, gate, up and down; a plain one is two. A zero of `input` skips a column of gate
    and of up; a zero of `intermediate` a column of down. A zero of `gate` skips a row of up and a column of down, for
    the product is zero whatever up says. `up` is assumed likewise: up is computed first, and its zeros skip a row of
    gate and a column of down. No kernel is timed here.

    Args:
        site: The site asked for; `all` is input and intermediate.
        sparsity: Achieved sparsity of each primitive site.
        gated: Whether the FFN has a gate.

    Returns:
        The share, or None where a sparsity it needs was not recorded or the FFN lacks the site.

    Source: with W the FFN's weights, saved = (share of W's columns and rows known to be skipped), gated:
        input 2 S_x / 3, intermediate S_i / 3, gate 2 S_g / 3, up 2 S_u / 3, all (2 S_x + S_i) / 3; plain: S_x / 2,
        S_i / 2, (S_x + S_i) / 2.
    """
    shares = {"input": 2 / 3, "gate": 2 / 3, "up": 2 / 3, "intermediate": 1 / 3}
    if not gated:
        shares = {"input": 1 / 2, "intermediate": 1 / 2}
    parts = ("input", "intermediate") if site == "all" else (site,)
    if any(part not in shares or part not in sparsity for part in parts):
        return None
    return sum(shares[part] * sparsity[part] for part in parts)
