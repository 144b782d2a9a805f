"""Trains the tokenizer and turns the documents into flat arrays of token ids, so that training needs no text."""

import argparse
import json
import logging
from pathlib import Path

import numpy as np

from dllm_sparsity.pair.making.tokenizer import train_tokenizer


def main() -> None:
    """Write the tokenizer and train.npz: ids of all documents in a row, their starts, prompt lengths and parts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that the corpus was written to")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder the tokenizer goes to")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    lines = (arguments.corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    tokenizer = train_tokenizer((doc["prompt"] + doc["text"] for doc in documents), arguments.tokenizer)
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = [encoding.ids for encoding in encode([doc["prompt"] for doc in documents])]
    texts = [encoding.ids for encoding in encode([doc["text"] for doc in documents])]
    names = sorted({doc["part"] for doc in documents})
    parts = np.array([names.index(doc["part"]) for doc in documents], dtype=np.uint8)
    sizes = np.array([len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)])
    ids = np.fromiter((i for pair in zip(prompts, texts, strict=True) for side in pair for i in side), dtype=np.uint16)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)
    prompt_sizes = np.array([len(prompt) for prompt in prompts], dtype=np.uint16)
    np.savez(arguments.out / "train.npz", ids=ids, starts=starts, prompts=prompt_sizes, parts=parts, names=names)
    for number, name in enumerate(names):
        logging.info("%s: %d documents, %.3f M tokens", name, sum(parts == number), sizes[parts == number].sum() / 1e6)


if __name__ == "__main__":
    main()
