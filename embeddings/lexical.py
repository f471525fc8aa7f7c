"""Lexical adaptation: the encoder learns from the catalogue alone to see the words that a query and a product share.

A pretrained encoder knows what words mean, but blurs model numbers, sizes and names, which decide grades in product
search. Before the first graded step it can learn, on queries cut out of titles, to give each product its pretrained
cosine plus a share of the query's words that the product holds: a dense model imitates a lexical one, as in SPAR
(Chen et al. 2021, arXiv 2110.06918), on queries of its own domain without labels, as in GPL (Wang et al. 2021, arXiv
2112.07577). No grade is needed, so it helps most where people's grades are few. Words are what spaces and punctuation
part; of a language that writes without spaces little is learned.

Q queries, U product texts of a step, N of the catalogue, D width of a vector.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.batches import stable_seed
from embeddings.recipes import LexicalRecipe
from embeddings.text import rarity, words

MAX_QUERY_WORDS = 5
HEAD_WORDS = 14
"""Of a title; queries are cut from these, since what a product is stands first."""
NEAREST = 40
"""Products that a seed's companions are drawn from."""
_UNIT = re.compile(r"[^\s,()/|]+")


@dataclass(frozen=True)
class CatalogText:
    """A product as the encoder reads it, and its title, which queries are cut from."""

    text: str
    title: str


def sample_catalog(catalog: Iterable[CatalogText], limit: int, seed: int) -> list[CatalogText]:
    """At most `limit` products of distinct texts, by chance, in the order of their texts; titles hold a word."""
    ordered = sorted(catalog, key=lambda product: (product.text, product.title))
    distinct = list({product.text: product for product in ordered if word_set(product.title)}.values())
    if len(distinct) <= limit:
        return distinct
    rng = np.random.default_rng(stable_seed(seed, "catalog"))
    return [distinct[row] for row in np.sort(rng.choice(len(distinct), limit, replace=False))]


def word_set(text: str) -> frozenset[str]:
    """Words in lower case, those of more than three letters without an s at the end, so that plurals meet."""
    return frozenset(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words(text)
    )


class WordWeights:
    """Weights of words by how few of the texts hold them: log((N + 1) / (n + 1/2)).

    Args:
        texts: product texts of the catalogue.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in word_set(text))
        self._num_texts = len(texts)
        self._weights = {word: rarity(len(texts), count) for word, count in counts.items()}

    def __getitem__(self, word: str) -> float:
        return self._weights.get(word, rarity(self._num_texts, 0))

    def coverage(self, queries: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
        """Weighted share of each query's words that each text holds, in [0, 1], [Q, U]; 0 for a query without words."""
        held_U = [word_set(text) for text in texts]
        coverage_QU = np.zeros((len(queries), len(texts)), dtype=np.float32)
        for row, query in enumerate(queries):
            weights = {word: self[word] for word in word_set(query)}
            # exact sums: those of floats in a set's order would differ between processes
            if total := math.fsum(weights.values()):
                coverage_QU[row] = [
                    math.fsum(weights[word] for word in weights.keys() & held) / total for held in held_U
                ]
        return coverage_QU


@dataclass(frozen=True)
class LexicalBatch:
    """A worker's part of a lexical step.

    Attributes:
        queries: cut from the texts, each once.
        texts: products around the step's seeds.
        rows: of the texts in the catalogue, [U].
        coverage: share of the query's words that the product holds, float32 [Q, U].
    """

    queries: list[str]
    texts: list[str]
    rows: NDArray[np.int64]
    coverage: NDArray[np.float32]


class LexicalSampler:
    """Draws steps of products that lie near each other, and queries cut from them.

    Random products share no words with a query and teach nothing; neighbours differ in the words that matter.

    Args:
        catalog: products, one per text.
        vectors: of their texts by the encoder before training, normalised, [N, D].
        recipe: size of a step.
        seed: decides seeds, companions and queries, together with the step.
    """

    def __init__(
        self, catalog: Sequence[CatalogText], vectors: NDArray[np.float32], recipe: LexicalRecipe, seed: int
    ) -> None:
        self.catalog, self.vectors, self.recipe, self.seed = catalog, vectors, recipe, seed
        self.weights = WordWeights([product.text for product in catalog])

    def step_batch(self, step: int, rank: int, world_size: int) -> LexicalBatch:
        """The worker's part of a step, a function of the arguments alone."""
        rng = np.random.default_rng(stable_seed(self.seed, "lexical", step))
        count = max(1, self.recipe.products_per_step // self.recipe.products_per_seed)
        seeds = rng.choice(len(self.catalog), min(max(count, world_size), len(self.catalog)), replace=False)
        rng = np.random.default_rng(stable_seed(self.seed, "lexical", step, rank))
        rows = np.unique(np.concatenate([self._around(seed, rng) for seed in seeds[rank::world_size]]))
        products = [self.catalog[row] for row in rows]
        texts = [product.text for product in products]
        queries = sorted({cut_query(product.title, self.weights, rng) for product in products})
        return LexicalBatch(queries, texts, rows, self.weights.coverage(queries, texts))

    def _around(self, seed: int, rng: np.random.Generator) -> NDArray[np.int64]:
        score_N = self.vectors @ self.vectors[seed]
        score_N[seed] = -np.inf
        nearest = np.argsort(-score_N, kind="stable")[: min(NEAREST, len(score_N) - 1)]
        companions = rng.choice(nearest, min(self.recipe.products_per_seed - 1, len(nearest)), replace=False)
        return np.append(companions, seed)


def cut_query(title: str, weights: WordWeights, rng: np.random.Generator) -> str:
    """One to five words from the head of a title that holds any, in their order.

    Half of the queries are a run of words, half are words drawn by their weight.
    """
    units = [unit for unit in _UNIT.findall(title) if words(unit)][:HEAD_WORDS]
    count = min(int(rng.integers(1, MAX_QUERY_WORDS + 1)), len(units))
    if rng.random() < 0.5:
        start = int(rng.integers(0, len(units) - count + 1))
        chosen = units[start : start + count]
    else:
        # a little even for words that every text holds
        chance = np.array([0.05 + max(weights[word] for word in word_set(unit)) for unit in units])
        places = rng.choice(len(units), count, replace=False, p=chance / chance.sum())
        chosen = [units[place] for place in np.sort(places)]
    return " ".join(chosen).lower()
