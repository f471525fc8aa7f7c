"""Reads judged data into the raw layout: Amazon ESCI, Home Depot, and any files that a mapping describes.

No product, query or mark vanishes: what cannot be used is written to rejected/ with its reason. Products that nobody
judged are kept, since retrieval is measured over the full catalogue. Exact repeats of a product or query are one row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc

from conf.load import meaning, settings
from embeddings.judged import (
    PRODUCT_COLUMNS,
    JudgedData,
    Mark,
    check_cuts,
    distinct_rows,
    mark_table,
    query_table,
    text_key,
    write_judged,
)
from embeddings.tabular import Source, as_id

_ESCI_CUTS = {0: ["I"], 1: ["S", "C"], 2: ["E"]}
_HOME_DEPOT_CUTS = {0: 1.5, 1: math.nextafter(2.5, 0)}
_HOME_DEPOT_BRAND = ("brand", "mfg brand name")


@settings
class QueryColumns:
    """Where the queries are."""

    file: Annotated[str, meaning("file with the queries")]
    text: Annotated[str, meaning("column of the query as typed")]
    id: Annotated[str | None, meaning("column of the query id; without it the text is the key")] = None


@settings
class ProductColumns:
    """Where the products are."""

    file: Annotated[str, meaning("file with the products")]
    id: Annotated[str, meaning("column of the product id")]
    title: Annotated[str, meaning("column of the title")]
    description: Annotated[str | None, meaning("column of the description")] = None
    brand: Annotated[str | None, meaning("column of the brand")] = None
    category: Annotated[str | None, meaning("column of the category path, split by >, | or /")] = None


@settings
class JudgementColumns:
    """Where the judgements are, one row per mark."""

    file: Annotated[str, meaning("file with the judgements")]
    query: Annotated[str, meaning("column of the query id, or of the query's text where queries.id is left out")]
    product: Annotated[str, meaning("column of the product id")]
    mark: Annotated[str, meaning("column of the mark")]
    annotator: Annotated[str | None, meaning("column of who gave the mark")] = None
    guideline: Annotated[str | None, meaning("column of the guideline's version it was given under")] = None


@settings
class DatasetMapping:
    """Describes a judged data set by its files and columns."""

    dataset: Annotated[str, meaning("name of the data set", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    queries: QueryColumns
    products: ProductColumns
    judgements: JudgementColumns
    grade_cuts: Annotated[
        dict[int, list[Mark]] | dict[int, float],
        meaning("marks of each grade, or inclusive upper bounds of grades 0 and 1 (the rest is 2)"),
    ]
    split: Annotated[str | None, meaning("column with train / test, in the judgements or the queries file")] = None
    encoding: Annotated[str, meaning("encoding of the text files")] = "utf-8"

    def __post_init__(self) -> None:
        check_cuts(self.grade_cuts)


def import_esci(root: Path, raw_folder: Path, *, locales: Sequence[str] = ("us",)) -> dict[str, int]:
    """Reads the two files of Amazon's Shopping Queries; with several locales a product's id is `locale:id`.

    Raises:
        ValueError: a file or column is missing, or a file cannot be read.
    """
    source = Source(root)
    examples_file, products_file = (
        source.find(f"shopping_queries_dataset_{name}.parquet") or f"shopping_queries_dataset_{name}.parquet"
        for name in ("examples", "products")
    )
    examples = source.read(
        examples_file, ("query_id", "query", "product_id", "product_locale", "esci_label"), ("split",)
    )
    products = source.read(
        products_file,
        ("product_id", "product_locale", "product_title"),
        (
            "product_description",
            "product_bullet_point",
            "product_brand",
            "product_color",
            "product_category",
            "product_price",
        ),
    )
    wanted = pa.array(list(locales), pa.string())
    examples = examples.filter(pc.is_in(examples["product_locale"], value_set=wanted))
    products = products.filter(pc.is_in(products["product_locale"], value_set=wanted))

    def key(table: pa.Table) -> pa.ChunkedArray:
        if len(locales) == 1:
            return table["product_id"]
        return pc.binary_join_element_wise(table["product_locale"], table["product_id"], ":")

    color = pc.binary_join_element_wise("color", products["product_color"], ": ")
    columns = [
        key(products),
        products["product_title"],
        _join_text(products, "product_bullet_point", "product_description"),
    ]
    columns += [products["product_brand"], products["product_category"], color, products["product_price"]]
    judged = JudgedData(
        products=pa.table(columns, names=PRODUCT_COLUMNS),
        queries=examples.select(["query_id", "query", "split"]),
        marks=mark_table(examples["query_id"], key(examples), examples["esci_label"]),
    )
    return write_judged(judged, source, raw_folder, _ESCI_CUTS, scale="ESCI", num_marks=1)


def import_home_depot(root: Path, raw_folder: Path) -> dict[str, int]:
    """Reads Home Depot's train.csv and attributes.csv, and product_descriptions.csv where it is present.

    Raises:
        ValueError: a file or column is missing, or a file cannot be read.
    """
    source = Source(root, encoding="latin-1")
    train_file = source.find("train.csv") or "train.csv"
    train = source.read(train_file, ("product_uid", "product_title", "search_term", "relevance"))
    attributes_file = source.find("attributes.csv") or "attributes.csv"
    attributes = source.read(attributes_file, ("product_uid", "name", "value"))
    brand, facts, bullets = _gather_attributes(attributes)
    descriptions: dict[str, str] = {}
    if descriptions_file := source.find("product_descriptions.csv"):
        table = source.read(descriptions_file, ("product_uid", "product_description")).drop_null()
        descriptions = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))

    products = distinct_rows(train.select(["product_uid", "product_title"]))
    ids = products["product_uid"].to_pylist()
    texts = [" ".join((*bullets.get(key, ()), descriptions.get(key, ""))).strip() or None for key in ids]
    columns = [products["product_uid"], products["product_title"], pa.array(texts, pa.string())]
    columns += [pa.array([brand.get(key) for key in ids], pa.string()), pa.nulls(len(ids), pa.string())]
    columns += [pa.array(["; ".join(facts[key]) if key in facts else None for key in ids], pa.string())]
    query_id = text_key(train["search_term"])
    judged = JudgedData(
        products=pa.table([*columns, pa.nulls(len(ids), pa.string())], names=PRODUCT_COLUMNS),
        queries=query_table(query_id, train["search_term"], None),
        marks=mark_table(query_id, train["product_uid"], train["relevance"]),
    )
    return write_judged(judged, source, raw_folder, _HOME_DEPOT_CUTS, scale="mean of 3 raters, 1..3", num_marks=3)


def import_mapped(root: Path, mapping: DatasetMapping, raw_folder: Path) -> dict[str, int]:
    """Reads the files that a mapping describes; a query with test rows is a test query as a whole.

    Raises:
        ValueError: a file or column is missing, a file cannot be read, the cuts overlap or miss a grade, or a
            split is neither train nor test.
    """
    source = Source(root, mapping.encoding)
    product, query, judgement = mapping.products, mapping.queries, mapping.judgements
    optional = {"description": product.description, "brand": product.brand, "category": product.category}
    named = {"product_id": product.id, "title": product.title, **{k: v for k, v in optional.items() if v}}
    table = source.read(product.file, list(named.values()))
    nulls = pa.nulls(len(table), pa.string())
    products = pa.table({key: table[named[key]] if key in named else nulls for key in PRODUCT_COLUMNS})

    judgement_columns = [judgement.query, judgement.product, judgement.mark]
    judgement_columns += [name for name in (judgement.annotator, judgement.guideline) if name]
    query_columns = [query.id, query.text] if query.id else [query.text]
    split_file = None
    if mapping.split:
        split_file = query.file if source.has_column(query.file, mapping.split) else judgement.file
    with_split = [mapping.split] if mapping.split else []
    queries = source.read(query.file, query_columns + (with_split if split_file == query.file else []))
    marks = source.read(judgement.file, judgement_columns + (with_split if split_file == judgement.file else []))

    as_key = as_id if query.id else text_key
    query_id = as_key(queries[query.id or query.text])
    found = query_table(query_id, queries[query.text], queries[mapping.split] if split_file == query.file else None)
    judged_id = as_key(marks[judgement.query])
    if mapping.split and split_file != query.file:
        found = pa.concat_tables([found, _splits_of_marks(found, judged_id, marks[mapping.split])])
    told = [marks[name] if name else None for name in (judgement.annotator, judgement.guideline)]
    judged = JudgedData(products, found, mark_table(judged_id, marks[judgement.product], marks[judgement.mark], *told))
    return write_judged(judged, source, raw_folder, mapping.grade_cuts, scale=f"{mapping.dataset} marks", num_marks=1)


def _join_text(table: pa.Table, *columns: str) -> pa.ChunkedArray:
    """Columns joined by a line break, leaving nulls out; null where all are."""
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    joined = ("\n".join(filter(None, row)) or None for row in rows)
    return pa.chunked_array([pa.array(joined, pa.string())])


def _splits_of_marks(queries: pa.Table, query_id: pa.ChunkedArray, split: pa.ChunkedArray) -> pa.Table:
    """The known queries again, with the splits that their judgements name."""
    named = distinct_rows(pa.table({"query_id": query_id, "split": split}))
    known = distinct_rows(queries.select(["query_id", "query"]))
    return known.join(named, keys="query_id", join_type="inner").select(queries.column_names)


def _gather_attributes(
    attributes: pa.Table,
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    """Per product: its brand, its facts as `name: value`, and the texts of its bullet points."""
    brand: dict[str, str] = {}
    facts: defaultdict[str, list[str]] = defaultdict(list)
    bullets: defaultdict[str, list[str]] = defaultdict(list)
    rows = attributes.drop_null()
    for key, name, value in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        if name.lower() in _HOME_DEPOT_BRAND:
            brand.setdefault(key, value)
        elif name.lower().startswith("bullet"):
            bullets[key].append(value)
        else:
            facts[key].append(f"{name}: {value}")
    return brand, facts, bullets
