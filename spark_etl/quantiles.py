"""Classes of equal size by a value, and small tables that are kept as data."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

ACCURACY = 10_000
"""Of percentile_approx: quantiles are exact up to so many distinct values per class."""


def with_part(frame: DataFrame, name: str, value: str, by: Sequence[str], num_parts: int) -> DataFrame:
    """Adds the column `name`: which of `num_parts` equal parts of its class a value is in, from 0; null for no value.

    The bounds are found at once, so that the answer is one pass over the frame; persist what is dear to compute twice.

    Args:
        value: column that is ordered.
        by: columns that make a class.
    """
    shares = [place / num_parts for place in range(1, num_parts)]
    if not shares:
        return frame.withColumn(name, sf.when(sf.col(value).isNotNull(), 0))
    known = frame.where(sf.col(value).isNotNull())
    bounds = as_data(known.groupBy(*by).agg(sf.percentile_approx(value, shares, ACCURACY).alias("bounds")))
    above = sf.size(sf.filter("bounds", lambda bound: bound < sf.col(value)))
    joined = frame.join(sf.broadcast(bounds), on=list(by), how="left")
    return joined.withColumn(name, sf.when(sf.col(value).isNotNull(), above)).drop("bounds")


def as_data(small: DataFrame) -> DataFrame:
    """A small frame's rows, without what they were found from."""
    return small.sparkSession.createDataFrame(small.collect(), small.schema)
