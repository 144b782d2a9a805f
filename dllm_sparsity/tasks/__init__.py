"""Embedded tasks: lm-eval YAML files with their items beside them; `FOLDER` is what lm-eval's `include_path` takes."""

from pathlib import Path

FOLDER = Path(__file__).parent
