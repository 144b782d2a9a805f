"""Puts a trained twin and the tokenizer into one folder: a single float16 file, the tied weights once."""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def ship(weights: Path, tokenizer: Path, out: Path) -> None:
    """Join the shards of one twin and write it beside its tokenizer."""
    AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)


def main() -> None:
    """Ship one twin."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("weights", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    ship(arguments.weights, arguments.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
