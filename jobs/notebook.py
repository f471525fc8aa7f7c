"""A lake as notebooks see it: where it lies, Spark, and the tables by name.

Settings come from the widgets of a Databricks notebook, elsewhere from the environment: ASSAY_LAKE, ASSAY_QUERY,
ASSAY_LABELLER, ASSAY_CONNECT_URL, as `notebooks/render.py` sets them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conf.load import validate
from jobs import build_audit, job
from lake import runs, tables
from lake.runs import RunRecord
from lake.schemas import QUERY, TABLES
from lake.spark import SparkPlacement
from lake.storage import Lake, LakeError
from spark_etl.recipes import AuditRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WRITTEN_BY = {
    "catalog_product": "ingest",
    "query": "ingest",
    "human_annotation": "ingest",
    "place_count": "ingest_events",
    "annotation_consensus": "build_consensus",
    "annotator_confusion": "build_consensus",
    "annotator_quality": "measure_annotators",
    "annotation_agreement": "measure_annotators",
    "click_model": "build_engagement",
    "click_model_round": "build_engagement",
    "engagement": "build_engagement",
    "audit_conflict": "build_audit",
    "audit_report": "audit_report",
}
"""The job that writes a table, for those that notebooks read."""
WITH = {"annotator_confusion": " recipe.method=dawid_skene"}
"""What that job must be told beside."""


class OpenLake:
    """A lake and the Spark session that reads it; the session starts with the first table."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self.lake = Lake(self.setting("lake", job.DEFAULT_LAKE))

    def setting(self, name: str, default: str = "") -> str:
        """A setting's text: of the widget, which is made where it is missing, or of the environment."""
        value = os.environ.get(f"ASSAY_{name.upper()}", "") or default
        if "dbutils" not in self._names:
            return value
        widgets = self._names["dbutils"].widgets
        widgets.text(name, value)
        return str(widgets.get(name)).strip()

    @functools.cached_property
    def spark(self) -> SparkSession:
        """The notebook's own session, else one of a Spark Connect server, else one of this process."""
        from lake import spark as lake_spark

        if "spark" in self._names:
            given: SparkSession = self._names["spark"]
            return given
        url = self.setting("connect_url")
        return lake_spark.session(SparkPlacement(engine="connect", connect_url=url) if url else SparkPlacement())

    def table(self, name: str) -> DataFrame:
        """The newest version of a table.

        Raises:
            LakeError: it is not there; the message names the job that writes it.
        """
        from lake import spark as lake_spark

        if not tables.exists(self.lake, TABLES[name]):
            raise LakeError(self._missing(name))
        return lake_spark.rows(self.spark, self.lake, TABLES[name])

    def table_if_there(self, name: str) -> DataFrame | None:
        """The newest version of a table; where it is not there, None, and a line that says what writes it."""
        if tables.exists(self.lake, TABLES[name]):
            return self.table(name)
        print(self._missing(name))
        return None

    def _missing(self, name: str) -> str:
        command = f"assay run {WRITTEN_BY[name]} dev lake={self.lake.root}{WITH.get(name, '')}"
        return f"{name}: no such table in lake={self.lake.root}; {WRITTEN_BY[name]} writes it: {command}"

    def find_query(self, wanted: str) -> DataFrame:
        """The rows of query with this id or text, one per data set at most; empty: that of the first conflict.

        Raises:
            LakeError: there is none.
        """
        from pyspark.sql import functions as sf

        queries = self.table(QUERY.name)
        if wanted:
            found = queries.where((sf.col("query_id") == wanted) | (sf.lower("text") == wanted.lower()))
        else:
            ids = ("dataset", "query_id")
            in_order = [sf.desc("priority"), "dataset", "query_id", "product_id"]
            first = self.table("audit_conflict").orderBy(*in_order).limit(1).select(*ids)
            found = queries.join(sf.broadcast(first), on=list(ids), how="left_semi")
        if found.isEmpty():
            remedy = "give the id or the text of one" if wanted else "audit_conflict has no row: name a query"
            raise LakeError(f"query={wanted!r}: no such query in lake={self.lake.root}; {remedy}")
        return found

    @property
    def audit_recipe(self) -> AuditRecipe:
        """The recipe of the newest build_audit."""
        record = self._audit()
        return validate(AuditRecipe, json.loads(record.recipe), source=f"run {record.run_id}")

    def judged_pairs(self) -> DataFrame:
        """Every judged pair as the newest build_audit judged it, from the versions that it read.

        Where labeller_oof holds several labellers, the setting `labeller` names one by fingerprint.

        Raises:
            LakeError: build_audit has not run.
        """
        from lake import spark as lake_spark
        from spark_etl.audit import judge_pairs

        frames = lake_spark.pinned_rows(self.spark, self.lake, self._audit().inputs)
        recipe = self.audit_recipe
        return judge_pairs(build_audit.scored_pairs(frames, recipe, self.setting("labeller")).persist(), recipe)

    def _audit(self) -> RunRecord:
        record = runs.newest(self.lake, "build_audit")
        if record is None:
            raise LakeError(self._missing("audit_conflict"))
        return record


def open_lake(names: Mapping[str, Any]) -> OpenLake:
    """The lake that a notebook is about.

    Args:
        names: the notebook's globals(); `spark` and `dbutils` are taken from there where they are.

    Raises:
        LakeError: there is no such folder.
    """
    opened = OpenLake(names)
    if not os.path.isdir(opened.lake.path()):
        raise LakeError(
            f"lake={opened.lake.root}: no such folder; name a lake in the widget lake, or as ASSAY_LAKE=DIR"
        )
    return opened
