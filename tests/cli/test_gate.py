"""--fail-if: what a condition may be, what it means, and the exit code."""

import pytest

from dllm_sparsity.cli.gate import Gate, names
from dllm_sparsity.errors import UserError

HALF, NONE = [0.4, 0.6], None


def curve(task, site, paradigm, value, model="m", rule="top_p", headline=True):
    critical = [
        {"retention": 0.95, "reading": "first", "value": 0.9, "interval": HALF},
        {"retention": 0.99, "reading": "first", "value": value, "interval": HALF if value is not None else NONE},
    ]
    named = {"task": task, "site": site, "paradigm": paradigm, "model": model, "rule": rule, "headline": headline}
    return {**named, "dense": {"value": 0.8, "interval": HALF}, "critical": critical}


SUMMARY = {
    "counts": {"cells": 12, "unsealed": 0},
    "default_retention": 0.99,
    "default_reading": "first",
    "curves": [
        curve("easy", "intermediate", "diffusion", 0.5),
        curve("easy", "input", "diffusion", None),
        curve("2-way.task", "all", "autoregressive", 0.3, "a/b-1", "top_p"),
        curve("2-way.task", "all", "autoregressive", 0.2, "a/b-1", "top_k"),
        curve("easy", "intermediate", "diffusion", 0.1, headline=False),
    ],
    "averages": [curve("average of 2 tasks", "input", "diffusion", 0.7)],
    "comparisons": [
        {
            "task": "easy",
            "site": "intermediate",
            "rule": "top_p",
            "quality": "acc",
            "autoregressive": "a",
            "diffusion": "d",
            "retention": 0.99,
            "difference": -0.02,
            "interval": [-0.05, 0.01],
        }
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
        ("difference.easy.intermediate < -0.01", True),
        ("critical.average_of_2_tasks.input.diffusion >= 0.7", True),
        ("difference.easy.intermediate.high < 0", False),
        ("critical._2_way_task.all.autoregressive.a_b_1.top_k >= 2e-1", True),
        ("dense.easy.intermediate.diffusion > .79", True),
    ],
)
def test_what_it_means(text, holds):
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
    assert NAME in error.value.hint
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
