"""Graded pairs into instances: one train query with several graded products.

Grades of experts go before those of people, those before the labeller's. The labeller's grades are found in the
ledger by the hashes of the texts, never by ids: what was once graded is graded wherever the texts return.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import CONSENSUS, TRAINING_INSTANCE
from spark_etl.consensus import with_verdicts
from spark_etl.recipes import InstancesRecipe

PAIR = ("dataset", "query_id", "product_id")
QUERY_KEY = ("dataset", "query_id")
SHARES = ("p0", "p1", "p2")
AT_LEAST = ("at_least_1", "at_least_2")
PRECEDENCE = ("expert", "human", "annotated", "sampled", "engagement", "mined")
"""Which source gives a pair's grade, and its name in `sources`, where there are several."""


def build_instances(tables: Mapping[str, DataFrame], recipe: InstancesRecipe) -> DataFrame:
    """Instances of train queries with at least two distinct grades, products in id order.

    Stage 1 holds all human grades and the graded candidates that were not mined. Stage 2 holds the same and the
    mined pairs that `keep_by_band` lets through; a mined pair with a human grade is there already.

    Args:
        tables: table -> rows: query, catalog_product and annotation_consensus; audit_verdict, candidate_pair,
            pair_grade, class_rate and, for stage 2, mined_pair where there are any.
    """
    train = tables["query"].where(sf.col("split") == "train")
    human = tables["annotation_consensus"]
    if "audit_verdict" in tables:
        human = with_verdicts(human, tables["audit_verdict"])
    graded = human.select(*PAIR, "grade", sf.col("judge").alias("source"), *AT_LEAST)
    if "pair_grade" in tables:
        for pairs in _ungraded(tables, recipe):
            graded = graded.unionByName(pairs)
    chosen = _at_most(_one_per_pair(graded.join(train, on=list(QUERY_KEY), how="left_semi")), recipe)
    items = sf.sort_array(sf.collect_list(sf.struct("product_id", "grade", "source", *AT_LEAST)))
    return (
        chosen.groupBy(*QUERY_KEY)
        .agg(items.alias("items"), sf.count_distinct("grade").alias("num_grades"))
        .where(sf.col("num_grades") >= 2)
        .join(train.select(*QUERY_KEY, sf.col("text").alias("query")), on=list(QUERY_KEY), how="inner")
        .select(
            sf.lit(recipe.stage).cast("int").alias("stage"),
            *QUERY_KEY,
            "query",
            sf.col("items.product_id").alias("product_ids"),
            sf.col("items.grade").alias("grades"),
            sf.col("items.source").alias("sources"),
            *(sf.col(f"items.{name}").alias(name) for name in AT_LEAST),
        )
        .select(*TRAINING_INSTANCE.column_names)
    )


def newest_grades(ledger: DataFrame, recipe: InstancesRecipe) -> DataFrame:
    """The grade of each pair of texts: an expert's, else people's consensus, else the labeller's, each the newest.

    Of labellers only the recipe's and its stronger one count if it names them. Columns query_hash, product_hash, grade,
    p0, p1, p2, labeller and is_human.
    """
    is_human, is_expert = sf.col("judge") == "human", sf.col("labeller") != CONSENSUS
    is_stronger = sf.col("labeller") == recipe.stronger
    is_wanted = is_human | is_stronger | (sf.col("labeller") == recipe.labeller)
    rows = ledger.where(is_wanted) if recipe.labeller else ledger
    order = Window.partitionBy("query_hash", "product_hash").orderBy(
        sf.desc(is_human), sf.desc(is_human & is_expert), sf.desc(is_stronger), sf.desc("created_at"), "address"
    )
    newest = rows.withColumn("age", sf.row_number().over(order)).where("age = 1")
    return newest.select("query_hash", "product_hash", "grade", *SHARES, "labeller", is_human.alias("is_human"))


def at_own_rates(graded: DataFrame, class_rate: DataFrame) -> DataFrame:
    """The labeller's grades under the class rates of their population: most probable after its biases, by Bayes' rule.

    Args:
        graded: dataset, source, and the columns of `newest_grades`.
        class_rate: biases by labeller, data set and source; pairs of other populations stay as they are.
    """
    biases = class_rate.select("labeller", "dataset", "source", "bias_0", "bias_1", "bias_2")
    joined = graded.join(sf.broadcast(biases), on=["labeller", "dataset", "source"], how="left")
    weights = [sf.col(f"p{grade}") * sf.exp(f"bias_{grade}") for grade in range(3)]
    total = sum(weights[1:], weights[0])
    is_corrected = sf.col("bias_0").isNotNull() & ~sf.col("is_human")
    best = sf.array_position(sf.array(*weights), sf.greatest(*weights)) - 1
    changed = {
        f"p{grade}": sf.when(is_corrected, weights[grade] / total).otherwise(sf.col(f"p{grade}")) for grade in range(3)
    }
    changed["grade"] = sf.when(is_corrected, best.cast("tinyint")).otherwise(sf.col("grade"))
    return joined.withColumns(changed)


def keep_by_band(mined: DataFrame, recipe: InstancesRecipe) -> DataFrame:
    """Mined pairs that teach: grade 0 near the top (hard negatives), 1 and 2 in the tail (hard positives).

    Grade 1 near the top is a hard negative beside exact products, if the recipe wants it.
    """
    is_hard_negative = (sf.col("band") == "top") & (sf.col("grade") <= int(recipe.keep_near_misses))
    is_hard_positive = (sf.col("band") == "tail") & (sf.col("grade") > 0)
    return mined.where(is_hard_negative | is_hard_positive)


def _ungraded(tables: Mapping[str, DataFrame], recipe: InstancesRecipe) -> list[DataFrame]:
    """Candidates, and for stage 2 mined pairs, with the grade that the ledger has for their texts, if it is sure."""
    found = []
    if "candidate_pair" in tables:
        candidates = tables["candidate_pair"].where(sf.col("source") != "mined")
        found.append(_graded(candidates, tables, recipe))
    if recipe.stage == 2 and "mined_pair" in tables:
        latest = sf.row_number().over(Window.partitionBy(*PAIR).orderBy(sf.desc("round"), "rank"))
        mined = tables["mined_pair"].withColumn("age", latest).where("age = 1").withColumn("source", sf.lit("mined"))
        graded = _graded(mined, tables, recipe)
        found.append(graded if recipe.keep_all_mined else keep_by_band(graded, recipe))
    at_least = ((sf.col("p1") + sf.col("p2")).alias(AT_LEAST[0]), sf.col("p2").alias(AT_LEAST[1]))
    return [frame.select(*PAIR, "grade", "source", *at_least) for frame in found]


def _graded(pairs: DataFrame, tables: Mapping[str, DataFrame], recipe: InstancesRecipe) -> DataFrame:
    queries = tables["query"].select(*QUERY_KEY, "query_hash")
    products = tables["catalog_product"].select("dataset", "product_id", "product_hash")
    graded = (
        pairs.join(queries, on=list(QUERY_KEY), how="inner")
        .join(products, on=["dataset", "product_id"], how="inner")
        .join(newest_grades(tables["pair_grade"], recipe), on=["query_hash", "product_hash"], how="inner")
    )
    if "class_rate" in tables:
        graded = at_own_rates(graded, tables["class_rate"])
    probability = sf.element_at(sf.array(*SHARES), sf.col("grade").cast("int") + 1)
    return graded.where(sf.col("is_human") | (probability >= recipe.min_grade_probability))


def _one_per_pair(graded: DataFrame) -> DataFrame:
    rank = sf.array_position(sf.lit(list(PRECEDENCE)), sf.col("source")).alias("rank")
    best = sf.min(sf.struct(rank, "grade", "source", *AT_LEAST))
    return graded.groupBy(*PAIR).agg(best.alias("best")).select(*PAIR, "best.*")


def _at_most(pairs: DataFrame, recipe: InstancesRecipe) -> DataFrame:
    is_human = sf.col("rank") <= PRECEDENCE.index("human") + 1
    by_chance = sf.xxhash64(sf.lit(recipe.seed), *PAIR)
    order = sf.row_number().over(Window.partitionBy(*QUERY_KEY).orderBy(sf.desc(is_human), by_chance, "product_id"))
    return pairs.withColumn("order", order).where(sf.col("order") <= recipe.max_products_per_query)
