"""--fail-if: what a condition may be, what it means, and the exit code."""

import pytest

from dllm_sparsity.cli.gate import Gate, names
from dllm_sparsity.errors import UserError

HALF, NONE = [0.4, 0.6], None


def curve(task, site, paradigm, value, model="m", rule="top_p", quality="acc", headline=True, at_least=False):
    interval = [0.4, value if at_least else 0.6] if value is not None else NONE
    critical = [
        {"retention": 0.95, "reading": "first", "value": 0.9, "interval": HALF, "censored": False},
        {"retention": 0.99, "reading": "first", "value": value, "interval": interval, "censored": at_least},
    ]
    named = {"task": task, "site": site, "paradigm": paradigm, "model": model, "rule": rule, "headline": headline}
    named["quality"] = quality
    return {**named, "dense": {"value": 0.8, "interval": HALF}, "critical": critical}


def pair(task, quality, difference, interval):
    named = {"task": task, "site": "intermediate", "rule": "top_p", "quality": quality, "retention": 0.99}
    return {**named, "autoregressive": "m", "diffusion": "m", "difference": difference, "interval": interval}


SUMMARY = {
    "counts": {"cells": 12, "unsealed": 0},
    "default_retention": 0.99,
    "default_reading": "first",
    "curves": [
        curve("easy", "intermediate", "diffusion", 0.5),
        curve("easy", "input", "diffusion", None),
        curve("2-way.task", "all", "autoregressive", 0.3, "a/b-1", "top_p"),
        curve("2-way.task", "all", "autoregressive", 0.2, "a/b-1", "top_k"),
        curve("easy", "intermediate", "diffusion", 0.1, quality="nll", headline=False),
        curve("easy", "intermediate", "autoregressive", 0.52),
        curve("easy", "intermediate", "autoregressive", 0.2, quality="nll", headline=False),
        curve("hard", "intermediate", "autoregressive", 0.5, at_least=True),
        curve("hard", "intermediate", "diffusion", 0.6),
        curve("free", "intermediate", "autoregressive", 0.5),
        curve("free", "intermediate", "diffusion", 0.6, at_least=True),
        curve("open", "intermediate", "autoregressive", 0.5, at_least=True),
        curve("open", "intermediate", "diffusion", 0.6, at_least=True),
    ],
    "averages": [curve("average of 2 tasks", "input", "diffusion", 0.7)],
    "comparisons": [
        pair("easy", "acc", -0.02, [-0.05, 0.01]),
        pair("easy", "nll", -0.1, [-0.2, 0.1]),
        *(pair(task, "acc", 0.1, [0.05, 0.2]) for task in ("hard", "free", "open")),
    ],
}
NAME = "critical.easy.intermediate.diffusion"


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (f"{NAME} < 0.5", False),
        (f"{NAME} <= 0.5", True),
        (f"0.4 < {NAME} < 0.6", True),
        (f"0.6 < {NAME} < 0.4", False),
        (f"{NAME}.low == 0.4 and {NAME}.high != 0.6", False),
        (f"not {NAME} > 1 or counts.cells > 99", True),
        ("difference.easy.intermediate == -0.02", True),  # the headline's, of several qualities
        ("difference.easy.intermediate.top_p.acc.m.m == -0.02", True),
        ("difference.easy.intermediate.top_p.nll.m.m == -0.1", True),
        (f"{NAME}.m.top_p == 0.5", True),
        ("critical.average_of_2_tasks.input.diffusion >= 0.7", True),
        ("difference.easy.intermediate.high < 0", False),
        ("critical._2_way_task.all.autoregressive.a_b_1.top_k >= 2e-1", True),
        ("dense.easy.intermediate.diffusion > .79", True),
    ],
)
def test_what_it_means(text, holds):
    assert Gate(text).holds(SUMMARY) is holds


AR, LATE = "critical.hard.intermediate.autoregressive", "difference.hard.intermediate"


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (f"{AR} < 0.4", False),  # it is 0.5 or more
        (f"{AR} >= 0.5", True),
        (f"{AR} < 0.6", None),
        (f"{AR} > 0.5", None),
        (f"{AR} == 0.7", None),
        (f"{AR} == 0.4", False),
        (f"{AR} != 0.4", True),
        (f"not {AR} < 0.6", None),
        (f"-{AR} <= -0.5", True),
        (f"{AR}.low < 0.45", True),
        (f"{AR}.high < 0.9", None),
        (f"{AR} < 0.6 and counts.cells > 99", False),
        (f"{AR} < 0.6 or counts.cells == 12", True),
        (f"{AR} < 0.6 or counts.cells > 99", None),
        (f"{LATE} > 0.2", False),  # autoregressive may hold out longer
        (f"{LATE} > 0", None),
        (f"{LATE}.high > 0.1", True),
        (f"{LATE}.low > 0", None),
        ("difference.free.intermediate > 0", True),
        ("difference.free.intermediate < 0.2", None),
        ("difference.open.intermediate > 0", None),
        ("difference.open.intermediate.low > 0", None),
    ],
)
def test_a_bound_decides_only_what_it_decides_alone(text, holds):
    if holds is None:
        with pytest.raises(UserError, match=r"is not known: .* (is only known to be at|has no bound)") as error:
            Gate(text).holds(SUMMARY)
        assert "sparser" in error.value.hint
    else:
        assert Gate(text).holds(SUMMARY) is holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        NAME,
        "__import__('os').system('true') == 0",
        f"{NAME}() < 1",
        f"{NAME} + 1 < 2",
        "'a' < 'b'",
        "True == 1",
        f"{NAME} in (1, 2)",
        "x[0] < 1",
        "(lambda: 1) < 2",
        "a := 1",
        "1 <",
        "(" * 500 + "1 < 2",
        "1 < 2 and " * 200 + "1 < 2",
        "f'{1}' < 2",
        "1j < 2",
    ],
)
def test_what_it_may_not_be(text):
    with pytest.raises(UserError):
        Gate(text)


def test_an_unknown_name_lists_some():
    with pytest.raises(UserError, match=r"no critical.easy.intermediate.difusion; did you mean critical.easy") as error:
        Gate("critical.easy.intermediate.difusion < 1").holds(SUMMARY)
    assert error.value.hint.startswith(f"nearest are {NAME}, ")
    assert "__class__" not in names(SUMMARY)
    with pytest.raises(UserError):
        Gate("critical.__class__ < 1").holds(SUMMARY)


def test_a_value_that_is_not_known_does_not_pass():
    for text in ("critical.easy.input.diffusion < 0.5", f"{NAME} > 0 or critical.easy.input.diffusion < 0.5"):
        with pytest.raises(UserError, match="is not known in this run"):
            Gate(text).holds(SUMMARY)


def test_exit_codes(run, material):
    command = [
        "compare",
        "--ar",
        material / "ar",
        "--text",
        material / "own.txt",
        "--strength",
        "0.7",
        "--site",
        "input",
    ]
    code, _, err = run(*command, "--fail-if", "counts.cells == 2")
    assert code == 4
    assert err.splitlines()[-1] == "failed: counts.cells == 2"
    assert run(*command, "--fail-if", "counts.cells > 2", "--json")[0] == 0
    assert run("report", "runs/ar", "--fail-if", "counts.cells > 1")[0] == 4
    code, out, err = run(*command, "--fail-if", "counts.cels > 2")
    assert code == 1
    assert "did you mean counts.cells?" in err
    assert out == ""  # it is refused before the study runs


def test_a_bad_condition_is_refused_before_the_study_runs(run, material, tmp_path):
    code, _, err = run("compare", "--ar", material / "ar", "--text", material / "own.txt", "--fail-if", "1 +")
    assert code == 1
    assert "is not a condition" in err
    assert not list(tmp_path.iterdir())
