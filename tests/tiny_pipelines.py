"""Tiny models and pipelines of diffusers for tests; nothing is downloaded."""

import diffusers
import tiny
import torch
import transformers as hf
from tiny_families import CANVAS as CANVAS
from tiny_families import diffusion_gemma as diffusion_gemma
from transformers import LlamaForCausalLM


def gemma_pipeline(model, scheduler):
    return _quiet(diffusers.DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=tiny.tokenizer()))


def llada2_pipeline(model, block_length=8, **settings):
    scheduler = diffusers.BlockRefinementScheduler(block_length, **settings)
    return _quiet(diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tiny.tokenizer()))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


class LLaDA2Form(LlamaForCausalLM):
    """A model trained block by block, in the form of LLaDA2's remote code.

    A 4-D mask is added to the scores. A 2-D mask of ones hides nothing, and one with a zero makes attention causal.
    """

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 2:
            if bool(attention_mask.all()):
                attention_mask = None
            else:
                length = input_ids.shape[1]
                seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool().unsqueeze(1)
                seen |= torch.eye(length, dtype=torch.bool)
                lowest = torch.finfo(torch.float32).min
                attention_mask = torch.zeros(seen.shape).masked_fill(~seen, lowest).unsqueeze(1)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    @torch.no_grad()
    def denoise_blocks(self, prompt, length, block, mask_id, threshold):
        """The model's own loop: whole blocks from position 0, each token sees its own and earlier blocks."""
        total = -(-(len(prompt) + length) // block) * block
        canvas = torch.tensor([[*prompt, *[mask_id] * (total - len(prompt))]])
        place = torch.arange(total) // block
        bias = torch.zeros(total, total).masked_fill(place > place.unsqueeze(-1), torch.finfo(torch.float32).min)
        for start in range(len(prompt) // block * block, total, block):
            end = start + block
            while bool((canvas[:, start:end] == mask_id).any()):
                logits = (
                    super().forward(canvas[:, :end], attention_mask=bias[None, None, :end, :end]).logits[0, start:end]
                )
                sure, token = logits.softmax(-1).max(-1)
                sure = sure.masked_fill(canvas[0, start:end] != mask_id, -1)
                chosen = sure > threshold
                chosen[sure.argmax()] = True
                canvas[0, start:end] = torch.where(chosen, token, canvas[0, start:end])
        return canvas[:, len(prompt) : len(prompt) + length]


def llada2_form(**changes):
    config = hf.LlamaConfig(**{**tiny.SHAPE, **changes})
    config.is_causal = False
    model = tiny.randomize(LLaDA2Form(config), seed=1)
    with torch.no_grad():
        model.lm_head.weight[tiny.MASK] = 0
    return model
