"""Queries that shoppers might type, written from titles by what they typed for other products.

Most products of a catalogue are nobody's answer in the training set, so that the encoder never sees their words beside
a query. A query is some of the words of a title; which ones, people's queries tell: measures and names of makers are
seldom typed, what a thing is nearly always. So the words of a query are drawn from a title by how often each word is
typed where it stands in the title of a product that fits, and by its place there. No grade is given to anybody: that
the product of the title fits is presumed, as in GPL and InPars, which let a language model write (Wang et al. 2021,
arXiv 2112.07577; Bonifacio et al. 2022, arXiv 2202.05144).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from embeddings.batches import stable_seed
from embeddings.text import normal_form

PLACES = 8
"""Parts of a title that have a chance of their own."""
PRIOR_SEEN = 5.0
"""Titles that hold a word weigh against as many in which it is typed as often as words are on the whole."""
MIN_WORDS, MAX_WORDS = 2, 6
"""Of a query; one word alone seldom means one product."""
IDLE_PASSES = 3
"""Passes over the products without a new query after which there are taken to be no more."""

Key = TypeVar("Key")


class QueryWriter:
    """Draws queries out of titles.

    Args:
        pairs: queries of people, each with the title of a product that fits it.

    Raises:
        ValueError: no query shares a word with its title.

    Example:
        >>> writer = QueryWriter([("steel hose", "Acme 3 ft. Steel Hose in Grey")])
        >>> writer.write("Brand 5 ft. Rubber Hose", np.random.default_rng(0))
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        typed: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        typed_at, seen_at = np.zeros(PLACES), np.zeros(PLACES)
        lengths: Counter[int] = Counter()
        for query, title in pairs:
            asked, held = _words(query), _words(title)
            lengths[min(max(len(asked), MIN_WORDS), MAX_WORDS)] += 1
            for word, place in zip(held, _places(len(held)), strict=True):
                seen[word] += 1
                seen_at[place] += 1
                typed[word] += word in asked
                typed_at[place] += word in asked
        if not typed.total():
            raise ValueError(
                f"synthetic queries: expected queries that share words with titles of their products of the best "
                f"grade, found none in {lengths.total()} pairs; give no synthetic queries"
            )
        self._rate = typed.total() / seen.total()
        self._chances = {word: self._smoothed(typed[word], count) for word, count in seen.items()}
        self._unknown = self._smoothed(0, 0)
        # a place that few titles reach is as any other
        self._of_place = (typed_at + PRIOR_SEEN * self._rate) / (seen_at + PRIOR_SEEN) / self._rate
        self._lengths = np.array(sorted(lengths))
        self._share_of_length = np.array([lengths[length] for length in sorted(lengths)]) / lengths.total()

    def write(self, title: str, rng: np.random.Generator) -> str:
        """Words of the title in their order, at most six; empty where it has fewer than two different ones."""
        held = _words(title)
        if len(held) < MIN_WORDS:
            return ""
        count = min(int(rng.choice(self._lengths, p=self._share_of_length)), len(held))
        chance = self._of_words(held)
        drawn = rng.choice(len(held), count, replace=False, p=chance / chance.sum())
        return " ".join(held[place] for place in np.sort(drawn))

    def _of_words(self, held: Sequence[str]) -> NDArray[np.float64]:
        chances = np.array([self._chances.get(word, self._unknown) for word in held])
        return chances * self._of_place[_places(len(held))]

    def _smoothed(self, typed: int, seen: int) -> float:
        return (typed + PRIOR_SEEN * self._rate) / (seen + PRIOR_SEEN)


def write_queries(
    writer: QueryWriter, titles: Sequence[tuple[Key, str]], number: int, seed: int
) -> list[tuple[Key, str]]:
    """So many queries, each with the key of the product it was written from.

    Products come in an order drawn by chance, each once before any comes again; where they have too few words for so
    many different queries, there are fewer.

    Args:
        writer: knows which words are typed.
        titles: key and title of each product, in an order that is the same every time.
        number: of queries.
        seed: of the order and the draws.
    """
    rng = np.random.default_rng(stable_seed(seed, "synthetic queries"))
    found: dict[tuple[Key, str], None] = {}
    idle = 0
    while len(found) < number and idle < IDLE_PASSES:
        before = len(found)
        for place in rng.permutation(len(titles)):
            key, title = titles[place]
            if (query := writer.write(title, rng)) and len(found) < number:
                found[key, query] = None
        idle = 0 if len(found) > before else idle + 1
    return list(found)


def _words(text: str) -> list[str]:
    """Different words in their order, as a query's normal form has them."""
    return list(dict.fromkeys(normal_form(text).split()))


def _places(count: int) -> NDArray[np.int64]:
    return np.arange(count) * PLACES // max(count, 1)
