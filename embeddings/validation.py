"""The number that chooses the best checkpoint: NDCG of validation queries over all their judged products.

P products, Q queries, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sentence_transformers import SentenceTransformer

from embeddings.batches import Instance
from embeddings.encoder import encode
from embeddings.metrics import GAINS, ndcg


@dataclass(frozen=True)
class ValidationSet:
    """Queries of one data set with graded products, to be found among the judged products of all of them.

    Attributes:
        queries: texts.
        catalogue: distinct product texts, sorted, which decides ties.
        grades: per query, the grade of each judged row of the catalogue.
    """

    queries: list[str]
    catalogue: list[str]
    grades: list[dict[int, int]]


def build_validation(instances: Sequence[Instance]) -> list[ValidationSet]:
    """Validation queries that have a grade above 0, by data set: each shop's queries search its own products."""
    by_dataset: dict[str, list[Instance]] = {}
    for instance in instances:
        if (instance.grades > 0).any():
            by_dataset.setdefault(instance.key[0], []).append(instance)
    return [_one_set(by_dataset[dataset]) for dataset in sorted(by_dataset)]


def _one_set(judged: Sequence[Instance]) -> ValidationSet:
    catalogue = sorted({text for instance in judged for text in instance.products})
    row = {text: index for index, text in enumerate(catalogue)}
    grades = [
        {row[text]: grade for text, grade in zip(instance.products, instance.grades.tolist(), strict=True)}
        for instance in judged
    ]
    return ValidationSet([instance.query for instance in judged], catalogue, grades)


def validation_ndcg(
    model: SentenceTransformer, validation: Sequence[ValidationSet], *, k: int = 10, bf16: bool = False
) -> float:
    """Mean NDCG@k over all queries; products judged only under other queries count as grade 0."""
    values: list[float] = []
    for one in validation:
        query_QD = encode(model, one.queries, "query", bf16=bf16)
        document_PD = encode(model, one.catalogue, "document", bf16=bf16)
        for query_D, grades in zip(query_QD, one.grades, strict=True):
            top = np.argsort(-(document_PD @ query_D), kind="stable")[:k]
            gains = [GAINS[grades.get(int(row), 0)] for row in top]
            values.append(ndcg(gains, [GAINS[grade] for grade in grades.values()], k))
    return float(np.mean(values))
