"""How raters agree: Krippendorff's alpha, and each annotator beside the majority of the others and beside gold.

Both statistics are one minus a ratio of sums over queries: disagreement over that by chance. Spark sums a few cells per
query and, over the queries of a slice, the cells and their products. The products tell how far the sums vary, so that
intervals need no resampling: by the delta method a statistic varies with its gradient's quadratic form in them. Pairs
of one query are not independent; queries are. Intervals are normal on the logarithm of the ratio and never reach
above 1.

Rows that hold a mean of raters (num_marks above 1) say nothing of how these agreed and are left out as marks; in the
majority of the other raters they count as in the consensus. Of several marks of an annotator on a pair the first
counts.

Cites: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability; Cohen 1968 (weighted kappa); Wilson 1927.

Shapes: R slices, C cells, V values of marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import ANNOTATION_AGREEMENT, ANNOTATOR_QUALITY, Grade
from spark_etl.recipes import AnnotatorsRecipe

PAIR = ("dataset", "query_id", "product_id")
GRADES = tuple(int(grade) for grade in Grade)
LEVELS = ("ordinal", "interval", "nominal")
_SLICE = ("dataset", "slice", "value")
_OF_ANNOTATOR = ("dataset", "annotator", "slice", "value")
_Z = 1.959964
"""Of a 95 % interval."""
_STEP = 1e-5
"""Share of a slice's sum by which a cell is moved to find a gradient."""

Array = NDArray[np.float64]
Estimates = tuple[Array, Array, Array]
"""Of each slice a statistic and the ends of its 95 % interval; nan where the marks do not tell."""


def with_context(
    annotations: DataFrame, products: DataFrame, recipe: AnnotatorsRecipe, gold: DataFrame | None = None
) -> DataFrame:
    """Single marks as `mark`, with category, the majority of the pair's `others` and the known grade; persist it.

    Args:
        annotations: rows of human_annotation.
        products: rows of catalog_product.
        recipe: how much of the category path counts.
        gold: PAIR, `gold` and `is_verdict`, as of `spark_etl.gold.known_grades`.
    """
    pair, hand = Window.partitionBy(*PAIR), Window.partitionBy(*PAIR, "annotator")
    weight, is_named = sf.col("num_marks"), sf.col("annotator").isNotNull()
    votes = {grade: sf.when(sf.col("grade") == grade, weight).otherwise(0) for grade in GRADES}
    marked = annotations.withColumns(
        {
            f"others_{grade}": sf.sum(vote).over(pair) - sf.when(is_named, sf.sum(vote).over(hand)).otherwise(vote)
            for grade, vote in votes.items()
        }
    )
    is_single = (weight == 1) & (~is_named | (sf.col("mark_number") == 1))
    levels = sf.slice(sf.split("category", " > "), 1, recipe.category_levels)
    categories = products.select("dataset", "product_id", sf.array_join(levels, " > ").alias("category"))
    known = annotations.sparkSession.createDataFrame(
        [], "dataset string, query_id string, product_id string, gold int, is_verdict boolean"
    )
    if gold is not None:
        known = gold.select(*PAIR, sf.col("gold").cast("int").alias("gold"), "is_verdict")
    single = marked.where(is_single).select(
        *PAIR, "annotator", "guideline", sf.col("grade").cast("int").alias("mark"), _majority().alias("others")
    )
    return single.join(categories, on=["dataset", "product_id"], how="left").join(known, on=list(PAIR), how="left")


def measure_agreement(marks: DataFrame, recipe: AnnotatorsRecipe) -> DataFrame:
    """Rows of the table annotation_agreement.

    Args:
        marks: as of `with_context`.
        recipe: how many marks a kappa needs.
    """
    counted = alphas(_pairs_by_slice(marks), _SLICE, GRADES)
    by_mark = {name: sf.col(name) for name in ("category", "guideline", "annotator")}
    compared = _compare(_by_slice(marks, by_mark), _SLICE, recipe)
    wanted = ("num_compared", "kappa", "kappa_low", "kappa_high")
    both = compared.select([*_SLICE, *wanted]).join(counted, keys=list(_SLICE), join_type="left outer")
    # a slice in which no pair has two marks
    for name in ("num_pairs", "num_marks"):
        filled = both[name].fill_null(0)
        both = both.set_column(both.column_names.index(name), name, filled)
    return _as_frame(marks, both, ANNOTATION_AGREEMENT.schema)


def measure_annotators(marks: DataFrame, recipe: AnnotatorsRecipe) -> DataFrame:
    """Rows of the table annotator_quality.

    Args:
        marks: as of `with_context`.
        recipe: how many marks a kappa needs.
    """
    named = marks.where(sf.col("annotator").isNotNull())
    by_mark = {name: sf.col(name) for name in ("category", "guideline")}
    compared = _compare(_by_slice(named, by_mark), _OF_ANNOTATOR, recipe)
    return _as_frame(marks, compared, ANNOTATOR_QUALITY.schema)


def alphas(pairs: DataFrame, by: Sequence[str], values: Sequence[int]) -> pa.Table:
    """Krippendorff's alpha of each slice on three levels, with 95 % intervals: columns as of annotation_agreement.

    Args:
        pairs: `by`, `query_id` and, per value V, `num_V`: how many raters of the pair gave it.
        by: columns that make a slice.
        values: what raters may give, in order; numbers for the interval level.
    """
    total = sum((sf.col(f"num_{value}") for value in values[1:]), sf.col(f"num_{values[0]}"))
    cells = {
        f"cell_{low}_{high}": sf.col(f"num_{low}") * (sf.col(f"num_{high}") - int(low == high)) / (sf.col("total") - 1)
        for low, high in combinations_with_replacement(values, 2)
    }
    several = pairs.withColumn("total", total).where("total >= 2")
    found = _sum_up(several, by, cells, {"num_pairs": sf.lit(1), "num_marks": sf.col("total")})
    columns = {name: found[name] for name in (*by, "num_pairs", "num_marks")}
    for level in LEVELS:

        def ratio(cells_RC: Array, level: str = level) -> Array:
            return disagreement(_square(cells_RC, len(values)), values, level)

        columns |= _named(f"alpha_{level}", _estimate(ratio, found, list(cells)))
    return pa.table(columns)


def disagreement(coincidence_RVV: Array, values: Sequence[float], level: str) -> Array:
    """Observed over expected disagreement, 1 less Krippendorff's alpha; nan where all raters gave one value.

    Args:
        coincidence_RVV: pairs of marks within units by their values, each unit's over its marks less one.
        values: the values, for the interval level.
        level: ordinal, interval or nominal.
    """
    count_RV = coincidence_RVV.sum(axis=-1)
    place_RV = np.cumsum(count_RV, axis=-1) - count_RV / 2
    if level == "interval":
        place_RV = np.broadcast_to(np.asarray(values, float), count_RV.shape)
    far_RVV = np.square(place_RV[..., :, None] - place_RV[..., None, :])
    if level == "nominal":
        far_RVV = np.broadcast_to(1 - np.eye(len(values)), coincidence_RVV.shape)
    observed = (coincidence_RVV * far_RVV).sum(axis=(-2, -1))
    by_chance = (count_RV[..., :, None] * count_RV[..., None, :] * far_RVV).sum(axis=(-2, -1))
    expected = by_chance / (count_RV.sum(axis=-1) - 1)
    return _over(observed, expected)


def weighted_disagreement(moments_RC: Array) -> Array:
    """Mean squared distance of two judges over that by chance, 1 less the quadratic-weighted kappa; nan for 0 / 0.

    Args:
        moments_RC: sums of 1, x, y, x^2, y^2 and xy.
    """
    n, x, y, xx, yy, xy = np.moveaxis(moments_RC, -1, 0)
    expected = xx + yy - 2 * x * y / np.maximum(n, 1)
    observed = xx + yy - 2 * xy
    return _over(observed, expected)


def _over(observed: Array, expected: Array) -> Array:
    return np.asarray(np.divide(observed, expected, out=np.full(observed.shape, np.nan), where=expected > 0))


def wilson(hits: Array, trials: Array) -> Estimates:
    """Shares of hits with Wilson's 95 % interval; nan without trials."""
    tried = np.where(trials > 0, trials, np.nan)
    share, bound = hits / tried, 1 + _Z * _Z / tried
    centre = (share + _Z * _Z / (2 * tried)) / bound
    reach = _Z / bound * np.sqrt(share * (1 - share) / tried + np.square(_Z / (2 * tried)))
    return share, centre - reach, centre + reach


def _majority() -> Column:
    """The grade that most other raters gave; null where there is none or several are."""
    names = [f"others_{grade}" for grade in GRADES]
    is_most = [(sf.col(name) == sf.greatest(*names)) & (sf.col(name) > 0) for name in names]
    num_most = sum((one.cast("int") for one in is_most[1:]), is_most[0].cast("int"))
    return sf.when(num_most == 1, sf.when(is_most[2], 2).when(is_most[1], 1).otherwise(0))


def _by_slice(marks: DataFrame, slices: Mapping[str, Column]) -> DataFrame:
    """Every row once as part of all, and once for each slice that it has a value of."""
    kinds = [sf.struct(sf.lit("all").alias("slice"), sf.lit("").alias("value"))]
    kinds += [sf.struct(sf.lit(name).alias("slice"), value.alias("value")) for name, value in slices.items()]
    return marks.select("*", sf.inline(sf.filter(sf.array(*kinds), lambda one: one["value"].isNotNull())))


def _pairs_by_slice(marks: DataFrame) -> DataFrame:
    """Numbers of raters per pair and grade, of all marks and of those under one version of the guideline."""
    numbers = [sf.count_if(sf.col("mark") == grade).alias(f"num_{grade}") for grade in GRADES]
    pairs = marks.groupBy(*PAIR).agg(
        *numbers, sf.first("category").alias("category"), sf.collect_set("annotator").alias("annotators")
    )
    by_annotator = pairs.select("*", sf.explode("annotators").alias("value"), sf.lit("annotator").alias("slice"))
    versions = marks.where(sf.col("guideline").isNotNull()).groupBy(*PAIR, "guideline").agg(*numbers)
    by_version = versions.select("*", sf.lit("guideline").alias("slice"), sf.col("guideline").alias("value"))
    names = [*_SLICE, "query_id", *(f"num_{grade}" for grade in GRADES)]
    plain = _by_slice(pairs, {"category": sf.col("category")})
    return plain.select(*names).unionByName(by_annotator.select(*names)).unionByName(by_version.select(*names))


def _compare(marks: DataFrame, by: Sequence[str], recipe: AnnotatorsRecipe) -> pa.Table:
    """Per slice marks beside the majority of the others and beside gold: columns as of annotator_quality."""
    x, y = sf.col("mark"), sf.col("others")
    is_compared, is_known = y.isNotNull(), sf.col("gold").isNotNull()
    moments = {"n": sf.lit(1), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    cells = {name: sf.when(is_compared, value).otherwise(0).cast("double") for name, value in moments.items()}
    counted = {
        "num_marks": sf.lit(1),
        "num_compared": is_compared.cast("int"),
        "equal": (is_compared & (x == y)).cast("int"),
        "num_gold": is_known.cast("int"),
        "num_verdicts": (is_known & sf.col("is_verdict")).cast("int"),
        "right": (is_known & (x == sf.col("gold"))).cast("int"),
        "above": sf.when(is_known, x - sf.col("gold")).otherwise(0),
    }
    found = _sum_up(marks, by, cells, counted)
    number = {name: found[name].to_numpy().astype(float) for name in (*counted, "x", "y")}
    compared = np.where(number["num_compared"] > 0, number["num_compared"], np.nan)
    is_enough = number["num_compared"] >= recipe.min_marks
    kappa = _estimate(weighted_disagreement, found, list(cells))
    counts = ("num_marks", "num_compared", "num_gold", "num_verdicts")
    columns = {name: found[name] for name in (*by, *counts)}
    columns |= {
        "agreement": _nullable(number["equal"] / compared),
        "bias": _nullable((number["x"] - number["y"]) / compared),
        "gold_bias": _nullable(number["above"] / np.where(number["num_gold"] > 0, number["num_gold"], np.nan)),
    }
    columns |= _named("kappa", tuple(np.where(is_enough, value, np.nan) for value in kappa))
    return pa.table(columns | _named("gold_accuracy", wilson(number["right"], number["num_gold"])))


def _sum_up(
    frame: DataFrame, by: Sequence[str], cells: Mapping[str, Column], counted: Mapping[str, Column]
) -> pa.Table:
    """Per slice `num_queries`, the sums of cells and of what is counted, and over queries those of cells' products."""
    sums = {name: sf.sum(value).alias(name) for name, value in [*cells.items(), *counted.items()]}
    by_query = frame.groupBy(*by, "query_id").agg(*sums.values())
    products = [
        sf.sum(sf.col(one) * sf.col(other)).alias(f"{one}*{other}")
        for one, other in combinations_with_replacement(cells, 2)
    ]
    totals = [sf.sum(name).alias(name) for name in sums]
    return by_query.groupBy(*by).agg(sf.count("*").alias("num_queries"), *totals, *products).orderBy(*by).toArrow()


def _estimate(ratio: Callable[[Array], Array], found: pa.Table, cells: Sequence[str]) -> Estimates:
    """1 less the ratio of each slice's sums, with an interval where two queries or more let it vary."""
    cells_RC = np.column_stack([found[name].to_numpy().astype(float) for name in cells]).reshape(-1, len(cells))
    vary_RCC = np.zeros((*cells_RC.shape, len(cells)))
    for row, one in enumerate(cells):
        for column, other in enumerate(cells[row:], start=row):
            vary_RCC[:, row, column] = vary_RCC[:, column, row] = found[f"{one}*{other}"].to_numpy()
    queries_R = found["num_queries"].to_numpy().astype(float)
    vary_RCC -= cells_RC[:, :, None] * cells_RC[:, None, :] / queries_R[:, None, None]
    value_R = ratio(cells_RC)
    step_R = _STEP * cells_RC.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        moves = [step_R[:, None] * unit_C for unit_C in np.eye(len(cells))]
        slope_RC = np.stack(
            [(ratio(cells_RC + move) - ratio(cells_RC - move)) / (2 * step_R * value_R) for move in moves], axis=-1
        )
        variance_R = np.einsum("rc,rcd,rd->r", slope_RC, vary_RCC, slope_RC) * queries_R / (queries_R - 1)
        reach_R = np.where((queries_R > 1) & (variance_R > 0), _Z * np.sqrt(variance_R), np.nan)
        return 1 - value_R, 1 - value_R * np.exp(reach_R), 1 - value_R * np.exp(-reach_R)


def _square(cells_RC: Array, num: int) -> Array:
    """Cells of the upper triangle, row by row, as symmetric matrices."""
    row_C, column_C = np.triu_indices(num)
    square_RVV = np.zeros((*cells_RC.shape[:-1], num, num))
    square_RVV[..., row_C, column_C] = cells_RC
    square_RVV[..., column_C, row_C] = cells_RC
    return square_RVV


def _named(name: str, estimates: Sequence[Array]) -> dict[str, pa.Array]:
    columns = (name, f"{name}_low", f"{name}_high")
    return {column: _nullable(values) for column, values in zip(columns, estimates, strict=True)}


def _nullable(values: Array) -> pa.Array:
    return pa.array(values, pa.float64(), from_pandas=True)


def _as_frame(marks: DataFrame, rows: pa.Table, schema: pa.Schema) -> DataFrame:
    return marks.sparkSession.createDataFrame(rows.select(schema.names).cast(schema))
