"""From what a labeller answers to how often it is right: temperature, class biases, and a curve per boundary.

A labeller's probabilities are fitted to the population they were tuned on and usually too sure. Three numbers (one
temperature, biases of two classes) repair most of that and are safe to fit on a few hundred pairs; where calibration
pairs are many, P(grade >= 1) and P(grade 2 given >= 1) follow monotone curves besides.
The biases are also what a population with other class rates needs: by Bayes' rule its prior enters the log
probabilities as a constant per class.

Cites: Guo et al. 2017 (arXiv 1706.04599), sections 4.1 and 4.2, for temperature, biases and isotonic regression;
Saerens et al. 2002 for class priors.
"""

# N pairs, K knots of a curve

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import meaning, settings

PROBABILITIES: Final = ("p0", "p1", "p2")
"""Columns of the calibrated probabilities of grades 0, 1 and 2, wherever rows have them."""
PAIRS_FOR_CURVES: Final = 1000
"""Calibration pairs from which on the boundaries get curves; below, the curves would fit chance."""
PAIRS_FOR_OWN_CALIBRATION: Final = 200
"""Calibration pairs from which on a data set has a calibration of its own."""
PAIRS_PER_KNOT: Final = 100
_SMALLEST = 1e-30
_BIAS_DEVIATION = 2.0
"""Standard deviation of the normal prior on biases, in nats: keeps a class that the sample lacks possible."""

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

    def __call__(self, probability_N3: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated probabilities, [N, 3]; rows sum to 1."""
        relevant_N, exact_N = _boundaries(_scaled(probability_N3, np.array([np.log(self.temperature), *self.bias])))
        relevant_N, exact_N = _follow(self.relevant, relevant_N), _follow(self.exact, exact_N)
        return np.stack([1 - relevant_N, relevant_N * (1 - exact_N), relevant_N * exact_N], axis=1)


def probabilities_of(rows: pa.Table) -> NDArray[np.float64]:
    """The columns p0, p1 and p2 as one array, [N, 3]."""
    return np.stack([rows[name].to_numpy() for name in PROBABILITIES], axis=1)


def calibrate(
    calibrations: Mapping[str, Calibration], datasets: Sequence[str], probability_N3: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Calibrated probabilities, [N, 3]: by its data set's calibration, or by that of any other pairs; nan stays nan."""
    calibrated_N3, dataset_N = np.empty(probability_N3.shape), np.array(datasets, dtype=object)
    for dataset in sorted(set(datasets)):
        rows = dataset_N == dataset
        chosen = calibrations.get(dataset) or calibrations.get("", Calibration())
        calibrated_N3[rows] = chosen(probability_N3[rows])
    return calibrated_N3


def fit_calibrations(
    probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer], datasets: Sequence[str]
) -> dict[str, Calibration]:
    """Calibrations of judged pairs by data set, and of any other pairs, ''.

    Which pairs people judge is a choice, and so are the rates of their grades. What the labeller is asked besides,
    sampled and mined pairs or another shop's, has others: there it keeps the rates of its tuning set, and '' is a
    temperature alone.
    """
    dataset_N = np.array(datasets, dtype=object)
    found = {"": Calibration(temperature=fit_temperature(probability_N3, grade_N))}
    for dataset in sorted(set(datasets)):
        rows = dataset_N == dataset
        if rows.sum() >= PAIRS_FOR_OWN_CALIBRATION:
            found[dataset] = fit_calibration(probability_N3[rows], grade_N[rows])
    return found


def fit_calibration(probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer]) -> Calibration:
    """The calibration of least negative log-likelihood on pairs that the labeller did not learn from.

    Without pairs it changes nothing. Curves are fitted from `PAIRS_FOR_CURVES` pairs on.
    """
    if not len(grade_N):
        return Calibration()
    log_temperature, *bias = _fit_scale(probability_N3, grade_N, is_free=("temperature", "bias"))
    scale = Calibration(temperature=_rounded(np.exp(log_temperature)), bias=_rounded_bias(bias))
    if len(grade_N) < PAIRS_FOR_CURVES:
        return scale
    relevant_N, exact_N = _boundaries(scale(probability_N3))
    positive_N = grade_N >= 1
    return Calibration(
        temperature=scale.temperature,
        bias=scale.bias,
        relevant=_fit_curve(relevant_N, positive_N),
        exact=_fit_curve(exact_N[positive_N], grade_N[positive_N] == 2),
    )


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
    added = _fit_scale(plain(probability_N3), grade_N, is_free=("bias",))[1:]
    bias = [old + new for old, new in zip(plain.bias, added, strict=True)]
    return Calibration(temperature=calibration.temperature, bias=_rounded_bias(bias))


def fit_temperature(probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer]) -> float:
    """The temperature of least negative log-likelihood, in [0.05, 20]; 1 where there are no pairs."""
    if not len(grade_N):
        return 1.0
    return _rounded(float(np.exp(_fit_scale(probability_N3, grade_N, is_free=("temperature",))[0])))


def _fit_scale(
    probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer], *, is_free: Sequence[str]
) -> list[float]:
    """Log temperature and the biases, grade 1's at 0, of least loss; what is not free stays 0."""
    from scipy.optimize import minimize

    chosen = (np.arange(len(grade_N)), grade_N)
    places = [0] * ("temperature" in is_free) + [1, 3] * ("bias" in is_free)

    def full(free: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = np.zeros(4)
        scale[places] = free
        return scale

    def loss(free: NDArray[np.float64]) -> float:
        scale = full(free)
        likelihood_N = np.maximum(_scaled(probability_N3, scale)[chosen], _SMALLEST)
        return float(-np.log(likelihood_N).sum() + (scale[1:] ** 2).sum() / (2 * _BIAS_DEVIATION**2))

    bounds = [(float(np.log(0.05)), float(np.log(20.0))), (-10.0, 10.0), (0.0, 0.0), (-10.0, 10.0)]
    start = np.zeros(len(places))
    found = minimize(loss, start, method="L-BFGS-B", bounds=[bounds[place] for place in places])
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
