"""Fine-tunes the labeller on the human consensus and calibrates it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import settings
from embeddings.anchors import choose_anchors
from embeddings.calibration import calibrate, fit_calibrations, grades_of, query_weights
from embeddings.evidence import Evidence, EvidenceHead, GradedNumbers, GradeRegression, fit_evidence_head
from embeddings.evidence_words import WordNumbers
from embeddings.few_shot import choose_examples, with_examples
from embeddings.guideline import labeller_product_text, load_guideline, products_of
from embeddings.labeller import LabellerCard, LabellerRecipe, save_labeller
from embeddings.labeller_metrics import labeller_metrics
from embeddings.metrics import labeller_agreement
from jobs import job, labelling
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, CATALOG_PRODUCT, HUMAN_ANNOTATION, LABELLER_OOF
from lake.storage import replace_text
from ray_apps.placements import TunePlacement

log = logging.getLogger(__name__)

FOR_EVIDENCE = "evidence"
"""Where a split's name would stand: random pairs of validation queries, by which the evidence is weighed besides."""
MAX_BASELINE_PAIRS = 1000
"""Train pairs that the two thresholds of the cosine are fitted on; more hardly move them, and take a minute."""


@settings
class Inputs:
    """Human grades and the texts they are about."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    human_annotation: job.TableVersion = "newest"


@settings
class Config:
    """Settings of tune_labeller."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: LabellerRecipe = LabellerRecipe()
    placement: TunePlacement = TunePlacement()


def run(config: Config) -> RunRecord:
    """Graded pairs of train queries -> models/labeller/<fingerprint>, measured on test queries."""
    from ray_apps.tune import tune_labeller

    current = job.begin(config, "tune_labeller")
    recipe, storage = config.recipe, current.lake.path("runs")
    consensus = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *labelling.GRADED])
    human = without_leaks(current, labelling.with_texts(current, consensus))
    if recipe.few_shot_per_grade:
        recipe = with_few_shot(human, recipe, current.lake.path("runs", f"{current.fingerprint}-guideline.yaml"))
    pairs = with_random(current, human, recipe)
    counts = {"human_pairs": len(human), "random_pairs": len(pairs) - len(human)}
    counts |= {f"{split}_pairs": pc.sum(pc.equal(human["split"], split)).as_py() or 0 for split in ("train", "test")}
    log.info("tune_labeller: %s", counts)
    tuned = tune_labeller(pairs, recipe, config.placement, storage=storage, name=current.fingerprint)
    gathered = gather_evidence(pairs, len(human), recipe, os.path.join(storage, f"{current.fingerprint}-encoder"))
    weighed = weigh_evidence(gathered, tuned.probability_N3)
    probability_N3 = with_evidence(weighed, np.arange(len(human)), tuned.probability_N3[: len(human)])
    grade_N = human["grade"].to_numpy()
    datasets, split_N = human["dataset"].to_pylist(), human["split"].to_numpy()
    fitted = np.flatnonzero(split_N == "calibration")
    keys = human.take(fitted)
    calibrations = fit_calibrations(
        probability_N3[fitted],
        grade_N[fitted],
        keys["dataset"].to_pylist(),
        keys["query_id"].to_pylist(),
        recipe.decision,
    )
    metrics: dict[str, float] = {"best_epoch": tuned.best_epoch}
    if (test_N := split_N == "test").any():
        calibrated_N3 = calibrate(calibrations, datasets, probability_N3)
        answered_N = grades_of(calibrations, datasets, calibrated_N3)
        metrics |= labeller_metrics(calibrated_N3[test_N], answered_N[test_N], grade_N[test_N])
        # the three numbers of the report are those of the grades that the ledger will hold: a temperature changes none
        metrics |= agreement("", grade_N[test_N], probability_N3[test_N].argmax(axis=1)) | baselines(human, recipe)
    folder = f"models/labeller/{current.fingerprint}"
    card = save_labeller(
        tuned.weights,
        current.lake.path(folder),
        recipe,
        grade_token_ids=tuned.grade_token_ids,
        calibrations=calibrations,
        metrics=metrics,
        head=weighed.head if weighed else None,
        anchors=choose_anchors(human.take(fitted), calibrations[""](probability_N3[fitted])) if len(fitted) else None,
    )
    # the speed is no property of the labeller: equal labellers have equal folders
    metrics["pairs_per_sec"] = tuned.pairs_per_sec
    outputs: dict[str, str | int] = {"labeller": folder}
    names = [f"{current.fingerprint}-fold{fold}" for fold in range(recipe.folds)]
    if recipe.folds:
        fold_N = folds_of(pairs, recipe.folds)
        for fold, name in enumerate(names):
            parted, rows = hold_out(pairs, fold_N == fold)
            answer_N3 = tune_labeller(parted, recipe, config.placement, storage=storage, name=name).probability_N3
            own = np.flatnonzero((fold_N == fold)[rows] & (rows < len(human)))
            unlearned = weighed and weighed.without_fold(fold_N == fold)
            probability_N3[rows[own]] = with_evidence(unlearned, rows[own], answer_N3[own])
        calibrated_N3 = calibrate(calibrations, datasets, probability_N3)
        outputs[LABELLER_OOF.name] = write_folds(current, human, fold_N[: len(human)], calibrated_N3, card)
    record = current.finish(rows=counts["train_pairs"], outputs=outputs, counts=counts, metrics=metrics)
    for name in (current.fingerprint, *names):
        shutil.rmtree(Path(storage, name), ignore_errors=True)
        Path(storage, f"{name}-guideline.yaml").unlink(missing_ok=True)
        shutil.rmtree(Path(storage, f"{name}-encoder"), ignore_errors=True)
    return record


def with_few_shot(human: pa.Table, recipe: LabellerRecipe, path: str) -> LabellerRecipe:
    """The recipe under its guideline with examples of the train split, which is written to a file of its own."""
    guideline = load_guideline(recipe.guideline)
    examples = choose_examples(human, recipe.few_shot_per_grade, recipe.text)
    replace_text(path, with_examples(guideline, examples))
    return dataclasses.replace(recipe, guideline=path)


def with_random(current: Run, human: pa.Table, recipe: LabellerRecipe) -> pa.Table:
    """People's pairs, then random ones: of train queries, and of validation queries where evidence is weighed."""
    splits = ["train"] if recipe.evidence == "none" else ["train", "validation"]
    weak = random_irrelevant(current, human, recipe, splits)
    split_of = dict(zip(human["query_hash"].to_pylist(), human["split"].to_pylist(), strict=True))
    splits = [split_of[query] for query in weak["query_hash"].to_pylist()]
    splits = [FOR_EVIDENCE if split == "validation" else split for split in splits]
    weak = weak.set_column(weak.schema.get_field_index("split"), "split", pa.array(splits, pa.string()))
    return pa.concat_tables([human, weak.select(human.column_names)])


@dataclasses.dataclass(frozen=True)
class GatheredEvidence:
    """What is said of pairs beside a labeller's answers.

    Attributes:
        evidence: of the pairs' titles.
        graded: numbers, raters' shares and weights, row by row as the pairs.
        is_learned_N: marks those that an opinion is fitted on: people's, of train queries.
        is_held_N: marks those by which answer and opinion are weighed: people's and random ones, of validation queries.
    """

    evidence: Evidence
    graded: GradedNumbers
    is_learned_N: NDArray[np.bool_]
    is_held_N: NDArray[np.bool_]


def gather_evidence(pairs: pa.Table, num_human: int, recipe: LabellerRecipe, folder: str) -> GatheredEvidence | None:
    """Evidence of all pairs of `with_random`; None where none is wanted.

    Args:
        pairs: of all splits.
        num_human: how many of them people have graded, the first ones.
        recipe: what is evidence.
        folder: where the encoder that speaks is written, if one does.
    """
    from ray_apps.tune import target_shares

    if recipe.evidence == "none":
        return None
    started = time.monotonic()
    titles = list(dict(zip(pairs["product_hash"].to_pylist(), pairs["title"].to_pylist(), strict=True)).values())
    encoder = ""
    if recipe.evidence == "encoder":
        from embeddings.encoder import EncoderRecipe, build_pretrained
        from embeddings.evidence_encoder import write_evidence_encoder

        write_evidence_encoder(folder, build_pretrained(EncoderRecipe(model=recipe.baseline_model)), titles)
        encoder = folder
    evidence = Evidence(WordNumbers.of(titles), encoder)
    weight_N = query_weights(pairs["query_id"].to_pylist())
    graded = GradedNumbers(evidence.numbers_of(pairs), target_shares(pairs, recipe), weight_N)
    log.info("tune_labeller: evidence of %d pairs in %.0f s", len(pairs), time.monotonic() - started)
    split_N = pairs["split"].to_numpy()
    is_learned_N = (split_N == "train") & (np.arange(len(pairs)) < num_human)
    return GatheredEvidence(evidence, graded, is_learned_N, np.isin(split_N, ("validation", FOR_EVIDENCE)))


@dataclasses.dataclass(frozen=True)
class WeighedEvidence:
    """Gathered evidence, and the head that weighs it beside answers to the same pairs."""

    gathered: GatheredEvidence
    head: EvidenceHead

    def without_fold(self, is_in_fold_N: NDArray[np.bool_]) -> WeighedEvidence:
        """The same with the opinion of the other folds."""
        others = self.gathered.graded.take(np.flatnonzero(self.gathered.is_learned_N & ~is_in_fold_N))
        head = dataclasses.replace(self.head, opinion=GradeRegression.fit(others))
        return dataclasses.replace(self, head=head)


def weigh_evidence(gathered: GatheredEvidence | None, answer_N3: NDArray[np.floating]) -> WeighedEvidence | None:
    """With the head of the labeller's uncalibrated answers to all pairs; None without evidence or with few pairs."""
    if gathered is None:
        return None
    learned, held = (np.flatnonzero(rows) for rows in (gathered.is_learned_N, gathered.is_held_N))
    graded = gathered.graded
    head = fit_evidence_head(gathered.evidence, graded.take(learned), graded.take(held), answer_N3[held])
    return WeighedEvidence(gathered, head) if head else None


def with_evidence(
    weighed: WeighedEvidence | None, rows: NDArray[np.intp], answer_N3: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Answers to some rows of the gathered pairs as the head weighs them, [N, 3]; as they are without one."""
    if weighed is None:
        return np.array(answer_N3, dtype=np.float64)
    return weighed.head(answer_N3, weighed.gathered.graded.number_NF[rows])


def folds_of(pairs: pa.Table, num_folds: int) -> NDArray[np.int32]:
    """Fold of each pair by its query's text, so that equal texts stay together; -1 outside the split train."""
    fold_N = np.array([int(digest[:8], 16) % num_folds for digest in pairs["query_hash"].to_pylist()])
    return np.where(pairs["split"].to_numpy() == "train", fold_N, -1).astype(np.int32)


def hold_out(pairs: pa.Table, is_held_out_N: NDArray[np.bool_]) -> tuple[pa.Table, NDArray[np.int64]]:
    """What a labeller is tuned on that shall grade the held-out pairs, and the rows of `pairs` that it is made of.

    They stand there as test pairs; of the other splits only the one that chooses the epoch takes part.
    """
    split_N = np.where(is_held_out_N, "test", pairs["split"].to_numpy())
    rows = np.flatnonzero(is_held_out_N | np.isin(split_N, ("train", "validation")))
    parted = pairs.set_column(pairs.schema.get_field_index("split"), "split", pa.array(split_N.tolist(), pa.string()))
    return parted.take(rows), rows


def write_folds(
    current: Run, human: pa.Table, fold_M: NDArray[np.int32], probability_M3: NDArray[np.floating], card: LabellerCard
) -> int:
    """Calibrated grades from labellers that had not learned from the pair -> labeller_oof; returns its version."""
    columns: dict[str, Any] = {"fold": fold_M} | {f"p{grade}": probability_M3[:, grade] for grade in range(3)}
    columns |= {
        name: pa.array([value] * len(human))
        for name, value in (("labeller", card.fingerprint), ("run_id", current.run_id))
    }
    data = human.select([*labelling.PAIR, "grade"])
    for name, values in columns.items():
        data = data.append_column(name, pa.array(values))
    tables.append_once(current.lake, LABELLER_OOF, data, run_id=current.fingerprint, part="folds")
    return tables.version(current.lake, LABELLER_OOF) or 0


def agreement(prefix: str, human_N: NDArray[np.integer], predicted_N: NDArray[np.integer]) -> dict[str, float]:
    """The three numbers of the report, named with the prefix."""
    found = labeller_agreement(human_N, predicted_N)
    return {
        f"{prefix}accuracy": found["accuracy"],
        f"{prefix}within_1": found["within_1"],
        f"{prefix}quadratic_weighted_kappa": found["quadratic_weighted_kappa"],
    }


def baselines(human: pa.Table, recipe: LabellerRecipe) -> dict[str, float]:
    """Agreement of the commonest grade and of the pretrained cosine on the same test pairs."""
    from embeddings import labeller_baseline as baseline
    from embeddings.encoder import EncoderRecipe, build_pretrained

    split_N, grade_N = human["split"].to_numpy(), human["grade"].to_numpy()
    train, test = np.flatnonzero(split_N == "train"), np.flatnonzero(split_N == "test")
    if len(train) > MAX_BASELINE_PAIRS:
        train = np.sort(np.random.default_rng(recipe.seed).choice(train, MAX_BASELINE_PAIRS, replace=False))
    rows = human.take(np.concatenate([train, test]))
    products = [labeller_product_text(product, recipe.text) for product in products_of(rows)]
    encoder = build_pretrained(EncoderRecipe(model=recipe.baseline_model))
    cosine_N = baseline.pair_cosines(rows["query"].to_pylist(), products, encoder)
    thresholds = baseline.fit_thresholds(cosine_N[: len(train)], grade_N[train])
    by_cosine = baseline.threshold_grades(cosine_N[len(train) :], thresholds)
    by_majority = baseline.majority_grades(grade_N[split_N == "train"], len(test))
    return agreement("majority_", grade_N[test], by_majority) | agreement("cosine_", grade_N[test], by_cosine)


def without_leaks(current: Run, pairs: pa.Table) -> pa.Table:
    """The pairs but those of train queries that read like a query of another split."""
    is_train = labelling.train_queries(current)
    keys = zip(pairs["dataset"].to_pylist(), pairs["query_id"].to_pylist(), pairs["split"].to_pylist(), strict=True)
    kept = [split != "train" or (dataset, query_id) in is_train for dataset, query_id, split in keys]
    return pairs.filter(pa.array(kept, pa.bool_()))


def random_irrelevant(current: Run, human: pa.Table, recipe: LabellerRecipe, splits: list[str]) -> pa.Table:
    """Pairs of the splits' queries with random products of their data set that no person has marked, as grade 0.

    A product drawn at random is irrelevant but for a small share; what a query draws depends on its key alone. A
    product with the texts of one that people grade above 0 under the query is left out as well.
    """
    catalogue = labelling.read(current, CATALOG_PRODUCT, ["dataset", "product_id"])
    products: dict[str, list[str]] = {}
    catalogue = catalogue.sort_by([("dataset", "ascending"), ("product_id", "ascending")])
    for dataset, product_id in zip(*(catalogue[name].to_pylist() for name in catalogue.column_names), strict=True):
        products.setdefault(dataset, []).append(product_id)
    people = human.filter(pc.is_in(human["split"], value_set=pa.array(splits)))
    judged: dict[tuple[str, str], set[str]] = {
        key: set() for key in zip(people["dataset"].to_pylist(), people["query_id"].to_pylist(), strict=True)
    }
    marked = labelling.read(current, HUMAN_ANNOTATION, labelling.PAIR)
    for dataset, query_id, product_id in zip(*(marked[name].to_pylist() for name in labelling.PAIR), strict=True):
        if (dataset, query_id) in judged:
            judged[dataset, query_id].add(product_id)
    rows: list[tuple[str, str, str]] = []
    for (dataset, query_id), known in judged.items():
        pool = products[dataset]
        key = f"{recipe.seed}\x1f{dataset}\x1f{query_id}".encode()
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
        wanted = min(recipe.random_irrelevant_per_query, len(pool))
        drawn = [pool[index] for index in rng.choice(len(pool), wanted, replace=False)]
        rows += [(dataset, query_id, product_id) for product_id in drawn if product_id not in known]
    drawn_pairs = pa.Table.from_pylist(
        [dict(zip(labelling.PAIR, row, strict=True)) for row in rows],
        schema=pa.schema([(name, pa.string()) for name in labelling.PAIR]),
    )
    for name in labelling.GRADED:
        kind = ANNOTATION_CONSENSUS.schema.field(name).type
        drawn_pairs = drawn_pairs.append_column(name, pa.array(np.zeros(len(rows)), kind))
    weak, same = labelling.with_texts(current, drawn_pairs), ["query_hash", "product_hash"]
    positive = people.filter(pc.greater(people["grade"], 0)).select(same)
    return weak.join(positive, same, join_type="left anti").sort_by([(name, "ascending") for name in labelling.PAIR])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("tune_labeller", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
