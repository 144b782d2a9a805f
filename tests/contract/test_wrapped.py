"""Models of several stacks, and models that other libraries wrapped, spread or quantised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from tiny_experts import tiny_moe
from tiny_families import LAYERS, VOCAB, WIDTH, diffusion_gemma, hooks
from torch import nn

from dllm_sparsity.errors import UserError
from dllm_sparsity.families import find_ffns
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

IDS = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def check(model: nn.Module, layers: int = LAYERS) -> None:
    """Every site of every layer fires, nothing changes without a rule, all is put back, and counts are right."""
    before, had = logits(model), hooks(model)
    with sparsify(model, None, "all") as tracker:
        assert torch.equal(logits(model), before)
    assert hooks(model) == had
    reading = tracker.read()
    assert {(layer, site) for layer, site in zip(reading["layer"], reading["site"], strict=True)} == {
        (layer, site) for layer in range(layers) for site in ("input", "intermediate")
    }
    assert not [note for note in tracker.notes if "dry run" in note]
    with sparsify(model, TopK(0.25), "all") as tracker:
        assert not torch.equal(logits(model), before)
    reading = tracker.read()
    for ffn in tracker.ffns:
        for site, width in (("input", ffn.d_model), ("intermediate", ffn.d_ffn)):
            assert 1 - reading.sparsity(layer=ffn.layer, site=site) == pytest.approx(0.25, abs=1 / width)
    assert torch.equal(logits(model), before)


LORA = {"r": 4, "init_lora_weights": False}
WRAPS = {
    "lora on the FFN": ("LoraConfig", {**LORA, "target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "lora on attention": ("LoraConfig", {**LORA, "target_modules": ["q_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["down_proj", "k_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_peft(wrap: str) -> None:
    peft = pytest.importorskip("peft")
    kind, options = WRAPS[wrap]
    check(peft.get_peft_model(tiny.llama(), getattr(peft, kind)(**options)).eval())


def test_peft_on_experts() -> None:
    peft = pytest.importorskip("peft")
    import copy

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=names)
    check(peft.get_peft_model(copy.deepcopy(tiny_moe("qwen3_moe")), config).eval())


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.llama(intermediate_size=128, hidden_size=64, head_dim=16)
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            own = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
            made = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, bias=False, **own)
            packed = (bnb.nn.Int8Params if own else bnb.nn.Params4bit)(linear.weight.data, requires_grad=False, **own)
            made.weight = packed
            setattr(layer.mlp, name, made)
    model.to("cpu")
    model(input_ids=IDS)
    assert model.model.layers[0].mlp.down_proj.weight.dtype in (torch.uint8, torch.int8)
    assert find_ffns(model)[0].points["intermediate"].weight is None
    check(model)


def test_weights_of_eight_bits_are_no_weights_to_rank_by() -> None:
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.to(torch.float8_e4m3fn), False)
    assert find_ffns(model)[0].points["intermediate"].weight is None


def test_linears_of_fp8_are_covered_and_quantised_experts_refused() -> None:
    import copy

    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = tiny.llama()
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(layer.mlp, name, FP8Linear(linear.in_features, linear.out_features, block_size=(16, 16)))
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1]
    assert ffns[0].points["intermediate"].weight is None
    for name, kind, reason in (
        ("qwen3_moe", FP8Experts, "FP8Experts.*not covered"),
        ("gpt_oss", Mxfp4GptOssExperts, "Mxfp4GptOssExperts.*not covered"),
    ):
        moe = copy.deepcopy(tiny_moe(name))
        for layer in moe.model.layers:
            layer.mlp.experts = kind(moe.config)
        with pytest.raises(UserError, match=reason):
            find_ffns(moe)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_layer_that_accelerate_keeps_elsewhere(name: str, tmp_path: Path) -> None:
    import copy

    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny.llama() if name == "llama" else copy.deepcopy(tiny_moe(name))
    before = logits(model)
    where = {
        key: "cpu" for key in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    }
    model = dispatch_model(model, {**where, "model.layers.1": "disk"}, offload_dir=str(tmp_path), main_device="cpu")
    assert next(model.model.layers[1].parameters()).is_meta
    assert torch.equal(logits(model), before)
    check(model)
    remove_hook_from_submodules(model)


def gemma3() -> nn.Module:
    import transformers as hf

    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {"image_token_index": 99, "boi_token_index": 98, "eoi_token_index": 97}
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    ).eval()


def test_gemma3_with_images_is_counted_where_it_reads_text() -> None:
    model = gemma3()
    names = [ffn.name for ffn in find_ffns(model)]
    assert names == [f"model.language_model.layers.{n}.mlp" for n in range(LAYERS)]
    check(model)


def test_diffusion_gemma() -> None:
    """Both stacks, dense FFN and experts; two canvases of 8 tokens, 3 steps each, after a prompt of 5."""
    model = diffusion_gemma()
    names = [(ffn.layer, ffn.name) for ffn in find_ffns(model)]
    stacks = ("model.encoder.language_model", "model.decoder")
    assert names == [
        (layer + 3 * number, f"{stack}.layers.{layer}.{kind}")
        for number, stack in enumerate(stacks)
        for layer in range(3)
        for kind in ("mlp", "experts")
    ]

    def generate() -> torch.Tensor:
        torch.manual_seed(1)
        return model.generate(IDS[:1, :5], max_new_tokens=16, max_denoising_steps=3, eos_token_id=None).sequences

    before = generate()
    with sparsify(model, None, ("input", "gate", "up", "intermediate")) as tracker:
        assert torch.equal(generate(), before)
    reading = tracker.read()
    rows: Counter = Counter()
    for layer, site, expert, count in zip(*(reading[k] for k in ("layer", "site", "expert", "rows")), strict=True):
        rows[layer // 3, site, expert >= 0] += count
    for site in ("input", "gate", "up", "intermediate"):
        assert rows[0, site, False] == 3 * (5 + 8)
        assert rows[1, site, False] == 3 * 2 * 3 * 8
        assert all(rows[stack, site, True] == 2 * rows[stack, site, False] for stack in (0, 1))  # top 2
    with sparsify(model, TopP(0.3), "all"):
        assert not torch.equal(generate(), before)
    assert torch.equal(generate(), before)


class NoisyBlock(nn.Module):
    """A block as block-diffusion transformers have it: a plain FFN in a Sequential, modulated by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn_qkv, self.attn_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Linear(16, 2 * WIDTH)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn_qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.attn_out(torch.softmax(q @ k.mT, -1) @ v)
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return x + self.mlp(self.norm2(x) * (1 + scale) + shift)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.vocab_embed = nn.Embedding(VOCAB, WIDTH)
        self.backbone.sigma_map = nn.Module()
        self.backbone.sigma_map.mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.backbone.blocks = nn.ModuleList(NoisyBlock() for _ in range(LAYERS))
        self.backbone.output_layer = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        c = self.backbone.sigma_map.mlp(timesteps.unsqueeze(-1).expand(-1, 8)).unsqueeze(1)
        x = self.backbone.vocab_embed(input_ids)
        for block in self.backbone.blocks:
            x = block(x, c)
        return self.backbone.output_layer(x)


def test_models_that_are_told_the_noise_level() -> None:
    torch.manual_seed(0)
    model = Noisy().eval()
    assert [ffn.name for ffn in find_ffns(model)] == [f"backbone.blocks.{n}.mlp" for n in range(LAYERS)]
    before = model(IDS, torch.rand(2, generator=torch.Generator().manual_seed(1)))
    with sparsify(model, None, "all") as tracker:  # it has no embedding to ask: the sites are checked at the end
        assert torch.equal(model(IDS, torch.rand(2, generator=torch.Generator().manual_seed(1))), before)
    reading = tracker.read()
    assert sum(reading["rows"]) == 2 * LAYERS * IDS.numel()
