import numpy as np
import pytest

from embeddings.parity import compare_vectors

AXES = np.eye(3, dtype=np.float32)


def test_equal_vectors_lose_nothing():
    report = compare_vectors(AXES[:2], AXES, AXES[:2], 2 * AXES, grades=[{0: 2, 1: 0}, {0: 1}])
    assert (report.num_queries, report.num_products) == (2, 3)
    assert (report.mean_cosine, report.min_cosine, report.max_score_error) == (1, 1, 0)
    assert (report.overlap_at_100, report.ndcg_loss) == (1, 0)


def test_numbers_are_those_of_the_text_that_turned():
    # of two queries one turns by 60 degrees, away from its product and to the next
    turned = np.array([[0.5, np.sqrt(0.75), 0], [0, 1, 0]], dtype=np.float32)
    report = compare_vectors(AXES[:2], AXES, turned, AXES, grades=[{0: 2}, {1: 2}])
    assert report.min_cosine == pytest.approx(0.5)
    assert report.mean_cosine == pytest.approx((0.5 + 4) / 5)
    assert report.max_score_error == pytest.approx(np.sqrt(0.75))
    assert report.exact_ndcg_at_10 == 1
    # the graded product falls to the second place: 1 / log2(3)
    assert report.ndcg_at_10 == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert report.ndcg_loss == pytest.approx(1 - (1 / np.log2(3) + 1) / 2)


def test_overlap_counts_the_first_hundred_of_each():
    rng = np.random.default_rng(0)
    exact, other = (rng.normal(size=(150, 4)).astype(np.float32) for _ in range(2))
    query = exact[:1] / np.linalg.norm(exact[0])
    report = compare_vectors(query, exact, query, other)
    first, second = (
        set(np.argsort(-(side / np.linalg.norm(side, axis=1, keepdims=True)) @ query[0])[:100])
        for side in (exact, other)
    )
    assert report.overlap_at_100 == pytest.approx(len(first & second) / 100)
    assert report.ndcg_at_10 is report.ndcg_loss is None


def test_queries_without_a_grade_above_0_do_not_count():
    assert compare_vectors(AXES, AXES, AXES, AXES, grades=[{0: 0}, {}, {2: 1}]).ndcg_at_10 == 1


def test_vectors_of_other_texts_are_refused():
    with pytest.raises(ValueError, match="same queries and products"):
        compare_vectors(AXES, AXES, AXES[:2], AXES)
    with pytest.raises(ValueError, match="grades of 3 queries, got 1"):
        compare_vectors(AXES, AXES, AXES, AXES, grades=[{}])
