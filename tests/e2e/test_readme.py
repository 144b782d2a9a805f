"""The README's code runs as it stands, and its commands are the ones that CI runs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_attach_example_runs_on_the_embedded_twin(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    from dllm_sparsity.pair import folder

    model = AutoModelForCausalLM.from_pretrained(folder("diffusion"), dtype=torch.float32).eval()
    mask = model.config.mask_token_id

    @torch.no_grad()
    def their_generate(model, prompt):
        canvas = torch.cat([prompt, torch.full((1, 4), mask)], dim=1)
        for place in range(prompt.shape[1], canvas.shape[1]):
            canvas[0, place] = model(canvas).logits[0, place].argmax()

    monkeypatch.chdir(tmp_path)
    example = next(block for block in blocks("python") if "observe" in block)
    prompt = torch.tensor([[100, 200, 300, 400]])
    exec(example, {"model": model, "MASK": mask, "their_generate": their_generate, "prompt": prompt})
    assert 0 < float(capsys.readouterr().out) < 1
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_the_rule_example_is_a_rule():
    from dllm_sparsity.errors import UserError

    namespace = {}
    exec(next(block for block in blocks("python") if "CutoffRule" in block), namespace)
    rows = torch.tensor([[4.0, -1.0, 1.0, 0.5]])
    assert namespace["TopHalf"](0.5).keep(rows, None).tolist() == [[True, True, True, False]]
    assert namespace["TopHalf"](0.0).is_dense
    with pytest.raises(UserError):
        namespace["TopHalf"](2.0)


def test_ci_finds_the_two_commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("pip install -c configs/constraints.txt")]
    assert len(commands) == 2
    script = README.parent / ".ci" / "run"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
