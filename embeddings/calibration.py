"""From what a labeller answers to how often it is right, and to grades: temperature, class biases, curves, cuts.

A labeller's probabilities are fitted to the population they were tuned on and usually too sure. Three numbers (one
temperature, biases of two classes) repair most of that; where calibration pairs are many, P(grade >= 1) and P(grade 2
given >= 1) follow monotone curves besides. The three of a data set depart from those of all pairs only as far as its
evidence asks: they have a prior there, and a query with many pairs counts as ten, since its pairs resemble each other.
The biases are also what a population with other class rates needs: by Bayes' rule its prior enters the log
probabilities as a constant per class.

Cites: Guo et al. 2017 (arXiv 1706.04599), sections 4.1 and 4.2, for temperature, biases and isotonic regression;
Saerens et al. 2002 for class priors.
"""

# N pairs, K knots of a curve

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import meaning, settings

PROBABILITIES: Final = ("p0", "p1", "p2")
"""Columns of the calibrated probabilities of grades 0, 1 and 2, wherever rows have them."""
PAIRS_FOR_CURVES: Final = 1000
"""Calibration pairs from which on the boundaries get curves; below, the curves would fit chance."""
PAIRS_PER_QUERY: Final = 10
"""Pairs that a query counts as at most. Fitted on 11 of ESCI's queries outside test and train, which have 45 pairs
each, the other six's calibration error fell from .163 to .145 with this and the priors below (results.md)."""
PAIRS_PER_KNOT: Final = 100
_SMALLEST = 1e-30
_OWN_DEVIATION: Final = (1.0, 0.3, 0.0, 0.3)
"""Standard deviations of a data set's log temperature and biases about those of all pairs, in nats; 0 is held.

How sure a labeller may be differs more between shops than how often each grade occurs; likelihood of ESCI's 17
validation and calibration queries, each left out in turn, chose these (results.md).
"""
_SAMPLE_DEVIATION: Final = (0.0, 2.0, 0.0, 2.0)
"""The same of a population whose class rates may be anything: keeps a class that its sample lacks possible."""
_TEMPERATURE_ALONE: Final = (np.inf, 0.0, 0.0, 0.0)

Decision = Literal["rates", "most_probable"]

Curve = tuple[tuple[float, float], ...]


@settings
class Calibration:
    """How a labeller's probabilities become calibrated ones."""

    temperature: Annotated[float, meaning("probabilities are raised to its inverse", gt=0)] = 1.0
    bias: Annotated[tuple[float, float, float], meaning("added to the log probabilities of 0, 1 and 2", "nats")] = (
        0.0,
        0.0,
        0.0,
    )
    relevant: Annotated[Curve, meaning("knots (before, after) of P(grade >= 1); none leaves it as it is")] = ()
    exact: Annotated[Curve, meaning("knots of P(grade 2 given grade >= 1); none leaves it as it is")] = ()
    cuts: Annotated[
        tuple[float, float] | None, meaning("expected grades from which on a pair is 1 and 2; null: the most probable")
    ] = None

    def __call__(self, probability_N3: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated probabilities, [N, 3]; rows sum to 1."""
        relevant_N, exact_N = _boundaries(_scaled(probability_N3, np.array([np.log(self.temperature), *self.bias])))
        return of_boundaries(_follow(self.relevant, relevant_N), _follow(self.exact, exact_N))

    def grades(self, calibrated_N3: NDArray[np.floating]) -> NDArray[np.int64]:
        """The grade of each pair from what calling this gave, [N]; whatever it is where a row holds nan."""
        if self.cuts is None:
            return np.asarray(calibrated_N3.argmax(axis=1), dtype=np.int64)
        return np.searchsorted(np.array(self.cuts), expected_grade(calibrated_N3), side="right").astype(np.int64)


def expected_grade(probability_N3: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean of the grade under each distribution, in [0, 2]."""
    return np.asarray(probability_N3.astype(np.float64) @ np.array([0.0, 1.0, 2.0]))


def of_boundaries(relevant_N: NDArray[np.float64], exact_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of the grades, [N, 3], from P(grade >= 1) and P(grade 2 given grade >= 1)."""
    return np.stack([1 - relevant_N, relevant_N * (1 - exact_N), relevant_N * exact_N], axis=1)


def probabilities_of(rows: pa.Table) -> NDArray[np.float64]:
    """The columns p0, p1 and p2 as one array, [N, 3]."""
    return np.stack([rows[name].to_numpy() for name in PROBABILITIES], axis=1)


def calibrate(
    calibrations: Mapping[str, Calibration], datasets: Sequence[str], probability_N3: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Calibrated probabilities, [N, 3]: by its data set's calibration, or by that of any other pairs; nan stays nan."""
    calibrated_N3 = np.empty(probability_N3.shape)
    for chosen, rows in _by_dataset(calibrations, datasets):
        calibrated_N3[rows] = chosen(probability_N3[rows])
    return calibrated_N3


def grades_of(
    calibrations: Mapping[str, Calibration], datasets: Sequence[str], calibrated_N3: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Grades, [N], from what `calibrate` gave: by its data set's decision, or by that of any other pairs."""
    grade_N = np.empty(len(calibrated_N3), dtype=np.int64)
    for chosen, rows in _by_dataset(calibrations, datasets):
        grade_N[rows] = chosen.grades(calibrated_N3[rows])
    return grade_N


def _by_dataset(
    calibrations: Mapping[str, Calibration], datasets: Sequence[str]
) -> Iterator[tuple[Calibration, NDArray[np.bool_]]]:
    dataset_N = np.array(datasets, dtype=object)
    for dataset in sorted(set(datasets)):
        yield calibrations.get(dataset) or calibrations.get("", Calibration()), dataset_N == dataset


def fit_calibrations(
    probability_N3: NDArray[np.floating],
    grade_N: NDArray[np.integer],
    datasets: Sequence[str],
    queries: Sequence[str],
    decision: Decision,
) -> dict[str, Calibration]:
    """Calibrations of judged pairs by data set, and of any other pairs, ''.

    Which pairs people judge is a choice, and so are the rates of their grades. What the labeller is asked besides,
    sampled and mined pairs or another shop's, has others: there it keeps the rates of its tuning set, '' is a
    temperature alone, and a grade is the most probable one.
    """
    dataset_N, query_N = np.array(datasets, dtype=object), np.array(queries, dtype=object)
    usual = Calibration(temperature=fit_temperature(probability_N3, grade_N, query_weights(queries)))
    found = {"": usual}
    for dataset in sorted(set(datasets)):
        rows = dataset_N == dataset
        weight_N = query_weights(query_N[rows].tolist())
        own = fit_calibration(probability_N3[rows], grade_N[rows], weight_N, usual)
        cuts = rate_cuts(own(probability_N3[rows]), weight_N) if decision == "rates" else None
        found[dataset] = dataclasses.replace(own, cuts=cuts)
    return found


def query_weights(queries: Sequence[str] | Sequence[int]) -> NDArray[np.float64]:
    """Weight of each pair, [N], by which no query counts as more than `PAIRS_PER_QUERY`."""
    size = Counter(queries)
    return np.array([min(1.0, PAIRS_PER_QUERY / size[query]) for query in queries])


def fit_calibration(
    probability_N3: NDArray[np.floating],
    grade_N: NDArray[np.integer],
    weight_N: NDArray[np.floating],
    usual: Calibration,
) -> Calibration:
    """The likeliest calibration by pairs that the labeller did not learn from, known to be near the usual one.

    Without pairs it is the usual one. Curves are fitted where the weights sum to `PAIRS_FOR_CURVES`.
    """
    if not len(grade_N):
        return usual
    log_temperature, *bias = _fit_scale(probability_N3, grade_N, weight_N, usual, _OWN_DEVIATION)
    scale = Calibration(temperature=_rounded(np.exp(log_temperature)), bias=_rounded_bias(bias))
    if weight_N.sum() < PAIRS_FOR_CURVES:
        return scale
    relevant_N, exact_N = _boundaries(scale(probability_N3))
    positive_N = grade_N >= 1
    return Calibration(
        temperature=scale.temperature,
        bias=scale.bias,
        relevant=_fit_curve(relevant_N, positive_N),
        exact=_fit_curve(exact_N[positive_N], grade_N[positive_N] == 2),
    )


def rate_cuts(calibrated_N3: NDArray[np.floating], weight_N: NDArray[np.floating]) -> tuple[float, float]:
    """Cuts of the expected grade that give each grade as often as the probabilities say it occurs.

    A rare grade is hardly ever the most probable one: of Home Depot's pairs 7 % are irrelevant, of their most probable
    grades 1 %. Chance-corrected agreement is best near equal rates, and this needs no search on noisy kappas.

    Cites: Lipton et al. 2014 (arXiv 1402.1892) for optimal cuts below the most probable class.
    """
    expected_N = expected_grade(calibrated_N3)
    order = np.argsort(expected_N, kind="stable")
    below_N = np.cumsum(weight_N[order]) / weight_N.sum()
    rate_3 = weight_N @ calibrated_N3 / weight_N.sum()
    low, high = (
        expected_N[order][min(int(np.searchsorted(below_N, rate)), len(order) - 1)] for rate in rate_3.cumsum()[:2]
    )
    return _rounded(low), _rounded(high)


def fit_class_rates(
    calibration: Calibration, probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer]
) -> Calibration:
    """The calibration of a population with other class rates, from a small sample of it.

    Args:
        calibration: of the population that the labeller knows.
        probability_N3: uncalibrated probabilities of the sample.
        grade_N: its grades by people.

    Returns:
        The old temperature with the biases that the sample asks for, of which one far from the old needs evidence.
        Curves are left out, since they belong to the old class rates.
    """
    plain = Calibration(temperature=calibration.temperature, bias=calibration.bias)
    if not len(grade_N):
        return plain
    added = _fit_scale(plain(probability_N3), grade_N, np.ones(len(grade_N)), Calibration(), _SAMPLE_DEVIATION)[1:]
    bias = [old + new for old, new in zip(plain.bias, added, strict=True)]
    return Calibration(temperature=calibration.temperature, bias=_rounded_bias(bias))


def fit_temperature(
    probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer], weight_N: NDArray[np.floating]
) -> float:
    """The likeliest temperature, in [0.05, 20]; 1 where there are no pairs."""
    if not len(grade_N):
        return 1.0
    scale = _fit_scale(probability_N3, grade_N, weight_N, Calibration(), _TEMPERATURE_ALONE)
    return _rounded(float(np.exp(scale[0])))


def _fit_scale(
    probability_N3: NDArray[np.floating],
    grade_N: NDArray[np.integer],
    weight_N: NDArray[np.floating],
    usual: Calibration,
    deviations: tuple[float, float, float, float],
) -> list[float]:
    """Log temperature and biases of greatest posterior under a normal prior about the usual ones."""
    from scipy.optimize import minimize

    chosen, deviation_4 = (np.arange(len(grade_N)), grade_N), np.array(deviations)
    centre_4 = np.array([np.log(usual.temperature), *usual.bias])
    places = np.flatnonzero(deviation_4)

    def full(free: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = centre_4.copy()
        scale[places] = free
        return scale

    def loss(free: NDArray[np.float64]) -> float:
        likelihood_N = np.maximum(_scaled(probability_N3, full(free))[chosen], _SMALLEST)
        departure = (free - centre_4[places]) / deviation_4[places]
        return float(-(weight_N * np.log(likelihood_N)).sum() + (departure**2).sum() / 2)

    bounds = [(float(np.log(0.05)), float(np.log(20.0))), *[(-10.0, 10.0)] * 3]
    found = minimize(loss, centre_4[places], method="L-BFGS-B", bounds=[bounds[place] for place in places])
    return [float(value) for value in full(found.x)]


def _boundaries(probability_N3: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """P(grade >= 1) and P(grade 2 given grade >= 1), [N] each."""
    # sums of rounded shares may pass 1 by a bit
    relevant_N = np.minimum(probability_N3[:, 1] + probability_N3[:, 2], 1.0)
    return relevant_N, np.minimum(probability_N3[:, 2] / np.maximum(relevant_N, _SMALLEST), 1.0)


def _scaled(probability_N3: NDArray[np.floating], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    log_N3 = np.log(np.maximum(probability_N3.astype(np.float64), _SMALLEST)) / np.exp(scale[0]) + scale[1:]
    scaled_N3 = np.exp(log_N3 - log_N3.max(axis=1, keepdims=True))
    return np.asarray(scaled_N3 / scaled_N3.sum(axis=1, keepdims=True))


def _fit_curve(before_N: NDArray[np.float64], is_above_N: NDArray[np.bool_]) -> Curve:
    """Knots of a rising curve through (0, 0) and (1, 1): isotonic means of equally large groups, joined by lines.

    Lines instead of steps keep pairs apart that the labeller tells apart, and half a pair on either side keeps a group
    from being certain.
    """
    from sklearn.isotonic import IsotonicRegression

    if not len(before_N):
        return ()
    groups = np.array_split(np.argsort(before_N, kind="stable"), max(1, len(before_N) // PAIRS_PER_KNOT))
    middle_K = np.array([before_N[group].mean() for group in groups])
    share_K = np.array([(is_above_N[group].sum() + 0.5) / (len(group) + 1) for group in groups])
    size_K = np.array([len(group) for group in groups])
    rising_K = IsotonicRegression(y_min=0.0, y_max=1.0).fit(middle_K, share_K, sample_weight=size_K).predict(middle_K)
    knots = {0.0: 0.0} | {_rounded(x): _rounded(y) for x, y in zip(middle_K, rising_K, strict=True)} | {1.0: 1.0}
    return tuple(knots.items())


def _follow(curve: Curve, before_N: NDArray[np.float64]) -> NDArray[np.float64]:
    if not curve:
        return before_N
    x_K, y_K = np.array(curve).T
    return np.asarray(np.interp(before_N, x_K, y_K))


def _rounded(value: float) -> float:
    """Six digits: the card shows it, and the labeller's fingerprint hangs on it."""
    return float(f"{value:.6g}")


def _rounded_bias(bias: list[float]) -> tuple[float, float, float]:
    zero, one, two = (round(value, 6) for value in bias)
    return zero, one, two
