"""Cells answered at once: what each gets, and what one that breaks leaves the others."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.items import PromptBatch, Target
from dllm_sparsity.lm.journal import Work
from dllm_sparsity.sparsity.reading import NonFiniteError
from dllm_sparsity.study.attached import LocalHost
from dllm_sparsity.study.config import ModelConfig, RuleConfig
from dllm_sparsity.study.counted import Counted
from dllm_sparsity.study.journal import CellJournal
from dllm_sparsity.study.models import open_backend
from dllm_sparsity.study.setting import Setting
from dllm_sparsity.study.stacked import Fellow, LeadHost, StackedHere, why_alone

WORKS = [
    Work([Target(("t", n), [5, 6, 7 + n], [8, 9]) for n in range(3)], True),
    Work(PromptBatch([[5, 6], [7]], [("t", 0), ("t", 1)], [(("t", 0), 0), (("t", 1), 0)], 4, [], {})),
]


def settings(folder, strengths, sites=("input", "intermediate"), layers=None):
    model = ModelConfig(paradigm="autoregressive", model=str(folder), batch_size=4)
    rule = RuleConfig(name="top_p", strengths=tuple(strengths), layers=layers)
    return [Setting(model, 0, rule, strength, tuple(sites), None) for strength in strengths]


@pytest.mark.parametrize("work", WORKS, ids=["scores", "texts"])
def test_what_each_cell_gets_is_what_it_gets_alone(material, work):
    asked = settings(material / "ar", [0.9, 0.6, 0.3], layers=(1,))
    host = LocalHost(open_backend(asked[0].model, "cpu", 0))
    with host.stacked(asked) as here:
        assert here.checked
        (number, each), *_ = here.counted([(7, work)])
        facts = host.facts(asked[0])
    assert number == 7
    for setting, counted in zip(asked, each, strict=True):
        with host.attached(setting) as alone:
            expected = alone.one(work, host.lm.compute)
            assert host.facts(setting) == facts
        assert counted.steps.equals(expected.steps)
        assert counted.per_item == expected.per_item
        assert counted.notes == expected.notes
        for mine, theirs in zip(counted.answer.results, expected.answer.results, strict=True):
            value = getattr(theirs, "loglikelihood", None)
            assert value is None or mine.loglikelihood == pytest.approx(value, rel=1e-5)
            assert value is not None or mine == theirs
    with pytest.raises(RuntimeError, match="attached"):
        host.facts(asked[0])


def test_a_strength_that_lets_an_overflow_through_takes_no_other_with_it(material):
    asked = settings(material / "ar", [0.3, 1.0 - 1e-6, 0.2])
    lm = open_backend(asked[0].model, "cpu", 0)
    down = lm.model.model.layers[0].mlp.down_proj
    small = torch.zeros(down.in_features)

    def see(_, args):
        small.add_(args[0].abs().flatten(0, -2).sum(0))

    handle = down.register_forward_pre_hook(see)
    StackedHere(lm, asked[:1]).one(WORKS[0])
    handle.remove()
    entry = small.argmin()  # strong rules do not keep it
    down.register_forward_hook(lambda _, args, out: out.masked_fill(args[0][..., entry, None] != 0, torch.inf))
    first, broken, third = StackedHere(lm, asked).one(WORKS[0])
    assert isinstance(first, Counted)
    assert isinstance(third, Counted)
    assert isinstance(broken, NonFiniteError)
    assert (broken.layer, broken.site) == (1, "input")


def test_why_strengths_run_one_at_a_time(material):
    (asked,) = settings(material / "ar", [0.9])
    lm = open_backend(asked.model, "cpu", 0)
    assert why_alone(lm, asked) is None
    assert why_alone(open_backend(asked.model, "meta", 0), asked) is None
    lm.model = tiny.causal_lm("mixtral")
    assert "experts" in why_alone(lm, settings(material / "ar", [0.9], ["intermediate"])[0])
    with pytest.raises(UserError, match="no such layers"):
        why_alone(open_backend(asked.model, "cpu", 0), settings(material / "ar", [0.9], layers=(9,))[0])
    assert "object" in why_alone(object(), asked)


class Workers:
    """Two workers that are busy for an hour with each batch, and answer all at once, as seen from here."""

    checked = True

    def __init__(self, lm, asked):
        self._here, self.lm, self.clock = StackedHere(lm, asked), lm, lm.clock

    def stacked(self, asked):
        return nullcontext(self)

    def counted(self, works):
        for number, each in self._here.counted(works):
            yield number, [replace(own, answer=replace(own.answer, seconds=3600.0)) for own in each]


def test_the_clock_of_a_cell_that_others_filled_is_not_its_workers_time(material, tmp_path):
    asked = settings(material / "ar", [0.9, 0.6])
    host = Workers(open_backend(asked[0].model, "cpu", 0), asked)
    with LeadHost(host, [Fellow(asked[1], "other", tmp_path / "other")]).attached(asked[0]) as shared:
        journal = CellJournal(tmp_path / "own", "own", shared)
        assert len(list(journal.answers(WORKS, host.lm.compute))) == 2
        journal.close()
    times = []
    for name in ("own", "other"):
        journal = CellJournal(tmp_path / name, name, shared)
        replayed = [answer for _, answer in journal.answers(WORKS, host.lm.compute)]
        assert [answer.seconds for answer in replayed] == [3600.0, 3600.0]
        times.append(journal.replayed_seconds)
        journal.close()
    assert 0 < max(times) < 60
