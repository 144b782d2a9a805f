"""Say in sentences what a run found, with intervals and counts; no claim beyond the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm_sparsity.analysis.comparison import Comparison
from dllm_sparsity.analysis.critical import DEFAULT_RETENTION
from dllm_sparsity.analysis.curves import Curve
from dllm_sparsity.analysis.readings import Reading


def findings(curves: Sequence[Curve], pairs: Sequence[Comparison], retention: float = DEFAULT_RETENTION) -> list[str]:
    """Return one sentence per pair of curves, and one per curve without a partner.

    Args:
        curves: Curves of one run; of each cell's qualities, the headline is told.
        pairs: Their comparisons.
        retention: Share of the dense quality.
    """
    headline = [curve for curve in curves if curve.quality["name"] == curve.group.headline]
    sentences, told = [], set()
    for pair in pairs:
        if pair.retention != retention or pair.diffusion not in headline or pair.autoregressive not in headline:
            continue
        told |= {id(pair.autoregressive), id(pair.diffusion)}
        sentences.append(_pair_sentence(pair))
    return sentences + [_curve_sentence(curve, retention) for curve in headline if id(curve) not in told]


def allocation_findings(search: Any) -> list[str]:
    """Return one sentence for each allocation by layer that a search looked for.

    Args:
        search: What search.json holds, or None; of several retentions the default one is told, and of the others those
            at which the allocation is better or worse than one strength.
    """
    answers = search.get("curves", []) if isinstance(search, dict) else []
    default = [answer for answer in answers if answer["retention"] == DEFAULT_RETENTION]
    others = [answer for answer in answers if answer["retention"] != DEFAULT_RETENTION]
    told = [*default, *(answer for answer in others if not default or _is_told_apart(answer))]
    return [_allocation_sentence(answer, answer["allocation"]) for answer in told if "allocation" in answer]


def _is_told_apart(answer: dict[str, Any]) -> bool:
    """Tell whether the interval of what an allocation gained, or lost, leaves out zero."""
    interval = answer.get("allocation", {}).get("difference", {}).get("interval")
    return interval is not None and not interval[0] <= 0 <= interval[1]


def _allocation_sentence(uniform: dict[str, Any], own: dict[str, Any]) -> str:
    place = f"{uniform['task']}, {uniform['rule']} at {uniform['site']}, {uniform['paradigm']} ({uniform['model']})"
    share = f"keeping {100 * uniform['retention']:g} % of the dense {_measure(uniform['kind'], uniform['quality'])}"
    if own["value"] is None:
        return f"{place}, {share}: no strengths by layer ({own['reason']})."
    both = [
        ("at least " if each["censored"] else "")
        + f"{percent(each['value'])} % [{', '.join(percent(end) for end in each['interval'])}]"
        for each in (own, uniform)
    ]
    at = "" if own.get("strength") is None else f" at t = {own['strength']:.4g}"
    reached = f"strengths by layer reach {both[0]} sparsity{at}, one strength {both[1]}"
    return f"{place}, {share}: {reached}: {own['difference']['words']}; {own['sharing']}."


def percent(value: float) -> str:
    """Return a share as percent with one digit.

    Args:
        value: The share.
    """
    return f"{100 * value:.1f}"


def first_worse(curve: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the least sparse cell that is worse than dense, and the cell before it.

    Args:
        curve: A curve of the summary; of one that was searched, all strengths count, each on its own items.

    Returns:
        The cell, None where no cell is worse; and the sparsest cell before it, None where there is none.
    """
    before = None
    for point in tested(curve):
        if point["outcome"] == "worse":
            return point, before
        before = None if point["dense"] else point
    return None, before


def tested(curve: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of a curve that are set against dense, dense first and the others by their sparsity.

    Args:
        curve: A curve of the summary.
    """
    both = [*curve["points"], *(own for own in curve["path"] if "outcome" in own)]
    return sorted(both, key=lambda point: (not point["dense"], point["sparsity"] or 0.0))


def in_words(reading: Reading) -> str:
    """Return a critical sparsity with its interval, or why there is none.

    Args:
        reading: The reading.
    """
    if reading.value is None or reading.interval is None:
        return f"no critical sparsity ({reading.reason})"
    low, high = reading.interval
    sign = "at least " if reading.censored else ""
    return f"{sign}{percent(reading.value)} % [{percent(low)}, {percent(high)}]"


def _pair_sentence(pair: Comparison) -> str:
    first, second = pair.autoregressive, pair.diffusion
    low, high = pair.interval
    difference = f"{100 * pair.difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    better, worse = ("diffusion", "autoregressive") if pair.difference > 0 else ("autoregressive", "diffusion")
    verdict = f"{better} tolerates more sparsity than {worse} ({difference})"
    if low <= 0 <= high:
        least = (
            "" if pair.smallest_detectable is None else f"; smallest detectable {100 * pair.smallest_detectable:.1f}"
        )
        verdict = f"no difference between the paradigms is detectable ({difference}{least})"
    bound = " One curve never fell below the threshold, so this compares bounds." if pair.bounded else ""
    told = [
        f"{_model(curve)} up to {in_words(curve.reading(retention=pair.retention))} sparsity"
        for curve in (second, first)
    ]
    kept = f"{100 * pair.retention:g} % of the dense {_quality(second)}"
    return f"{_place(second)}: {verdict}. Keeping {kept}: {', '.join(told)}; n={_items(second, pair.retention)}.{bound}"


def _curve_sentence(curve: Curve, retention: float) -> str:
    reading = curve.reading(retention=retention)
    told = in_words(reading) if reading.value is None else f"up to {in_words(reading)} sparsity"
    return (
        f"{_place(curve)}, keeping {100 * retention:g} % of the dense {_quality(curve)}: {_model(curve)} {told}"
        f" (n={_items(curve, retention)})."
    )


def _items(curve: Curve, retention: float) -> int:
    """Return the items that a reading rests on: a search's are more than those that all its cells have."""
    return curve.reading(retention=retention).items or len(curve.keys)


def _place(curve: Curve) -> str:
    return f"{curve.group.dense.record['task']}, {curve.group.rule} at {curve.group.site}"


def _model(curve: Curve) -> str:
    record = curve.group.dense.record
    return f"{record['paradigm']} ({record['model']})"


def _quality(curve: Curve) -> str:
    return _measure(curve.quality["kind"], curve.quality["name"])


def _measure(kind: str, name: str) -> str:
    return {"nll": "likelihood per token"}.get(kind, name)
