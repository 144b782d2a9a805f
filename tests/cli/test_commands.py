"""The commands that need no model: fast, plain text, no heavy imports."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dllm_sparsity import registry
from dllm_sparsity.cli.main import cli

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "diffusers", "plotly", "scipy", "ray")


def test_help_and_ls_import_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom dllm_sparsity.cli.main import cli\n"
        "for a in (['-h'], ['compare', '-h'], *(['ls', k] for k in ('rules', 'samplers', 'families', 'backends', 'tasks'))):\n"
        "    result = CliRunner().invoke(cli, a); assert result.exit_code == 0, (a, result.output, result.exception)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["rules", "samplers", "families", "metrics", "sections", "backends"])
def test_ls_names_everything_with_a_line(kind):
    lines = CliRunner().invoke(cli, ["ls", kind]).output.splitlines()
    assert [line.split()[0] for line in lines] == registry.names(kind)
    assert all(len(line.split()) > 2 and len(line) <= 120 for line in lines)


def test_ls_tasks_names_the_embedded_ones():
    output = CliRunner().invoke(cli, ["ls", "tasks"]).output
    for name in ("easy_endings", "piqa_local", "heldout_text", "heldout_continuation"):
        assert name in output


def test_compare_from_options_prints_json_and_a_table(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--ar", str(material / "ar"), "--diffusion", str(material / "dm"), "--text", str(material / "own.txt")]
    options += ["--strength", "0.7", "--site", "all", "--mc", "2", "--batch-size", "4", "--limit", "2", "--seed", "3"]
    runner = CliRunner()
    first = runner.invoke(cli, ["compare", *options, "--json"], catch_exceptions=False)
    assert first.exit_code == 0
    assert json.loads(first.stdout)["findings"]
    table = runner.invoke(cli, ["compare", *options], catch_exceptions=False)
    assert "report: runs/ar-vs-dm/report.html" in table.stdout
    assert max(len(line) for line in table.stdout.splitlines()) <= 80
    again = runner.invoke(cli, ["report", "runs/ar-vs-dm"], catch_exceptions=False)
    assert again.stdout.splitlines()[:-1] == table.stdout.splitlines()[:-1]
    config = (tmp_path / "runs/ar-vs-dm/config.yaml").read_text()
    assert "mc: 2" in config
    assert "seed: 3" in config


def test_a_study_without_diffusion_model_is_a_study(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--ar", str(material / "ar"), "--text", str(material / "own.txt"), "--strength", "0.7", "--limit", "2"]
    assert CliRunner().invoke(cli, ["compare", *options], catch_exceptions=False).exit_code == 0
