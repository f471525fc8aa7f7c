"""Judged queries with their catalogues, from the lake's tables or from a data set that a mapping describes."""

from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from conf.load import fingerprint, load, read_yaml
from embeddings.evaluation import JudgedQuery
from jobs import job
from jobs.embed_catalog import Catalog, read_catalogs
from lake import tables
from lake.runs import RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, QUERY
from lake.storage import Lake, LakeError

READ = ("query", "catalog_product", "annotation_consensus")
"""Tables that judged queries come from."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """The queries of one data set: those measured, and those on which grade bands are fitted."""

    catalog: Catalog
    measured: list[JudgedQuery]
    calibration: list[JudgedQuery]

    @property
    def texts(self) -> list[str]:
        """Texts of both, in that order."""
        return [query.text for query in (*self.measured, *self.calibration)]


def read_judged(lake: Lake, versions: Mapping[str, int], split: str) -> list[Judged]:
    """Judged queries by data set, in the order of their ids."""
    read = read_catalogs(lake, versions["catalog_product"], columns=["title"])
    catalogs = {catalog.dataset: catalog for catalog in read}
    known = {name: set(catalog.products["product_id"].to_pylist()) for name, catalog in catalogs.items()}
    grades: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    names = ["dataset", "query_id", "product_id", "grade"]
    consensus = tables.rows(lake, ANNOTATION_CONSENSUS, version=versions["annotation_consensus"], columns=names)
    for dataset, query_id, product_id, grade in zip(*(consensus[name].to_pylist() for name in names), strict=True):
        if product_id in known.get(dataset, ()):
            grades[dataset, query_id][product_id] = grade
    truth = {dataset: _truth(lake, dataset) for dataset in catalogs}
    found = {dataset: Judged(catalog, [], []) for dataset, catalog in catalogs.items()}
    queries = tables.rows(lake, QUERY, version=versions["query"], columns=["dataset", "query_id", "text", "split"])
    for row in queries.sort_by([("dataset", "ascending"), ("query_id", "ascending")]).to_pylist():
        key = (row["dataset"], row["query_id"])
        if key not in grades:
            continue
        query = JudgedQuery(row["query_id"], row["text"], grades[key], truth[row["dataset"]].get(row["query_id"]))
        if row["split"] == "test" or split == "all":
            found[row["dataset"]].measured.append(query)
        if row["split"] == "calibration":
            found[row["dataset"]].calibration.append(query)
    kept = [own for own in found.values() if own.measured]
    if not kept:
        raise LakeError(f"evaluate_retrieval: no judged query of split {split} in lake={lake.root}; judge some pairs")
    return kept


def _truth(lake: Lake, dataset: str) -> dict[str, dict[str, int]]:
    """True grades above 0 by query and product, where a simulation left them."""
    path = Path(lake.path("truth", dataset, "pair_grade.parquet"))
    found: dict[str, dict[str, int]] = defaultdict(dict)
    if path.is_file():
        rows = pq.read_table(path, columns=["query_id", "product_id", "grade"])
        for query_id, product_id, grade in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
            if grade > 0:
                found[query_id][product_id] = grade
    return found


def import_mapped(main: Lake, inputs: Mapping[str, str], pinned: Mapping[str, str]) -> tuple[Lake, dict[str, int]]:
    """A mapped data set in a lake of its own below this one, whose tables stay as they are.

    Args:
        main: the lake below which it goes, at evaluation/<dataset>-<content>.
        inputs: root and mapping.
        pinned: content hashes of the two.

    Returns:
        The lake and the versions of its tables.
    """
    from jobs.import_dataset import read_mapping

    name = read_mapping(inputs["mapping"]).dataset
    content = fingerprint(pinned["root"], pinned["mapping"])
    nested = Lake(main.path("evaluation", f"{name}-{content}"))
    imported = _run_once(nested, "import_dataset", dict(inputs), {"kind": "mapped"})
    ingested = _run_once(nested, "ingest", {"raw": list(imported.outputs.values())}, {})
    marks = {"human_annotation": ingested.outputs["human_annotation"]}
    consensus = _run_once(nested, "build_consensus", marks, {})
    outputs = {**ingested.outputs, **consensus.outputs}
    return nested, {name: int(outputs[name]) for name in READ}


def _run_once(lake: Lake, name: str, inputs: Mapping[str, Any], recipe: Mapping[str, Any]) -> RunRecord:
    """The record of a job in a lake, which runs only where that work is not done yet."""
    module = importlib.import_module(f"jobs.{name}")
    values = read_yaml(name, "dev") | {"lake": lake.root, "inputs": dict(inputs)}
    if recipe:
        values["recipe"] = dict(recipe)
    config = load(module.Config, values, source=f"conf/{name}/dev.yaml")
    return job.run_once(config, name, module.run)
