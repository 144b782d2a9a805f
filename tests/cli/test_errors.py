"""What bad input gets: two lines, exit code 1, no traceback, before anything expensive."""

import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dllm_sparsity.cli import main as main_module
from dllm_sparsity.errors import shorten

AR, DM = "{ar}", "{dm}"
BAD = [
    (["--ar", "/no/such/folder", "--task", "easy_endings"], "no such folder", "check the path"),
    (
        ["--ar", "nobody/nothing", "--task", "easy_endings"],
        "is not on this machine and HF_HUB_OFFLINE is set",
        "local folder",
    ),
    (["--ar", "bad id!", "--task", "easy_endings"], "neither a folder nor a hub id", "org/name"),
    (["--ar", AR, "--rule", "topp", "--strength", "0.9"], "unknown rule 'topp'; did you mean top_p?", "ls rules"),
    (["--ar", AR, "--site", "intermediat"], "did you mean intermediate?", "sites are"),
    (["--ar", AR, "--task", "easy_ending", "--strength", "0.9"], "did you mean easy_endings?", "ls tasks"),
    (["--ar", AR, "--strength", "1.5"], "strength 1.5 is out of range for TopP", "[0, 1]"),
    (["--ar", AR, "--strength", "1"], "is its dense setting", "every study runs dense"),
    (["--ar", AR, "--rule", "top_k"], "no strength given for rule top_k", "--strength"),
    (["--grid", "paper", "--rule", "top_k"], "--grid paper is a grid of top_p, and the study has top_k", "leave that"),
    (["--diffusion", DM, "--sampler", "low_confidance"], "did you mean low_confidence?", "ls samplers"),
    (["--diffusion", DM, "--confidence-threshold", "0.5"], "has no confidence threshold", "confidence_threshold"),
    (["--diffusion", AR, "--text", "{text}"], "is a causal model, it cannot be used as a diffusion model", "--ar"),
    (["--ar", DM, "--text", "{text}"], "it is not autoregressive", "--diffusion"),
    (["--ar", AR, "--text", "no.txt"], "no such text file", "text file"),
    (["--ar", AR, "--task", "no.yaml"], "no such task file", "lm-eval YAML"),
    (["--diffusion", DM, "--mask-token", "<nope>", "--text", "{text}"], "is not in the vocabulary", "or its id"),
    (["--ar", AR, "--device", "cuda:99", "--text", "{text}"], "cuda", "--device cpu"),
    (["--ar", AR, "--site", "gate", "--text", "{text}", "--out", "/proc/nothing"], "cannot write", "--out"),
    (["--ar", AR, "--steps", "8", "--text", "{text}"], "--steps is for diffusion models", "--diffusion"),
    (["--ar", AR, "--text", "{text}", "--text", "{text}"], "a task is named twice", "configs/"),
    (["nowhere.yaml"], "no such file", "configs/"),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_two_lines(run, material, arguments, message, hint):
    places = {"ar": material / "ar", "dm": material / "dm", "text": material / "own.txt"}
    arguments = [str(argument).format(**places) for argument in arguments]
    code, out, err = run("compare", *arguments)
    assert code == 1
    assert out == ""
    lines = err.strip().splitlines()[-2:]
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint:  ")
    assert hint in lines[1]
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not valid YAML"),
        ("just text", "holds no fields"),
        ("modles: []", "did you mean models?"),
        ("models: []\ntasks: []\nrules: []", "models"),
        (
            "models: [{paradigm: ar, model: x}]\ntasks: [{name: a}]\nrules: [{name: top_p, strengths: [0.9]}]",
            "paradigm",
        ),
        (
            "models: [{paradigm: diffusion, model: x, mask: y}]\ntasks: [{name: a}]\n"
            "rules: [{name: top_p, strengths: [0.9]}]",
            "did you mean mask_token?",
        ),
    ],
)
def test_bad_studies(run, tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    code, _, err = run("compare", "study.yaml")
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_no_folder_is_left_by_bad_input(run, material, tmp_path):
    run("compare", "--ar", "/no/such/folder")
    run("compare", "--ar", material / "ar", "--rule", "nope", "--strength", "0.5")
    assert not list(tmp_path.iterdir())


def test_an_unrelated_folder_is_not_written_into(run, material, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, err = run("compare", "--ar", material / "ar", "--text", material / "own.txt", "--out", "mine")
    assert code == 1
    assert "is not empty" in err


def test_a_model_without_an_ffn_we_know(run, material, tmp_path, capsys):
    import tiny
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=100, hidden_size=32, state_size=4, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    capsys.readouterr()
    code, _, err = run("compare", "--ar", tmp_path / "mamba", "--text", material / "own.txt")
    assert code == 1
    assert "found no FFN in MambaForCausalLM" in err
    assert len(err.strip().splitlines()) == 2


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("DLLM_SPARSITY_DEBUG", "1")
    code, _, err = run("compare", "--ar", "/no/such/folder")
    assert code == 1
    assert "Traceback" in err


def test_an_interrupt_leaves_with_130_and_a_second_one_at_once():
    program = (
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\nfrom dllm_sparsity.cli import main\n"
        "ThreadPoolExecutor().submit(time.sleep, 60)\n"  # the interpreter waits for it before it ends
        "def interrupted(**_): raise KeyboardInterrupt\n"
        "main.cli.main = interrupted\nmain.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    said = [process.stderr.readline(), process.stderr.readline()]
    assert said[0] == "error: interrupted; finished cells are sealed\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == ""


def test_an_interrupted_eval_leaves_with_130(run, monkeypatch):
    from dllm_sparsity.errors import Interrupted

    def interrupted(**_):
        raise Interrupted("interrupted; nothing was written", "run it again")

    monkeypatch.setattr(main_module.cli, "main", interrupted)
    assert run("eval")[0] == 130


def test_what_libraries_say_is_cut_at_a_word():
    assert shorten("a  b\nc") == "a b c"
    first = "It failed, " + "word " * 45 + "and ended."
    assert shorten(f"{first} Then it said more.") == f"{first} …"
    said = shorten("Short. " + "word " * 100)
    assert said.startswith("Short. word")
    assert said.endswith("word …")
    assert len(said) <= 202
    assert shorten("x" * 500) == "x" * 200 + " …"


def test_wrong_options_are_usage_errors():
    runner = CliRunner()
    for arguments in (["compare", "--nope"], ["compare", "--limit", "0"], ["compare", "--mc", "many"], ["ls", "rulez"]):
        assert runner.invoke(main_module.cli, arguments).exit_code == 2
