"""The raw layout: the files that every data source writes and the ingest job reads.

    catalog/*.jsonl.gz     product_id, title, description, brand, category ("A > B"),
                           attributes ("color: red; size: 9"), price
    queries/*.csv.gz       query_id, query, split (empty unless the source gives train / test)
    annotations/*.parquet  query_id, product_id, mark, scale, num_marks, annotator, grade, grade_value (optional: the
                           mark on the scale of grades, 0 to 2, where a mean lies between two), guideline (optional:
                           the version it was given under); one row per mark
    gold/*                 query_id, product_id, grade, source, note, guideline (the last three optional); pairs whose
                           grade is known, put among annotators' work; optional
    events/*.jsonl.gz      event_id, session_id, query_id, product_id, kind, position, event_time; optional
    rejected/*.jsonl       table, row (JSON), reason; rows of the source that cannot be used; optional

A folder becomes visible only when it is whole, and equal rows give equal bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ANNOTATION_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("product_id", pa.string()),
        ("mark", pa.string()),
        ("scale", pa.string()),
        ("num_marks", pa.int32()),
        ("annotator", pa.string()),
        ("grade", pa.int8()),
        ("grade_value", pa.float64()),
    ]
)
"""`num_marks` counts the raters whose mean the mark is; 1 where each rater has a row."""


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines as gzip; without a time stamp, so that equal lines give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=3, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        text.writelines(f"{line}\n" for line in lines)


def write_catalog(folder: Path, products: Iterable[Mapping[str, Any]]) -> None:
    """Writes the whole catalogue as one file."""
    lines = (json.dumps(product, ensure_ascii=False) for product in products)
    write_lines(folder / "catalog" / "part-00000.jsonl.gz", lines)


def write_queries(folder: Path, queries: Iterable[Sequence[str]]) -> None:
    """Writes rows of (query_id, query, split)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query_id", "query", "split"))
    writer.writerows(queries)
    write_lines(folder / "queries" / "part-00000.csv.gz", [text.getvalue().removesuffix("\n")])


def write_annotations(folder: Path, marks: pa.Table) -> None:
    """Writes one row per mark, cast to `ANNOTATION_SCHEMA`; the guideline's version too where the marks have one."""
    (folder / "annotations").mkdir(exist_ok=True)
    has_version = "guideline" in marks.column_names
    schema = ANNOTATION_SCHEMA.append(pa.field("guideline", pa.string())) if has_version else ANNOTATION_SCHEMA
    table = marks.select(schema.names).cast(schema)
    pq.write_table(table, folder / "annotations" / "part-00000.parquet")


def write_rejected(folder: Path, rejected: Sequence[Mapping[str, str]]) -> None:
    """Writes rows of table, row and reason; no file where nothing was rejected."""
    if rejected:
        (folder / "rejected").mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        (folder / "rejected" / "part-00000.jsonl").write_text(text, encoding="utf-8")
