"""The embedded pair loads offline, fits its size, and each twin attends the way its paradigm needs."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dllm_sparsity.pair import PAIR, folder


@pytest.fixture(scope="module", params=sorted(PAIR))
def twin(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    """Load one twin as users do."""
    model = AutoModelForCausalLM.from_pretrained(folder(request.param), dtype=torch.float32, local_files_only=True)
    return request.param, model.eval()


def test_causal_twin_sees_the_past_only_and_diffusion_twin_sees_all(twin: tuple[str, PreTrainedModel]) -> None:
    paradigm, model = twin
    ids = torch.randint(3, 8192, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 8192
    with torch.inference_mode():
        moved = (model(ids).logits[:, :3] - model(changed).logits[:, :3]).abs().max()
    assert (moved == 0) if paradigm == "autoregressive" else (moved > 1e-3)


def test_config_says_what_the_twin_is(twin: tuple[str, PreTrainedModel]) -> None:
    paradigm, model = twin
    config = model.config
    assert config.tie_word_embeddings
    if paradigm == "diffusion":
        assert config.is_causal is False
        assert config.mask_token_id == AutoTokenizer.from_pretrained(folder(paradigm)).mask_token_id


def test_twins_share_shape_and_tokenizer() -> None:
    first, second = (folder(paradigm) for paradigm in PAIR)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    shapes = [
        {name: value.shape for name, value in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}
        for path in (first, second)
    ]
    assert shapes[0] == shapes[1]


def test_weights_are_float16_and_at_most_40_megabytes() -> None:
    files = [path / "model.safetensors" for path in PAIR.values()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    for file in files:
        header = file.read_bytes()[:20_000]
        assert b'"dtype":"F16"' in header
        assert b'"dtype":"F32"' not in header


def test_tokenizer_has_its_specials_and_adds_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder("diffusion"))
    assert (tokenizer.eos_token, tokenizer.mask_token, tokenizer.pad_token) == ("<|endoftext|>", "<|mask|>", "<|pad|>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    assert len({tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id}) == 3
    text = "A man is seen painting a fence — naïvely."
    ids = tokenizer.encode(text)
    assert not {tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_unknown_paradigm_is_refused() -> None:
    with pytest.raises(KeyError):
        folder("recurrent")


def test_finding_the_pair_imports_no_torch() -> None:
    code = "import sys, dllm_sparsity.pair, dllm_sparsity.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
