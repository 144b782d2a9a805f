"""The journal of an open cell: what a crash, a bad disk or a full one does to it, and that its sums are the counts."""

import errno
import logging
import random

import pytest
import tiny
import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.distributed import KEYS, merge
from dllm_sparsity.lm.items import Generation, Score, Target
from dllm_sparsity.lm.journal import Answer, Work, answers
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study import journal as journal_module
from dllm_sparsity.study.collect import step_table
from dllm_sparsity.study.counted import Counted, Here
from dllm_sparsity.study.journal import CellJournal, Sums
from dllm_sparsity.study.recordfile import RecordFile

CONTENTS = [b"first", b"", b"a third, longer record\nwith a line break", bytes(range(256))]


@pytest.fixture(scope="module")
def model():
    return tiny.llama(causal=False, forbid_mask=True)


def written(path, contents=CONTENTS):
    file = RecordFile(path)
    for content in contents:
        file.append(content)
    file.close()
    return path.read_bytes()


def held(path):
    file = RecordFile(path)
    contents = [file.read(number) for number in range(len(file))]
    file.close()
    return contents


def test_records_come_back_and_more_are_added(tmp_path):
    path = tmp_path / "deep" / "records"
    written(path, CONTENTS[:2])
    written(path, CONTENTS[2:])
    assert held(path) == CONTENTS


def test_cut_short_anywhere_the_whole_records_before_stay(tmp_path, caplog):
    path = tmp_path / "records"
    data = written(path)
    path.write_bytes(data)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        found = held(path)
        assert found == CONTENTS[: len(found)]
        assert len(found) < len(CONTENTS)
        written(path, CONTENTS[len(found) :])  # and it goes on from there
        assert path.read_bytes() == data
    assert any(
        "cut short, or damaged" in record.getMessage() and str(path) in record.getMessage() for record in caplog.records
    )


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "records"
    data, draw = written(path), random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        found = held(path)
        assert found == CONTENTS[: len(found)]
        assert len(found) < len(CONTENTS)


def test_a_record_cannot_stand_for_another(tmp_path):
    path = tmp_path / "records"
    data = written(path, [b"one", b"two"])
    start, size = data.index(b"\n") + 1, 8 + 32 + 3
    path.write_bytes(data[:start] + data[start + size :] + data[start : start + size])
    assert held(path) == []


class FullDisk:
    """A stream whose disk takes only some bytes more."""

    def __init__(self, stream, room):
        self._stream, self.room = stream, room

    def write(self, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._stream.write(data[: self.room])
        self.room -= done
        return done

    def __getattr__(self, name):
        return getattr(self._stream, name)


@pytest.mark.parametrize("room", [0, 1, 7, 8, 30, 44])
def test_a_full_disk_costs_the_last_record_only(tmp_path, room):
    path = tmp_path / "records"
    file = RecordFile(path)
    file.append(b"first")
    whole = path.read_bytes()
    stream, file._stream = file._stream, FullDisk(file._stream, room)
    with pytest.raises(UserError, match="no space left") as caught:
        file.append(b"second")
    assert "what is finished is kept" in caught.value.hint
    assert path.read_bytes() == whole
    file._stream = stream
    file.append(b"second")
    assert held(path) == [b"first", b"second"]


def test_a_folder_that_cannot_be_written_to_is_two_lines(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        RecordFile(tmp_path / "file" / "records")


def forwards(model, clock, items, steps, seed):
    """Run one request batch of denoising steps."""
    ids = torch.randint(5, 40, (len(items), 6), generator=torch.Generator().manual_seed(seed))
    states = torch.full(ids.shape, TokenState.MASKED)
    states[:, 0] = TokenState.PROMPT
    with clock.batch(items, steps), torch.no_grad():
        for step in range(steps):
            clock.tick(Slot(Phase.DENOISE, step=step), states, Compare.PREVIOUS if step else Compare.START)
            model((ids + step) % 40)


BATCHES = [([("t", 0), ("t", 1)], 3), ([("t", 1)], 5), ([("t", 2), ("t", 3)], 2)]


def rows(columns):
    names = sorted(columns)
    return sorted(zip(*(columns[name] for name in names), strict=True), key=repr)


def test_takes_add_up_to_the_reading(model):
    clock = Clock()
    with sparsify(model, TopP(0.7), "all", clock=clock) as whole:
        for seed, (items, steps) in enumerate(BATCHES):
            forwards(model, clock, items, steps, seed)
    takes = []
    with sparsify(model, TopP(0.7), "all", clock=clock) as tracker:
        for seed, (items, steps) in enumerate(BATCHES):
            forwards(model, clock, items, steps, seed)
            takes.append(tracker.take())
    assert not tracker.take().columns["kept"]
    summed, reading = merge(takes), whole.read()
    assert rows(summed.columns) == rows(reading.columns)
    assert summed.per_item == reading.per_item


@pytest.mark.parametrize("pending", [0, 40, 500_000])
def test_sums_are_those_of_merge_in_any_order(model, monkeypatch, pending):
    monkeypatch.setattr(journal_module, "_PENDING_ROWS", pending)
    clock, takes = Clock(), []
    with sparsify(model, TopP(0.7), "all", clock=clock) as tracker:
        for seed, (items, steps) in enumerate(BATCHES):
            forwards(model, clock, items, steps, seed)
            takes.append(tracker.take())
    tables = []
    for order in ([0, 1, 2], [2, 1, 0]):
        sums = Sums()
        for number in order:
            sums.add(step_table(takes[number].columns), takes[number].per_item)
        tables.append(sums.steps())
        assert sums.per_item == merge(takes).per_item
    assert tables[0].equals(tables[1])
    assert rows(tables[0].to_pydict()) == rows(merge(takes).columns)
    keys = [tables[0][name].to_pylist() for name in KEYS if name in ("block", "step", "noise_bin", "layer")]
    assert list(zip(*keys, strict=True)) == sorted(zip(*keys, strict=True))


RESULTS = [
    [Score(-0.1, True, float("nan"), 3), Score(-1e-17, False, 0.25, 3)],
    [Generation([5, 6, 7], 4, 3)],
    [Score(1 / 3, False, 0.0, 2)],
]


def run_batches(model, path, upto, fingerprint="cell", keep_last=True, computed=None, keys=("a", "b", "c")):
    """Answer the first batches as a backend does; return answers, journal and what it sums up to."""
    clock, works = Clock(), [work(key) for key in keys[:upto]]
    with sparsify(model, TopP(0.7), "all", clock=clock) as tracker:
        tracker.checked = keep_last
        journal = CellJournal(path, fingerprint, Here(tracker))

        def compute(asked):
            seed = works.index(asked)
            (computed if computed is not None else []).append(seed)
            forwards(model, clock, *BATCHES[seed], seed)
            return RESULTS[seed]

        found = [answer.results for _, answer in sorted(journal.answers(works, compute), key=lambda pair: pair[0])]
    sums = journal.finish()
    journal.close()
    return found, journal, sums


def work(name):
    return Work([Target(name, [1], [2])])


def same(first, second):
    assert repr(first[0]) == repr(second[0])  # NaN is equal to itself here
    assert first[2][0].equals(second[2][0])
    assert first[2][1:] == second[2][1:]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_journal_goes_on_where_it_stopped(model, tmp_path, before):
    whole, computed = run_batches(model, tmp_path / "whole", 3), []
    run_batches(model, tmp_path / "broken", before)
    again = run_batches(model, tmp_path / "broken", 3, computed=computed)
    same(whole, again)
    assert computed == list(range(before, 3))
    assert again[1].replayed == before
    assert (again[1].replayed_seconds > 0) == (before > 0)


def test_a_damaged_journal_is_computed_again_from_there(model, tmp_path, caplog):
    whole = run_batches(model, tmp_path / "whole", 3)
    data, draw = (tmp_path / "whole").read_bytes(), random.Random(1)
    path = tmp_path / "broken"
    for _ in range(12):
        damaged, computed = bytearray(data), []
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([len(data), draw.randrange(len(data))])])
        caplog.clear()
        same(whole, run_batches(model, path, 3, computed=computed))
        assert computed == list(range(3 - len(computed), 3))
        assert computed
        assert str(path) in caplog.text
        assert "dropped" in caplog.text


def test_bytes_that_go_bad_while_it_is_open_are_found(model, tmp_path):
    whole, path = run_batches(model, tmp_path / "whole", 3), tmp_path / "bad"
    run_batches(model, path, 3)
    real, computed = CellJournal._known, []

    def known(self, key):
        if key == work("b").key:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            data[self._file._places[2][0]] ^= 1
            path.write_bytes(data)
        return real(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellJournal, "_known", known)
        same(whole, run_batches(model, path, 3, computed=computed))
    assert computed == [1, 2]


def test_other_requests_and_other_cells_are_not_mixed_in(model, tmp_path, caplog):
    path, computed = tmp_path / "journal", []
    run_batches(model, path, 3)
    run_batches(model, path, 3, computed=computed, keys=("a", "changed", "c"))
    assert computed == [1]
    computed.clear()
    run_batches(model, path, 3, fingerprint="another", computed=computed)
    assert computed == [0, 1, 2]
    assert "the journal of another cell" in caplog.text


def test_the_last_batch_runs_again_for_a_tracker_that_saw_nothing(model, tmp_path):
    whole, computed = run_batches(model, tmp_path / "journal", 3), []
    same(whole, run_batches(model, tmp_path / "journal", 3, keep_last=False, computed=computed))
    assert computed == [2]


def test_a_journal_brings_the_clock_back(model, tmp_path):
    """Overlap stays refused where an earlier batch, now in the journal, had it refused."""
    for expected in (["why"], ["why"]):
        clock = Clock()
        with sparsify(model, None, "all", clock=clock) as tracker:
            journal = CellJournal(tmp_path / "journal", "cell", Here(tracker))

            def compute(_, clock=clock):
                forwards(model, clock, [("t", 0)], 1, 0)
                clock.note("why")
                clock.overlap_refused = True
                return RESULTS[2]

            list(journal.answers([work("a")], compute))
        assert clock.overlap_refused
        assert clock.notes == expected
        assert journal.finish()[2][-1] == "why"
        journal.close()
    assert journal.replayed == 1


def test_notes_do_not_tell_who_was_faster(model, tmp_path):
    """Workers of a pool each note what they see, and answer in any order."""
    clock = Clock()
    with sparsify(model, TopP(0.7), "all", clock=clock) as tracker:
        forwards(model, clock, *BATCHES[0], 0)
        taken = tracker.take()
    answered = [
        Counted(Answer(RESULTS[0], 0.1), step_table(taken.columns), taken.per_item, notes, False)
        for notes in (("one thing",), ("one thing", "another"), ("a third", "one thing"))
    ]
    found = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):

        class Workers(Here):
            checked = True

            def counted(self, works, compute):
                yield from ((works[place][0], answered[place]) for place in order)  # noqa: B023

            def rest(self):
                return None

        journal = CellJournal(tmp_path / str(order), "cell", Workers(tracker))
        assert len(list(journal.answers([work(name) for name in "abc"], lambda _: []))) == 3
        found.append(journal.finish()[2])
        journal.close()
    assert found == [("a third", "another", "one thing")] * 3


def test_without_a_journal_nothing_is_asked():
    assert [(place, found.results) for place, found in answers(None, [work("a")], lambda _: [1])] == [(0, [1])]
    assert Answer([], 0.0).results == []


def test_the_log_is_where_messages_go():
    assert logging.getLogger(RecordFile.__module__).name.startswith("dllm_sparsity")
