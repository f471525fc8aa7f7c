"""The Spark jobs through a Spark Connect server: the second engine, with the same code."""

import json
import subprocess
import sys

import pytest

from lake import tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    ANNOTATOR_QUALITY,
    AUDIT_CONFLICT,
    CATALOG_PRODUCT,
    ENGAGEMENT,
    REVIEW_QUEUE,
    TABLE_QUALITY,
)
from lake.storage import Lake

JOBS = (
    "ingest",
    "ingest_events",
    "build_consensus",
    "build_engagement",
    "measure_annotators",
    "build_audit",
    "build_review",
)
TABLES = (
    CATALOG_PRODUCT,
    ANNOTATION_CONSENSUS,
    ENGAGEMENT,
    ANNOTATOR_QUALITY,
    AUDIT_CONFLICT,
    REVIEW_QUEUE,
    TABLE_QUALITY,
)
OF_THE_RUN = ("run_id", "batch", "created_at", "found_at", "standard")


def of_content(rows, spec):
    """A table's rows in the order of their keys, without what names the run or its time."""
    kept = rows.drop_columns([name for name in OF_THE_RUN if name in rows.column_names])
    return kept.sort_by([(key, "ascending") for key in spec.key if key not in OF_THE_RUN])


def assay(*words):
    """The record of a job run by the command line in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_both_engines_write_the_same_tables(tmp_path, connect_url):
    """About 6 minutes."""
    small = ["recipe.num_products=100", "recipe.num_queries=20", "recipe.num_sessions=100"]
    remote = ["placement.spark.engine=connect", f"placement.spark.connect_url={connect_url}"]
    lakes = {"local": [], "connect": remote}
    for name, placement in lakes.items():
        root = f"lake={tmp_path}/{name}"
        assay("simulate", "dev", root, *small)
        for job in JOBS:
            assay(job, "dev", root, *placement)
    for spec in TABLES:
        local, connect = (of_content(tables.rows(Lake(f"{tmp_path}/{name}"), spec), spec) for name in lakes)
        assert local.num_rows > 0, spec.name
        assert local.equals(connect), spec.name
