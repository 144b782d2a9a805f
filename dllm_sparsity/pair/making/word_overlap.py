"""Scores `easy_endings` by shared words alone, without a model: the figure that the twins' accuracy is read beside."""

import argparse
import json
import logging
import re
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev

EASY_ENDINGS = Path(__file__).parents[2] / "tasks" / "easy_endings.jsonl"


def beginnings(text: str) -> list[str]:
    """Return the first four letters of each word of four letters or more, in lower case."""
    return [word[:4] for word in re.findall(r"[^\W\d_]{4,}", text.lower())]


def word_share(context: str, ending: str) -> Fraction:
    """Return the share of an ending's words that the context has too, compared by their beginnings; 0 without words."""
    known, words = set(beginnings(context)), beginnings(ending)
    return Fraction(sum(word in known for word in words), len(words) or 1)


def credit(query: str, choices: list[str], gold: int) -> float:
    """Return 1 where the true ending alone has the largest share, 1/n where it is one of n such, else 0."""
    shares = [word_share(query, choice) for choice in choices]
    best = max(shares)
    return 1 / shares.count(best) if shares[gold] == best else 0.0


def main() -> None:
    """Log the accuracy of taking the ending with the largest share of its words in the context."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tasks", type=Path, default=EASY_ENDINGS, help="file of choice items")
    parser.add_argument("--first", type=int, default=0, help="number of the first item, from 0")
    parser.add_argument("--items", type=int, default=1000, help="how many items")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = arguments.tasks.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[arguments.first : arguments.first + arguments.items]]
    credits = [credit(row["query"], row["choices"], row["gold"]) for row in rows]
    error = stdev(credits) / len(credits) ** 0.5
    logging.info("%d items: accuracy %.4f, standard error %.4f", len(credits), mean(credits), error)


if __name__ == "__main__":
    main()
