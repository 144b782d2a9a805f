"""dllm-sparsity bench on a CPU: what it prints, what it writes, and what bad input gets."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dllm_sparsity.cli import main as main_module

SMALL = ["bench", "--device", "cpu", "--shape", "embedded", "--repeats", "2", "--layers", "1"]
ONE = [*SMALL, "--batch", "2x5"]

UTILS = "def read(path):\n    import json\n    return json.load(open(path))['modules_to_sparsify']\n"
FUNCTION = """
import torch

def sparsify_tensor(tensor, rule, th_val=None, topp_power=1.0):
    assert rule == "maxp"
    keep = tensor.abs() >= th_val * tensor.abs().amax(-1, keepdim=True)
    return torch.where(keep, tensor, 0), (~keep).sum(-1).detach().cpu().tolist(), [[tensor.shape[-1]] * tensor.shape[1]]
"""
MANAGER = (
    """
from lm_eval.sparsification_utils import read
"""
    + FUNCTION
    + """
class SparsificationManager:
    calls = []

    def __init__(self, sparsification_config_path, output_dir, sparsification_rule, th_val=None, topp_power=1.0):
        self.rule, self.th_val, self.sites = sparsification_rule, th_val, read(sparsification_config_path)

    def initialize(self, lm):
        for name, side in self.sites.items():
            module = lm.model.get_submodule(name)
            act = lambda value: sparsify_tensor(value, self.rule, self.th_val)[0]
            if side == "input":
                module.register_forward_pre_hook(lambda module, args: act(args[0]))
            else:
                module.register_forward_hook(lambda module, args, output: act(output))

    def restart(self):
        self.calls.append(len(self.sites))
"""
)


@pytest.fixture
def checkout(tmp_path):
    """Return a function that writes a stand-in for the paper's repository, its package's own front door shut."""

    def write(text, utils=UTILS):
        package = tmp_path / "their code" / "harness" / "lm_eval"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the whole harness was imported')\n")
        (package / "sparsification_utils.py").write_text(utils)
        if text == MANAGER:
            (package / "moe.py").write_text("def sparsify_tensor(tensor):\n    raise RuntimeError('the wrong file')\n")
        (package / "zz_sparsification_manager.py").write_text(text)
        return tmp_path / "their code"

    return write


def test_times_and_a_table(run, tmp_path):
    code, out, err = run(*SMALL, "--json", "times.json")
    assert code == 0, err
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert "embedded, 1 of 5 layers" in out
    for line in ("8x64 tokens, eager", "1x64 tokens, eager", "1x1 tokens, eager", "kernels are timed on a GPU only"):
        assert line in out
    found = json.loads((tmp_path / "times.json").read_text())
    assert found["environment"]["command"].startswith("dllm-sparsity bench --device cpu")
    assert found["environment"]["packages"]["torch"]
    assert found["settings"]["sites"] == ["input", "intermediate"]
    assert found["kernels"] is None
    assert [(model["batch"], model["tokens"]) for model in found["models"]] == [(8, 64), (1, 64), (1, 1)]
    for model in found["models"]:
        names = [timed["name"] for timed in model["timings"]]
        assert names == ["dense", "sparsified, all statistics", "sparsified, without overlap"]
        assert all(0 < share < 1 for share in model["sparsity"].values())
        for timed in model["timings"]:
            assert len(timed["seconds"]) == 2
            assert 0 < timed["min_seconds"] <= timed["median_seconds"] <= timed["max_seconds"]
        assert all(timed["ratio"] > 0 for timed in model["timings"][1:])


@pytest.mark.parametrize("sites", [("input", "intermediate"), ("gate", "up")])
def test_against_its_manager(run, checkout, tmp_path, sites):
    options = [part for site in sites for part in ("--site", site)]
    folder = checkout(MANAGER)
    before = sorted(folder.rglob("*"))
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lm_eval"}
    arguments = ["--rule", "max_p", "--strength", "0.2", *options, "--against", folder, "--json", "times.json"]
    code, out, err = run(*ONE, *arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "times.json").read_text())
    (model,) = found["models"]
    assert model["timings"][-1]["name"] == "the paper's hooks"
    assert model["timings"][-1]["over"] == "dense"
    assert model["difference_from_paper"] < 1e-5
    assert tuple(model["sparsity"]) == sites
    assert "by its SparsificationManager" in " ".join(out.split())
    assert sorted(folder.rglob("*")) == before
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lm_eval"} == loaded


def test_against_its_function_alone(run, checkout):
    code, out, err = run(*ONE, "--rule", "max_p", "--strength", "0.2", "--against", checkout(FUNCTION))
    assert code == 0, err
    assert "hooks of ours that call its sparsify_tensor" in " ".join(out.split())


def test_against_code_that_does_not_load(run, checkout):
    code, _, err = run(*ONE, "--against", checkout(MANAGER, utils="import no_such_package\n"))
    two_lines(code, err, "does not load: ModuleNotFoundError", "leave --against out")


BAD = [
    (["--shape", "llama-3.1-8"], "unknown shape 'llama-3.1-8'; did you mean llama-3.1-8b?", "llada-8b"),
    (["--against", "nowhere"], "no such folder: nowhere", "activation-sparsity-benchmarking"),
    (["--against", "."], "no file in . defines sparsify_tensor", "activation-sparsity-benchmarking"),
    (["--against", ".", "--rule", "threshold", "--strength", "0.1"], "has no rule threshold", "top_p"),
    (["--rule", "topp", "--strength", "0.5"], "did you mean top_p?", "ls rules"),
    (["--rule", "top_k"], "no strength given for rule top_k", "--strength"),
    (["--strength", "1"], "is top_p's dense setting", "nothing to time"),
    (["--strength", "1.5"], "out of range", "[0, 1]"),
    (["--site", "gates"], "did you mean gate?", "sites are"),
    (["--mode", "graph"], "CUDA graphs need a GPU", "--mode"),
    (["--device", "cuda:99"], "cuda", "cpu"),
    (["--device", "gpu"], "unknown device 'gpu'", "cuda:0"),
    (["--json", "no/such/folder.json"], "cannot write no/such/folder.json", "folder"),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_two_lines(run, arguments, message, hint):
    code, out, err = run("bench", "--device", "cpu", *arguments)
    assert out == ""
    two_lines(code, err, message, hint)


def two_lines(code, err, message, hint):
    assert code == 1
    first, second = err.strip().splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint:  ")
    assert hint in second


@pytest.mark.parametrize("arguments", [["--batch", "8"], ["--batch", "0x4"], ["--repeats", "0"], ["--mode", "fast"]])
def test_wrong_options_are_usage_errors(arguments):
    assert CliRunner().invoke(main_module.cli, ["bench", *arguments]).exit_code == 2


def test_help_and_a_wrong_shape_import_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom dllm_sparsity.cli.main import cli\n"
        "assert CliRunner().invoke(cli, ['bench', '-h']).exit_code == 0\n"
        "assert CliRunner().invoke(cli, ['bench', '--shape', 'x']).exit_code == 1\n"
        "print([name for name in ('torch', 'transformers', 'rich', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
