"""A seeded marketplace with known truth, written as the raw files that a shop's systems would deliver.

Shoppers' intents and products' properties give every pair a true grade. Annotators see it through errors,
and a share of the pairs is planted with a wrong consensus; sessions see it through a noisy ranker, position
bias, price and popularity. The truth goes to a folder of its own, which only evaluation reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embeddings import raw_files
from embeddings.marketplace_behavior import Pool, annotate, choose_annotated, query_id, session_lines
from embeddings.marketplace_recipe import MarketplaceRecipe
from embeddings.marketplace_world import (
    Products,
    Query,
    build_products,
    build_queries,
    draw,
    grade_catalog,
    product_id,
    product_rows,
)
from lake.storage import atomic_folder

__all__ = ["MarketplaceRecipe", "write_marketplace"]

_TRUTH_SCHEMA = pa.schema([("query_id", pa.string()), ("product_id", pa.string()), ("grade", pa.int8())])


def write_marketplace(
    recipe: MarketplaceRecipe, raw_folder: Path, truth_folder: Path, *, products_per_file: int = 50_000
) -> dict[str, int]:
    """Writes the raw files and, apart from them, the truth; both folders are replaced when they are whole.

    The truth is pair_grade.parquet (every pair with a true grade above 0; what is absent is 0) and
    planted_error.parquet (query_id, product_id, true_grade, planted_grade).

    Args:
        recipe: what the marketplace is like.
        raw_folder: gets the raw layout.
        truth_folder: gets the truth; keep it out of the lake's reach.
        products_per_file: lines of a catalogue file; bears on memory only, not on content.

    Returns:
        Number of rows written, by table and kind.

    Raises:
        ValueError: fewer annotators than marks per pair, kinds for some of them only, or more queries than the
            catalogue can word.
    """
    if len(recipe.annotator_error_rates) < recipe.marks_per_pair:
        raise ValueError(
            f"annotator_error_rates: expected at least marks_per_pair={recipe.marks_per_pair} annotators, "
            f"got {len(recipe.annotator_error_rates)}; add rates or lower marks_per_pair"
        )
    if recipe.annotator_kinds and len(recipe.annotator_kinds) != len(recipe.annotator_error_rates):
        raise ValueError(
            f"annotator_kinds: expected one for each of the {len(recipe.annotator_error_rates)} "
            f"annotator_error_rates, got {len(recipe.annotator_kinds)}; give as many, or none"
        )
    products = build_products(recipe.num_products, recipe.seed, recipe.near_duplicate_share)
    queries = build_queries(products, recipe.num_queries, recipe.seed, recipe.misspelled_query_share)
    counts: Counter[str] = Counter(products=recipe.num_products, queries=len(queries))
    with atomic_folder(str(truth_folder)) as truth, atomic_folder(str(raw_folder)) as raw:
        counts["broken_rows"] = _write_catalog(raw, recipe, products, products_per_file)
        raw_files.write_queries(raw, ((query_id(row), query.text, "") for row, query in enumerate(queries)))
        pools, counts["true_pairs"] = _write_truth(truth, recipe, products, queries)
        marks, planted = annotate(recipe, pools)
        raw_files.write_annotations(raw, marks)
        pq.write_table(planted, truth / "planted_error.parquet")
        counts.update(
            annotated_pairs=sum(pool.num_annotated for pool in pools),
            marks=len(marks),
            planted_errors=len(planted),
        )
        if recipe.num_sessions:
            lines = session_lines(recipe, products, pools, counts)
            raw_files.write_lines(raw / "events" / "part-00000.jsonl.gz", lines)
    return dict(counts)


def _write_catalog(raw: Path, recipe: MarketplaceRecipe, products: Products, products_per_file: int) -> int:
    num_broken = 0

    def lines(row_R: NDArray[Any]) -> Iterator[str]:
        nonlocal num_broken
        broken_RK = draw(recipe.seed, "broken", row_R, 2)
        rows = product_rows(products, row_R, recipe.seed, recipe.incomplete_share)
        for product, (chance, kind) in zip(rows, broken_RK, strict=True):
            line = json.dumps(product, ensure_ascii=False)
            yield line
            if chance < recipe.broken_row_share:
                num_broken += 1
                unnamed = {**product, "product_id": None}
                untitled = {**product, "product_id": f"X{product['product_id']}", "title": None}
                yield (line[: len(line) // 2], json.dumps(unnamed), json.dumps(untitled))[int(kind * 3)]

    for part, start in enumerate(range(0, recipe.num_products, products_per_file)):
        row_R = np.arange(start, min(start + products_per_file, recipe.num_products))
        raw_files.write_lines(raw / "catalog" / f"part-{part:05d}.jsonl.gz", lines(row_R))
    return num_broken


def _write_truth(
    truth: Path, recipe: MarketplaceRecipe, products: Products, queries: list[Query]
) -> tuple[list[Pool], int]:
    """Grades the catalogue per query, writes what is above 0, and keeps each query's pool of products."""
    pools, num_true = [], 0
    with pq.ParquetWriter(truth / "pair_grade.parquet", _TRUTH_SCHEMA) as writer:
        for row, query in enumerate(queries):
            row_n, grade_n = grade_catalog(query.intent, products)
            is_true_n = grade_n > 0
            ids = pa.array([product_id(product) for product in row_n[is_true_n].tolist()], pa.string())
            columns = [pa.repeat(query_id(row), len(ids)), ids, pa.array(grade_n[is_true_n])]
            writer.write_table(pa.table(columns, schema=_TRUTH_SCHEMA))
            num_true += len(ids)
            pools.append(choose_annotated(recipe, products, (row, query), (row_n, grade_n)))
    return pools, num_true
