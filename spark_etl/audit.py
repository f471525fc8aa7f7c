"""Human grades in doubt: what shoppers did, what the labeller says and how raters agreed, weighed against the grade.

Two rules name conflicts as the paper does (loved but grade 0, ignored but grade 2), and a third one follows confident
learning (Northcutt et al. 2021): a labeller that had not learned from the pair gives another grade more than it gives
that grade on average where people do. Behind them stands one probability per pair. Marks give each grade a first
probability; each witness then changes the odds by how much commoner its finding is under one grade than under another,
which all judged pairs tell, for people are mostly right. Witnesses are taken as independent given the grade.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import reduce
from math import log
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import AUDIT_CONFLICT, Grade
from spark_etl.quantiles import ACCURACY, as_data, with_part
from spark_etl.recipes import AuditRecipe

PAIR = ("dataset", "query_id", "product_id")
GRADES = tuple(int(grade) for grade in Grade)
_LABELLER = ("p0", "p1", "p2")
_POSTERIOR = tuple(f"posterior_{grade}" for grade in GRADES)


class _Witness(NamedTuple):
    """What a witness found of a pair, how well it is known, and in how many equal parts findings are told apart."""

    name: str
    value: Column
    level: Column
    num_parts: int


def find_conflicts(scored: DataFrame, recipe: AuditRecipe) -> DataFrame:
    """The pairs in doubt, each with the first rule that it meets, its evidence and its priority.

    Args:
        scored: as of `score_pairs`.
    """
    traffic = sf.pow(1 + sf.coalesce("impressions", sf.lit(0)), sf.lit(recipe.traffic_exponent))
    return (
        judge_pairs(scored, recipe)
        .withColumn("priority", sf.col("expected_change") * traffic)
        .where(sf.col("kind").isNotNull())
        .fillna({"impressions": 0, "clicks": 0, "purchases": 0, "corrected_rate": 1.0})
        .withColumn("found_at", sf.lit(None).cast("timestamp"))
        .select(*AUDIT_CONFLICT.column_names)
    )


def judge_pairs(scored: DataFrame, recipe: AuditRecipe) -> DataFrame:
    """The pairs with the rules that each meets and the bounds that these compare it with.

    Adds `loved_above` and `ignored_below`, the bounds of the pair's data set and stratum; `sure_of`, how sure the
    labeller is of each grade on average where people give it; `is_loved` and `is_ignored`; `labeller_names`, the other
    grade that the labeller is surer of than that; and `kind`, the first rule met; null for none.

    Args:
        scored: as of `score_pairs`.
    """
    is_shown = sf.coalesce("impressions", sf.lit(0)) >= recipe.min_impressions
    by_class = ["dataset", "stratum"]
    bounds = (
        scored.where(is_shown)
        .groupBy(*by_class)
        .agg(
            sf.percentile_approx("click_rate", recipe.loved_quantile, ACCURACY).alias("loved_above"),
            sf.percentile_approx("click_rate", recipe.ignored_quantile, ACCURACY).alias("ignored_below"),
        )
    )
    sure_of = [sf.avg(sf.when(sf.col("grade") == grade, sf.col(f"p{grade}"))) for grade in GRADES]
    means = scored.groupBy("dataset").agg(sf.array(*sure_of).alias("sure_of"))
    judged = scored.join(sf.broadcast(bounds), on=by_class, how="left").join(sf.broadcast(means), on="dataset")
    grade = sf.col("grade")
    is_loved = is_shown & (sf.col("click_rate") > sf.col("loved_above")) & (sf.col("clicks") >= recipe.min_clicks)
    is_ignored = is_shown & (sf.col("click_rate") < sf.col("ignored_below"))
    named = [
        sf.when(
            (grade != other)
            & (sf.col(f"p{other}") == sf.greatest(*_LABELLER))
            & (sf.col(f"p{other}") >= sf.element_at("sure_of", other + 1)),
            other,
        )
        for other in GRADES
    ]
    kind = (
        sf.when(sf.col("is_loved") & (grade == int(Grade.IRRELEVANT)), "loved_but_irrelevant")
        .when(sf.col("is_ignored") & (grade == int(Grade.EXACT)), "ignored_but_exact")
        .when(sf.col("labeller_names").isNotNull(), "labeller_disagrees")
        .when(sf.col("wrong_probability") >= recipe.min_wrong_probability, "doubtful")
    )
    return judged.withColumns(
        {"is_loved": is_loved, "is_ignored": is_ignored, "labeller_names": sf.coalesce(*named)}
    ).withColumn("kind", kind)


def with_found_at(conflicts: DataFrame, now: datetime, earlier: DataFrame | None = None) -> DataFrame:
    """The conflicts with the time since when each pair has been in doubt: as before, or now.

    Args:
        conflicts: as of `find_conflicts`.
        now: when this run began.
        earlier: the conflicts of the run before.
    """
    since = sf.lit(now).cast("timestamp")
    if earlier is None or "found_at" not in earlier.columns:
        return conflicts.withColumn("found_at", since)
    before = earlier.select(*PAIR, sf.col("found_at").alias("before"))
    held = conflicts.join(before, on=list(PAIR), how="left")
    return held.withColumn("found_at", sf.coalesce("before", since)).select(*AUDIT_CONFLICT.column_names)


def score_pairs(
    engagement: DataFrame, consensus: DataFrame, recipe: AuditRecipe, labeller: DataFrame | None = None
) -> DataFrame:
    """Every judged pair with its behaviour, the probability of each grade, and how far its own is off.

    `wrong_probability` is that of all other grades, `expected_change` the mean distance to the true grade in steps.

    Args:
        engagement: rows of that table; pairs that nobody saw have none.
        consensus: rows of annotation_consensus.
        labeller: p0, p1, p2 per PAIR, of labellers that had not learned from it; None: it is no witness.
    """
    judged = consensus.select(*PAIR, "grade", "num_marks", "at_least_1", "at_least_2").join(
        engagement, on=list(PAIR), how="left"
    )
    if labeller is None:
        judged = judged.withColumns({name: sf.lit(None).cast("double") for name in _LABELLER})
    else:
        judged = judged.join(labeller.select(*PAIR, *_LABELLER), on=list(PAIR), how="left")
    frame = judged.withColumn("stratum", sf.coalesce("stratum", sf.lit(0))).withColumns(_first(recipe)).persist()
    views, clicks = sf.coalesce("examinations", sf.lit(0.0)), sf.coalesce("clicks", sf.lit(0))
    witnesses = (
        _Witness("clicked", sf.col("click_rate"), _level(views, recipe.look_levels), 10),
        _Witness("carted", sf.try_divide("carts", "clicks"), _level(clicks, recipe.click_levels), 4),
        _Witness("labelled", sf.col("p1") + 2 * sf.col("p2"), sf.lit(0), 12),
    )
    try:
        # small tables, found at once: so the answer is one pass over the pairs, however many witnesses there are
        celled = reduce(_with_cell, witnesses, frame)
        lifts = {witness.name: _lifts(celled, witness.name, recipe) for witness in witnesses}
    finally:
        frame.unpersist()
    weighed = celled.withColumns({f"log_{grade}": sf.log(f"first_{grade}") for grade in GRADES})
    for name, lift in lifts.items():
        weighed = weighed.join(sf.broadcast(lift), on=["dataset", name], how="left").withColumns(
            {f"log_{grade}": sf.col(f"log_{grade}") + sf.col(f"lift_{grade}") for grade in GRADES}
        )
        weighed = weighed.drop(*(f"lift_{grade}" for grade in GRADES))
    odds = {grade: sf.exp(f"log_{grade}") for grade in GRADES}
    total = reduce(Column.__add__, odds.values())
    frame = weighed.withColumns({f"posterior_{grade}": odds[grade] / total for grade in GRADES})
    far = [sf.abs(sf.lit(grade) - sf.col("grade")) * sf.col(f"posterior_{grade}") for grade in GRADES]
    own = sf.element_at(sf.array(*_POSTERIOR), sf.col("grade").cast("int") + 1)
    frame = frame.withColumns({"expected_change": reduce(Column.__add__, far), "wrong_probability": 1 - own})
    return frame.drop(*lifts, *(f"{kind}_{grade}" for kind in ("log", "first") for grade in GRADES))


def grades_out_of_fold(labeller_oof: DataFrame, fingerprint: str) -> DataFrame:
    """The rows of one labeller; an empty fingerprint takes the only one there is.

    Raises:
        ValueError: there are several and none is named, or the named one is not there.
    """
    known = sorted(row["labeller"] for row in labeller_oof.select("labeller").distinct().collect())
    if not fingerprint and len(known) == 1:
        fingerprint = known[0]
    if fingerprint not in known:
        raise ValueError(
            f"labeller_oof holds grades of {', '.join(known) or 'no labeller'}; "
            "name one of them (of a job inputs.labeller=FOLDER, of a notebook labeller=FINGERPRINT)"
        )
    return labeller_oof.where(sf.col("labeller") == fingerprint)


def _first(recipe: AuditRecipe) -> dict[str, Column]:
    """first_0 to first_2: the probability of each grade from the marks alone.

    A mark is wrong with `mark_error_rate`, each for itself; with `error_rate` all are, by what they have in common.
    """
    marks = sf.col("num_marks").cast("double")
    share = {2: sf.col("at_least_2"), 1: sf.col("at_least_1") - sf.col("at_least_2"), 0: 1 - sf.col("at_least_1")}
    per_mark = log((1 - recipe.mark_error_rate) / (recipe.mark_error_rate / 2))
    raw = {grade: sf.exp(per_mark * marks * (share[grade] - 1)) for grade in GRADES}
    total = reduce(Column.__add__, raw.values())
    error = recipe.error_rate
    return {
        f"first_{grade}": (1 - error) * raw[grade] / total + error / 2 * (1 - raw[grade] / total) for grade in GRADES
    }


def _level(value: Column, levels: Sequence[float]) -> Column:
    """How many of the levels a value reaches."""
    return reduce(Column.__add__, ((value >= level).cast("int") for level in levels))


def _with_cell(frame: DataFrame, witness: _Witness) -> DataFrame:
    """Adds the witness' column: which of its equal parts of the class a value is in, and at which level of evidence.

    A class is a data set, stratum and level; a missing value is in a cell of its own.
    """
    valued = frame.withColumns({"value": witness.value, "level": witness.level})
    parted = with_part(valued, "part", "value", ["dataset", "stratum", "level"], witness.num_parts)
    cell = sf.coalesce(sf.col("level") * witness.num_parts + sf.col("part"), sf.lit(-1))
    return parted.withColumn(witness.name, cell).drop("value", "level", "part")


def _lifts(frame: DataFrame, name: str, recipe: AuditRecipe) -> DataFrame:
    """Per cell of the column `name` lift_0 to lift_2: log of how much commoner it is under each grade than at all.

    The grades' shares are those of the marks, errors and all; cells are drawn to the average by `prior_pairs`.
    """
    cells = frame.groupBy("dataset", name).agg(
        sf.count("*").alias("size"), *(sf.sum(f"first_{grade}").alias(f"mass_{grade}") for grade in GRADES)
    )
    dataset = Window.partitionBy("dataset")
    share = sf.col("size") / sf.sum("size").over(dataset)
    return as_data(
        cells.select(
            "dataset",
            name,
            *(
                sf.log(
                    (sf.col(f"mass_{grade}") + recipe.prior_pairs * share)
                    / (sf.sum(f"mass_{grade}").over(dataset) + recipe.prior_pairs)
                    / share
                ).alias(f"lift_{grade}")
                for grade in GRADES
            ),
        )
    )
