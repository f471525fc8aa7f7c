"""A batch of the review queue as CSV, Parquet and Argilla records, with texts, evidence and guideline."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pyarrow import parquet

from conf.load import ConfigError, meaning, settings
from embeddings.guideline import load_guideline, render_markdown
from embeddings.review_records import GRADE_NAMES, argilla_record, evidence_in_words, guarded_cell
from jobs import job
from jobs.labelling import PAIR
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import CATALOG_PRODUCT, QUERY, REVIEW_QUEUE, REVIEW_ROUTE, ROUTES, TableSpec
from lake.storage import replace_text

log = logging.getLogger(__name__)

Format = Literal["csv", "parquet", "argilla"]
Route = Literal["kept", "changed", "to_expert"]
TO_EXPERT = ROUTES[-1]
PRODUCT_TEXTS = ("title", "brand", "category", "description")
EXPORTED = (
    *("batch", "rank", "dataset", "query_id", "product_id", "query", *PRODUCT_TEXTS),
    *("human_grade", "human_grade_name", "kind", "evidence", "guideline"),
)
BLANKS = ("verdict", "expert", "decided_at", "note")
"""Columns that experts fill in."""


@settings
class Inputs:
    """The queue and the texts of its pairs."""

    review_queue: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    review_route: job.TableVersion = job.IF_THERE


@settings
class ExportRecipe:
    """What is exported."""

    batch: Annotated[str, meaning("batch of the queue; empty: the newest")] = ""
    routes: Annotated[
        tuple[Route, ...],
        meaning("only pairs that review_conflicts sent there, as to_expert; none: all"),
    ] = ()
    guideline: Annotated[str, meaning("version of the guideline to decide under, or its YAML file")] = "v1"
    formats: Annotated[tuple[Format, ...], meaning("files that are written", min_length=1)] = (
        "csv",
        "parquet",
        "argilla",
    )


@settings
class Config:
    """Settings of export_review."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    out: Annotated[str, meaning("folder to write to; empty: reviews/BATCH in the lake")] = ""
    inputs: Inputs = Inputs()
    recipe: ExportRecipe = ExportRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """Files review.csv, review.parquet and argilla.jsonl in the order of the queue, and guideline.md.

    Raises:
        ConfigError: there is no such batch, or routes are asked for that it does not have.
    """
    current = job.begin(config, "export_review")
    guideline = load_guideline(config.recipe.guideline)
    batch, queue = read_batch(current, config.recipe.batch)
    routes = read_routes(current, batch)
    if config.recipe.routes and not routes:
        raise ConfigError(f"recipe.routes: batch {batch} has no routes; run review_conflicts first, or leave it out")
    queue = [row for row in queue if not config.recipe.routes or _route(row, routes) in config.recipe.routes]
    rows = with_texts(current, queue, guideline.version)
    if missing := len(queue) - len(rows):
        log.warning("export_review: %d pairs left out: their query or product is not in the lake any more", missing)
    folder = Path(config.out or current.lake.path("reviews", batch)).resolve()
    replace_text(folder / "guideline.md", render_markdown(guideline))
    for name in config.recipe.formats:
        write_rows(rows, folder, name)
    outputs = {"review": current.lake.relative(str(folder)) if not config.out else str(folder)}
    return current.finish(rows=len(rows), outputs=outputs, counts={"queued": len(queue), "without_text": missing})


def read_batch(current: Run, batch: str) -> tuple[str, list[dict[str, Any]]]:
    """The name and the rows of a batch in their order; of the newest for an empty name.

    Raises:
        ConfigError: there is no such batch.
    """
    version = int(current.inputs[REVIEW_QUEUE.name])
    known = tables.rows(current.lake, REVIEW_QUEUE, version=version, columns=["batch", "created_at"])
    by_age = known.group_by("batch").aggregate([("created_at", "max")]).sort_by("created_at_max")
    names = by_age["batch"].to_pylist()
    if not names or batch not in ("", *names):
        raise ConfigError(
            f"recipe.batch={batch!r}: the queue holds {', '.join(names) or 'no batch'}; run build_review, or name one"
        )
    wanted = batch or names[-1]
    rows = tables.rows(current.lake, REVIEW_QUEUE, version=version, where=[("batch", "=", wanted)])
    return wanted, rows.sort_by("rank").to_pylist()


def read_routes(current: Run, batch: str) -> dict[tuple[str, ...], str]:
    """Route of the batch's pairs, by pair; empty where labellers were not asked."""
    if REVIEW_ROUTE.name not in current.inputs:
        return {}
    version = int(current.inputs[REVIEW_ROUTE.name])
    rows = tables.rows(current.lake, REVIEW_ROUTE, version=version, where=[("batch", "=", batch)]).to_pylist()
    return {_pair(row): row["route"] for row in rows}


def _pair(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in PAIR)


def _route(row: Mapping[str, Any], routes: Mapping[tuple[str, ...], str]) -> str:
    """Pairs that no labeller could be asked of go to experts."""
    return routes.get(_pair(row), TO_EXPERT)


def with_texts(current: Run, queue: Sequence[dict[str, Any]], guideline: str) -> list[dict[str, Any]]:
    """The pairs with what experts read; those whose query or product is gone are left out."""
    queries = _texts(current, QUERY, "query_id", ("text",), queue)
    products = _texts(current, CATALOG_PRODUCT, "product_id", PRODUCT_TEXTS, queue)
    rows = []
    for row in queue:
        query = queries.get((row["dataset"], row["query_id"]))
        product = products.get((row["dataset"], row["product_id"]))
        if query is not None and product is not None:
            told = {"query": query["text"], "human_grade": row["grade"], "human_grade_name": GRADE_NAMES[row["grade"]]}
            told |= {"evidence": evidence_in_words(row), "guideline": guideline}
            rows.append(row | {name: product[name] for name in PRODUCT_TEXTS} | told)
    return rows


def _texts(
    current: Run, spec: TableSpec, key: str, names: Sequence[str], queue: Sequence[dict[str, Any]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the queue's queries or products alone, so that the catalogue is never in memory."""
    ids = sorted({row[key] for row in queue})
    if not ids:
        return {}
    version, columns = int(current.inputs[spec.name]), ["dataset", key, *names]
    found = tables.rows(current.lake, spec, version=version, columns=columns, where=[(key, "in", ids)])
    return {(row["dataset"], row[key]): row for row in found.to_pylist()}


def write_rows(rows: Sequence[dict[str, Any]], folder: Path, kind: Format) -> None:
    """Writes a file of the export; it appears whole or not at all."""
    if kind == "argilla":
        lines = (json.dumps(argilla_record(row), ensure_ascii=False) for row in rows)
        replace_text(folder / "argilla.jsonl", "".join(f"{line}\n" for line in lines))
    elif kind == "csv":
        replace_text(folder / "review.csv", csv_text(rows))
    else:
        kinds = {"rank": pa.int32(), "human_grade": pa.int8()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in (*EXPORTED, *BLANKS)])
        table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)
        fresh = folder / f".review.parquet.{os.getpid()}"
        parquet.write_table(table, fresh)
        fresh.replace(folder / "review.parquet")


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with blanks to fill in; texts that a spreadsheet would run are guarded.

    It begins with a byte order mark, without which spreadsheets take UTF-8 for another encoding.
    """
    stream = io.StringIO(newline="")
    lines = csv.writer(stream)
    lines.writerow((*EXPORTED, *BLANKS))
    for row in rows:
        cells = (row[name] for name in EXPORTED)
        lines.writerow(
            [*(guarded_cell(cell) if isinstance(cell, str) else cell for cell in cells), *[""] * len(BLANKS)]
        )
    return f"\ufeff{stream.getvalue()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("export_review", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
