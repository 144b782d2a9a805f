"""The entry point as a user runs it."""

import pytest

from dllm_sparsity.cli import main as main_module


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the real entry point in an empty folder; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["dllm-sparsity", *map(str, arguments)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left:
            main_module.main()
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return call
