import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

import ray_apps.label
from embeddings.candidates import CandidateRecipe
from embeddings.encoder import build_encoder, save_encoder
from embeddings.recipes import EncoderRecipe
from embeddings.text import TextRecipe
from jobs import cost, label_catalog, label_pairs, record_human_grades
from jobs.cost import CostPlan
from jobs.embed_catalog import EmbedPlacement
from jobs.label_catalog import Budget, CatalogRecipe, Placement
from lake import tables
from lake.schemas import CANDIDATE_PAIR, CATALOG_CANDIDATE, CATALOG_PRODUCT, ENGAGEMENT, PAIR_GRADE, QUERY
from ray_apps.cluster import RayPlacement
from ray_apps.placements import LabelPlacement
from tests.fakes import hash_of, put
from tests.tiny_models import tiny_bert_folder

pytestmark = pytest.mark.usefixtures("ray_cluster")
LABEL = LabelPlacement(engine="torch", part_rows=10, price_per_hour=2.0)
EMBED = EmbedPlacement(ray=RayPlacement(address="local", num_cpus=2), threads_per_worker=1)
PLACEMENT = Placement(embed=EMBED, label=LABEL)
FEW = CandidateRecipe(lexical_per_product=2, embedding_per_product=2, products_per_new_query=2)


@pytest.fixture
def encoder(tmp_path):
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    save_encoder(model, str(tmp_path / "encoder"), {"text": TextRecipe(), "stage": 1, "fingerprint": "x"})
    return str(tmp_path / "encoder")


@pytest.fixture
def seen(shop):
    """The shop with what its shoppers did: p9 was shown most under q11."""
    plain = {"clicks": 0, "carts": 0, "purchases": 0, "expected_clicks": 1.0, "corrected_rate": 1.0, "dataset": "s"}
    shown = [("q11", "p9", 90), ("q10", "p9", 5), ("q0", "p2", 40), ("gone", "p2", 3), ("q0", "p3", 0)]
    put(shop, ENGAGEMENT, [plain | {"query_id": q, "product_id": p, "impressions": n} for q, p, n in shown])
    return shop


def config_of(lake, labeller, encoder, recipe=None, placement=PLACEMENT):
    inputs = label_catalog.Inputs(labeller=labeller, model=encoder)
    recipe = recipe or CatalogRecipe(candidates=FEW)
    return label_catalog.Config(lake=lake.root, inputs=inputs, recipe=recipe, placement=placement)


def candidates(lake):
    return tables.rows(lake, CATALOG_CANDIDATE).to_pylist()


def test_a_night_grades_what_is_new_and_the_next_one_only_what_changed(seen, labeller, encoder):
    first = label_catalog.run(config_of(seen, labeller, encoder))
    rows = candidates(seen)
    assert first.counts["new_products"] == first.counts["products"] == 10
    assert first.counts["new_queries"] == first.counts["queries"] == 12
    assert first.counts["labelled"] == len(tables.rows(seen, PAIR_GRADE)) > 30
    assert first.counts["over_budget"] == 0
    found = {(row["query_id"], row["product_id"]): row for row in rows}
    assert "engagement" in found["q11", "p9"]["sources"]
    assert ("gone", "p2") not in found
    assert ("q0", "p3") not in found or "engagement" not in found["q0", "p3"]["sources"]
    assert {source for row in rows for source in row["sources"]} == {"engagement", "lexical", "embedding"}
    assert found["q11", "p9"]["demand"] == 91
    np.testing.assert_allclose([row["value"] for row in rows], [row["demand"] * row["relevance"] for row in rows])
    page = Path(seen.path(first.outputs["report"])).read_text()
    assert "Plan and what it took" in page
    assert "lexical" in page

    again = label_catalog.run(config_of(seen, labeller, encoder))
    assert (again.counts["asked"], again.counts["new_products"], again.counts["new_queries"]) == (0, 0, 0)
    assert again.counts["reused"] == again.counts["candidates"] == len(rows)
    assert [row | {"run_id": ""} for row in candidates(seen)] == [row | {"run_id": ""} for row in rows]

    put(seen, CATALOG_PRODUCT, [{"dataset": "s", "product_id": "new", "title": "red lamp z", "product_hash": "new"}])
    text = {"text": "green hat", "normalised": "green hat", "query_hash": hash_of("green hat"), "split": "train"}
    put(seen, QUERY, [{"dataset": "s", "query_id": "late"} | text])
    third = label_catalog.run(config_of(seen, labeller, encoder))
    assert (third.counts["new_products"], third.counts["new_queries"]) == (1, 1)
    fresh = [row for row in candidates(seen) if "new" in row["product_id"] or row["query_id"] == "late"]
    assert third.counts["asked"] == len(fresh) == len(candidates(seen)) - len(rows)


def test_a_changed_product_is_graded_again_and_its_row_names_none_of_the_old_text(seen, labeller, encoder):
    label_catalog.run(config_of(seen, labeller, encoder))
    products = tables.rows(seen, CATALOG_PRODUCT).to_pylist()
    for row in products:
        if row["product_id"] == "p5":
            row |= {"title": "black shoe y", "product_hash": "changed"}
    data = pa.Table.from_pylist(products, schema=CATALOG_PRODUCT.schema)
    write_deltalake(seen.table(CATALOG_PRODUCT.name), data, mode="overwrite")

    record = label_catalog.run(config_of(seen, labeller, encoder))

    assert record.counts["new_products"] == 1
    graded = tables.rows(seen, PAIR_GRADE, where=[("run_id", "=", record.run_id)])
    assert set(graded["product_id"].to_pylist()) == {"p5"}
    assert set(graded["product_hash"].to_pylist()) == {"changed"}


def test_pairs_that_people_have_graded_are_not_asked(seen, labeller, encoder):
    record_human_grades.run(record_human_grades.Config(lake=seen.root))
    record = label_catalog.run(config_of(seen, labeller, encoder))
    assert record.counts["graded_by_people"] > 0
    assert record.counts["graded_by_people"] + record.counts["asked"] <= record.counts["candidates"]
    rows = tables.rows(seen, PAIR_GRADE).to_pylist()
    texts = [(row["query_hash"], row["product_hash"]) for row in rows]
    assert len(set(texts)) == len(texts)


def test_a_budget_takes_the_most_valuable_pairs_and_the_rest_waits_for_the_next_night(seen, labeller, encoder):
    recipe = CatalogRecipe(candidates=FEW, budget=Budget(max_pairs=7))
    first = label_catalog.run(config_of(seen, labeller, encoder, recipe))
    assert first.counts["labelled"] == first.metrics["planned_pairs"] == 7
    value = {(row["query_id"], row["product_id"]): row["value"] for row in candidates(seen)}
    graded = {(row["query_id"], row["product_id"]) for row in tables.rows(seen, PAIR_GRADE).to_pylist()}
    assert ("q11", "p9") in graded
    # equal texts are graded once, so that one pair of p0 and p1 may stand for both
    least = min(value[pair] for pair in graded)
    assert sum(found > least for found in value.values()) <= 2 * 7

    second = label_catalog.run(config_of(seen, labeller, encoder, recipe))
    assert second.counts["labelled"] == 7
    assert second.counts["over_budget"] == first.counts["over_budget"] - 7


def test_the_plan_counts_what_the_run_then_asks_and_starts_no_engine(seen, labeller, encoder, monkeypatch):
    config = config_of(seen, labeller, encoder)
    planned = label_catalog.plan(config)
    assert not tables.exists(seen, PAIR_GRADE)
    assert planned.measured_by == cost.SAMPLE
    assert planned.cost > 0
    assert planned.cost == pytest.approx(2.0 * planned.engine_hours)

    record = label_catalog.run(config)
    assert record.counts["asked"] == planned.pairs
    assert record.metrics["tokens_per_pair"] == pytest.approx(planned.tokens_per_pair)
    assert record.metrics["planned_tokens"] == planned.tokens

    def never(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(ray_apps.label, "label_pairs", never)
    assert label_catalog.plan(config).pairs == 0
    assert label_catalog.plan(config).render().startswith("nothing to grade")


def test_a_plan_takes_the_rate_of_the_last_run_with_this_labeller(shop, labeller, monkeypatch):
    monkeypatch.setattr(cost, "LEAST_ASKED", 10)
    inputs = label_pairs.Inputs(labeller=labeller)
    few = label_pairs.Config(
        lake=shop.root, inputs=inputs, recipe=label_pairs.LabelRecipe(sources=("sampled",)), placement=LABEL
    )
    record = label_pairs.run(few)
    put(shop, CATALOG_PRODUCT, [{"dataset": "s", "product_id": "new", "title": "lamp", "product_hash": "new"}])
    put(shop, CANDIDATE_PAIR, [{"dataset": "s", "query_id": "q1", "product_id": "new", "source": "sampled"}])

    planned = label_pairs.plan(few)
    assert planned.pairs == 1
    assert planned.measured_by == f"run {record.run_id}"
    assert planned.tokens_per_sec == pytest.approx(record.metrics["tokens_per_sec"])
    twice = dataclasses.replace(few, placement=dataclasses.replace(LABEL, num_engines=2))
    assert label_pairs.plan(twice).tokens_per_sec == pytest.approx(2 * record.metrics["tokens_per_sec"])


def test_the_tightest_budget_counts():
    plan = CostPlan(
        pairs=1000,
        tokens=50_000,
        tokens_per_pair=50.0,
        tokens_per_sec=100.0,
        start_sec=60.0,
        engine_hours=0.16,
        cost=0.3,
        currency="USD",
        measured_by="run r",
        on_gpu=False,
    )

    def allowed(**budget):
        return cost.affordable(plan, LABEL, **({"max_pairs": 0, "max_hours": 0.0, "max_cost": 0.0} | budget))

    assert allowed() == 1000
    assert allowed(max_pairs=300) == 300
    assert allowed(max_hours=160 / 3600) == 200
    assert allowed(max_hours=160 / 3600, max_cost=2.0 * 110 / 3600) == 100
    assert allowed(max_hours=1 / 3600) == 0
    assert "GPU-hours" in dataclasses.replace(plan, on_gpu=True).render()
