"""The Spark jobs through a Spark Connect server: the second engine, with the same code."""

import json
import subprocess
import sys

import pytest

from lake import tables
from lake.schemas import ANNOTATION_CONSENSUS, CATALOG_PRODUCT, ENGAGEMENT
from lake.storage import Lake


def assay(*words):
    """The record of a job run by the command line in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_engines_write_the_same_tables(tmp_path, connect_url):
    """About 3 minutes."""
    small = ["recipe.num_products=100", "recipe.num_queries=20", "recipe.num_sessions=100"]
    remote = ["placement.spark.engine=connect", f"placement.spark.connect_url={connect_url}"]
    lakes = {"local": [], "connect": remote}
    for name, placement in lakes.items():
        root = f"lake={tmp_path}/{name}"
        assay("simulate", "dev", root, *small)
        for job in ("ingest", "ingest_events", "build_consensus", "build_engagement"):
            assay(job, "dev", root, *placement)
    for spec in (CATALOG_PRODUCT, ANNOTATION_CONSENSUS, ENGAGEMENT):
        local, connect = (
            tables.rows(Lake(f"{tmp_path}/{name}"), spec).sort_by([(key, "ascending") for key in spec.key])
            for name in lakes
        )
        assert local.num_rows > 0
        assert local.equals(connect)
