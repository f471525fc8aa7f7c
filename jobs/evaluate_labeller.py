"""Measures labellers on human grades of test queries, beside the commonest grade and the cosines of encoders."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import ConfigError, meaning, settings
from embeddings import injections
from embeddings.calibration import Calibration, grades_of, query_weights, rate_cuts
from embeddings.labeller import load_labeller_card
from embeddings.labeller_evaluation import (
    GradedPairs,
    JudgeRecipe,
    MeasuredSlice,
    measure_judge,
    rate_probabilities,
    score_probabilities,
    slices_of_pairs,
)
from embeddings.labeller_report import SHOWN, Shifts, labeller_page
from embeddings.metrics import Interval
from embeddings.recipes import read_card
from embeddings.text import normalise_query, product_texts
from jobs import job, labelling, models
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, LABELLER_EVALUATION
from lake.storage import Lake, LakeError, replace_text
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

MEASURED_SPLITS = ("calibration", "test")
VOTES = "votes"
"""Name of the judge that answers the mean probabilities of all named labellers, as vote_grades does."""

Judged = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Calibrated probabilities of pairs, [N, 3], and their grades, [N]."""


@settings
class Inputs:
    """Human grades, the texts they are about, and the judges."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    labellers: Annotated[
        tuple[str, ...],
        meaning("folders of labellers, below the lake or anywhere; none: the lake's newest; of several also the votes"),
    ] = ()
    encoders: Annotated[
        tuple[str, ...], meaning("encoders whose cosines are judged too: pretrained, stage1, stage2 or folders")
    ] = ()


@settings
class EvaluateRecipe:
    """How judges are compared."""

    judges: JudgeRecipe = JudgeRecipe()
    injection_pairs: Annotated[
        int, meaning("test pairs of a data set on which prompt injections are tried; 0: none", "pairs", ge=0)
    ] = 0


@settings
class Placement:
    """Where pairs are graded; cosines are computed in this process."""

    label: LabelPlacement = LabelPlacement(engine="auto")


@settings
class Config:
    """Settings of evaluate_labeller."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: EvaluateRecipe = EvaluateRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """A row per judge, data set and slice in labeller_evaluation, and one HTML page of them all."""
    config = _with_folders(config)
    current = job.begin(config, "evaluate_labeller")
    labellers, encoders = _named(current, config.inputs)
    consensus = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *labelling.GRADED])
    pairs = labelling.with_texts(current, consensus)
    train = pairs.filter(pc.equal(pairs["split"], "train"))
    train_grades = {dataset: train["grade"].to_numpy()[rows] for dataset, rows in _rows_by_dataset(train).items()}
    pairs = measured_pairs(pairs)
    if not len(pairs):
        raise LakeError(f"annotation_consensus: no test query of lake={current.lake.root} has grades; annotate some")
    log.info("evaluate_labeller: %d pairs of calibration and test queries", len(pairs))
    graded, rows_of = _graded_pairs(pairs), _rows_by_dataset(pairs)
    answered = {name: _labeller_probabilities(pairs, folder, config) for name, folder in labellers.items()}
    answers = {(dataset, name): found[rows] for dataset, rows in rows_of.items() for name, found in answered.items()}
    judges: dict[tuple[str, str], Judged] = {}
    for (dataset, name), answer_N3 in answers.items():
        calibrations = load_labeller_card(labellers[name]).calibrations
        judges[dataset, name] = answer_N3, grades_of(calibrations, [dataset] * len(answer_N3), answer_N3)
    if len(answered) > 1:
        joint_N3 = np.mean(list(answered.values()), axis=0)
        for dataset, rows in rows_of.items():
            judges[dataset, VOTES] = _at_people_s_rates(joint_N3[rows], graded[dataset])
    for name, folder in encoders.items():
        score_N = _cosines(pairs, folder)
        for dataset, rows in rows_of.items():
            judges[dataset, f"cosine of {name}"] = _by_score(score_N[rows], graded[dataset])
    for dataset, own in graded.items():
        rates = rate_probabilities(train_grades.get(dataset, own.grade_N[~own.is_test_N]), len(own.grade_N))
        judges[dataset, "commonest grade"] = rates, rates.argmax(axis=1)
    found = {key: measure_judge(*judged, graded[key[0]], config.recipe.judges) for key, judged in judges.items()}
    shifts = {key: _injected(pairs.take(rows_of[key[0]]), labellers[key[1]], config) for key in answers}
    page = f"reports/labeller-{current.fingerprint}.html"
    subtitle = f"run {current.run_id}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, split test"
    replace_text(current.lake.path(page), labeller_page(subtitle, found, shifts, answers, graded))
    counts = {f"test_pairs/{dataset}": int(own.is_test_N.sum()) for dataset, own in graded.items()}
    return current.finish(
        rows=sum(counts.values()),
        outputs={LABELLER_EVALUATION.name: _write(current, found, shifts), "report": page},
        counts=counts,
        metrics={
            f"{dataset}/{judge}/{metric}": measured[0].metrics[metric].mean
            for (dataset, judge), measured in found.items()
            for metric in SHOWN
            if metric in measured[0].metrics
        },
    )


def _with_folders(config: Config) -> Config:
    """The config with every judge by its folder, so that what was judged is pinned, whatever is newest later.

    Raises:
        LakeError: no labeller is named, and none was tuned in this lake.
    """
    lake, inputs = Lake(config.lake), config.inputs
    encoders = []
    for value in inputs.encoders:
        inside = job.find_path(lake, value)
        is_folder = inside is not None and Path(inside).is_dir()
        encoders.append(value if is_folder else lake.relative(models.encoder_folder(lake, value)))
    labellers = inputs.labellers or (lake.relative(models.labeller_folder(lake)),)
    return dataclasses.replace(
        config, inputs=dataclasses.replace(inputs, labellers=labellers, encoders=tuple(encoders))
    )


def _named(current: Run, inputs: Inputs) -> tuple[dict[str, str], dict[str, str]]:
    """Judge -> folder: labellers by kind and fingerprint, encoders by stage or, where they have none, by folder."""
    labellers: dict[str, str] = {}
    encoders: dict[str, str] = {}
    for value in inputs.labellers:
        folder = labelling.labeller_folder(current.lake, value)
        card = load_labeller_card(folder)
        labellers[f"{card.kind} {card.fingerprint}"] = folder
    for value in inputs.encoders:
        folder = job.find_path(current.lake, value) or value
        stage = str(read_card(folder).get("stage", Path(folder).name))
        name = f"stage{stage}" if stage in ("1", "2") else stage
        if name in encoders:
            raise ConfigError(f"inputs.encoders: {encoders[name]} and {folder} are both {name}; give one of them")
        encoders[name] = folder
    return labellers, encoders


def measured_pairs(pairs: pa.Table) -> pa.Table:
    """Pairs of calibration and test queries, of the data sets that have test queries."""
    pairs = pairs.filter(pc.is_in(pairs["split"], value_set=pa.array(MEASURED_SPLITS)))
    tested = pairs.filter(pc.equal(pairs["split"], "test"))["dataset"].unique()
    return pairs.filter(pc.is_in(pairs["dataset"], value_set=tested))


def _rows_by_dataset(pairs: pa.Table) -> dict[str, NDArray[np.int64]]:
    dataset_N = pairs["dataset"].to_numpy()
    return {dataset: np.flatnonzero(dataset_N == dataset) for dataset in sorted(set(dataset_N))}


def _query_numbers(pairs: pa.Table) -> NDArray[np.int64]:
    """An integer per pair of one data set, equal for pairs of one query."""
    return np.unique(pairs["query_id"].to_numpy(), return_inverse=True)[1].astype(np.int64)


def _graded_pairs(pairs: pa.Table) -> dict[str, GradedPairs]:
    """Data set -> its pairs, in their order."""
    graded = {}
    for dataset, rows in _rows_by_dataset(pairs).items():
        part = pairs.take(rows)
        queries, titles, categories = (part[name].to_pylist() for name in ("query", "title", "category"))
        graded[dataset] = GradedPairs(
            grade_N=part["grade"].to_numpy(),
            value_N=part["at_least_1"].to_numpy() + part["at_least_2"].to_numpy(),
            query_N=_query_numbers(part),
            is_test_N=part["split"].to_numpy() == "test",
            slices=slices_of_pairs(queries, titles, categories),
        )
    return graded


def _labeller_probabilities(pairs: pa.Table, folder: str, config: Config) -> NDArray[np.float64]:
    """Calibrated probabilities of all pairs, in their order.

    Raises:
        ValueError: the labeller gave a pair no distribution.
    """
    probability_N3 = labelling.graded_in_order(pairs, folder, config.placement.label)
    if lost := int(np.isnan(probability_N3).any(axis=1).sum()):
        raise ValueError(f"{folder}: gave {lost} of {len(pairs)} pairs no distribution over the grades; tune it again")
    return probability_N3


def _injected(pairs: pa.Table, folder: str, config: Config) -> Shifts:
    """Attack -> what it does to the labeller's grades of a data set's test pairs with short titles, and the pairs."""
    titles = pairs["title"].to_pylist()
    is_short_N = np.array([len(title) <= injections.MAX_TITLE_CHARS for title in titles])
    rows = np.flatnonzero(is_short_N & (pairs["split"].to_numpy() == "test"))
    count = min(config.recipe.injection_pairs, len(rows))
    rows = np.sort(np.random.default_rng(config.recipe.judges.seed).choice(rows, count, replace=False))
    if not count:
        return {}
    asked = pairs.take(rows)
    additions = [injections.HARMLESS[0], *injections.ATTACKS.values()]
    place = asked.schema.get_field_index("title")
    tables_of = [
        asked.set_column(
            place, "title", pa.array([injections.attacked(title, text) for title in asked["title"].to_pylist()])
        )
        for text in additions
    ]
    answer_N3 = _labeller_probabilities(pa.concat_tables(tables_of), folder, config)
    control_N3, *attacked = np.split(answer_N3, len(additions))
    drawn = {"resamples": config.recipe.judges.resamples, "seed": config.recipe.judges.seed}
    return {
        name: (injections.measure_shift(control_N3, one_N3, _query_numbers(asked), **drawn), count)
        for name, one_N3 in zip(injections.ATTACKS, attacked, strict=True)
    }


def _cosines(pairs: pa.Table, folder: str) -> NDArray[np.float64]:
    from embeddings.encoder import load_encoder
    from embeddings.labeller_baseline import pair_cosines

    model, text = load_encoder(folder)
    queries = [normalise_query(query) for query in pairs["query"].to_pylist()]
    return pair_cosines(queries, product_texts(pairs, text), model).astype(np.float64)


def _by_score(score_N: NDArray[np.float64], pairs: GradedPairs) -> Judged:
    """What a score stands for by the calibration pairs; without any, by the test pairs, in its favour."""
    fitted_N = _fitted(pairs)
    return _at_people_s_rates(score_probabilities(score_N[fitted_N], pairs.grade_N[fitted_N], score_N), pairs)


def _at_people_s_rates(probability_N3: NDArray[np.float64], pairs: GradedPairs) -> Judged:
    """The probabilities with grades by the cuts that suit the calibration pairs."""
    fitted_N = _fitted(pairs)
    weight_N = query_weights(pairs.query_N[fitted_N].tolist())
    return probability_N3, Calibration(cuts=rate_cuts(probability_N3[fitted_N], weight_N)).grades(probability_N3)


def _fitted(pairs: GradedPairs) -> NDArray[np.bool_]:
    return ~pairs.is_test_N if not pairs.is_test_N.all() else pairs.is_test_N


def _write(
    current: Run,
    found: Mapping[tuple[str, str], Sequence[MeasuredSlice]],
    shifts: Mapping[tuple[str, str], Shifts],
) -> int:
    rows: list[dict[str, Any]] = []
    for (dataset, judge), measured in found.items():
        for one in measured:
            whole = {"slice": one.name, "num_pairs": one.num_pairs, "num_queries": one.num_queries}
            more = {"ece_floor": one.ece_floor, "confusion": [count for row in one.confusion for count in row]}
            rows.append({"dataset": dataset, "judge": judge} | whole | more | _bounds(one.metrics))
    for (dataset, judge), own in shifts.items():
        for name, (metrics, count) in own.items():
            whole = {"slice": f"injection: {name}", "num_pairs": count}
            rows.append({"dataset": dataset, "judge": judge} | whole | _bounds(metrics))
    for row in rows:
        row |= {"run_id": current.run_id, "created_at": datetime.now(UTC)}
    data = pa.Table.from_pylist(rows, schema=LABELLER_EVALUATION.schema)
    tables.append_once(current.lake, LABELLER_EVALUATION, data, run_id=current.run_id, part="judges")
    return tables.version(current.lake, LABELLER_EVALUATION) or 0


def _bounds(metrics: Mapping[str, Interval]) -> dict[str, list[tuple[str, float]]]:
    parts = (("metrics", "mean"), ("low", "low"), ("high", "high"))
    return {name: [(metric, getattr(interval, part)) for metric, interval in metrics.items()] for name, part in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("evaluate_labeller", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
