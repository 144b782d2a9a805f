"""A model that comes with code of its own, in the form of LLaDA's, loads, is scored, generates and is sparsified."""

import itertools
import json
import subprocess
import sys

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from dllm_sparsity import TopP, UserError, observe, sparsify
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.lm.loading import ModelSource, load

MASK, LAYERS, WIDTH, INNER, VOCAB = tiny.MASK, 2, 32, 64, 100

CONFIGURATION = """
from transformers import PretrainedConfig


class BlocksConfig(PretrainedConfig):
    model_type = "blocks"

    def __init__(self, d_model=32, n_heads=4, n_layers=2, mlp_hidden_size=64, vocab_size=100,
                 max_sequence_length=128, init_device="cuda", **kwargs):
        self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
        self.mlp_hidden_size, self.vocab_size = mlp_hidden_size, vocab_size
        self.max_sequence_length, self.init_device = max_sequence_length, init_device
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_blocks import BlocksConfig

ROPE_INIT_FUNCTIONS["default"], is_torch_fx_available()


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x):
        angle = torch.outer(torch.arange(x.shape[-2], device=x.device), self.inv_freq).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


class Block(nn.Module):
    def __init__(self, config, device):
        super().__init__()
        wide, inner = config.d_model, config.mlp_hidden_size
        self.heads = config.n_heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(wide, device=device), nn.RMSNorm(wide, device=device)
        self.qkv = nn.Linear(wide, 3 * wide, bias=False, device=device)
        self.attn_out = nn.Linear(wide, wide, bias=False, device=device)
        self.ff_proj = nn.Linear(wide, inner, bias=False, device=device)
        self.up_proj = nn.Linear(wide, inner, bias=False, device=device)
        self.ff_out = nn.Linear(inner, wide, bias=False, device=device)
        self.act, self.rotary = nn.SiLU(), Rotary(wide // config.n_heads)
        self.scale = torch.ones((), device=device).to(torch.device(device))

    def forward(self, x, bias):
        q, k, v = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, attn_mask=bias)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(self.act(self.ff_proj(y)) * self.up_proj(y))


class Core(nn.Module):
    def __init__(self, config, device):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model, device=device)
        self.blocks = nn.ModuleList(Block(config, device) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(config.d_model, device=device)
        self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device)

    def forward(self, input_ids, attention_mask):
        x, bias = self.wte(input_ids), None
        if attention_mask is not None:
            bias = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, bias)
        return self.ff_out(self.ln_f(x))


class BlocksLM(PreTrainedModel):
    config_class = BlocksConfig
    base_model_prefix = "model"

    def __init__(self, config, model=None):
        super().__init__(config)
        self.model = model or Core(config, "cuda")

    def _init_weights(self, module):
        pass

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        if self.config.use_cache if use_cache is None else use_cache:
            raise ValueError("there is no cache")
        return MaskedLMOutput(logits=self.model.forward(input_ids, attention_mask))

    def get_input_embeddings(self):
        return self.model.wte

    def tie_weights(self):
        pass
"""


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte": (VOCAB, WIDTH), "ln_f": (WIDTH,), "ff_out": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.{name}": (WIDTH,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"blocks.{layer}.{name}": (INNER, WIDTH) for name in ("ff_proj", "up_proj")}
        shapes[f"blocks.{layer}.qkv"] = (3 * WIDTH, WIDTH)
        shapes[f"blocks.{layer}.attn_out"] = (WIDTH, WIDTH)
        shapes[f"blocks.{layer}.ff_out"] = (WIDTH, INNER)
    made = {f"model.{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    made["model.ff_out.weight"][MASK] = 0  # a random model would commit the mask token
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "blocks"
    place.mkdir()
    (place / "configuration_blocks.py").write_text(CONFIGURATION)
    (place / "modeling_blocks.py").write_text(MODELING)
    classes = {"AutoConfig": "configuration_blocks.BlocksConfig", "AutoModelForCausalLM": "modeling_blocks.BlocksLM"}
    config = {"model_type": "blocks", "architectures": ["BlocksLM"], "auto_map": classes, "init_device": "cuda"}
    config["n_layers"] = LAYERS
    (place / "config.json").write_text(json.dumps(config))
    save_file(weights(), place / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(place)
    with pytest.MonkeyPatch.context() as patch:  # copies of the code go to a folder of this test
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place.parent / "modules"))
        patch.syspath_prepend(str(place.parent / "modules"))
        yield place


@pytest.fixture(scope="module")
def backend(folder):
    return DiffusionBackend.from_source(ModelSource(str(folder), trust_remote_code=True), mc="exact")


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def test_without_trust_it_is_refused_in_two_lines(folder):
    with pytest.raises(UserError, match="code of its own") as caught:
        DiffusionBackend.from_source(ModelSource(str(folder)))
    assert len(str(caught.value).splitlines()) == 2
    assert "--trust-remote-code" in caught.value.hint


def test_the_code_of_an_untrusted_model_does_not_run(folder, tmp_path):
    program = (
        "import sys; from dllm_sparsity.lm.loading import ModelSource, load\n"
        f"try: load(ModelSource({str(folder)!r}))\n"
        "except Exception as error: print(type(error).__name__, any('_blocks' in name for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["UserError", "False"]


def test_weights_and_buffers_are_what_was_saved_however_often_it_is_loaded(folder):
    saved, ids = load_file(folder / "model.safetensors"), torch.arange(5, 15).unsqueeze(0)
    models = [load(ModelSource(str(folder), trust_remote_code=True))[0] for _ in range(2)]
    for model in models:
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)
        for block in model.model.blocks:  # in no checkpoint: transformers 5 would leave it unset
            assert torch.equal(block.rotary.inv_freq, 1e4 ** (-torch.arange(0, 8, 2).float() / 8))
            assert block.scale.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_check_and_dry_run_build_what_a_run_loads(folder, tmp_path):
    from dllm_sparsity.study.check import check_study
    from dllm_sparsity.study.config import build_config
    from dllm_sparsity.study.dry_run import dry_run

    (tmp_path / "own.txt").write_text("A text.")
    fields = {
        "models": [{"paradigm": "diffusion", "model": str(folder), "trust_remote_code": True, "mc": 2}],
        "tasks": [{"text": str(tmp_path / "own.txt")}],
        "rules": [{"name": "top_p", "strengths": [0.9]}],
    }
    study = build_config(fields)
    assert check_study(study, here=True).problems == ()
    found = dry_run(study)
    assert (found.problems, found.parts[0].why) == ([], "")


def test_what_was_mended_is_said(folder, caplog):
    model, _ = load(ModelSource(str(folder), trust_remote_code=True))
    said = "\n".join(model.shims)
    for words in ("use_cache", "init_device", "is_torch_fx_available", "ROPE_INIT_FUNCTIONS", "tie_weights"):
        assert words in said, words
        assert words in caplog.text
    assert load(ModelSource("dllm_sparsity/pair/diffusion"))[0].shims == ()


def test_loading_leaves_no_trace_in_torch(folder):
    before = torch.nn.Module.register_parameter
    load(ModelSource(str(folder), trust_remote_code=True))
    assert torch.nn.Module.register_parameter is before
    assert torch.empty(1).device.type == "cpu"
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_the_call_passes_what_its_forward_takes_and_padding_changes_nothing(backend):
    with torch.no_grad():
        texts = [("hi", " you"), ("a longer context", " it")]
        alone = [backend.loglikelihood([request("loglikelihood", *text)])[0][0] for text in texts]
        together = [score for score, _ in backend.loglikelihood([request("loglikelihood", *text) for text in texts])]
    assert together == pytest.approx(alone, abs=1e-4)


@torch.no_grad()
def test_the_exact_bound_is_the_mean_over_all_masks(backend):
    context, target = backend.tok_encode("abc"), backend.tok_encode("xyz")
    total = 0.0
    for count in range(1, 4):
        masks = list(itertools.combinations(range(3), count))
        for mask in masks:
            ids = [*context, *[MASK if place in mask else token for place, token in enumerate(target)]]
            scores = backend.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found = sum(float(scores[len(context) + place, target[place]]) for place in mask)
            total += found * 3 / count / len(masks) / 3
    assert backend.loglikelihood([request("loglikelihood", "abc", "xyz")])[0][0] == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_it_generates_what_greedy_denoising_commits(backend):
    ids = torch.tensor([[*backend.tok_encode("hello"), *[MASK] * 6]])
    for _ in range(6):
        sure, token = backend.model(ids).logits.double().softmax(-1).max(-1)
        place = int(sure.masked_fill(ids != MASK, -1).argmax())
        ids[0, place] = token[0, place]
    wanted = ids[0, 5:].tolist()
    wanted = wanted[: wanted.index(tiny.EOS)] if tiny.EOS in wanted else wanted
    text = backend.generate_until([request("generate_until", "hello", {"until": [], "max_gen_toks": 6})])
    assert text == [backend.tokenizer.decode(wanted, skip_special_tokens=True)]


@torch.no_grad()
@pytest.mark.parametrize("site", ["input", "gate", "up", "intermediate", "all"])
def test_every_site_fires_on_every_layer_and_dense_is_bit_identical(backend, site):
    ids = torch.arange(5, 25).view(2, 10)
    plain = backend.model(ids).logits
    with sparsify(backend.model, TopP(1.0), site):
        assert torch.equal(backend.model(ids).logits, plain)
    with sparsify(backend.model, TopP(0.5), site) as tracker:
        assert not torch.equal(backend.model(ids).logits, plain)
    reading = tracker.read()
    sites = ("input", "intermediate") if site == "all" else (site,)
    assert set(zip(reading["layer"], reading["site"], strict=True)) == set(itertools.product(range(LAYERS), sites))
    assert torch.equal(backend.model(ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("sites", [("input",), ("gate",), ("up",), ("intermediate",), ("input", "intermediate")])
def test_the_ffn_gives_what_masks_by_hand_give(backend, sites):
    block, seen = backend.model.model.blocks[1], {}
    handles = [
        block.ff_norm.register_forward_hook(lambda module, args, output: seen.update(x=output)),
        block.ff_out.register_forward_hook(lambda module, args, output: seen.update(y=output)),
    ]
    with sparsify(backend.model, TopP(0.6), sites, layers=[1]):
        backend.model(torch.arange(5, 25).view(2, 10))
    for handle in handles:
        handle.remove()

    def cut(name, tensor):
        if name not in sites:
            return tensor
        falling = tensor.abs().sort(-1, descending=True).values
        mass = falling.double().cumsum(-1)
        last = (mass >= 0.6 * mass[..., -1:]).double().argmax(-1, keepdim=True)
        return torch.where(tensor.abs() >= falling.gather(-1, last), tensor, 0)

    x = cut("input", seen["x"])
    gate, up = cut("gate", block.act(block.ff_proj(x))), cut("up", block.up_proj(x))
    torch.testing.assert_close(seen["y"], block.ff_out(cut("intermediate", gate * up)))


@torch.no_grad()
def test_a_guided_request_and_a_plain_one_of_the_same_batch_size_are_told_apart(backend):
    guided = torch.tensor([[9, 8, MASK, MASK], [MASK] * 4])
    plain = torch.tensor([[9, 8, MASK, MASK], [7, 6, MASK, MASK]])
    with observe(backend.model, MASK) as clock, sparsify(backend.model, None, clock=clock) as tracker:
        for first in (guided, plain):
            second = first.clone()
            second[:, 2] = 11
            backend.model(first)
            backend.model(second)
    reading = tracker.read()
    assert len(reading.per_item) == 3
    prompt = sum(
        count
        for count, branch, state in zip(reading["rows"], reading["branch"], reading["token_state"], strict=True)
        if (branch, state) == ("cond", "prompt")
    )
    assert prompt == LAYERS * 2 * (2 + 4)
