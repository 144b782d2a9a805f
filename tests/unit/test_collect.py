"""What a cell's tables hold beyond what the backends logged."""

from dllm_sparsity.study.collect import _groups


def test_items_of_one_passage_are_one_group():
    documents = [{"passage": "a", "question": n} for n in range(2)] + [{"passage": "b", "question": 2}]
    first, second, third = _groups(documents)
    assert first == second != third
    assert len(first) == 16


def test_items_that_stand_alone_have_none():
    assert _groups([{"passage": "a"}, {"passage": "b"}]) is None  # each its own
    assert _groups([{"passage": "a"}, {"passage": "a"}]) is None  # all of one: nothing to resample
    assert _groups([{"question": "a"}, {"question": "a"}]) is None
    assert _groups([{"passage": "a"}, {"passage": "a"}, {"passage": None}]) is None
    assert _groups([]) is None
