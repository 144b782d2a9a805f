"""The page as text: its policy, its escaping, its tables without JavaScript, and what it does without columns."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_analysis_run import seal, write_study

from dllm_sparsity.analysis import load, summary
from dllm_sparsity.analysis.logged import study_numbers
from dllm_sparsity.errors import UserError
from dllm_sparsity.registry import get, names
from dllm_sparsity.report import render, save_report, write_report
from dllm_sparsity.report.data import from_run
from dllm_sparsity.report.figures import Line, line_chart
from dllm_sparsity.report.section import Section
from dllm_sparsity.study.records import OVERLAP_COLUMNS

POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data: blob:\">"
)
HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "study"
    options = {"items": 20, "layers": 2, "steps": 3, "sites": ("intermediate", "all"), "strengths": (0.9, 0.6)}
    return write_study(path, answer=HOSTILE, model=HOSTILE, **options)


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir).read_text()


def payloads(page: str) -> dict[str, str]:
    blocks = re.findall(r'<script type="application/octet-stream" id="([\w-]+)">([^<]*)</script>', page)
    return {name: gzip.decompress(base64.b64decode(text)).decode() for name, text in blocks}


def test_the_policy_is_the_first_tag_and_nothing_is_loaded(page):
    head = page[page.index("<head>") + 6 :]
    assert head.lstrip().startswith(POLICY)
    assert not re.search(r'<(?:script|link|img|iframe)[^>]*\b(?:src|href)="', page)


def test_foreign_text_is_data(page):
    assert "document.title='pwned'" not in page
    assert "&lt;/script&gt;" in page
    assert page.count("<script") == page.count("</script>") == len(payloads(page)) + 1
    figures = [text for name, text in payloads(page).items() if name != "plotly-packed"]
    drawn = [chart["figure"] for text in figures for option in json.loads(text) for chart in option]
    assert "<script" not in json.dumps(drawn)


def test_every_chart_is_valid_and_has_its_table(page):
    for name, text in payloads(page).items():
        if name == "plotly-packed":
            continue
        for charts in json.loads(text):
            assert charts
            for chart in charts:
                go.Figure(chart["figure"])
                assert chart["caption"]
                assert chart["table"]["rows"]
                assert {len(row) for row in chart["table"]["rows"]} == {len(chart["table"]["columns"])}
    assert page.count("<figure>") == page.count("<details>") > 8


def test_every_section_is_there(page):
    searched = {"allocation"}  # this study was not searched: tests/e2e/test_layerwise_study.py has it
    assert sorted(set(names("sections")) - searched) == sorted(
        set(re.findall(r'<section id="(\w+)"', page)) - {"skipped"}
    )


def test_files_beside_the_page(run_dir, page):
    found = json.loads((run_dir / "summary.json").read_text())
    assert found["study"] == "study"
    made = {path.name for path in (run_dir / "tables").iterdir()}
    tables = ("points", "critical", "steps", "overlap", "layers", "items", "speed")
    assert made == {f"{name}.{end}" for name in tables for end in ("parquet", "csv")}
    assert all(len(pq.read_table(run_dir / "tables" / f"{name}.parquet")) for name in tables)
    assert not [path for path in run_dir.rglob(".*") if path.is_file()]


def test_verdicts_are_in_the_page_and_in_the_tables(run_dir, page):
    points = pq.read_table(run_dir / "tables" / "points.parquet").to_pylist()
    columns = {
        "difference",
        "difference_interval_low",
        "difference_interval_high",
        "p",
        "p_holm",
        "smallest_detectable",
    }
    assert columns | {"words", "comparisons", "test", "groups", "noise_floor", "outcome"} <= set(points[0])
    assert {point["measure"] for point in points} == {"acc", "nll", "exact_match", "agreement"}
    told = [point["words"] for point in points if point["outcome"] == "worse"]
    assert told
    drawn = "".join(text for name, text in payloads(page).items() if name.startswith("quality"))
    assert all(words in drawn for words in told)
    assert all(point["words"] is None for point in points if point["dense"])
    header = (run_dir / "tables" / "points.csv").read_text().splitlines()[0]
    assert '"words"' in header
    assert "Where quality first falls below dense" in page


def test_averages_are_in_the_page_and_in_the_tables(run_dir, page):
    found = json.loads((run_dir / "summary.json").read_text())
    assert {own["task"] for own in found["averages"]} == {"average of 2 tasks"}
    critical = pq.read_table(run_dir / "tables" / "critical.parquet").to_pylist()
    ours = [row for row in critical if row["task"] == "average of 2 tasks"]
    assert len(ours) == sum(len(own["critical"]) for own in found["averages"]) == 4 * 4 * 4
    assert "<h4>average of 2 tasks</h4>" in page
    assert page.count("<td>average of 2 tasks</td>") >= 2 * 4
    assert "Average of 2 tasks: arc_easy, gsm8k." in page
    panels = {name: text for name, text in payloads(page).items() if name.startswith("quality")}
    assert len(panels) == 3
    charts = json.loads(next(text for text in panels.values() if '"accuracy kept"' in text))[0]
    assert {chart["title"] for chart in charts} == {"intermediate, top_p", "all, top_p"}
    for chart in charts:
        assert all(len(line["x"]) == 3 for line in chart["figure"]["data"])
        assert chart["table"]["columns"] == [
            "paradigm",
            "model",
            "asked",
            "achieved",
            "quality",
            "95 % interval",
            "kept",
        ]
    assert f"average of 2 tasks/{HOSTILE}/top_p, all/critical" in study_numbers(found)


def test_a_report_is_the_same_twice(run_dir, page):
    assert write_report(run_dir).read_text() == page


@pytest.mark.parametrize("name", names("sections"))
def test_sections_keep_their_contract(name, run_dir):
    section = get("sections", name)()
    assert isinstance(section, Section)
    assert section.title
    assert section.missing(from_run(load(run_dir))) is None


def test_without_overlap_the_section_says_why(tmp_path):
    run_dir = write_study(tmp_path / "s", items=8, layers=2, steps=2, sites=("intermediate",), strengths=(0.9,))
    for path in run_dir.glob("cells/*/steps.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(list(OVERLAP_COLUMNS)), path)
        seal(path.parent)
    page = write_report(run_dir).read_text()
    assert "It needs the column inter_prev" in page
    assert 'id="overlap"' not in page


class Reading:
    """What a tracker gives, as an object."""

    def __init__(self, columns):
        self.columns = columns
        self.notes = ("no clock: phase is forward <b>",)


def reading():
    rows = [(step, layer, state) for step in range(4) for layer in range(2) for state in ("masked", "prompt")]
    return {
        "phase": ["denoise"] * len(rows),
        "step": np.array([row[0] for row in rows]),
        "layer": [row[1] for row in rows],
        "site": ["intermediate"] * len(rows),
        "token_state": [row[2] for row in rows],
        "rows": [5] * len(rows),
        "kept": [row[0] + 10 for row in rows],
        "total": [50] * len(rows),
    }


@pytest.mark.parametrize("made", [reading(), Reading(reading())], ids=["mapping", "object"])
def test_a_foreign_loop_gets_the_sections_about_steps(made, tmp_path):
    page = save_report(made, tmp_path / "deep" / "page.html").read_text()
    shown = set(re.findall(r'<section id="(\w+)"', page))
    assert {"denoise", "layers", "skipped"} <= shown
    assert not shown & {"findings", "quality", "overlap", "decode", "answers"}
    assert "one recorded loop" in page


def test_notes_of_a_foreign_loop_are_escaped(tmp_path):
    page = save_report(Reading(reading()), tmp_path / "page.html").read_text()
    assert "no clock: phase is forward &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kept": None}, "column kept is missing"),
        ({"kept": ["x"] * 16}, "wrong type or length"),
        ({"kept": [1]}, "wrong type or length"),
        ({"layer": [None] * 16}, "column layer has nulls"),
    ],
)
def test_a_wrong_reading_is_refused(change, told, tmp_path):
    columns = {name: value for name, value in (reading() | change).items() if value is not None}
    with pytest.raises(UserError, match=told):
        save_report(columns, tmp_path / "page.html")
    with pytest.raises(UserError, match="needs columns by name"):
        save_report(42, tmp_path / "page.html")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_report(reading(), Path(tmp_path / "file" / "page.html"))


def test_a_full_disk_is_not_taken_for_a_folder_that_may_not_be_written(run_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left") as error:
        write_report(run_dir)
    assert error.value.hint == "free some space, then run the same command again; all cells are kept"


def test_ticks_of_layers_stand_at_whole_numbers():
    layers = line_chart([Line("ar", [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], "red")], "layer", "sparsity")
    assert layers["layout"]["xaxis"]["dtick"] == 1
    many = line_chart([Line("ar", list(range(80)), [0.1] * 80, "red")], "layer", "sparsity")
    assert many["layout"]["xaxis"]["dtick"] == 8
    shares = line_chart([Line("ar", [0.0, 0.5], [1.0, 0.9], "red")], "achieved sparsity", "kept", x_percent=True)
    assert "dtick" not in shares["layout"]["xaxis"]


@pytest.mark.parametrize(("items", "is_told"), [(8, True), (20, False)])
def test_intervals_on_few_items_are_said_to_be_rough(tmp_path, items, is_told):
    found = summary(load(write_study(tmp_path, items=items, strengths=(0.9,))), draws=20)
    console = Console(width=80, record=True)
    console.print(render(found))
    assert (f"an interval is rough: arc_easy ({items})" in " ".join(console.export_text().split())) is is_told


def test_notes_that_the_terminal_has_no_room_for_are_counted(tmp_path):
    found = summary(load(write_study(tmp_path)))
    console = Console(width=80, record=True)
    console.print(render(found | {"notes": ["one", "two", "three", "four", "five"]}))
    told = console.export_text()
    assert "note: three" in told
    assert "note: four" not in told
    assert "note: the report has 2 more notes" in told


def test_the_terminal_table_fits_80_columns_without_colour(tmp_path):
    run_dir = write_study(tmp_path / "s", items=20, layers=2, steps=2, strengths=(0.9, 0.6))
    console = Console(width=80, color_system=None, record=True, file=open("/dev/null", "w"))
    console.print(render(summary(load(run_dir), draws=200)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("diffusion") >= 6
    assert re.search(r"average of 2 tasks *\n *all +AR +\d+\.\d % right +\d", text)
    assert "first cell worse" in text
    assert re.search(r"by \d+\.\d \[\d+\.\d, \d+\.\d\] at \d+\.\d %", text)
    assert "no speed-up was measured" in text


def test_an_average_of_some_tasks_alone_names_them_in_the_terminal(tmp_path):
    run_dir = write_study(tmp_path / "s", items=20, layers=2, steps=2, strengths=(0.9, 0.6))
    found = summary(load(run_dir), draws=20)
    texts = []
    for curves in (found["curves"], [*found["curves"], {**found["curves"][0], "task": "third"}]):
        console = Console(width=200, color_system=None, record=True, file=open("/dev/null", "w"))
        console.print(render({**found, "curves": curves}))
        texts.append(" ".join(console.export_text().split()))
    named = f"Average of 2 tasks: {', '.join(found['averages'][0]['tasks'])}."
    assert named not in texts[0]
    assert named in texts[1]


def test_a_result_file_cannot_steer_the_terminal(tmp_path):
    run_dir = write_study(tmp_path / "s", items=8, layers=2, steps=2, sites=("input",), strengths=(0.9,))
    for path in run_dir.glob("cells/*/cell.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"notes": ["\x1b[2Jgone"], "task": record["task"] + "\x1b[31m"}))
        seal(path.parent)
    console = Console(width=80, force_terminal=True, color_system=None, record=True, file=open("/dev/null", "w"))
    console.print(render(summary(load(run_dir), draws=50)))
    assert "\x1b" not in console.export_text(styles=False)


@pytest.mark.parametrize("name", ["summary.json", "report.html", "tables"])
def test_what_stands_in_a_files_place_is_to_be_moved_away(tmp_path, name):
    run = write_study(tmp_path / "study", items=4, layers=1, steps=1, sites=("intermediate",), strengths=(0.9,))
    if name == "tables":
        (run / name).write_text("no folder")
    else:
        (run / name).mkdir()
    with pytest.raises(UserError) as caught:
        write_report(run)
    assert "move it away, then run the same command again" in caught.value.hint
