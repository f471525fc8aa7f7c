"""The audit on simulated shops with planted wrong grades: what a review of few pairs finds.

    python -m benchmarks.audit_truth [--quick] [--planted SHARE ...]

Each shop is simulated, ingested and audited by the jobs of the same names, over real Delta tables, with planted errors
in 5, 10 and 20 % of the judged pairs. Its ranker is as sticky and as wrong as those of shops: a product's place hardly
changes from session to session, and partly for reasons that have nothing to do with relevance; it puts an exact product
before an irrelevant one in 76 of 100 cases, a pretrained encoder in 82 on Home Depot and 71 on ESCI. Shoppers look at
place k in one of k sessions, as is usual in studies of it (Joachims et al. 2017) and as retrotech's sessions have it.
The labeller is a small network over the pretrained encoder's vectors, tuned on four fifths of the queries for the fifth
that it grades.

Five seeds, --quick one and two shares. `errors_found_vs_random`: planted errors among the first 5 % of pairs by the
audit's priority, over those of a random 5 %, the least of all shops with 5 or 10 % planted.
`errors_found_vs_best_single_signal`: over those of the best of the rules on behaviour, the labeller's distance from the
grade, and the raters' disagreement, likewise. `dawid_skene_vs_majority`: see benchmarks/annotators.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import annotators
from embeddings.encoder import EncoderRecipe, build_pretrained, encode
from embeddings.marketplace_recipe import MarketplaceRecipe
from embeddings.text import TextRecipe, product_texts
from jobs import build_audit, build_consensus, build_engagement, ingest, ingest_events, simulate
from lake import tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    CATALOG_PRODUCT,
    CLICK_MODEL,
    ENGAGEMENT,
    LABELLER_OOF,
    QUERY,
)
from lake.storage import Lake

BUDGET = 0.05
FOLDS = 5
POSITION_BIAS = 1.0
KEY = ["query_id", "product_id"]
Pair = tuple[str, str]


def audited(folder: Path, seed: int, planted: float) -> Lake:
    """A lake in which the shop was audited."""
    lake = Lake(str(folder / "lake"))
    recipe = MarketplaceRecipe(
        seed=seed,
        num_products=3000,
        num_queries=500,
        num_sessions=50_000,
        planted_error_share=planted,
        position_bias=POSITION_BIAS,
        rank_noise=0.3,
        ranker_error=1.0,
    )
    simulate.run(simulate.Config(lake=lake.root, recipe=recipe))
    ingest.run(ingest.Config(lake=lake.root))
    ingest_events.run(ingest_events.Config(lake=lake.root))
    build_consensus.run(build_consensus.Config(lake=lake.root))
    build_engagement.run(build_engagement.Config(lake=lake.root))
    tables.append_once(lake, LABELLER_OOF, out_of_fold(lake), run_id="benchmark", part="0")
    inputs = build_audit.Inputs(labeller_oof="newest")
    build_audit.run(build_audit.Config(lake=lake.root, inputs=inputs))
    return lake


def out_of_fold(lake: Lake) -> pa.Table:
    """Grades of every judged pair by a classifier of vectors that had not learned from the pair's query."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    judged = tables.rows(lake, ANNOTATION_CONSENSUS, columns=["dataset", *KEY, "grade"])
    queries = tables.rows(lake, QUERY, columns=["query_id", "text"]).to_pylist()
    products = tables.rows(lake, CATALOG_PRODUCT)
    encoder, text = build_pretrained(EncoderRecipe()), TextRecipe()
    query_QD = encode(encoder, [row["text"] for row in queries], "query")
    product_ND = encode(encoder, product_texts(products, text), "document")
    row_of = {row["query_id"]: place for place, row in enumerate(queries)}
    place_of = {product: place for place, product in enumerate(products["product_id"].to_pylist())}
    row_R = np.array([row_of[query] for query in judged["query_id"].to_pylist()])
    query_RD = query_QD[row_R]
    product_RD = product_ND[[place_of[product] for product in judged["product_id"].to_pylist()]]
    both_RD = query_RD * product_RD
    feature_RF = StandardScaler().fit_transform(
        np.hstack([both_RD, np.abs(query_RD - product_RD), both_RD.sum(axis=1, keepdims=True)])
    )
    grade_R, fold_R = judged["grade"].to_numpy(), row_R % FOLDS
    probability_R3 = np.zeros((len(judged), 3))
    for fold in range(FOLDS):
        model = MLPClassifier((64,), alpha=3.0, max_iter=12, batch_size=64, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(feature_RF[fold_R != fold], grade_R[fold_R != fold])
        probability_R3[fold_R == fold] = model.predict_proba(feature_RF[fold_R == fold])
    size = len(judged)
    columns = {"fold": pa.array(fold_R, pa.int32())} | {f"p{grade}": probability_R3[:, grade] for grade in range(3)}
    columns |= {name: pa.array(["benchmark"] * size) for name in ("labeller", "run_id")}
    for name, values in columns.items():
        judged = judged.append_column(name, pa.array(values))
    return judged.select(LABELLER_OOF.column_names)


def found(score_R: NDArray[np.floating], is_error_R: NDArray[np.bool_]) -> float:
    """Share of the errors among the first pairs by score (ties by chance), over the share of pairs looked at."""
    num = round(BUDGET * len(score_R))
    by_chance_R = np.random.default_rng(0).random(len(score_R))
    first_R = np.lexsort((by_chance_R, -score_R))[:num]
    return float(is_error_R[first_R].sum() / is_error_R.sum() / (num / len(score_R)))


def measure(lake: Lake, truth: Path) -> dict[str, float]:
    """What the audit, and each of its signals alone, found; and how near behaviour came to the truth."""
    judged = tables.rows(lake, ANNOTATION_CONSENSUS).to_pylist()
    pairs = [(row["query_id"], row["product_id"]) for row in judged]
    true = {pair: row["grade"] for pair, row in by_pair(pq.read_table(truth / "pair_grade.parquet")).items()}
    planted = by_pair(pq.read_table(truth / "planted_error.parquet"))
    seen, conflicts, said = (by_pair(tables.rows(lake, spec)) for spec in (ENGAGEMENT, AUDIT_CONFLICT, LABELLER_OOF))
    grade_R = np.array([row["grade"] for row in judged])
    is_planted_R = np.array([pair in planted for pair in pairs])
    is_wrong_R = grade_R != np.array([true.get(pair, 0) for pair in pairs])
    behaves = ("loved_but_irrelevant", "ignored_but_exact")
    signals = {
        "audit": [conflicts[pair]["priority"] if pair in conflicts else 0.0 for pair in pairs],
        "behaviour": [
            _evidence(seen[pair]) if pair in conflicts and conflicts[pair]["kind"] in behaves else 0.0 for pair in pairs
        ],
        "labeller": [
            sum(abs(grade - row["grade"]) * said[pair][f"p{grade}"] for grade in range(3))
            for pair, row in zip(pairs, judged, strict=True)
        ],
        "raters": [1 - row["agreement"] for row in judged],
    }
    result = {"pairs": float(len(pairs)), "wrong_share": float(is_wrong_R.mean())}
    for name, score in signals.items():
        score_R = np.array(score)
        result |= {name: found(score_R, is_planted_R), f"{name}_all_wrong": found(score_R, is_wrong_R)}
    result["ratio_best_single"] = result["audit"] / max(result[name] for name in ("behaviour", "labeller", "raters"))
    look = {row["first_position"]: row["examination"] for row in tables.rows(lake, CLICK_MODEL).to_pylist()}
    result["examination_error"] = max(abs(look[place] * place**POSITION_BIAS - 1) for place in range(1, 11))
    return result | _correlations(seen, true)


def _correlations(seen: Mapping[Pair, Mapping[str, Any]], true: Mapping[Pair, int]) -> dict[str, float]:
    """Spearman's correlation with the true grade: of clicks per impression, of clicks per look, and of attraction."""
    from scipy.stats import spearmanr

    grade = [true.get(pair, 0) for pair in seen]
    raw = [row["clicks"] / max(row["impressions"], 1) for row in seen.values()]
    rates = {name: [row[name] for row in seen.values()] for name in ("click_rate", "attraction")}
    return {
        f"spearman_{name}": float(spearmanr(values, grade).statistic)
        for name, values in [("raw_click_rate", raw), *rates.items()]
    }


def _evidence(row: Mapping[str, Any]) -> float:
    return float(abs(np.log(row["corrected_rate"])) * np.sqrt(row["impressions"]))


def by_pair(rows: pa.Table) -> dict[Pair, dict[str, Any]]:
    """Rows by query and product."""
    return {(row["query_id"], row["product_id"]): row for row in rows.to_pylist()}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 5 and 10 % planted")
    parser.add_argument("--planted", type=float, nargs="+", help="shares of the judged pairs; else 0.05, 0.1 and 0.2")
    given = parser.parse_args(argv)
    quick, rows = given.quick, []
    shares = given.planted or ((0.05, 0.1) if quick else (0.05, 0.1, 0.2))
    for seed in range(1 if quick else 5):
        for planted in shares:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                lake = audited(Path(folder), seed, planted)
                result = measure(lake, Path(lake.root) / "truth" / "market")
            rows.append({"seed": seed, "planted": planted, **result})
            told = " ".join(f"{name} {value:.3f}" for name, value in result.items())
            print(f"seed {seed} planted {planted}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    crews = annotators.compare(2 if quick else 5)
    print(f"planted annotators: {json.dumps(crews['rows'])}", flush=True)
    counted = [row for row in rows if row["planted"] <= 0.1] or rows
    ratios = {
        "errors_found_vs_random": min(row["audit"] for row in counted),
        "errors_found_vs_best_single_signal": min(row["ratio_best_single"] for row in counted),
        **crews["ratios"],
    }
    print(json.dumps({"benchmark": "audit_truth", "quick": quick, "rows": rows, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
