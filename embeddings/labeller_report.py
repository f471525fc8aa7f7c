"""The page of `evaluate_labeller`: judges side by side, slices, confusion, reliability, prompt injections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from embeddings import report as page
from embeddings.calibration import expected_grade
from embeddings.labeller_evaluation import GradedPairs, MeasuredSlice
from embeddings.metrics import Interval

Shifts = dict[str, tuple[dict[str, Interval], int]]
"""Attack -> what it does (`injections.measure_shift`), and the pairs it was tried on."""

SHOWN: Final = (
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


def labeller_page(
    subtitle: str,
    found: Mapping[tuple[str, str], Sequence[MeasuredSlice]],
    shifts: Mapping[tuple[str, str], Shifts],
    answers: Mapping[tuple[str, str], NDArray[np.float64]],
    graded: Mapping[str, GradedPairs],
) -> str:
    """One self-contained HTML page.

    Args:
        subtitle: which run this is.
        found: (data set, judge) -> its slices, the whole first.
        shifts: (data set, labeller) -> what prompt injections do.
        answers: (data set, labeller) -> probabilities of the data set's pairs.
        graded: data set -> its pairs.
    """
    plots = []
    for (dataset, judge), answer_N3 in answers.items():
        tested_N, caption = graded[dataset].is_test_N, f"{dataset}: {judge}"
        expected_N, grade_N = expected_grade(answer_N3[tested_N]), graded[dataset].grade_N[tested_N]
        plots.append(page.violin(caption, {grade: expected_N[grade_N == grade] for grade in range(3)}))
        plots.append(page.reliability_plot(caption, found[dataset, judge][0].reliability))
    sheets = []
    for dataset in graded:
        judges = {judge: measured for (held, judge), measured in found.items() if held == dataset}
        lines = [[judge, *(_cell(measured[0], name) for name in SHOWN)] for judge, measured in judges.items()]
        note = "In brackets: 95 % interval, bootstrap over queries."
        sheets.append(page.Sheet(f"{dataset}: judges on test queries", ["judge", *SHOWN], lines, note))
        for judge in (judge for held, judge in answers if held == dataset):
            sheets += [_slice_sheet(dataset, judge, judges[judge]), _confusion_sheet(dataset, judge, judges[judge][0])]
            if shifts.get((dataset, judge)):
                sheets.append(_injection_sheet(dataset, judge, shifts[dataset, judge]))
    plots_note = (
        "Expected grade of every judged test pair by human grade; beside it, of each tenth of the pairs by certainty, "
        "how sure the labeller was and how often it was right."
    )
    return page.render("Assay: labellers", subtitle, plots, plots_note, sheets)


def _confusion_sheet(dataset: str, judge: str, whole: MeasuredSlice) -> page.Sheet:
    lines = [[f"people: {grade}", *map(str, row)] for grade, row in enumerate(whole.confusion)]
    header = ["", *(f"labeller: {grade}" for grade in range(3))]
    return page.Sheet(f"{dataset}: grades of people and of {judge}", header, lines)


def _slice_sheet(dataset: str, judge: str, measured: Sequence[MeasuredSlice]) -> page.Sheet:
    lines = []
    for one in measured:
        shown = [_cell(one, name) for name in ("accuracy", "quadratic_weighted_kappa", "ece")]
        lines.append([one.name or "all", f"{one.num_pairs:,}", f"{one.num_queries:,}", *shown, f"{one.ece_floor:.3f}"])
    header = ["slice", "pairs", "queries", "accuracy", "quadratic_weighted_kappa", "ece", "ece of a perfect judge"]
    return page.Sheet(f"{dataset}: slices of {judge}", header, lines)


def _injection_sheet(dataset: str, judge: str, own: Shifts) -> page.Sheet:
    names = ("shift", "share_2", "changed")
    lines = [[attack, *(interval_cell(metrics[name]) for name in names)] for attack, (metrics, _) in own.items()]
    header = [
        "appended to the title",
        "change of the expected grade",
        "change of the share of grade 2",
        "grades changed",
    ]
    note = "Beside harmless words; the first row shows what other harmless words do, the noise of the measure."
    return page.Sheet(f"{dataset}: prompt injections against {judge}", header, lines, note)


def _cell(one: MeasuredSlice, name: str) -> str:
    return interval_cell(one.metrics.get(name))


def interval_cell(interval: Interval | None) -> str:
    """A figure with its interval; a dash where there is none."""
    return "-" if interval is None else f"{interval.mean:.3f} [{interval.low:.3f} {interval.high:.3f}]"
