"""The schema of sealed cells: what steps.parquet, samples.parquet, cell.json and DONE hold. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict

import pyarrow as pa

SCHEMA_VERSION = 1
SEALED_FILES = ("cell.json", "samples.parquet", "steps.parquet")
"""What DONE holds the checksums of."""
NOISE_BINS = 20
PRIMITIVE_SITES = ("input", "gate", "up", "intermediate")
EXCLUDED_STATES = ("pad", "after_eos")
"""Token states left out of every headline figure: padding, and tokens behind the end of their row."""

STEP_COLUMNS: dict[str, pa.DataType] = {
    "phase": pa.string(),  # prefill, decode, denoise, likelihood, forward, ...
    "branch": pa.string(),  # cond or uncond (the half of classifier-free guidance without its prompt)
    "block": pa.int32(),  # block of the canvas; 0 where there is one block only
    "step": pa.int32(),  # denoising step or decode step, counted over the whole canvas; 0 in likelihood
    "noise_bin": pa.int32(),  # floor(20 * masked fraction of the row's canvas), 0 to 19
    "layer": pa.int32(),
    "site": pa.string(),  # a primitive site; a cell at `all` has rows for input and for intermediate
    "expert": pa.int32(),  # -1 for a dense FFN
    "token_state": pa.string(),  # unknown, prompt, masked, committed_now, committed, after_eos, pad
    "rows": pa.int64(),  # tokens counted
    "kept": pa.int64(),  # activations that are non-zero after the rule
    "total": pa.int64(),  # rows times the width of the site
}
OVERLAP_COLUMNS: dict[str, pa.DataType] = {
    # *_prev: against the same row one step before; *_first: against its first step
    f"{name}_{against}": kind
    for against in ("prev", "first")
    for name, kind in (
        ("rows", pa.int64()),  # tokens that had an earlier kept set to compare with
        ("inter", pa.int64()),  # size of the intersection of both kept sets, summed over those tokens
        ("union", pa.int64()),
        ("kept", pa.int64()),  # size of the earlier kept set, summed
        ("jaccard_sum", pa.float64()),  # per-token Jaccard, summed; divide by rows
    )
}
SAMPLE_COLUMNS: dict[str, pa.DataType] = {
    "task": pa.string(),
    "doc_id": pa.int64(),
    "doc_hash": pa.string(),
    "prompt_hash": pa.string(),
    "filter": pa.string(),
    "answer": pa.string(),  # generated text, or the index of the chosen option
    "correct": pa.float64(),  # the task's headline metric for this item; null where it has none per item
    "metrics": pa.string(),  # JSON object of every numeric metric the task gave for this item
    "target": pa.int32(),  # index of the right option; null unless multiple choice
    "loglikelihoods": pa.list_(pa.float64()),  # one per request, in nats; a bound on diffusion models
    "loglikelihood_errors": pa.list_(pa.float64()),  # Monte-Carlo standard error of each; 0 where exact
    "target_tokens": pa.list_(pa.int32()),  # scored tokens of each request
    "answer_tokens": pa.list_(pa.int32()),  # generated token ids up to the stop
    "nfe": pa.int64(),  # forward passes this item took part in
    "new_tokens": pa.int64(),  # generated tokens up to the stop
    "seconds": pa.float64(),  # its share of its batches' wall clock
    # over all layers, without pad, after_eos and uncond; null for a site that was not recorded
    **{f"{count}_{site}": pa.int64() for site in PRIMITIVE_SITES for count in ("kept", "total")},
}
OPTIONAL_SAMPLE_COLUMNS: dict[str, pa.DataType] = {
    "group": pa.string(),  # items with one value depend on each other: one passage, one twin pair; null stands alone
}


KINDS = ("accuracy", "nll", "loglikelihood", "agreement", "score")
"""Of qualities."""
_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "fingerprint": (str,),
    "paradigm": (str,),
    "model": (str,),
    "task": (str,),
    "output_type": (str,),
    "dense": (bool,),
    "rule": (str, type(None)),
    "rule_parameters": (dict,),
    "strength": (*_NUMBER, type(None)),
    "site": (str, type(None)),
    "sites_recorded": (list,),
    "layers": (list, type(None)),
    "qualities": (list,),
    "estimator": (str, type(None)),
    "shifted_steps": (bool,),
    "ffn": (dict,),
    "simulated": (bool,),
    "items": (int,),
    "totals": (dict,),
    "notes": (list,),
}


class Quality(TypedDict):
    """One quality measure of a cell."""

    name: str  # column of `metrics`, or nll (gold option or whole text, per token), or agreement
    kind: str  # accuracy | nll | loglikelihood | agreement | score
    chance: float | None  # expected value of guessing, for accuracy


class CellRecord(TypedDict):
    """What cell.json holds: enough to label, pair and rank the cell without its tables."""

    schema: int
    fingerprint: str
    paradigm: str  # autoregressive | diffusion
    backend: str  # registry name of the backend
    model: str  # label shown to people
    model_id: str  # hub id or folder as given
    task: str
    output_type: str  # lm-eval's: multiple_choice, loglikelihood, loglikelihood_rolling, generate_until
    dense: bool  # no rule acted; shared by every curve of its model and task
    rule: str | None
    rule_parameters: dict[str, Any]
    strength: float | None
    site: str | None  # the site asked for (may be `all`); null when dense
    sites_recorded: list[str]
    layers: list[int] | None
    qualities: list[Quality]  # the first is the headline
    estimator: str | None  # `bound, K=4 stratified` and the like; null for an exact likelihood
    shifted_steps: bool  # true where overlap with the step before compares different tokens (AR decode)
    ffn: dict[str, Any]  # d_model, d_ffn, num_layers, gated
    simulated: bool  # true: masks were simulated, no sparse kernel ran
    items: int
    totals: dict[str, Any]  # nfe, new_tokens, seconds, and {site: {kept, total}} under `sites`
    parts: dict[str, Any]  # what the fingerprint was made of
    environment: dict[str, Any]
    notes: list[str]
    replicate: NotRequired[int]  # 1 and up: a further run of a dense cell with its batches in another order


def steps_schema(with_overlap: bool) -> pa.Schema:
    """Return the schema of steps.parquet.

    Args:
        with_overlap: Whether the overlap metric was on.
    """
    return pa.schema({**STEP_COLUMNS, **(OVERLAP_COLUMNS if with_overlap else {})})


def samples_schema() -> pa.Schema:
    """Return the schema of samples.parquet."""
    return pa.schema(SAMPLE_COLUMNS)


def checksums(folder: Path) -> dict[str, str]:
    """Return what DONE holds of a cell: the SHA-256 of each of its files.

    Args:
        folder: The cell's.

    Raises:
        OSError: A file cannot be read.
    """
    return {name: _digest(folder / name) for name in SEALED_FILES}


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a cell that has a DONE, or None where its files are those that were sealed.

    Args:
        folder: The cell's.
    """
    sums = _read(folder / "DONE")
    if not isinstance(sums, dict) or set(sums) != set(SEALED_FILES):
        return "DONE is damaged"
    for name in SEALED_FILES:
        try:
            if _digest(folder / name) != sums[name]:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    record = _read(folder / "cell.json")
    if isinstance(record, dict) and record.get("fingerprint") != folder.name:
        return "cell.json is of another cell"
    flaw = "not JSON" if record is None else find_flaw(record)
    return None if flaw is None else f"cell.json does not hold: {flaw}"


def find_flaw(record: Any) -> str | None:
    """Return what keeps a record from being one of this schema, in all that the analysis relies on; None where nothing.

    Args:
        record: What a cell.json holds.
    """
    if not isinstance(record, dict):
        return "not an object"
    for name, types in _FIELDS.items():
        if not isinstance(record.get(name), types) or (isinstance(record.get(name), bool) and bool not in types):
            return f"{name} is missing or of the wrong type"
    if any(not isinstance(each, str) for name in ("sites_recorded", "notes") for each in record[name]):
        return "sites_recorded or notes holds something that is no text"
    if any(type(layer) is not int for layer in record["layers"] or ()):
        return "layers holds something that is no number of a layer"
    if record["schema"] != SCHEMA_VERSION:
        return f"schema {record['schema']}, this version reads schema {SCHEMA_VERSION}"
    if not record["dense"] and (record["site"] is None or record["rule"] is None):
        return "a cell with a rule needs its rule and its site"
    again = record.get("replicate", 1)
    if type(again) is not int or again < 1 or ("replicate" in record and not record["dense"]):
        return "replicate is not the number of a further dense run"
    sites = record["totals"].get("sites", {})
    counts = list(sites.values()) if isinstance(sites, dict) else [None]
    if not all(isinstance(own, dict) and all(isinstance(value, _NUMBER) for value in own.values()) for own in counts):
        return "totals.sites is not a count for each site"
    for quality in record["qualities"]:
        if not isinstance(quality, dict) or not isinstance(quality.get("name"), str):
            return "a quality without a name"
        if quality.get("kind") not in KINDS or not isinstance(quality.get("chance"), (*_NUMBER, type(None))):
            return f"quality {quality['name'][:40]} is of an unknown kind"
    return None


def parse_json(text: str | bytes) -> Any:
    """Read JSON strictly: no NaN, no infinity, no number that 64 bits do not hold.

    Args:
        text: The JSON.

    Raises:
        ValueError: It is something else.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse, parse_int=_whole, parse_float=_real)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not JSON")


def _whole(text: str) -> int:
    return int(text) if len(text) < 20 and abs(int(text)) < 2**63 else _refuse(text)


def _real(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
