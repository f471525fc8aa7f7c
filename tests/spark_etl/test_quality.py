"""Profiles of frames on real Spark."""

import numpy as np
import pytest

from lake.schemas import CATALOG_PRODUCT, ENGAGEMENT, FLOAT64, INT32, STRING, Column, TableSpec
from spark_etl.expectations import NUM_QUANTILES, OTHERS
from spark_etl.quality import MAX_VALUES, columns_of, profile_rows

SPEC = TableSpec(
    "t",
    "A table.",
    "spark",
    ("dataset", "rank"),
    (
        Column("dataset", STRING, "data set"),
        Column("rank", INT32, "of the key"),
        Column("kind", STRING, "one of few", nullable=True),
        Column("price", FLOAT64, "a number", nullable=True),
        Column("price_low", FLOAT64, "end of its interval", nullable=True),
        Column("title", STRING, "a text"),
    ),
)


def frame(spark, rows):
    """Rows of (dataset, kind, price)."""
    full = [(dataset, rank, kind, price, None, "t") for rank, (dataset, kind, price) in enumerate(rows)]
    return spark.createDataFrame(
        full, "dataset string, rank int, kind string, price double, price_low double, title string"
    )


def test_a_profile_counts_rows_nulls_and_values_and_ranks_numbers_by_data_set(spark):
    rng = np.random.default_rng(1)
    prices = rng.lognormal(2, 1, 700).tolist()
    rows = [("a", "x" if place % 7 else None, price) for place, price in enumerate(prices)]
    rows += [("b", "y", None), ("b", "x", float("nan")), ("b", "x", 3.0)]
    profiles = profile_rows(frame(spark, rows), SPEC)
    assert (profiles["a"].rows, profiles["b"].rows) == (700, 3)
    assert profiles["a"].nulls == {"kind": 100, "price": 0, "price_low": 700}
    assert profiles["a"].counts == {"kind": {"x": 600}}
    assert profiles["b"].counts == {"kind": {"x": 2, "y": 1}}
    assert profiles["b"].quantiles == {"price": [3.0] * NUM_QUANTILES}
    grid = np.arange(1, NUM_QUANTILES + 1) / (NUM_QUANTILES + 1)
    ranks = np.searchsorted(np.sort(prices), profiles["a"].quantiles["price"], side="right") / 700
    assert np.abs(ranks - grid).max() < 0.003


def test_values_beyond_the_commonest_count_as_one(spark):
    rows = [("a", f"k{kind}", 1.0) for kind in range(MAX_VALUES + 5) for _ in range(2 + (kind < MAX_VALUES))]
    counts = profile_rows(frame(spark, rows), SPEC)["a"].counts["kind"]
    assert counts == {f"k{kind}": 3 for kind in range(MAX_VALUES)} | {OTHERS: 10}


def test_a_frame_without_rows_and_a_column_without_values_are_no_error(spark):
    assert profile_rows(frame(spark, [("a", "x", 1.0)]).where("false"), SPEC) == {}
    empty = profile_rows(frame(spark, [("a", None, None)]), SPEC)["a"]
    assert (empty.nulls["price"], empty.counts, empty.quantiles) == (1, {"kind": {}}, {})


@pytest.mark.parametrize(
    ("spec", "few", "numeric"),
    [(SPEC, ["kind"], ["price"]), (CATALOG_PRODUCT, [], ["price"]), (ENGAGEMENT, None, None)],
)
def test_keys_texts_and_ends_of_intervals_have_no_distribution(spec, few, numeric):
    nullable, told, ranked = columns_of(spec)
    assert nullable == [column.name for column in spec.columns if column.nullable]
    if few is None:
        few = ["stratum"]
        numeric = ["impressions", "clicks", "carts", "purchases", "expected_clicks", "corrected_rate", "examinations"]
        numeric += ["breadth", "click_rate", "cart_rate", "purchase_rate", "attraction"]
    assert (told, ranked) == (few, numeric)
