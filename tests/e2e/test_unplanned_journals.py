"""What a cell had begun goes when a study no longer asks for it, unless a search may ask for it again."""

import pytest
from material import make_study
from test_resume import Stop, stop_at

from dllm_sparsity import compare


@pytest.fixture
def small(material):
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:1]
    study["models"][0]["batch_size"] = 2
    study["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["input"]}]
    return study


@pytest.fixture
def broken(small, tmp_path, monkeypatch):
    """A run that stopped in the third of four batches of its second cell; returns its folder and the journal."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stop):
            compare(small, path)
    (journal,) = path.glob("journals/*.journal")
    return path, journal


def test_another_study_removes_them_and_says_so(small, broken, caplog):
    path, journal = broken
    small["rules"][0]["strengths"] = [0.9]
    compare(small, path)
    assert not journal.exists()
    assert not (path / "journals").exists()
    told = "1 cells that an earlier run began are not in this study; their batches are removed"
    assert told in caplog.messages
    assert told in (path / "log.txt").read_text()


def test_the_same_study_goes_on_from_them(small, broken, monkeypatch):
    path, _ = broken
    begun = stop_at(monkeypatch, 0)
    compare(small, path)
    assert len(begun) == 2  # of four batches
    assert "are not in this study" not in (path / "log.txt").read_text()


def test_a_search_keeps_them(small, broken):
    path, journal = broken
    small["search"] = {"width": 0.9, "retentions": [0.5]}
    small["rules"][0]["strengths"] = []
    compare(small, path)
    assert journal.exists()
