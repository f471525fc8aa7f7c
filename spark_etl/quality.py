"""Profiles of frames that are about to be published: rows, nulls, shares of values and quantiles, in one pass."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from lake.schemas import FLOAT64, INT32, INT64, TableSpec
from spark_etl.expectations import NUM_QUANTILES, OTHERS, Profile

FEW_VALUES = ("grade", "kind", "split", "given_split", "source", "scale", "stratum", "converged")
"""Columns whose shares by value are told; of other columns that are no numbers only nulls are counted.

Who judged is none of them: verdicts take the place of marks as reviews go on.
"""
MAX_VALUES = 20
"""Commonest values of such a column that are told apart."""

_TRACKED = 1000
"""Values that are counted exactly, as long as there are fewer of them."""
_ACCURACY = 2000
"""Of quantiles: ranks are off by one in so many rows at most."""
_DERIVED = ("_low", "_high")
"""Ends of intervals follow their rate."""


def profile_rows(frame: DataFrame, spec: TableSpec) -> dict[str, Profile]:
    """Data set -> profile of its rows, by one aggregation; a data set without rows has none.

    Args:
        frame: rows of the table, persisted where they are dear to compute.
    """
    nullable, few, numeric = columns_of(spec)
    counted = [sf.count(name).alias(f"known_{name}") for name in nullable]
    commonest = [
        sf.expr(f"approx_top_k(CAST({name} AS STRING), {MAX_VALUES}, {_TRACKED})").alias(f"few_{name}") for name in few
    ]
    quantiles = [sf.expr(_quantiles(name)).alias(f"quantiles_{name}") for name in numeric]
    totals = [sf.count("*").alias("rows"), *counted, *commonest, *quantiles]
    rows = [row.asDict() for row in frame.groupBy("dataset").agg(*totals).collect()]
    return {
        row["dataset"]: Profile(
            rows=row["rows"],
            nulls={name: row["rows"] - row[f"known_{name}"] for name in nullable},
            counts={name: _counts(row, name) for name in few},
            quantiles={name: row[f"quantiles_{name}"] for name in numeric if row[f"quantiles_{name}"]},
        )
        for row in rows
    }


def columns_of(spec: TableSpec) -> tuple[list[str], list[str], list[str]]:
    """Columns whose nulls, whose values and whose quantiles are told; those of the key are not."""
    free = [column for column in spec.columns if column.name not in spec.key]
    few = [column.name for column in free if column.name in FEW_VALUES]
    numeric = [
        column.name
        for column in free
        if column.type in (INT32, INT64, FLOAT64) and column.name not in few and not column.name.endswith(_DERIVED)
    ]
    return [column.name for column in free if column.nullable and not pa.types.is_nested(column.type)], few, numeric


def _quantiles(name: str) -> str:
    # as text: as columns each of the shares costs a call
    shares = ", ".join(f"{place / (NUM_QUANTILES + 1)}D" for place in range(1, NUM_QUANTILES + 1))
    return f"percentile_approx(nanvl(CAST({name} AS DOUBLE), NULL), array({shares}), {_ACCURACY})"


def _counts(row: dict[str, Any], name: str) -> dict[str, int]:
    """Value -> rows of the commonest values, and of all others together where there are more."""
    counts = {one["item"]: int(one["count"]) for one in row[f"few_{name}"] if one["item"] is not None}
    others = row.get(f"known_{name}", row["rows"]) - sum(counts.values())
    return counts | ({OTHERS: others} if others > 0 else {})
