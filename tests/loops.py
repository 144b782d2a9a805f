"""Denoising loops in the manner of published ones, on tiny models; each tells a log what its forward passes are.

They stand in for loops that other codebases have: the algorithms are theirs, the code is not. What a loop tells its
log comes from what it does, never from what a model saw, so tests hold `observe` against it.
"""

from __future__ import annotations

import copy

import tiny
import torch
from torch.nn import functional as F
from transformers import DynamicCache

MASK, EOS, PAD = tiny.MASK, tiny.EOS, tiny.PAD


def commit(logits, ids, where, count=1, threshold=None):
    """Fix the surest masked tokens of each row: some of them, or all that are sure enough and one at least."""
    sure, token = logits.softmax(-1).max(-1)
    sure = sure.masked_fill((ids != MASK) | ~where, -1)
    place = sure.topk(count, dim=-1).indices
    chosen = torch.zeros_like(where).scatter(1, place, True)
    if threshold is not None:
        chosen |= sure >= threshold
    return torch.where(chosen & (ids == MASK) & where, token, ids)


def within(ids, left, right):
    return (torch.arange(ids.shape[1]) >= left).expand_as(ids) & (torch.arange(ids.shape[1]) < right)


def guide(cond, free, scale):
    return free + (scale + 1) * (cond - free)


@torch.no_grad()
def llada(model, prompt, log, new=8, block=4, cfg=0.0):
    """Semi-autoregressive blocks, the whole sequence in each forward pass, guidance by a doubled batch."""
    ids = F.pad(prompt, (0, new), value=MASK)
    wide, given = prompt.shape[1], F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, new))
    log.begin(given)
    for step in range(new):
        left = wide + step // block * block
        if cfg:
            log.add("denoise", ids, range(ids.shape[1]), step=step, branches=("cond", "uncond"))
            logits = guide(*model(torch.cat([ids, ids.masked_fill(given, MASK)])).logits.chunk(2), cfg)
        else:
            log.add("denoise", ids, range(ids.shape[1]), step=step)
            logits = model(ids).logits
        ids = commit(logits, ids, within(ids, left, left + block))
    return ids


@torch.no_grad()
def dream(model, prompt, log, new=6, remask_at=(), edit_at=()):
    """The whole canvas in each step, logits of the token before; some steps put masks back, some change a token."""
    ids = F.pad(prompt, (0, new), value=MASK)
    log.begin(F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, new)))
    wide = prompt.shape[1]
    for step in range(new):
        log.add("denoise", ids, range(ids.shape[1]), step=step)
        logits = model(ids, attention_mask=None).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        ids = commit(logits, ids, within(ids, wide, ids.shape[1]))
        done = [
            (row, place) for row in range(len(ids)) for place in range(wide, ids.shape[1]) if ids[row, place] != MASK
        ]
        if step in remask_at:
            ids[done[0]] = MASK
        if step in edit_at:
            ids[done[-1]] = 4 + (ids[done[-1]] - 3) % 90
    return ids


@torch.no_grad()
def edited(model, prompt, log, new=4, block=4, after=2):
    """A window that grows by blocks, and forward passes over a finished block that may still change tokens."""
    ids, step = prompt, 0
    log.begin(torch.ones_like(prompt, dtype=torch.bool))
    for number in range(new // block):
        left = ids.shape[1]
        ids = F.pad(ids, (0, block), value=MASK)
        for turn in range(block + after):
            phase = "denoise" if turn < block else "correct"
            log.add(phase, ids, range(ids.shape[1]), number, step)
            logits = model(ids).logits
            step += 1
            if turn < block:
                ids = commit(logits, ids, within(ids, left, left + block))
            else:
                ids = torch.where(within(ids, left, left + 1), 4 + (ids - 3) % 90, ids)
    return ids


def block_causal(width, block):
    number = torch.arange(width) // block
    seen = number.unsqueeze(0) <= number.unsqueeze(1)
    return torch.zeros(width, width).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def sdar(model, prompt, log, new=8, block=4, cfg=0.0):
    """Blocks behind a cache: prefill, denoising steps that leave the cache alone, one pass that commits the block."""
    wide = prompt.shape[1]
    full = -(-(wide + new) // block) * block
    ids = F.pad(prompt, (0, full - wide), value=MASK)
    given = F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, full - wide))
    branches = ("cond", "uncond") if cfg else ("cond",)
    log.begin(given)
    cache, bias, step = DynamicCache(config=model.config), block_causal(full, block), 0

    def run(left, right, keep):
        part = ids[:, left:right]
        if cfg:
            part = torch.cat([part, ids.masked_fill(given, MASK)[:, left:right]])
        mask = bias[:, :, left:right, :right].expand(len(part), -1, -1, -1)
        place = torch.arange(left, right).expand(len(part), -1)
        logits = model(part, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True).logits
        if not keep:
            cache.crop(left - right)
        return guide(*logits.chunk(2), cfg) if cfg else logits

    start = wide // block * block
    if start:
        log.add("prefill", ids[:, :start], range(start), branches=branches)
        run(0, start, keep=True)
    for number, left in enumerate(range(start, full, block)):
        part = ids[:, left : left + block]
        while (part == MASK).any():
            log.add("denoise", ids[:, : left + block], range(left, left + block), number, step, branches)
            part = commit(run(left, left + block, keep=False), part, torch.ones_like(part, dtype=torch.bool))
            ids[:, left : left + block] = part
            step += 1
        log.add("commit", ids[:, : left + block], range(left, left + block), number, 0, branches)
        run(left, left + block, keep=True)
    return ids


@torch.no_grad()
def mdlm(model, prompts, log, new=8, block=4, cfg=0.0):
    """Prompts of any length on the left, end tokens as padding on the right, and an attention mask for them."""
    wide = max(map(len, prompts)) + new
    ids, mask = torch.full((len(prompts), wide), EOS), torch.zeros(len(prompts), wide, dtype=torch.long)
    given = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + new
        ids[row, : len(prompt)], ids[row, len(prompt) : end] = torch.tensor(prompt), MASK
        mask[row, :end], given[row, : len(prompt)] = 1, True
    log.begin(given, mask == 0)
    for step in range(new):
        if cfg:
            log.add("denoise", ids, range(wide), step=step, branches=("cond", "uncond"))
            both = model(torch.cat([ids, ids.masked_fill(given, MASK)]), attention_mask=mask.repeat(2, 1)).logits
            logits = guide(*both.chunk(2), cfg)
        else:
            log.add("denoise", ids, range(wide), step=step)
            logits = model(ids, attention_mask=mask).logits
        ends = torch.tensor([[len(prompt) + (step // block + 1) * block] for prompt in prompts])
        ids = commit(logits, ids, torch.arange(wide) < ends)
    return ids


@torch.no_grad()
def bd3lm(model, prompts, log, new=8, block=4, cfg=0.0):
    """One pass over all that is finished for each block, a copy of its cache for each step, guidance by more passes."""
    wide = -(-max(map(len, prompts)) // block) * block
    ids = torch.stack([torch.tensor([PAD] * (wide - len(prompt)) + prompt) for prompt in prompts])
    given, step = ids != PAD, 0
    log.begin(given, ids == PAD)

    def run(part, left, right, past=None):
        real = ids[:, :right] != PAD
        number = torch.arange(right) // block
        seen = (number.unsqueeze(0) <= number.unsqueeze(1)) & real.unsqueeze(1)
        seen |= torch.eye(right, dtype=torch.bool)  # a row without any key would be undefined
        place = (real.long().cumsum(-1) - 1).clamp(min=0)[:, left:]
        mask = seen[:, None, left:]
        return model(part, attention_mask=mask, position_ids=place, past_key_values=past, use_cache=past is None)

    for number in range(new // block):
        left, pasts = ids.shape[1], []
        for branch in ("cond", "uncond") if cfg else ("cond",):
            log.add("prefill", ids, range(left), number, 0, (branch,))
            part = ids if branch == "cond" else ids.masked_fill(F.pad(given, (0, left - wide)), MASK)
            pasts.append(run(part, 0, left).past_key_values)
        ids = F.pad(ids, (0, block), value=MASK)
        for _ in range(block):
            logits = []
            for branch, past in zip(("cond", "uncond"), pasts, strict=False):
                log.add("denoise", ids, range(left, left + block), number, step, (branch,))
                logits.append(run(ids[:, left:], left, left + block, copy.deepcopy(past)).logits)
            part = ids[:, left:]
            chosen = guide(*logits, cfg) if cfg else logits[0]
            ids[:, left:] = commit(chosen, part, torch.ones_like(part, dtype=torch.bool))
            step += 1
    return ids


@torch.no_grad()
def fast(model, prompt, log, new=16, block=8, cache=None, threshold=None):
    """Blocks over the whole sequence; behind each block's first pass only its suffix, or only it, is computed anew."""
    ids = F.pad(prompt, (0, new), value=MASK)
    wide, total, step = prompt.shape[1], prompt.shape[1] + new, 0
    log.begin(F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, new)))
    for number, left in enumerate(range(wide, total, block)):
        right, past = left + block, None
        while (ids[:, left:right] == MASK).any():
            shown = number if cache else 0  # without a cache the passes of all blocks are alike
            start, end = (0, total) if past is None else (left, total if cache == "prefix" else right)
            log.add("denoise", ids, range(start, end), shown, step)
            part = ids[:, start:end]
            if past is None:
                output = model(part, use_cache=cache is not None)
                if cache == "prefix":
                    past = [tuple(tensor[:, :, :left] for tensor in layer) for layer in output.past_key_values]
                elif cache == "dual":
                    past, replace = output.past_key_values, within(ids, left, right)
            elif cache == "prefix":
                output = model(part, past_key_values=past, use_cache=True)
            else:
                output = model(part, past_key_values=past, use_cache=True, replace_position=replace)
            where = within(ids, left, right)[:, start:end]
            ids[:, start:end] = commit(output.logits, part, where, threshold=threshold)
            step += 1
    return ids
