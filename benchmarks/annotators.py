"""Dawid-Skene beside the majority on planted annotators of different quality: wrong grades and steps off.

    python -m benchmarks.annotators [--quick]

The simulated marketplace's annotators mark pairs whose true grade is known; some are careful, some mark blindly, some a
grade too high or too low. Both methods see the same marks. Five seeds, --quick two, each a data set of one fit.

Compared are pairs that both grade. Pairs whose marks tie have no majority; what becomes of them is told apart.
`dawid_skene_vs_majority`: wrong grades of the majority over those of Dawid-Skene, the least of all seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.marketplace import write_marketplace
from embeddings.marketplace_recipe import MarketplaceRecipe
from lake.spark import SparkPlacement, session
from spark_etl.consensus import build_consensus, most_probable
from spark_etl.dawid_skene import fit_annotators, grade_probabilities, prepare_marks
from spark_etl.recipes import ConsensusRecipe

CREW = (
    *(("careful", rate) for rate in (0.03, 0.05, 0.08, 0.1, 0.15)),
    *(("spammer", rate) for rate in (1.0, 1.0, 0.7)),
    *(("high", rate) for rate in (0.4, 0.6)),
    *(("low", rate) for rate in (0.4, 0.6)),
)
"""Kind of each annotator, and the share of his marks that are not what he saw (spammers may be right by chance)."""
METHODS = ("majority", "dawid_skene")
Pair = tuple[str, str, str]


def planted_marks(folder: Path, seed: int) -> tuple[pa.Table, dict[Pair, int]]:
    """Marks of a shop as rows of human_annotation, its seed the data set, and the true grades above 0."""
    recipe = MarketplaceRecipe(
        seed=seed,
        num_sessions=0,
        num_queries=200,
        planted_error_share=0.0,
        annotator_kinds=tuple(kind for kind, _ in CREW),
        annotator_error_rates=tuple(rate for _, rate in CREW),
    )
    raw, truth = folder / f"raw{seed}", folder / f"truth{seed}"
    write_marketplace(recipe, raw, truth)
    marks = pq.read_table(raw / "annotations")
    name = f"seed {seed}"
    true = pq.read_table(truth / "pair_grade.parquet").to_pylist()
    return marks.append_column("dataset", pa.array([name] * len(marks))), {
        (name, row["query_id"], row["product_id"]): row["grade"] for row in true
    }


def compare(num_seeds: int) -> dict[str, Any]:
    """What both methods make of the same marks: `rows` per seed and `ratios`."""
    spark, recipe = session(SparkPlacement()), ConsensusRecipe()
    with tempfile.TemporaryDirectory() as folder:
        found = [planted_marks(Path(folder), seed) for seed in range(num_seeds)]
    true = {pair: grade for _, grades in found for pair, grade in grades.items()}
    annotations = spark.createDataFrame(pa.concat_tables([marks for marks, _ in found]))
    marks = prepare_marks(annotations).persist()
    probabilities = grade_probabilities(marks, fit_annotators(marks, recipe.dawid_skene))
    frames = build_consensus(annotations, recipe), most_probable(annotations, probabilities, recipe)
    graded = {
        method: {(row["dataset"], row["query_id"], row["product_id"]): row["grade"] for row in _rows(frame.toArrow())}
        for method, frame in zip(METHODS, frames, strict=True)
    }
    marks.unpersist()
    rows = [_compared(f"seed {seed}", graded, true) for seed in range(num_seeds)]
    ratio = min(row["majority_wrong"] / max(row["dawid_skene_wrong"], 1) for row in rows)
    return {"rows": rows, "ratios": {"dawid_skene_vs_majority": ratio}}


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(["dataset", "query_id", "product_id", "grade"]).to_pylist()
    return rows


def _compared(name: str, graded: dict[str, dict[Pair, int]], true: dict[Pair, int]) -> dict[str, Any]:
    own = {
        method: {pair: grade for pair, grade in found.items() if pair[0] == name} for method, found in graded.items()
    }
    both = sorted(own["majority"].keys() & own["dawid_skene"].keys())
    row: dict[str, Any] = {"dataset": name, "pairs": len(both)}
    for method, found in own.items():
        off = np.array([abs(found[pair] - true.get(pair, 0)) for pair in both])
        row[f"{method}_wrong"] = int((off > 0).sum())
        row[f"{method}_accuracy"] = float((off == 0).mean())
        row[f"{method}_steps_off"] = float(off.mean())
    tied = own["dawid_skene"].keys() - own["majority"].keys()
    right = sum(own["dawid_skene"][pair] == true.get(pair, 0) for pair in tied)
    return row | {"ties": len(tied), "ties_right": right / max(len(tied), 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    quick, start = parser.parse_args(argv).quick, time.perf_counter()
    result = compare(2 if quick else 5)
    for row in result["rows"]:
        print(
            " ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print(json.dumps({"benchmark": "annotators", "quick": quick, **result, "seconds": time.perf_counter() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
