"""The commands of SLURM as its jobs see them, by scripts of their names: the same array, without the queue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from material import make_study

ROOT = Path(__file__).parents[2]
SBATCH = """#!/bin/sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
export SLURM_ARRAY_JOB_ID=700 SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
for i in $(seq 0 "$last"); do
    SLURM_JOB_ID=70$i SLURM_ARRAY_TASK_ID=$i bash "$1" >/dev/null 2>&1 &
done
echo "Submitted batch job 700"
"""
SACCT = """#!/bin/sh
echo "Slurm accounting storage is disabled" >&2
exit 1
"""
pytestmark = pytest.mark.slow


def test_a_cluster_without_accounting_is_told_of_in_the_log_alone(material, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {"sbatch": SBATCH, "sacct": SACCT, "srun": "", "scancel": "#!/bin/sh"}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:1]
    study["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["compare", "study.yaml", "--out", "run", "--engine", "slurm", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "dllm_sparsity.cli", *command, "--engine-option", "slurm_use_srun=0"],
        cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    for said in (done.stdout, done.stderr):
        assert "accounting" not in said
        assert "sacct" not in said
    assert "accounting storage is disabled" in (tmp_path / "run" / "log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "run" / "parts").iterdir()) == ["1-of-2", "2-of-2"]
