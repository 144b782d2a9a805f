"""What times depend on: the machine, the packages and the command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("dllm-sparsity", "torch", "triton", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Return machine, packages, date and command as plain data.

    Args:
        device: Where things run.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["dllm-sparsity", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {**packages, "torch": torch.__version__},  # with the CUDA that it was built for
    }
