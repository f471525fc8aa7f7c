"""Anchors: judged pairs that go with a labeller, with its answers at tuning, to notice when it answers otherwise.

A labeller is its weights, but its answers also pass through an engine, a tokenizer and a machine that change under it.
Before a run's grades are published the same pairs are graded again and compared: how often each grade is given, and how
well the grades agree with people's.
"""

# N pairs

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.calibration import PROBABILITIES, probabilities_of
from embeddings.guideline import ProductFields
from embeddings.metrics import labeller_agreement

ANCHOR_FILE: Final = "anchors.parquet"
NUM_ANCHORS: Final = 256
ANCHOR_TEXTS: Final = ("query", *ProductFields._fields)


@settings
class AnchorRecipe:
    """How far the answers to the anchors may be from those at tuning."""

    max_rate_change: Annotated[
        float, meaning("largest change of the share of a grade among the anchors", "0..1", ge=0, le=1)
    ] = 0.02
    max_kappa_drop: Annotated[
        float, meaning("largest loss of quadratic weighted kappa with people", "kappa", ge=0, le=2)
    ] = 0.02


@dataclass(frozen=True)
class Drift:
    """What changed between two answers to the anchors.

    Attributes:
        rate_change: largest change of the share of a grade.
        kappa_drop: loss of quadratic weighted kappa; negative for a gain.
        largest_change: of any probability.
    """

    rate_change: float
    kappa_drop: float
    largest_change: float


def choose_anchors(pairs: pa.Table, probability_N3: NDArray[np.floating]) -> pa.Table:
    """At most 256 of the pairs, by the hash of their texts, with grade and probabilities.

    Args:
        pairs: columns query_hash, product_hash, grade and the texts.
        probability_N3: what the labeller answers, as it is published.
    """
    keyed = pairs.append_column("row", pa.array(np.arange(len(pairs))))
    # the end of one hash and the start of the other: no order that anything else goes by
    hashes = zip(pairs["query_hash"].to_pylist(), pairs["product_hash"].to_pylist(), strict=True)
    keys = [product[-8:] + query for query, product in hashes]
    ordered = keyed.append_column("key", pa.array(keys, pa.string())).sort_by("key").slice(0, NUM_ANCHORS)
    chosen = ordered["row"].to_numpy()
    columns = {name: pairs[name].take(pa.array(chosen)) for name in (*ANCHOR_TEXTS, "grade")}
    columns |= {name: pa.array(probability_N3[chosen, grade]) for grade, name in enumerate(PROBABILITIES)}
    return pa.table(columns)


def write_anchors(folder: Path, anchors: pa.Table) -> None:
    """Puts the anchors beside the weights."""
    pq.write_table(anchors, folder / ANCHOR_FILE)


def read_anchors(folder: str | Path) -> pa.Table | None:
    """The anchors of a labeller's folder; None where it has none."""
    path = Path(folder, ANCHOR_FILE)
    return pq.read_table(path) if path.is_file() else None


def measure_drift(anchors: pa.Table, answer_N3: NDArray[np.floating]) -> Drift:
    """How the answers differ from those at tuning; an answer that is no distribution counts as a change of 1."""
    before_N3 = probabilities_of(anchors)
    grade_N, answer_N3 = anchors["grade"].to_numpy(), np.where(np.isfinite(answer_N3), answer_N3, 0.0)
    rates, kappas = [], []
    for given_N3 in (before_N3, answer_N3):
        predicted_N = given_N3.argmax(axis=1)
        rates.append(np.bincount(predicted_N, minlength=3) / len(grade_N))
        kappas.append(labeller_agreement(grade_N, predicted_N)["quadratic_weighted_kappa"])
    changes_N3 = np.where(answer_N3.sum(axis=1, keepdims=True) > 0, np.abs(before_N3 - answer_N3), 1.0)
    return Drift(float(np.abs(rates[0] - rates[1]).max()), kappas[0] - kappas[1], float(changes_N3.max()))


def drift_sentence(drift: Drift, recipe: AnchorRecipe) -> str:
    """What is wrong with the answers, in words; empty where they are within the bounds."""
    found = []
    if drift.rate_change > recipe.max_rate_change:
        found.append(f"a grade's share moved by {drift.rate_change:.3f} (max_rate_change={recipe.max_rate_change})")
    if drift.kappa_drop > recipe.max_kappa_drop:
        found.append(f"kappa with people fell by {drift.kappa_drop:.3f} (max_kappa_drop={recipe.max_kappa_drop})")
    return " and ".join(found)
