"""Splits by hash of the normalised text, one per text over all data sets.

The data set's name is not hashed and every row of a text gets one split, so a test query of one data set is never
a train query of another. A text that any data set gives as test is test. A text that is only given as train is cut
into train, validation and calibration in the recipe's proportions. All others fall by the recipe's shares. Shares
are met in expectation: the split of a query never depends on which other queries there are.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from spark_etl.recipes import SplitRecipe

NUM_BUCKETS = 10_000


def bucket(normalised: Column) -> Column:
    """Uniform number in 0..1 of a text; 60 bits of its sha256, since 64 overflow a signed long."""
    digits = sf.substring(sf.sha2(normalised, 256), 1, 15)
    return (sf.conv(digits, 16, 10).cast("bigint") % NUM_BUCKETS) / NUM_BUCKETS


def with_split(queries: DataFrame, recipe: SplitRecipe) -> DataFrame:
    """Adds `split` to queries that have `normalised`, `given_split` and `reason` (refused rows decide nothing)."""
    same_text = Window.partitionBy("normalised")
    counts = sf.col("reason").isNull()
    is_given_test = sf.max(counts & (sf.col("given_split") == "test")).over(same_text)
    is_given_train = sf.max(counts & (sf.col("given_split") == "train")).over(same_text)
    fitted = recipe.train + recipe.validation + recipe.calibration
    place = bucket(sf.col("normalised")) * sf.when(sf.col("is_given_train"), sf.lit(fitted)).otherwise(sf.lit(1.0))
    split = (
        sf.when(sf.col("is_given_test"), "test")
        .when(place < recipe.train, "train")
        .when(place < recipe.train + recipe.validation, "validation")
        # The last given train bucket must not fall off the end by rounding.
        .when((place < fitted) | sf.col("is_given_train"), "calibration")
        .otherwise("test")
    )
    flags = {
        "is_given_test": sf.coalesce(is_given_test, sf.lit(False)),
        "is_given_train": sf.coalesce(is_given_train, sf.lit(False)),
    }
    return queries.withColumns(flags).withColumn("split", split).drop(*flags)
