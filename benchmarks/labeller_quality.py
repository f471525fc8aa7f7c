"""What each choice of the labeller's recipe gives on a lake's human grades, by validation queries.

    python -m benchmarks.labeller_quality LAKE MODEL --pairs 6000 --only base,dropout
    python -m benchmarks.labeller_quality LAKE MODEL --only base,"as pretrained" --set kind=generative max_tokens=1280

Every row is a labeller of its own, tuned in this process on the same train pairs, whole queries in the order of a hash,
and calibrated on calibration queries. RMSE is to the raters' mean by the line that fits the calibration queries. Choose
on validation, where half of the calibration queries fit the head that weighs evidence and the other half
calibrates; `--split test`, where the head is fitted on validation as the job does, is for what has been chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import tempfile
import time
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from conf.load import load
from embeddings.backbone import resolve_model
from embeddings.calibration import Decision, calibrate, fit_calibrations, grades_of
from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder
from embeddings.labeller_evaluation import GradedPairs, JudgeRecipe, MeasuredSlice, measure_judge
from embeddings.labeller_model import LabellerTrainer, build_labeller, plain_probabilities
from embeddings.text import TextRecipe
from jobs import job, labelling, tune_labeller
from lake.schemas import ANNOTATION_CONSENSUS
from ray_apps.tune import target_shares

BASE: Final = LabellerRecipe(
    text=TextRecipe(clauses=("{title}", "by {brand}")),
    max_tokens=48,
    batch_size=64,
    learning_rate=8e-5,
    epochs=1,
    dropout=0.0,
    evidence="none",
)
WITH_ATTRIBUTES: Final = TextRecipe(clauses=("{title}", "by {brand}", "{description}"), max_description_chars=100)
CHANGES: Final[dict[str, dict[str, Any]]] = {
    "base": {},
    "consensus instead of shares": {"targets": "hard"},
    "cross-entropy instead of ordinal": {"loss": "cross_entropy"},
    "title alone": {"text": TextRecipe(clauses=("{title}",))},
    "attributes and description": {"text": WITH_ATTRIBUTES, "max_tokens": 72},
    "two passes": {"epochs": 2},
    "three passes": {"epochs": 3},
    "dropout": {"dropout": None},
    "preferences besides": {"preference_weight": 0.5},
    "most probable grade": {"decision": "most_probable"},
    "without random pairs": {"random_irrelevant_per_query": 0},
    "words beside the answer": {"evidence": "words"},
    "words and encoder": {"evidence": "encoder"},
    "as pretrained": {"epochs": 0},
}
SHOWN: Final = (
    *("accuracy", "quadratic_weighted_kappa", "macro_f1", "recall_0", "precision_0"),
    *("auc_2v1", "auc_1v0", "rmse", "ece"),
)


def main() -> None:
    """Prints a row per data set and change of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lake")
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=6000, help="train pairs, in whole queries")
    parser.add_argument("--only", default=",".join(CHANGES), help="names of changes, with commas between")
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every row's recipe")
    given = parser.parse_args()
    base = dataclasses.asdict(dataclasses.replace(BASE, model=given.model))
    recipe = load(LabellerRecipe, base, given.set)
    current = job.begin(tune_labeller.Config(lake=given.lake, recipe=recipe), "tune_labeller")
    consensus = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *labelling.GRADED])
    human = tune_labeller.without_leaks(current, labelling.with_texts(current, consensus))
    if given.split == "validation":
        human = as_test(human)
    print("data set", "change", "train pairs", *SHOWN, "pairs/s", sep=" | ")
    for name in given.only.split(","):
        changed = dataclasses.replace(recipe, **CHANGES[name])
        pairs = tune_labeller.with_random(current, human, changed)
        measure(name, pairs, len(human), changed, given.pairs)


def as_test(human: pa.Table) -> pa.Table:
    """The pairs with validation in the place of test, and half of the calibration queries in that of validation."""
    place, halved = human.schema.get_field_index("split"), {"validation": "test", "test": "left out"}
    splits = [
        "validation" if split == "calibration" and int(digest[:8], 16) % 2 else halved.get(split, split)
        for split, digest in zip(human["split"].to_pylist(), human["query_hash"].to_pylist(), strict=True)
    ]
    human = human.set_column(place, "split", pa.array(splits, pa.string()))
    return human.filter(pc.not_equal(human["split"], "left out"))


def first_queries(query_hashes: list[str], num_pairs: int) -> list[bool]:
    """Marks the pairs of whole queries, in an order by hash, until there are enough."""
    order = sorted(set(query_hashes), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    place = {query: number for number, query in enumerate(order)}
    size = np.bincount([place[query] for query in query_hashes])
    is_kept = np.concatenate([[True], size.cumsum()[:-1] < num_pairs])
    return [bool(is_kept[place[query]]) for query in query_hashes]


def measure(name: str, pairs: pa.Table, num_human: int, recipe: LabellerRecipe, num_pairs: int) -> None:
    """Tunes one labeller and prints its rows; the first `num_human` pairs are people's."""
    is_kept_N = np.array(pairs["split"].to_numpy() != "train")
    is_kept_N[~is_kept_N] = first_queries(pairs.filter(pa.array(~is_kept_N))["query_hash"].to_pylist(), num_pairs)
    pairs, num_human = pairs.filter(pa.array(is_kept_N)), int(is_kept_N[:num_human].sum())
    is_train_N = pairs["split"].to_numpy() == "train"
    train, held = pairs.filter(pa.array(is_train_N)), pairs.filter(pa.array(~is_train_N))
    encoder = PairEncoder(resolve_model(recipe.model), recipe, load_guideline(recipe.guideline))
    model = build_labeller(recipe, encoder, device="cpu")
    queries = train["query"].to_pylist()
    trainer = LabellerTrainer(model, encoder.encode_rows(train), target_shares(train, recipe), queries, recipe)
    started = time.monotonic()
    while trainer.step < trainer.num_steps:
        trainer.train_step()
    speed = len(train) * recipe.epochs / (time.monotonic() - started)
    answer_N3 = np.full((len(pairs), 3), np.nan)
    answer_N3[~is_train_N] = plain_probabilities(model, encoder.encode_rows(held), bf16=trainer.bf16)
    with tempfile.TemporaryDirectory() as place:
        gathered = tune_labeller.gather_evidence(pairs, num_human, recipe, f"{place}/encoder")
        weighed = tune_labeller.weigh_evidence(gathered, answer_N3)
    answer_N3 = tune_labeller.with_evidence(weighed, np.arange(len(pairs)), answer_N3)[~is_train_N]
    is_judged_N = np.isin(held["split"].to_numpy(), ("calibration", "test"))
    answer_N3, held = answer_N3[is_judged_N], held.filter(pa.array(is_judged_N))
    for dataset, whole in judged(answer_N3, held, recipe.decision).items():
        found = [f"{whole.metrics[key].mean:.4f}" if key in whole.metrics else "-" for key in SHOWN]
        print(dataset, name, len(train), *found, f"{speed:.0f}", sep=" | ", flush=True)


def judged(
    answer_N3: NDArray[np.floating], held: pa.Table, decision: Decision, resamples: int = 20
) -> dict[str, MeasuredSlice]:
    """Uncalibrated answers to held pairs, calibrated on those of split calibration, measured on the others."""
    datasets, grade_N = held["dataset"].to_pylist(), held["grade"].to_numpy()
    is_fitted_N = held["split"].to_numpy() == "calibration"
    fitted = held.filter(pa.array(is_fitted_N))
    keys = fitted["dataset"].to_pylist(), fitted["query_id"].to_pylist()
    calibrations = fit_calibrations(answer_N3[is_fitted_N], grade_N[is_fitted_N], *keys, decision)
    calibrated_N3 = calibrate(calibrations, datasets, answer_N3)
    answered_N = grades_of(calibrations, datasets, calibrated_N3)
    value_N = held["at_least_1"].to_numpy() + held["at_least_2"].to_numpy()
    query_N = np.unique(held["query_id"].to_numpy(), return_inverse=True)[1]
    found = {}
    for dataset in sorted(set(datasets)):
        own = np.array([name == dataset for name in datasets])
        pairs = GradedPairs(grade_N[own], value_N[own], query_N[own], ~is_fitted_N[own], {})
        recipe = JudgeRecipe(resamples=resamples)
        found[dataset] = measure_judge(calibrated_N3[own], answered_N[own], pairs, recipe)[0]
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
