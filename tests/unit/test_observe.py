"""observe(): a loop that is not ours drives the clock through nothing but its token ids."""

from collections import Counter

import pytest
import tiny
import torch

from dllm_sparsity import TopP, UserError, observe, save_report, sparsify


@pytest.fixture(scope="module")
def model():
    return tiny.llama(causal=False, forbid_mask=True)


@torch.no_grad()
def their_generate(model, prompt, new=6, guidance=False):
    """Somebody's loop: one commit a step, guidance by batch doubling."""
    canvas = torch.cat([prompt, torch.full((len(prompt), new), tiny.MASK)], dim=1)
    for _ in range(new):
        if guidance:
            blank = canvas.clone()
            blank[:, : prompt.shape[1]] = tiny.MASK
            both = model(torch.cat([canvas, blank])).logits
            logits = both[len(prompt) :] + 2 * (both[: len(prompt)] - both[len(prompt) :])
        else:
            logits = model(canvas).logits
        sure, token = logits.softmax(-1).max(-1)
        place = sure.masked_fill(canvas != tiny.MASK, -1).argmax(-1, keepdim=True)
        canvas.scatter_(1, place, token.gather(1, place))
    return canvas


def rows(reading, *names):
    counted = Counter()
    for number, count in enumerate(reading["rows"]):
        if reading["layer"][number] == 0 and reading["site"][number] == "input":
            counted[tuple(reading[name][number] for name in names)] += count
    return counted


@pytest.mark.parametrize("guidance", [False, True])
def test_states_steps_and_requests(model, guidance):
    prompts = torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80]])
    with observe(model, tiny.MASK) as clock, sparsify(model, TopP(0.8), "all", clock=clock) as tracker:
        for prompt in (prompts, prompts, prompts[:1], prompts[:, :3]):
            their_generate(model, prompt, guidance=guidance)
    reading = tracker.read()
    batch = 2 + 2 + 1 + 2
    cond = {key[1:]: count for key, count in rows(reading, "branch", "step", "token_state").items() if key[0] == "cond"}
    for step in range(6):
        assert cond[step, "masked"] == batch * (6 - step)
        assert cond[step, "prompt"] == 5 * 4 + 2 * 3
        assert cond.get((step, "committed_now"), 0) == (batch if step else 0)
    assert set(reading["branch"]) == ({"cond", "uncond"} if guidance else {"cond"})
    assert len(reading.per_item) == batch
    assert sum(reading["rows_prev"]) > 0
    assert set(reading["phase"]) == {"denoise"}


def test_the_loop_gets_the_same_answer_when_only_counted(model):
    prompt = torch.tensor([[10, 20, 30]])
    plain = their_generate(model, prompt)
    with observe(model, tiny.MASK) as clock, sparsify(model, None, "all", clock=clock) as tracker:
        assert torch.equal(their_generate(model, prompt), plain)
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert tracker.read().sparsity(token_state="masked") < 0.05


def test_padding_and_the_end_token_are_told_apart(model):
    with observe(model, tiny.MASK, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS) as clock:
        with sparsify(model, None, clock=clock) as tracker, torch.no_grad():
            for canvas in (
                [tiny.PAD, 9, tiny.MASK, tiny.MASK],
                [tiny.PAD, 9, tiny.EOS, tiny.MASK],
                [tiny.PAD, 9, tiny.EOS, 7],
            ):
                model(torch.tensor([canvas]))
    states = rows_of_states(tracker.read())
    assert states["pad"] == 3
    assert states["prompt"] == 3
    assert states["after_eos"] == 1


def rows_of_states(reading):
    states = Counter()
    for number, count in enumerate(reading["rows"]):
        if reading["layer"][number] == 0:
            states[reading["token_state"][number]] += count
    return states


def test_reading_goes_on_inside_the_block(model):
    prompt = torch.tensor([[10, 20, 30]])
    with observe(model, tiny.MASK) as clock, sparsify(model, TopP(0.8), clock=clock) as tracker:
        their_generate(model, prompt)
        first = sum(tracker.read()["rows"])
        their_generate(model, prompt)
        assert sum(tracker.read()["rows"]) == 2 * first
    assert sum(tracker.read()["rows"]) == 2 * first


def test_save_report_of_a_foreign_loop(model, tmp_path):
    with observe(model, tiny.MASK) as clock, sparsify(model, TopP(0.8), "all", clock=clock) as tracker:
        their_generate(model, torch.tensor([[10, 20, 30]]))
    page = save_report(tracker.read(), tmp_path / "report.html").read_text()
    assert "Content-Security-Policy" in page
    assert "token state" in page.lower()


def test_a_model_without_embedding_is_refused():
    with pytest.raises(UserError, match="no input embedding"), observe(torch.nn.Linear(2, 2), 3):
        pass


def test_without_a_mask_token_there_has_to_be_an_encoder(model):
    with pytest.raises(UserError, match="without a mask token"), observe(model, None):
        pass


def test_a_compiled_model_is_followed():
    model, prompt, counted = tiny.llama(causal=False, forbid_mask=True), torch.tensor([[10, 20, 30]]), []
    for compiled in (False, True):
        with observe(model, tiny.MASK) as clock, sparsify(model, TopP(0.8), "all", clock=clock) as tracker:
            their_generate(torch.compile(model, backend="eager") if compiled else model, prompt)
        counted.append(rows(tracker.read(), "step", "token_state"))
    torch._dynamo.reset()
    assert counted[0] == counted[1]
    assert len(counted[0]) > 12
