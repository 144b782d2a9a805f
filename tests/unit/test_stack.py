"""A stack gives each rule what it would get alone: scores, texts, and every count, on both backends."""

from collections import Counter

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.diffusion.samplers.confidence_threshold import ConfidenceThreshold
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.journal import Answer
from dllm_sparsity.lm.stacked import compute_copies
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.layerwise import Layerwise
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.threshold import Threshold
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.sparsity.stack import Copy, Stack, StackClock

SITES = ["input", "gate", "up", "intermediate"]
CONTEXT = "a long context that three options have"
PAIRS = [(CONTEXT, " yes"), (CONTEXT, " no"), (CONTEXT, " y"), ("a", " b"), ("what is it", " ok then"), ("", "x")]
TEXTS = [("some text to score",), ("more",)]
PROMPTS = ["hi", "a longer prompt", "x", "of another length", "and one more"]
TOP_P = [TopP(p) for p in (0.95, 0.8, 0.6, 0.3)]


class Stacked:
    """A journal that answers each batch for all rules at once, and keeps what each got."""

    def __init__(self, lm, stack):
        self.lm, self.stack, self.found = lm, stack, [[] for _ in stack.units]

    def answers(self, works, compute):
        for place, work in enumerate(works):
            each = compute_copies(self.lm, work, self.stack.clock)
            for mine, results in zip(self.found, each, strict=True):
                mine.append(results)
            yield place, Answer(each[0], 0.0)


class Alone:
    """A journal that keeps what each batch gave."""

    def __init__(self):
        self.found = []

    def answers(self, works, compute):
        for place, work in enumerate(works):
            self.found.append(compute(work))
            yield place, Answer(self.found[-1], 0.0)


def backend(paradigm, size=3, model=None, **settings):
    if paradigm == "autoregressive":
        return AutoregressiveBackend(model or tiny.llama(), tiny.tokenizer(), batch_size=size, **settings)
    settings = {"mc": 3, "block_length": 4, "steps": 8, **settings}
    model = model or tiny.llama(causal=False, forbid_mask=True)
    return DiffusionBackend(model, tiny.tokenizer(), batch_size=size, **settings)


def ask(lm, kind, **options):
    if kind == "likelihood":
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0, ("t", n // 3, 1)) for n, pair in enumerate(PAIRS)])
        lm.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, text, 0, ("r", n, 1)) for n, text in enumerate(TEXTS)]
        )
        return
    options = {"until": [], "max_gen_toks": 8, **options}
    lm.generate_until(
        [Instance("generate_until", {}, (prompt, options), 0, ("g", n, 1)) for n, prompt in enumerate(PROMPTS)]
    )


def columns(reading, left_out=()):
    names = [name for name in reading if name not in left_out]
    rows = zip(*(reading[name] for name in names), strict=True)
    return Counter(rows), reading.per_item


def stacked(lm, rules, sites, layers, *asked, **options):
    clock = StackClock(len(rules))
    with Stack(lm.model, rules, sites, clock, layers=layers) as stack:
        lm.journal = Stacked(lm, stack)
        ask(lm, *asked, **options)
    return [(found, columns(unit.read())) for found, unit in zip(lm.journal.found, stack.units, strict=True)]


def alone(lm, rule, sites, layers, *asked, **options):
    with sparsify(lm.model, rule, sites, layers=layers, clock=lm.clock) as tracker:
        lm.journal = Alone()
        ask(lm, *asked, **options)
    return lm.journal.found, columns(tracker.read())


def assert_same(each, expected):
    for (found, counts), (alone_found, alone_counts) in zip(each, expected, strict=True):
        for mine, theirs in zip(found, alone_found, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                if hasattr(one, "loglikelihood"):
                    assert one.loglikelihood == pytest.approx(other.loglikelihood, rel=1e-5)
                    assert (one.is_greedy, one.nfe) == (other.is_greedy, other.nfe)
                else:
                    assert one == other
        assert counts == alone_counts


def check(make, rules, sites="all", layers=None, asked=("likelihood",), **options):
    each = stacked(make(), rules, sites, layers, *asked, **options)
    assert_same(each, [alone(make(), rule, sites, layers, *asked, **options) for rule in rules])
    return each


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
@pytest.mark.parametrize("kind", ["likelihood", "generation"])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_each_strength_gets_what_it_gets_alone(paradigm, kind, size):
    each = check(lambda: backend(paradigm, size), TOP_P, SITES, asked=(kind,))
    kept = [sum(k for sites in counts[1].values() for k, _ in sites.values()) for _, counts in each]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


RULES = [
    [TopK(0.5), TopK(0.2)],
    [Threshold(0.1), Threshold(0.5), Threshold(1.0)],
    [TopP(0.9, scope="sequence"), TopP(0.5, scope="sequence")],
    [Layerwise(0.2), Layerwise(0.6)],
    [None, TopP(0.5)],
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_every_kind_of_rule(paradigm, rules):
    check(lambda: backend(paradigm), rules)
    check(lambda: backend(paradigm), rules, asked=("generation",))


def forwards(model, clock, copies, only=None):
    """Run some denoising steps over copies of a padded batch; return the logits.

    With `only`, on an ordinary clock that is told that all other copies are padding.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (3, 6), generator=generator)
    states = torch.randint(1, 5, (3, 6), generator=generator)
    states[0, :2] = states[2, :4] = TokenState.PAD
    ids, states = ids.to(model.device), states.to(model.device)
    states, items = states.repeat(copies, 1), [Copy(n, item) for n in range(copies) for item in "abb"]
    if only is not None:
        items = [item.item if item.number == only else None for item in items]
        states[[item is None for item in items]] = TokenState.PAD
    logits = []
    with clock.batch(items):
        for step in range(3):
            ids = (ids * 7 + step) % 95 + 5
            clock.tick(Slot(Phase.DENOISE, step=step), states, Compare.PREVIOUS if step else Compare.START)
            logits.append(model(input_ids=ids.repeat(copies, 1)).logits)
    return torch.stack(logits)


def without_padding(reading):
    counted = [place for place, state in enumerate(reading["token_state"]) if state != "pad"]
    rows = Counter(tuple(values[place] for values in reading.values()) for place in counted)
    return rows, {item: counts for item, counts in reading.per_item.items() if item is not None}


DRAWN = [[Random(0.9), Random(0.5), Random(0.9)], [Random(0.9), Random(0.9, seed=1)]]


ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


@pytest.mark.parametrize("rules", [TOP_P, *RULES, *DRAWN], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@torch.no_grad()
def test_bit_for_bit_and_count_for_count(name, rules, device):
    """Beside one rule on as many rows, where rounding is the same, all is equal to the last bit."""
    model, copies = tiny.causal_lm(name).to(device), len(rules)
    sites = SITES if name == "llama" else "intermediate"
    clock = StackClock(copies)
    with Stack(model, rules, sites, clock) as stack:
        logits = forwards(model, clock, copies)
    for number, (rule, unit) in enumerate(zip(rules, stack.units, strict=True)):
        own = Clock()
        with sparsify(model, rule, sites, clock=own) as tracker:
            expected = forwards(model, own, copies, only=number)
        rows = slice(3 * number, 3 * number + 3)
        assert torch.equal(logits[:, rows], expected[:, rows])
        assert without_padding(unit.read()) == without_padding(tracker.read())
        assert "rows_prev" in unit.read()
    assert not torch.equal(logits[:, :3], logits[:, 3:6])


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
@pytest.mark.parametrize(
    ("sites", "layers"), [(["input", "intermediate"], [1]), ("gate", [0]), (["up", "input"], None)]
)
def test_sites_and_layers(paradigm, sites, layers):
    each = check(lambda: backend(paradigm), TOP_P[:2], sites, layers)
    found = {(row[5], row[6]) for row in each[0][1][0]}
    wanted = {sites} if isinstance(sites, str) else set(sites)
    assert found == {(layer, site) for layer in (layers or [0, 1]) for site in wanted}


def test_options_that_share_their_context_share_it_within_a_copy_alone():
    model, read = tiny.llama(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    rules = [TopP(0.8)] * 3
    stacked(backend("autoregressive", 8, model), rules, "all", None, "likelihood")
    tokens, read[:] = sum(read[1:]), []
    alone(backend("autoregressive", 8, model), rules[0], "all", None, "likelihood")
    assert tokens == 3 * sum(read[1:])
    read.clear()
    stacked(backend("autoregressive", 8, model, share_context=False), rules, "all", None, "likelihood")
    assert tokens < 0.85 * sum(read[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 1.5},
        {"temperature": 0.8},
        {"mc": 9},
        {"sampler": ConfidenceThreshold(0.02), "temperature": 0.5},
    ],
    ids=str,
)
def test_guidance_draws_and_adaptive_samplers(settings):
    check(lambda: backend("diffusion", 3, **settings), TOP_P)
    check(lambda: backend("diffusion", 3, **settings), TOP_P, asked=("generation",))


def test_exact_likelihood_in_several_forward_passes_a_target(monkeypatch):
    monkeypatch.setitem(globals(), "TEXTS", [])  # whole texts are too long to enumerate
    check(lambda: backend("diffusion", 50, mc="exact"), TOP_P[:2])


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_sampling_draws_for_each_copy_what_it_draws_alone(paradigm):
    each = check(
        lambda: backend(paradigm),
        [TopP(0.9), TopP(0.9), TopP(0.2)],
        asked=("generation",),
        do_sample=True,
        temperature=0.7,
    )
    assert each[0] == each[1]
    assert each[0] != each[2]


def test_a_copy_whose_texts_are_finished_is_not_counted_on():
    """Alone its loop would have ended; beside copies that go on it runs on as padding."""
    rules = [TopP(p) for p in (0.99, 0.5, 0.2, 0.1)]
    each = check(
        lambda: backend("autoregressive", 2), rules, asked=("generation",), until=["a", "e", "0", "Q"], max_gen_toks=16
    )
    lengths = [[max(each.nfe for each in batch) for batch in found] for found, _ in each]
    assert any(len(set(of_batch)) > 1 for of_batch in zip(*lengths, strict=True))


def test_experts_and_other_rows_are_refused():
    mixtral = tiny.causal_lm("mixtral")
    with pytest.raises(UserError, match="experts"):
        Stack(mixtral, TOP_P, "intermediate", StackClock(4))
    clock = StackClock(2)
    for items in (
        ["a", "a"],
        [Copy(0, "a"), Copy(1, "a"), Copy(1, "b")],
        [Copy(0, "a"), Copy(1, "a"), Copy(0, "b"), Copy(1, "b")],
    ):
        with pytest.raises(ValueError, match="one behind the other"):
            clock.begin(items)
    model = tiny.llama()
    with Stack(model, TOP_P[:2], "input", clock), clock.batch([Copy(0, "a"), Copy(1, "a")]):
        clock.tick(Slot(Phase.FORWARD), torch.ones(2, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="2 copies"):
            model(input_ids=torch.ones(3, 2, dtype=torch.long))
        with pytest.raises(ValueError, match="announced"):
            model(input_ids=torch.ones(4, 3, dtype=torch.long))


def test_the_model_is_what_it_was():
    model = tiny.llama()
    before = model(input_ids=torch.arange(5, 11).view(1, 6)).logits
    clock = StackClock(2)
    with Stack(model, TOP_P[:2], "all", clock):
        pass
    assert torch.equal(model(input_ids=torch.arange(5, 11).view(1, 6)).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(part.listeners for part in clock.parts)
