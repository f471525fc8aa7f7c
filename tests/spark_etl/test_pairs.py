"""Candidate pairs: sources, shares, determinism."""

from collections import Counter

import pytest

from spark_etl.pairs import sample_pairs
from spark_etl.recipes import SamplePairsRecipe

PAIR = "dataset string, query_id string, product_id string"


def tables_of(spark, *, num_products=60, judged=(), marks=(), engagement=(), mined=()):
    queries = [("d", "train", "train"), ("d", "train2", "train"), ("d", "test", "test"), ("e", "train", "train")]
    products = [(dataset, f"p{number:03}") for dataset in ("d", "e") for number in range(num_products)]
    return {
        "query": spark.createDataFrame(queries, "dataset string, query_id string, split string"),
        "catalog_product": spark.createDataFrame(products, "dataset string, product_id string"),
        "annotation_consensus": spark.createDataFrame(list(judged), f"{PAIR}, grade tinyint"),
        "human_annotation": spark.createDataFrame(list(marks), PAIR),
        "engagement": spark.createDataFrame(list(engagement), f"{PAIR}, impressions bigint"),
        "mined_pair": spark.createDataFrame(list(mined), f"{PAIR}, round int"),
    }


def collected(frame):
    return sorted(
        tuple(row[name] for name in ("dataset", "query_id", "product_id", "source")) for row in frame.collect()
    )


JUDGED = [
    *(("d", "train", f"p{number:03}", 2 if number < 4 else 0) for number in range(6)),
    *(("d", "train2", f"p{number:03}", 0 if number else 1) for number in range(6)),
    *(("d", "test", f"p{number:03}", 2) for number in range(5)),
    *(("e", "train", f"p{number:03}", 1) for number in range(5)),
]
"""d/train has 4 positives and 2 of grade 0: lacks .65/.35 x 4 - 2 = 5.43, x 1.2 = 6.51, so 7. d/train2 has 1 and
5: lacks none. e/train has 5 positives: lacks 9.29, x 1.2 = 11.14, so 12."""


def test_sampled_products_bring_each_instance_to_its_share_of_grade_0(spark):
    marks = [("d", "train", "p059")]
    found = collected(
        sample_pairs(tables_of(spark, judged=JUDGED, marks=marks), SamplePairsRecipe(sources=("sampled",)))
    )
    assert Counter((dataset, query) for dataset, query, _, _ in found) == {("d", "train"): 7, ("e", "train"): 12}
    assert len(set(found)) == len(found)
    assert not {row[:3] for row in found} & ({row[:3] for row in JUDGED} | set(marks))
    assert (2 + 7) / (6 + 7) >= 0.65
    assert 12 / (5 + 12) >= 0.65


def test_sample_depends_on_the_seed_and_not_on_other_queries(spark):
    tables = tables_of(spark, judged=JUDGED)
    one, again = (collected(sample_pairs(tables, SamplePairsRecipe(sources=("sampled",)))) for _ in range(2))
    alone = tables | {"query": tables["query"].where("dataset = 'd'").repartition(3)}
    assert one == again
    assert collected(sample_pairs(alone, SamplePairsRecipe(sources=("sampled",)))) == [
        row for row in one if row[0] == "d"
    ]
    assert collected(sample_pairs(tables, SamplePairsRecipe(sources=("sampled",), seed=1))) != one


def test_small_catalogue_gives_all_it_has(spark):
    found = collected(
        sample_pairs(tables_of(spark, num_products=8, judged=JUDGED), SamplePairsRecipe(sources=("sampled",)))
    )
    assert [row[2] for row in found if row[:2] == ("d", "train")] == ["p006", "p007"]
    assert [row[2] for row in found if row[:2] == ("e", "train")] == ["p005", "p006", "p007"]


def test_other_sources_take_train_pairs_without_consensus(spark):
    marks = [("d", "train", "p000"), ("d", "train", "p050"), ("d", "train", "p050"), ("d", "test", "p051")]
    shown = [("d", "train", f"p{number:03}", number) for number in (1, 20, 21, 22)] + [("d", "train", "p030", 0)]
    shown += [("d", "test", "p040", 9)]
    mined = [("d", "train", "p055", 1), ("d", "train", "p055", 2), ("d", "train", "p001", 1), ("d", "test", "p055", 1)]
    tables = tables_of(spark, judged=JUDGED, marks=marks, engagement=shown, mined=mined)
    recipe = SamplePairsRecipe(sources=("annotated", "engagement", "mined"), max_engagement_per_query=2)
    assert collected(sample_pairs(tables, recipe)) == [
        ("d", "train", "p021", "engagement"),
        ("d", "train", "p022", "engagement"),
        ("d", "train", "p050", "annotated"),
        ("d", "train", "p055", "mined"),
    ]


@pytest.mark.parametrize("share", [0.0, 0.65, 0.9])
def test_share_without_slack_is_met_by_the_fewest_products(spark, share):
    recipe = SamplePairsRecipe(sources=("sampled",), irrelevant_share=share, slack=0.0)
    found = [row for row in collected(sample_pairs(tables_of(spark, judged=JUDGED), recipe)) if row[0] == "e"]
    positives, sampled = 5, len(found)
    assert sampled / (positives + sampled) >= share - 1e-12
    assert sampled == 0 or (sampled - 1) / (positives + sampled - 1) < share
