"""Doubtful pairs from the queue to the experts and back, on real Spark and real Delta."""

from datetime import UTC, datetime

import pytest

from conf.load import load_job
from jobs import build_review
from lake import tables
from lake.schemas import AUDIT_CONFLICT, AUDIT_VERDICT, CATALOG_PRODUCT, ENGAGEMENT, QUERY, REVIEW_QUEUE
from tests.fakes import hash_of, put

JOBS = {"build_review": build_review}
DAY = {number: datetime(2026, 1, number, 3, tzinfo=UTC) for number in range(1, 10)}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setting", ["dev", "nightly"])
def test_every_setting_of_the_review_jobs_loads(job, setting):
    assert load_job(JOBS[job].Config, job, setting).recipe


def run(lake, job, *overrides):
    return JOBS[job].run(load_job(JOBS[job].Config, job, "dev", [f"lake={lake.root}", *overrides]))


@pytest.fixture
def doubtful(lake):
    """Three queries of falling traffic, twelve conflicts: four products each, whose people say 2."""
    put(
        lake,
        QUERY,
        [
            {"dataset": "s", "query_id": f"q{n}", "text": f"=query {n}", "normalised": f"query {n}"}
            | {"query_hash": hash_of(f"=query {n}"), "split": "train"}
            for n in range(3)
        ],
    )
    put(
        lake,
        CATALOG_PRODUCT,
        [
            {"dataset": "s", "product_id": f"p{n}", "title": f"title, {n}", "product_hash": f"hash {n}"}
            | {"category": "Garden > Tools" if n % 2 else None, "brand": "Åcme", "description": '-1 "deep"\nwell'}
            for n in range(4)
        ],
    )
    pairs = [{"dataset": "s", "query_id": f"q{q}", "product_id": f"p{p}"} for q in range(3) for p in range(4)]
    counts = {"clicks": 2, "carts": 1, "purchases": 1, "expected_clicks": 1.0, "corrected_rate": 1.5}
    put(lake, ENGAGEMENT, [pair | counts | {"impressions": (100, 50, 10)[int(pair["query_id"][1])]} for pair in pairs])
    counts = {"impressions": 20, "clicks": 2, "purchases": 1, "corrected_rate": 1.5}
    found = {"kind": "doubtful", "grade": 2, "posterior_0": 0.6, "posterior_1": 0.3, "posterior_2": 0.1}
    found |= {"wrong_probability": 0.9, "found_at": DAY[2]}
    put(lake, AUDIT_CONFLICT, [pair | counts | found | {"priority": 1 + n / 100} for n, pair in enumerate(pairs)])
    return lake


def queued(lake, **where):
    return tables.rows(lake, REVIEW_QUEUE).sort_by("rank").to_pylist()


@pytest.mark.usefixtures("spark")
def test_batches_follow_each_other_until_nothing_waits(doubtful):
    first = run(doubtful, "build_review", "recipe.budget=8")
    assert first.counts == {
        "waiting": 12,
        "strata": 6,
        "at_random": 2,
        "by_priority": 6,
        "strata_without_random": 4,
        "waiting_without_random": 8,
    }
    rows = queued(doubtful)
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert {row["batch"] for row in rows} == {first.run_id}
    assert {(row["query_id"], row["traffic"]) for row in rows} == {("q0", "head"), ("q1", "torso"), ("q2", "tail")}
    assert {(row["product_id"] in ("p1", "p3"), row["category"]) for row in rows} == {(True, "Garden"), (False, "")}
    assert all(row["wrong_probability"] == 0.9 and row["found_at"] == DAY[2] for row in rows)

    second = run(doubtful, "build_review", "recipe.budget=8")
    assert (second.counts["waiting"], second.rows) == (4, 4)
    assert run(doubtful, "build_review").rows == 0
    names = [(row["query_id"], row["product_id"]) for row in queued(doubtful)]
    assert len(set(names)) == len(names) == 12

    verdict = {"dataset": "s", "query_id": "q0", "product_id": "p0", "grade": 0, "expert": "eva", "decided_at": DAY[1]}
    put(doubtful, AUDIT_VERDICT, [verdict, verdict | {"product_id": "p1", "decided_at": DAY[3]}])
    again = run(doubtful, "build_review", f"recipe.abandoned=[{first.run_id},{second.run_id}]")
    # what came up after its verdict waits again
    assert again.rows == 11
