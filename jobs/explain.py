"""`assay explain QUERY PRODUCT`: everything the lake knows of a pair."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lake import tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    AUDIT_VERDICT,
    CATALOG_CANDIDATE,
    CATALOG_PRODUCT,
    ENGAGEMENT,
    GOLD_QUESTION,
    HUMAN_ANNOTATION,
    MINED_PAIR,
    PAIR_GRADE,
    QUERY,
    REVIEW_GRADE,
    REVIEW_QUEUE,
    REVIEW_ROUTE,
    TableSpec,
)
from lake.storage import Lake, LakeError

BY_ID = (
    *(HUMAN_ANNOTATION, GOLD_QUESTION, ANNOTATION_CONSENSUS, ENGAGEMENT, AUDIT_CONFLICT),
    *(REVIEW_QUEUE, REVIEW_GRADE, REVIEW_ROUTE, AUDIT_VERDICT, MINED_PAIR),
)


def explain(lake: Lake, query: str, product: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of every table about a pair, table -> rows; the ledger's by the texts' hashes, oldest first.

    Args:
        query: a query's id or text.
        product: a product's id or title.

    Raises:
        LakeError: the lake holds no such query or product.
    """
    queries = _find(lake, QUERY, query, ("query_id", "text"))
    products = _find(lake, CATALOG_PRODUCT, product, ("product_id", "title"))
    facts = {QUERY.name: queries, CATALOG_PRODUCT.name: products}
    datasets = [row["dataset"] for row in queries]
    ids = {
        "dataset": datasets,
        "query_id": [row["query_id"] for row in queries],
        "product_id": [row["product_id"] for row in products],
    }
    for spec in BY_ID:
        facts[spec.name] = _rows(lake, spec, ids)
    hashes = {
        "query_hash": [row["query_hash"] for row in queries],
        "product_hash": [row["product_hash"] for row in products],
    }
    facts[CATALOG_CANDIDATE.name] = _rows(lake, CATALOG_CANDIDATE, ids)
    history = sorted(_rows(lake, PAIR_GRADE, hashes), key=lambda row: (row["created_at"], row["address"]))
    superseded = {row["supersedes"] for row in history}
    facts[PAIR_GRADE.name] = [row | {"is_newest": row["address"] not in superseded} for row in history]
    return facts


def render(facts: dict[str, list[dict[str, Any]]]) -> str:
    """The facts as text, one block per table that has any."""
    blocks = []
    for name, found in facts.items():
        lines = ["  " + ", ".join(f"{key}={value}" for key, value in row.items() if value is not None) for row in found]
        blocks.append("\n".join([name, *(lines or ["  nothing"])]))
    return "\n".join(blocks)


def _find(lake: Lake, spec: TableSpec, wanted: str, columns: tuple[str, str]) -> list[dict[str, Any]]:
    for column in columns:
        found: list[dict[str, Any]] = tables.rows(lake, spec, where=[(column, "=", wanted)]).to_pylist()
        if found:
            return found
    raise LakeError(f"{spec.name}: no row whose {columns[0]} or {columns[1]} is {wanted!r} in lake={lake.root}")


def _rows(lake: Lake, spec: TableSpec, among: dict[str, list[str]]) -> list[dict[str, Any]]:
    if not tables.exists(lake, spec):
        return []
    found = tables.rows(lake, spec, where=[(column, "in", values) for column, values in among.items()])
    for column, values in among.items():
        found = found.filter(pc.is_in(found.column(column), pa.array(values)))
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows
