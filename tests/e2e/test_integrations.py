"""Each block of INTEGRATIONS.md runs as it stands; tiny models take the place of what it would download."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import loops
import pytest
import tiny
import tiny_pipelines
import torch
import transformers
from torch import nn

import dllm_sparsity
from dllm_sparsity.lm import loading

PAGE = (Path(dllm_sparsity.__file__).parent / "INTEGRATIONS.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


class Silent:
    """Stand where a loop of the tests keeps its log."""

    def begin(self, *args, **kwargs):
        pass

    def add(self, *args, **kwargs):
        pass


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)


def with_mask(mask_id):
    """Return a bidirectional model whose vocabulary has this mask id, and a tokenizer whose mask it is not."""
    model = tiny.llama(causal=False, vocab_size=mask_id + 1)
    model.config.mask_token_id = mask_id
    with torch.no_grad():
        model.lm_head.weight[mask_id] = 0
    return model, tiny.tokenizer()


def run(section, monkeypatch, tmp_path, model, tokenizer=None, mask=None):
    """Run a section's Python as a file of its own and return its names."""
    (code,) = blocks(section, "python")
    asked = []

    def load(source):
        asked.append(source)
        return model, tokenizer

    if model is not None:
        monkeypatch.setattr(loading, "load", load)
    monkeypatch.chdir(tmp_path)
    if mask is not None:
        monkeypatch.setattr(loops, "MASK", mask)
    space = {"__name__": "__main__"}
    exec(compile(code, f"INTEGRATIONS.md, {section}", "exec"), space)
    for source in asked:
        assert source.trust_remote_code
        assert source.dtype == "bfloat16"
    return space


def test_llada(monkeypatch, tmp_path):
    model, tokenizer = with_mask(126336)

    def generate(model, prompt, steps, gen_length, block_length):
        assert steps == gen_length  # one token a step, as the stand-in has it
        return loops.llada(model, prompt, Silent(), new=gen_length, block=block_length)

    monkeypatch.setitem(sys.modules, "generate", types.SimpleNamespace(generate=generate))
    space = run("LLaDA", monkeypatch, tmp_path, model, tokenizer, 126336)
    reading = space["tracker"].read()
    assert max(reading["step"]) == 63
    assert {"prompt", "masked", "committed_now", "committed"} <= set(reading["token_state"])
    assert sum(reading["rows_prev"]) > 0
    assert "<html" in (tmp_path / "llada.html").read_text(encoding="utf-8")


def test_dream(monkeypatch, tmp_path):
    model, tokenizer = with_mask(151666)

    def diffusion_generate(prompt, max_new_tokens, steps, alg):
        return loops.dream(model, prompt, Silent(), new=max_new_tokens)

    model.diffusion_generate = diffusion_generate
    space = run("Dream", monkeypatch, tmp_path, model, tokenizer, 151666)
    assert max(space["reading"]["step"]) == 63
    assert (tmp_path / "dream.html").is_file()


def test_diffusers(monkeypatch, tmp_path):
    model = tiny_pipelines.llada2_form()
    space = run("diffusers: LLaDA2Pipeline and DiffusionGemmaPipeline", monkeypatch, tmp_path, model, tiny.tokenizer())
    assert [step.forwards for step in space["clock"].steps] == list(range(1, len(space["clock"].steps) + 1))
    assert set(space["tracker"].read()["phase"]) == {"denoise"}
    assert (tmp_path / "llada2.html").is_file()


def test_diffusion_gemma(monkeypatch, tmp_path, capsys):
    model = tiny_pipelines.diffusion_gemma()
    cls = transformers.DiffusionGemmaForBlockDiffusion
    monkeypatch.setattr(cls, "from_pretrained", classmethod(lambda cls, name, **kwargs: model))
    tokenizer = types.SimpleNamespace(from_pretrained=lambda name: tiny.tokenizer())
    monkeypatch.setattr(transformers, "AutoTokenizer", tokenizer)
    reading = run("DiffusionGemma in transformers", monkeypatch, tmp_path, model)["reading"]
    assert {"encode", "denoise"} == set(reading["phase"])
    assert {-1, 0, 1, 2, 3} == set(reading["expert"])
    assert "denoise" in capsys.readouterr().out


@pytest.mark.slow
def test_lm_eval(monkeypatch, tmp_path):
    space = run("lm-eval", monkeypatch, tmp_path, None)
    assert 0 <= space["results"]["results"]["easy_endings"]["acc,none"] <= 1
    assert len(space["tracker"].read().per_item) == 4


@pytest.mark.slow
def test_lm_eval_from_a_shell(tmp_path):
    (line,) = blocks("lm-eval", "bash")
    words = shlex.split(line)
    assert words[0] == "dllm-sparsity"
    command = [sys.executable, "-m", "dllm_sparsity.cli", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "easy_endings" in done.stdout
    assert "intermediate" in done.stdout


def test_my_own_loop(monkeypatch, tmp_path, capsys):
    space = run("My own loop", monkeypatch, tmp_path, None)
    assert not (space["ids"] == space["mask"]).any()
    assert max(space["tracker"].read()["step"]) == 7
    assert 0 < float(capsys.readouterr().out) < 1


def test_every_section_is_run():
    tested = {
        "LLaDA",
        "Dream",
        "diffusers: LLaDA2Pipeline and DiffusionGemmaPipeline",
        "DiffusionGemma in transformers",
    }
    assert set(SECTIONS) == tested | {"lm-eval", "My own loop"}
    assert isinstance(with_mask(120)[0], nn.Module)
