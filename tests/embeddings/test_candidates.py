import numpy as np
import pytest

from embeddings.candidates import RelevancePrior, WordMatcher, fit_prior, nearest, union

QUERIES = ["red shoe", "blue lamp", "oak table", "!!!"]
PRODUCTS = ["red shoes for children", "blue lamp with red shade", "lamp", "chair"]


def test_words_find_the_queries_of_a_product_and_the_products_of_a_query():
    matcher = WordMatcher(QUERIES, PRODUCTS)
    query_N, product_N = matcher.queries_of(np.arange(4), 2, 0.3)
    assert set(zip(query_N.tolist(), product_N.tolist(), strict=True)) == {(0, 0), (1, 1), (0, 1), (1, 2)}
    query_N, product_N = matcher.products_of(np.array([1]), 1, 0.0)
    assert (query_N.tolist(), product_N.tolist()) == ([1], [1])
    assert [len(part) for part in matcher.queries_of(np.arange(4), 0, 0.0)] == [0, 0]


def test_coverage_weighs_rare_words_more_and_is_that_of_the_lexical_weights():
    from embeddings.lexical import WordWeights

    matcher = WordMatcher(QUERIES, PRODUCTS)
    whole = WordWeights(PRODUCTS).coverage(QUERIES, PRODUCTS)
    query_N, product_N = (part.ravel() for part in np.indices((4, 4)))
    np.testing.assert_allclose(matcher.coverage(query_N, product_N), whole.ravel(), atol=1e-6)
    assert matcher.coverage(np.array([0]), np.array([0]))[0] == pytest.approx(1.0)


def test_nearest_rows_are_those_of_the_largest_products():
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(size, 4)).astype(np.float32) for size in (1500, 30))
    row_N, other_N = nearest(left, right, 3)
    best = np.argsort(-(left @ right.T), axis=1)[:, :3]
    assert [set(part) for part in other_N.reshape(-1, 3)] == [set(part) for part in best]
    assert row_N.tolist() == np.repeat(np.arange(1500), 3).tolist()
    assert len(nearest(left, right, 99)[0]) == 1500 * 30
    assert len(nearest(left, right[:0], 3)[0]) == 0


def test_a_pair_that_several_sources_found_is_there_once_with_all_of_them():
    (query_N, product_N), sources = union(
        [
            ("embedding", (np.array([1, 0]), np.array([2, 1]))),
            ("engagement", (np.array([0]), np.array([1]))),
            ("embedding", (np.array([1]), np.array([2]))),
        ],
        num_products=3,
    )
    assert (query_N.tolist(), product_N.tolist()) == ([0, 1], [1, 2])
    assert sources == [["engagement", "embedding"], ["embedding"]]
    assert union([], 3)[1] == []


def test_the_prior_learns_from_judged_pairs_and_is_plain_where_they_are_few():
    rng = np.random.default_rng(0)
    cosine_J, coverage_J = rng.uniform(-1, 1, 4000), rng.uniform(0, 1, 4000)
    true_J = 1 / (1 + np.exp(-(3 * cosine_J + 2 * coverage_J - 1)))
    fitted = fit_prior(cosine_J, coverage_J, rng.uniform(size=4000) < true_J)
    assert fitted.num_judged == 4000
    np.testing.assert_allclose(fitted(cosine_J, coverage_J), true_J, atol=0.06)
    assert fit_prior(cosine_J[:50], coverage_J[:50], true_J[:50] > 0.5) == RelevancePrior()
    assert fit_prior(cosine_J, coverage_J, np.ones(4000, dtype=bool)) == RelevancePrior()
