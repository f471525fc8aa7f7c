"""Graded pairs that a generative labeller's prompt shows: from what people agreed on, never from a test query."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Final

import pyarrow as pa
import yaml

from embeddings.guideline import Example, Guideline, ProductFields, labeller_product_text
from embeddings.text import TextRecipe

MAX_CHARS: Final = 160
"""Of query and product together: every token of the prompt is read at tuning for every pair."""


def choose_examples(pairs: pa.Table, per_grade: int, text: TextRecipe) -> tuple[Example, ...]:
    """Pairs of train queries on whose grade all raters agreed, each of another query, grades in turn: 2, 1, 0, 2, ...

    By hash of their texts, so that the same pairs are chosen whatever their order.

    Args:
        pairs: query, title and the other texts, split, grade, at_least_1, at_least_2, query_hash, product_hash.
        per_grade: wanted of each grade; fewer where there are no more.
        text: what is shown of a product.
    """
    rows = [row for row in pairs.to_pylist() if row["split"] == "train" and _is_agreed(row)]
    rows.sort(key=lambda row: hashlib.sha256(f"{row['query_hash']} {row['product_hash']}".encode()).hexdigest())
    chosen: dict[int, list[Example]] = {2: [], 1: [], 0: []}
    asked: set[str] = set()
    for row in rows:
        own = chosen[row["grade"]]
        product = labeller_product_text(ProductFields(*(row.get(name) for name in ProductFields._fields)), text)
        is_short = len(row["query"]) + len(product) <= MAX_CHARS
        if len(own) < per_grade and is_short and row["query_hash"] not in asked:
            own.append(Example(query=row["query"], product=product, grade=row["grade"]))
            asked.add(row["query_hash"])
    return tuple(own[place] for place in range(per_grade) for own in chosen.values() if place < len(own))


def with_examples(guideline: Guideline, examples: tuple[Example, ...]) -> str:
    """The guideline's YAML text with these examples."""
    # through JSON, since YAML has no name for tuples
    values = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(guideline, examples=examples))))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _is_agreed(row: dict[str, Any]) -> bool:
    return all(row[f"at_least_{bound}"] == float(row["grade"] >= bound) for bound in (1, 2))
