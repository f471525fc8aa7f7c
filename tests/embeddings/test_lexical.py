import math
import os
import subprocess
import sys

import numpy as np

from embeddings.lexical import (
    HEAD_WORDS,
    MAX_QUERY_WORDS,
    CatalogText,
    LexicalSampler,
    WordWeights,
    cut_query,
    sample_catalog,
    word_set,
)
from embeddings.recipes import LexicalRecipe

CATALOG = [
    CatalogText(f"{word} {number} steel, by Acme", f"{word} {number} steel")
    for word in ("lamp", "hose", "drill", "sofa")
    for number in range(5)
]


def sampler(**settings):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(len(CATALOG), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return LexicalSampler(CATALOG, vectors, LexicalRecipe(steps=4, **settings), seed=5)


def test_words_meet_in_lower_case_and_as_plurals():
    assert word_set("Steel SHOES, size 7 1/2") == word_set("steel shoe: size-7_1 2")
    assert word_set("glass bus") == {"glass", "bus"}
    assert word_set("Büro-Stühle größe") == {"büro", "stühle", "größe"}


def test_coverage_equals_the_shares_by_hand():
    weights = WordWeights(["red lamp", "red hose", "red red drill"])
    red, lamp, unknown = (math.log(4 / (count + 0.5)) for count in (3, 1, 0))
    coverage = weights.coverage(["red lamp", "lamp saw", "--"], ["a red lamp", "red", "saw", ""])
    # a word of every text still weighs a little, and one of no text the most
    expected = [
        [1.0, red / (red + lamp), 0.0, 0.0],
        [lamp / (lamp + unknown), 0.0, unknown / (lamp + unknown), 0.0],
        [0.0] * 4,
    ]
    np.testing.assert_allclose(coverage, expected, atol=1e-6)
    assert coverage.dtype == np.float32


def test_coverage_is_the_same_to_the_bit_in_every_process():
    """Sets of strings have another order in each process."""
    code = (
        "from embeddings.lexical import WordWeights; words = [f'w{i}' for i in range(40)];"
        "texts = [' '.join(words[: 1 + 7 * i % 40]) for i in range(60)];"
        "print(WordWeights(texts).coverage([' '.join(words)], texts).tobytes().hex())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1


def test_a_step_is_a_function_of_its_number_and_its_worker():
    first, again = (sampler(products_per_step=12, products_per_seed=4).step_batch(2, 0, 1) for _ in range(2))
    assert (first.queries, first.texts) == (again.queries, again.texts)
    np.testing.assert_array_equal(first.coverage, again.coverage)
    assert first.queries != sampler(products_per_step=12, products_per_seed=4).step_batch(3, 0, 1).queries
    assert first.coverage.shape == (len(first.queries), len(first.texts))
    assert [CATALOG[row].text for row in first.rows] == first.texts


def test_companions_are_the_nearest_products(monkeypatch):
    monkeypatch.setattr("embeddings.lexical.NEAREST", 3)
    drawn = sampler(products_per_step=4, products_per_seed=4)
    rows = drawn.step_batch(0, 0, 1).rows
    assert any(set(rows) == {seed, *np.argsort(-(drawn.vectors @ drawn.vectors[seed]))[1:4]} for seed in rows)


def test_workers_draw_from_different_seeds_and_each_gets_one():
    parts = [sampler(products_per_step=2, products_per_seed=2).step_batch(0, rank, 2) for rank in range(2)]
    assert all(len(part.texts) == 2 for part in parts)
    assert parts[0].texts != parts[1].texts


def test_queries_are_cut_from_the_head_of_the_title_in_its_order():
    title = " ".join(f"W{number}" for number in range(30))
    rng = np.random.default_rng(0)
    cut = [cut_query(title, WordWeights([title]), rng) for _ in range(300)]
    places = [[int(word[1:]) for word in query.split()] for query in cut]
    assert {len(of_query) for of_query in places} == set(range(1, MAX_QUERY_WORDS + 1))
    assert all(of_query == sorted(set(of_query)) for of_query in places)
    assert {place for of_query in places for place in of_query} == set(range(HEAD_WORDS))


def test_rare_words_are_drawn_more_often_than_common_ones():
    texts = [f"for item{number}" for number in range(50)]
    rng = np.random.default_rng(1)
    cut = [cut_query("for item7 for for", WordWeights(texts), rng) for _ in range(400)]
    single = [query for query in cut if " " not in query]
    assert single.count("item7") > len(single) / 2


def test_a_catalogue_is_sampled_once_per_text_with_words_in_its_title_whatever_its_order():
    twice = [*CATALOG, *CATALOG, CatalogText("by Acme", ""), CatalogText("--- / |", "--- / |")]
    assert {product.text for product in sample_catalog(twice, 100, 0)} == {product.text for product in CATALOG}
    few = sample_catalog(twice, 7, 0)
    assert len(few) == 7
    assert few == sample_catalog(reversed(twice), 7, 0)
    assert few != sample_catalog(twice, 7, 1)
