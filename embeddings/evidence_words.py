"""What the words of a query and a product say of their grade: how rare they are, and how alike a word of the title is.

N pairs.

Cites: of numbers like these in product search, the winners' notes of the Home Depot search relevance competition.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embeddings.guideline import ProductFields
from embeddings.text import rarity

WORD_NUMBERS: Final = (
    "likeness of the query's least alike word to a word of the title",
    "mean likeness of the query's words, weighted by rarity",
    "likeness of its last word",
    "rarity of its rarest word",
    "mean rarity of its words",
    "rarity of its rarest word that the title lacks, 0 without any",
    "share of its words in the title",
    "share of its words in any text of the product, weighted by rarity",
    "share of its neighbouring words that are neighbours in the title; -1 without any",
    "mean place in the title of its words that stand there, 0 first; -1 without any",
    "number of its words",
    "how many of them are numbers",
    "share of these in the title; -1 without any",
    "number of the title's words",
    "mean rarity of the title's words",
)
"""Meaning of each number; likeness is the share of common letter triples, rarity log((N + 1) / (n + 1/2)) of n of N."""
_MAX_WORDS: Final = 400
"""Of a text that are read: a description of megabytes says no more."""
_UNIT = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


def units(text: str | None) -> list[str]:
    """Runs of letters and numbers in lower case, without a plural's s, in their order."""
    found = _UNIT.findall((text or "").lower())[:_MAX_WORDS]
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found]


class WordNumbers:
    """Computes WORD_NUMBERS by the words of a set of titles.

    Args:
        num_texts: titles that the words were counted in.
        counts: of these, how many hold a word; one that is missing here is in none or one.
    """

    def __init__(self, num_texts: int, counts: Mapping[str, int]) -> None:
        self.num_texts, self.counts = num_texts, dict(counts)

    @classmethod
    def of(cls, titles: Sequence[str]) -> WordNumbers:
        """By these titles, each product's once."""
        counts = Counter(word for title in titles for word in set(units(title)))
        return cls(len(titles), {word: count for word, count in sorted(counts.items()) if count > 1})

    def values(self) -> dict[str, Any]:
        """What the class is made of, for a JSON file."""
        return {"num_texts": self.num_texts, "counts": self.counts}

    def __call__(self, queries: Sequence[str], products: Sequence[ProductFields]) -> NDArray[np.float64]:
        """Numbers of each pair, [N, 15]; 0 for likeness and shares without words."""
        found = [self._numbers(units(query), product) for query, product in zip(queries, products, strict=True)]
        return np.array(found, dtype=np.float64).reshape(-1, len(WORD_NUMBERS))

    def _rarity(self, word: str) -> float:
        return rarity(self.num_texts, self.counts.get(word, 0))

    def _numbers(self, asked: list[str], product: ProductFields) -> list[float]:
        title = units(product.title)
        first: dict[str, int] = {}
        for place, word in enumerate(title):
            first.setdefault(word, place)
        known = set(first)
        likeness = [_likeness(word, known) for word in asked] or [0.0]
        rareness = [self._rarity(word) for word in asked] or [0.0]
        is_there = [word in known for word in asked] or [False]
        everywhere = known.union(*map(units, product[1:]))
        total = sum(rareness) or 1.0
        numbers = [word for word in asked if word[0].isdigit()]
        neighbours = set(pairwise(title))
        return [
            min(likeness),
            sum(map(float.__mul__, likeness, rareness)) / total,
            likeness[-1],
            max(rareness),
            sum(rareness) / len(rareness),
            max((rare for rare, there in zip(rareness, is_there, strict=True) if not there), default=0.0),
            sum(is_there) / len(is_there),
            sum(rare for word, rare in zip(asked, rareness, strict=False) if word in everywhere) / total,
            _mean([pair in neighbours for pair in pairwise(asked)]),
            _mean([first[word] / len(title) for word in asked if word in first]),
            float(len(asked)),
            float(len(numbers)),
            _mean([word in known for word in numbers]),
            float(len(title)),
            sum(map(self._rarity, sorted(known))) / max(len(known), 1),
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else -1.0


@lru_cache(maxsize=100_000)
def _triples(word: str) -> frozenset[str]:
    padded = f" {word} "
    return frozenset(padded[start : start + 3] for start in range(len(padded) - 2))


def _likeness(word: str, others: set[str]) -> float:
    """Largest share of common letter triples with one of the others; 1 where it is among them."""
    if word in others:
        return 1.0
    own = _triples(word)
    return max((len(own & theirs) / len(own | theirs) for theirs in map(_triples, others)), default=0.0)
