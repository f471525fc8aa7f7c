"""Measures labellers on human grades of test queries, beside the commonest grade and the cosines of encoders."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import ConfigError, meaning, settings
from embeddings import report as page
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
from embeddings.labeller_metrics import expected_grade
from embeddings.text import normalise_query, product_text
from jobs import job, labelling, models
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, LABELLER_EVALUATION
from lake.storage import LakeError, replace_text
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

GRADED = ["grade", "at_least_1", "at_least_2"]
MEASURED_SPLITS = ("calibration", "test")
SHOWN = (
    "accuracy",
    "within_1",
    "quadratic_weighted_kappa",
    "macro_f1",
    "auc_2v1",
    "auc_1v0",
    "rmse",
    "recall_0",
    "precision_0",
    "ece",
)


@settings
class Inputs:
    """Human grades, the texts they are about, and the judges."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    labellers: Annotated[
        tuple[str, ...], meaning("folders of labellers, below the lake or anywhere; none: the lake's newest")
    ] = ()
    encoders: Annotated[
        tuple[str, ...], meaning("encoders whose cosines are judged too: pretrained, stage1, stage2 or folders")
    ] = ()


@settings
class EvaluateRecipe:
    """How judges are compared."""

    judges: JudgeRecipe = JudgeRecipe()


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
    current = job.begin(config, "evaluate_labeller")
    labellers, encoders = _folders(current, config.inputs)
    consensus = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *GRADED])
    pairs = labelling.with_texts(current, consensus)
    split_N = pairs["split"].to_numpy()
    train_grades = _by_dataset(pairs.filter(pa.array(split_N == "train")))
    pairs = pairs.filter(pa.array(np.isin(split_N, MEASURED_SPLITS)))
    if not (pairs["split"].to_numpy() == "test").any():
        raise LakeError(f"annotation_consensus: no test query of lake={current.lake.root} has grades; annotate some")
    graded = _graded_pairs(pairs)
    log.info("evaluate_labeller: %d pairs of calibration and test queries", len(pairs))
    answers: dict[str, NDArray[np.float64]] = {
        name: _labeller_probabilities(pairs, folder, config.placement.label) for name, folder in labellers.items()
    }
    scores = {f"cosine of {name}": _cosines(pairs, folder) for name, folder in encoders.items()}
    found: dict[tuple[str, str], list[MeasuredSlice]] = {}
    for dataset, rows in _rows_by_dataset(pairs).items():
        own = graded[dataset]
        judges = {name: answer_N3[rows] for name, answer_N3 in answers.items()}
        judges |= {name: _by_score(score_N[rows], own) for name, score_N in scores.items()}
        judges["commonest grade"] = rate_probabilities(
            train_grades.get(dataset, own.grade_N[~own.is_test_N]), len(rows)
        )
        for name, probability_N3 in judges.items():
            found[dataset, name] = measure_judge(probability_N3, own, config.recipe.judges)
    version = _write(current, found)
    name = f"reports/labeller-{current.fingerprint}.html"
    replace_text(current.lake.path(name), _page(current, found, answers, pairs))
    metrics = {
        f"{dataset}/{judge}/{metric}": interval.mean
        for (dataset, judge), measured in found.items()
        for metric, interval in measured[0].metrics.items()
        if metric in SHOWN
    }
    counts = {f"test_pairs/{dataset}": int(own.is_test_N.sum()) for dataset, own in graded.items()}
    return current.finish(
        rows=sum(counts.values()),
        outputs={LABELLER_EVALUATION.name: version, "report": name},
        counts=counts,
        metrics=metrics,
    )


def _folders(current: Run, inputs: Inputs) -> tuple[dict[str, str], dict[str, str]]:
    """Judge -> folder, of the labellers and of the encoders; a labeller is named by kind and fingerprint."""
    given = inputs.labellers or (current.lake.relative(models.labeller_folder(current.lake)),)
    labellers = {}
    for value in given:
        folder = labelling.labeller_folder(current.lake, value)
        card = load_labeller_card(folder)
        labellers[f"{card.kind} {card.fingerprint}"] = folder
    encoders = {}
    for value in inputs.encoders:
        inside = job.find_path(current.lake, value)
        folder = inside if inside and Path(inside).is_dir() else models.encoder_folder(current.lake, value)
        name = value if value in models.ENCODERS else Path(folder).name
        if name in encoders:
            raise ConfigError(f"inputs.encoders: two folders are named {name!r}; rename one")
        encoders[name] = folder
    return labellers, encoders


def _rows_by_dataset(pairs: pa.Table) -> dict[str, NDArray[np.int64]]:
    dataset_N = pairs["dataset"].to_numpy()
    return {dataset: np.flatnonzero(dataset_N == dataset) for dataset in sorted(set(dataset_N))}


def _by_dataset(pairs: pa.Table) -> dict[str, NDArray[np.int8]]:
    grade_N = pairs["grade"].to_numpy()
    return {dataset: grade_N[rows] for dataset, rows in _rows_by_dataset(pairs).items()}


def _graded_pairs(pairs: pa.Table) -> dict[str, GradedPairs]:
    """Data set -> its pairs, in their order; data sets without a test pair are left out."""
    graded = {}
    for dataset, rows in _rows_by_dataset(pairs).items():
        part = pairs.take(rows)
        queries, titles, categories = (part[name].to_pylist() for name in ("query", "title", "category"))
        graded[dataset] = GradedPairs(
            grade_N=part["grade"].to_numpy(),
            value_N=part["at_least_1"].to_numpy() + part["at_least_2"].to_numpy(),
            query_N=np.unique(part["query_id"].to_numpy(), return_inverse=True)[1].astype(np.int64),
            is_test_N=part["split"].to_numpy() == "test",
            slices=slices_of_pairs(queries, titles, categories),
        )
    return graded


def _labeller_probabilities(pairs: pa.Table, folder: str, placement: LabelPlacement) -> NDArray[np.float64]:
    """Calibrated probabilities of all pairs, in their order.

    Raises:
        ValueError: the labeller gave a pair no distribution.
    """
    from ray_apps.label import label_pairs

    asked = pairs.append_column("address", pa.array([f"{row:012d}" for row in range(len(pairs))]))
    probability_N3 = np.full((len(pairs), 3), np.nan)
    for part in label_pairs(asked, folder, placement):
        places = [int(address) for address in part["address"].to_pylist()]
        probability_N3[places] = np.stack([part[f"p{grade}"].to_numpy() for grade in range(3)], axis=1)
    if lost := int(np.isnan(probability_N3).any(axis=1).sum()):
        raise ValueError(f"{folder}: gave {lost} of {len(pairs)} pairs no distribution over the grades; tune it again")
    return probability_N3


def _cosines(pairs: pa.Table, folder: str) -> NDArray[np.float64]:
    from embeddings.encoder import encode, load_encoder

    model, text = load_encoder(folder)
    columns = (pairs[name].to_pylist() for name in ("title", "brand", "category", "description"))
    products = [
        product_text(title, brand, category, description, text)
        for title, brand, category, description in zip(*columns, strict=True)
    ]
    queries = [normalise_query(query) for query in pairs["query"].to_pylist()]
    query_ND, product_ND = encode(model, queries, "query"), encode(model, products, "document")
    return np.asarray((query_ND * product_ND).sum(axis=1), dtype=np.float64)


def _by_score(score_N: NDArray[np.float64], pairs: GradedPairs) -> NDArray[np.float64]:
    """Probabilities that a score stands for by the calibration pairs, or, where there are none, by all of them."""
    fitted_N = ~pairs.is_test_N if not pairs.is_test_N.all() else pairs.is_test_N
    return score_probabilities(score_N[fitted_N], pairs.grade_N[fitted_N], score_N)


def _write(current: Run, found: Mapping[tuple[str, str], Sequence[MeasuredSlice]]) -> int:
    rows: list[dict[str, Any]] = []
    for (dataset, judge), measured in found.items():
        for one in measured:
            bounds = {
                name: [(metric, getattr(interval, part)) for metric, interval in one.metrics.items()]
                for name, part in (("metrics", "mean"), ("low", "low"), ("high", "high"))
            }
            rows.append(
                {
                    "run_id": current.run_id,
                    "dataset": dataset,
                    "judge": judge,
                    "slice": one.name,
                    "num_pairs": one.num_pairs,
                    "num_queries": one.num_queries,
                    "ece_floor": one.ece_floor,
                    "confusion": [count for row in one.confusion for count in row],
                    "created_at": datetime.now(UTC),
                }
                | bounds
            )
    data = pa.Table.from_pylist(rows, schema=LABELLER_EVALUATION.schema)
    tables.append_once(current.lake, LABELLER_EVALUATION, data, run_id=current.run_id, part="judges")
    return tables.version(current.lake, LABELLER_EVALUATION) or 0


def _page(
    current: Run,
    found: Mapping[tuple[str, str], Sequence[MeasuredSlice]],
    answers: Mapping[str, NDArray[np.float64]],
    pairs: pa.Table,
) -> str:
    plots = []
    is_test_N, grade_N = pairs["split"].to_numpy() == "test", pairs["grade"].to_numpy()
    for dataset, rows in _rows_by_dataset(pairs).items():
        for judge, answer_N3 in answers.items():
            tested = rows[is_test_N[rows]]
            expected_N, own_N = expected_grade(answer_N3[tested]), grade_N[tested]
            caption = f"{dataset}: {judge}"
            plots.append(page.violin(caption, {grade: expected_N[own_N == grade] for grade in range(3)}))
            plots.append(page.reliability_plot(caption, found[dataset, judge][0].reliability))
    sheets = []
    for dataset in sorted({dataset for dataset, _ in found}):
        judges = {judge: measured for (held, judge), measured in found.items() if held == dataset}
        lines = [[judge, *(_cell(measured[0], name) for name in SHOWN)] for judge, measured in judges.items()]
        note = "In brackets: 95 % interval, bootstrap over queries."
        sheets.append(page.Sheet(f"{dataset}: judges on test queries", ["judge", *SHOWN], lines, note))
        for judge in answers:
            whole, *slices = judges[judge]
            sheets.append(_slice_sheet(dataset, judge, [whole, *slices]))
            rows_of_confusion = [[f"people: {grade}", *map(str, row)] for grade, row in enumerate(whole.confusion)]
            header = ["", *(f"labeller: {grade}" for grade in range(3))]
            sheets.append(page.Sheet(f"{dataset}: grades of people and of {judge}", header, rows_of_confusion))
    return page.render(
        "Assay: labellers",
        f"run {current.run_id}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, split test",
        plots,
        "Expected grade of every judged test pair by human grade; beside it, of each tenth of the pairs by certainty, "
        "how sure the labeller was and how often it was right.",
        sheets,
    )


def _slice_sheet(dataset: str, judge: str, measured: Sequence[MeasuredSlice]) -> page.Sheet:
    lines = []
    for one in measured:
        shown = [_cell(one, name) for name in ("accuracy", "quadratic_weighted_kappa", "ece")]
        lines.append([one.name or "all", f"{one.num_pairs:,}", f"{one.num_queries:,}", *shown, f"{one.ece_floor:.3f}"])
    header = ["slice", "pairs", "queries", "accuracy", "quadratic_weighted_kappa", "ece", "ece of a perfect judge"]
    return page.Sheet(f"{dataset}: slices of {judge}", header, lines)


def _cell(one: MeasuredSlice, name: str) -> str:
    interval = one.metrics.get(name)
    return "-" if interval is None else f"{interval.mean:.3f} [{interval.low:.3f} {interval.high:.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("evaluate_labeller", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
