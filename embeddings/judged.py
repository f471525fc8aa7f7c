"""A judged data set as columns of text: grades from marks, the checks, and the way into the raw layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embeddings import raw_files
from embeddings.tabular import Source, as_id
from lake.storage import atomic_folder

PRODUCT_COLUMNS = ("product_id", "title", "description", "brand", "category", "attributes", "price")

Mark = int | float | str
GradeCuts = Mapping[int, Sequence[Mark]] | Mapping[int, float]
"""Marks of each grade, or the inclusive upper bounds of grades 0 and 1; what is above is 2."""


@dataclass
class JudgedData:
    """A data set on its way into the raw layout, as columns of text.

    Attributes:
        products: `PRODUCT_COLUMNS`.
        queries: query_id, query, split (null where not given); rows may repeat.
        marks: query_id, product_id, mark, annotator and, where the source tells it, guideline.
        rejected: rows of table, row and reason.
    """

    products: pa.Table
    queries: pa.Table
    marks: pa.Table
    rejected: list[dict[str, str]] = field(default_factory=list)

    def keep(self, name: str, is_usable: pa.ChunkedArray, reason: str) -> None:
        """Rejects the rows of a table that are not usable; null is not usable."""
        table = getattr(self, name)
        is_usable = pc.fill_null(is_usable, False)
        for row in table.filter(pc.invert(is_usable)).to_pylist():
            self.rejected.append({"table": name, "row": json.dumps(row, ensure_ascii=False), "reason": reason})
        setattr(self, name, table.filter(is_usable))


def check_cuts(cuts: GradeCuts) -> None:
    """Raises a ValueError unless every mark has at most one grade and every grade is told."""
    listed = any(isinstance(bound, list) for bound in cuts.values())
    expected = {0, 1, 2} if listed else {0, 1}
    if set(cuts) != expected:
        raise ValueError(
            f"grade_cuts: expected the grades {sorted(expected)}, got {sorted(cuts)}; "
            "list the marks of 0, 1 and 2, or give the upper bounds of 0 and 1"
        )
    if listed:
        bounds: list[Any] = list(cuts.values())
        marks = [_mark_key(mark) for bound in bounds for mark in bound]
        if repeated := sorted({str(mark) for mark in marks if marks.count(mark) > 1}):
            raise ValueError(f"grade_cuts: marks with two grades: {', '.join(repeated)}; give each mark one grade")
    elif not cuts[0] < cuts[1]:  # type: ignore[operator]
        raise ValueError(f"grade_cuts: expected the bound of 0 below that of 1, got {cuts[0]} and {cuts[1]}")


def grade_of_mark(mark: str, cuts: GradeCuts) -> int | None:
    """The grade that a mark stands for, None where the cuts do not say: "4", "4.0" and 4 are one mark."""
    key = _mark_key(mark)
    for grade in sorted(cuts):
        bound = cuts[grade]
        if isinstance(bound, int | float):
            if isinstance(key, float) and key <= bound:
                return grade
        elif key in [_mark_key(listed) for listed in bound]:
            return grade
    bounded = any(isinstance(bound, int | float) for bound in cuts.values())
    return 2 if bounded and isinstance(key, float) else None


def grade_value_of_mark(mark: str, cuts: GradeCuts) -> float | None:
    """The mark on the scale of grades, in [0, 2]; None where it has no grade.

    Listed marks stand for their grade. Between upper bounds the scale is linear: the bound of grade 0 is 0.5, that of
    grade 1 is 1.5, so that a mean of several raters keeps how far they were apart.
    """
    grade = grade_of_mark(mark, cuts)
    low, high = cuts[0], cuts[1]
    if grade is None or not isinstance(low, int | float) or not isinstance(high, int | float):
        return grade
    return min(max(0.5 + (float(mark) - low) / (high - low), 0.0), 2.0)


def _mark_key(mark: Mark) -> float | str:
    try:
        value = float(mark)
    except ValueError:
        return str(mark).strip()
    return value if math.isfinite(value) else str(mark)


def text_key(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Query ids of a source that has none: "q" and a hash of the trimmed text."""
    keys = [None if value is None else _hash_text(value) for value in text.to_pylist()]
    return pa.chunked_array([pa.array(keys, pa.string())])


def _hash_text(text: str) -> str:
    return "q" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def query_table(query_id: pa.ChunkedArray, text: pa.ChunkedArray, split: pa.ChunkedArray | None) -> pa.Table:
    """The queries of a data set; one row per mention is enough."""
    split = pa.nulls(len(text), pa.string()) if split is None else split
    return pa.table({"query_id": query_id, "query": text, "split": split})


def mark_table(
    query_id: pa.ChunkedArray,
    product_id: pa.ChunkedArray,
    mark: pa.ChunkedArray,
    annotator: pa.ChunkedArray | None = None,
    guideline: pa.ChunkedArray | None = None,
) -> pa.Table:
    """The marks of a data set, one row each; no annotator or version of the guideline where the source names none."""
    annotator = pa.nulls(len(mark), pa.string()) if annotator is None else annotator
    marks = pa.table({"query_id": query_id, "product_id": product_id, "mark": mark, "annotator": annotator})
    return marks if guideline is None else marks.append_column("guideline", guideline)


def distinct_rows(table: pa.Table) -> pa.Table:
    """Each row once, in the order of its first occurrence."""
    numbered = table.append_column("_row", pa.array(range(len(table))))
    first = numbered.group_by(table.column_names).aggregate([("_row", "min")])
    return table.take(first["_row_min"].sort())


def write_judged(
    data: JudgedData, source: Source, raw_folder: Path, cuts: GradeCuts, *, scale: str, num_marks: int
) -> dict[str, int]:
    """Checks a data set and writes what can be used, and apart from it what cannot.

    Args:
        data: the data set; its tables are replaced by their usable rows.
        source: where it came from; lines that it could not parse count as rejected.
        raw_folder: replaced when everything is written.
        cuts: the grade of each mark.
        scale: name of the scale of the marks.
        num_marks: raters whose mean a mark is.

    Returns:
        Rows written: products, queries, marks; and rejected.
    """
    data.rejected += [{"table": file, "row": line, "reason": reason} for file, line, reason in source.broken]
    _check_products(data)
    queries = _check_queries(data)
    grade, value = _check_marks(data, [row[0] for row in queries], cuts)
    count = len(data.marks)
    marks = data.marks.append_column("grade", grade).append_column("grade_value", value)
    marks = marks.append_column("scale", pa.repeat(scale, count)).append_column(
        "num_marks", pa.repeat(num_marks, count)
    )
    with atomic_folder(str(raw_folder)) as folder:
        raw_files.write_catalog(folder, _catalog_rows(data.products))
        raw_files.write_queries(folder, queries)
        raw_files.write_annotations(folder, marks)
        raw_files.write_rejected(folder, data.rejected)
    return {
        "products": len(data.products),
        "queries": len(queries),
        "marks": count,
        "rejected": len(data.rejected),
    }


def _check_products(data: JudgedData) -> None:
    table = data.products
    for name, change in (("product_id", as_id), ("category", _normalise_path)):
        table = table.set_column(table.column_names.index(name), name, change(table[name]))
    data.products = distinct_rows(table)
    data.keep("products", pc.is_valid(data.products["product_id"]), "the product id is missing")
    data.keep("products", pc.is_valid(data.products["title"]), "the title is missing")
    data.keep("products", _is_first(data.products["product_id"]), "an earlier product has the same id")


def _check_queries(data: JudgedData) -> list[tuple[str, str, str]]:
    """Rows of (query_id, query, split), once each; test where any mention says so."""
    table = data.queries
    table = table.set_column(0, "query_id", as_id(table["query_id"]))
    table = table.set_column(2, "split", pc.utf8_lower(table["split"]))
    unknown = set(pc.unique(table["split"]).to_pylist()) - {"train", "test", None}
    if unknown:
        raise ValueError(
            f"split: expected train or test, got {', '.join(sorted(unknown))}; rename or empty those values"
        )
    # A line break inside a query would break the row of a CSV reader that goes by lines.
    data.queries = table.set_column(1, "query", pc.replace_substring_regex(table["query"], r"\s+", " "))
    data.keep("queries", pc.is_valid(data.queries["query"]), "the query text is missing")
    data.keep("queries", pc.is_valid(data.queries["query_id"]), "the query id is missing")
    test_ids = data.queries.filter(pc.equal(data.queries["split"], "test"))["query_id"]
    train_ids = data.queries.filter(pc.equal(data.queries["split"], "train"))["query_id"]
    data.queries = distinct_rows(data.queries.select(["query_id", "query"]))
    data.keep("queries", _is_first(data.queries["query_id"]), "an earlier query has the same id and another text")
    ids = data.queries["query_id"]
    is_test = pc.is_in(ids, value_set=test_ids.combine_chunks())
    is_train = pc.is_in(ids, value_set=train_ids.combine_chunks())
    split = pc.if_else(is_test, "test", pc.if_else(is_train, "train", ""))
    return list(zip(ids.to_pylist(), data.queries["query"].to_pylist(), split.to_pylist(), strict=True))


def _check_marks(data: JudgedData, query_ids: list[str], cuts: GradeCuts) -> tuple[pa.Array, pa.Array]:
    """Keeps the usable marks; returns their grades and grade values."""
    for place, name in ((0, "query_id"), (1, "product_id"), (2, "mark")):
        data.marks = data.marks.set_column(place, name, as_id(data.marks[name]) if name != "mark" else data.marks[name])
        data.keep("marks", pc.is_valid(data.marks[name]), f"the {name.replace('_', ' ')} is missing")
    known_queries = pa.array(query_ids, pa.string())
    known_products = data.products["product_id"].combine_chunks()
    data.keep("marks", pc.is_in(data.marks["query_id"], value_set=known_queries), "no such query")
    data.keep("marks", pc.is_in(data.marks["product_id"], value_set=known_products), "no such product")
    grade_of = {mark: grade_of_mark(mark, cuts) for mark in pc.unique(data.marks["mark"]).to_pylist()}
    outside = pa.array([mark for mark, grade in grade_of.items() if grade is None], pa.string())
    data.keep(
        "marks",
        pc.invert(pc.is_in(data.marks["mark"], value_set=outside)),
        "the mark is in none of the grade cuts",
    )
    # Without names, equal marks of a pair may come from several people: only named repetitions are rejected.
    key = pc.binary_join_element_wise(*(pc.fill_null(data.marks[name], "") for name in data.marks.column_names), "\x1f")
    is_first = pc.or_(_is_first(key), pc.is_null(data.marks["annotator"]))
    data.keep("marks", is_first, "the annotator gave this mark before")
    value_of = {mark: grade_value_of_mark(mark, cuts) for mark in grade_of}
    marks = data.marks["mark"].to_pylist()
    return pa.array([grade_of[mark] for mark in marks], pa.int8()), pa.array([value_of[mark] for mark in marks])


def _is_first(key: pa.ChunkedArray) -> pa.Array:
    """Whether no earlier row has the same key."""
    first = pa.table({"key": key, "row": pa.array(range(len(key)))}).group_by("key").aggregate([("row", "min")])
    return pc.is_in(pa.array(range(len(key)), pa.int64()), value_set=first["row_min"].combine_chunks())


def _normalise_path(category: pa.ChunkedArray) -> pa.ChunkedArray:
    """Levels joined by " > ": split at >, else at |, else at /: "TV / Video > Cables" has two levels."""
    path = category
    for sign in ("|", "/"):
        has_level = pc.match_substring(path, ">")
        path = pc.if_else(has_level, path, pc.replace_substring(path, sign, " > "))
    return pc.replace_substring_regex(pc.replace_substring_regex(path, r"^[\s>]+|[\s>]+$", ""), r"\s*>[\s>]*", " > ")


def _catalog_rows(products: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in products.select(list(PRODUCT_COLUMNS)).to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            yield {**row, "price": _parse_price(row["price"])}


def _parse_price(text: str | None) -> float | None:
    """A price in the source's currency; null where it is not a finite number."""
    try:
        price = float((text or "").lstrip("$").replace(",", ""))
    except ValueError:
        return None
    return price if math.isfinite(price) else None
