"""The entry point as a user runs it."""

import pytest

from dllm_sparsity.cli import main as main_module
from dllm_sparsity.study.offline import SWITCHES


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the real entry point in an empty folder; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["dllm-sparsity", *map(str, arguments)])
        for name in SWITCHES:  # a command that goes offline is not to take what comes after it along
            monkeypatch.setenv(name, "1" if name == "HF_HUB_OFFLINE" else "0")
        for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
            monkeypatch.setattr(name, False)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left:
            main_module.main()
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return call
