"""Attraction of pairs: the click rate that clicks, carts and purchases together let expect.

Of most pairs a log holds a handful of clicks. What the same shoppers then put into their carts and bought tells as much
again, because what is liked is clicked, carted and bought oftener than its query and its place let expect. So pairs are
taken to be of a few classes, each with a lift for every kind of event: how many times what is expected a pair of the
class brings. In a class lifts vary by a Gamma distribution, and of a pair's lift the events are Poisson, each kind for
itself. A pair's attraction is the mean of its click rate after all its events; with many of them its own count decides.

The classes of a data set are a prior of free form (Laird 1978; Koenker and Mizera 2014), found by expectation
maximisation on a sample of its pairs, in memory; how much lifts vary in a class is what makes the sample likeliest.
"""

# N pairs, J kinds of events, K classes

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

logger = logging.getLogger(__name__)

NUM_CLASSES: Final = 6
"""Eight are not worth their parameters on simulated shops (BIC), fewer order pairs worse (benchmarks/results.md)."""
MAX_SAMPLE: Final = 20_000
"""Pairs of a data set that its classes are found from."""
_FIRST_SHAPE: Final = 30.0
_OTHER_SHAPES: Final = ((10.0, 3.0, 1.0), (100.0, 300.0))
"""Of the Gamma distribution in a class, whose lifts deviate from their mean by one over its root; tried in this order,
each way as long as the sample grows likelier."""
_FIRST_LIFTS: Final = (0.1, 4.0)
_MAX_ROUNDS: Final = 300
_CONVERGED: Final = 1e-6
"""Log likelihood that a round gains per pair, below which the classes stay as they are."""
_PRIOR_PAIRS: Final = 1.0
"""Pairs of lift 1 that a class is taken to have seen, so that an event that never happens has a lift all the same."""
_LEAST_DUE: Final = 1e-12
_BUCKETS: Final = 1 << 20


class PairClasses(NamedTuple):
    """Classes of a data set's pairs.

    Attributes:
        shape: of the Gamma distribution of lifts in a class.
        share_K: of the pairs.
        lift_KJ: mean lift of each kind of event.
        log_likelihood: of the sample, but for what hangs on no class.
    """

    shape: float
    share_K: NDArray[np.float64]
    lift_KJ: NDArray[np.float64]
    log_likelihood: float


def fit_classes(seen_NJ: NDArray[np.float64], due_NJ: NDArray[np.float64]) -> PairClasses:
    """The likeliest classes under the likeliest shape.

    Args:
        seen_NJ: events.
        due_NJ: events that query and place let expect, above 0.
    """
    order_N = np.lexsort(np.concatenate([seen_NJ, due_NJ], axis=1).T)
    # in an order of their own: sums are then the same whatever order the rows came in
    seen_NJ, due_NJ = seen_NJ[order_N], due_NJ[order_N]
    num_kinds = seen_NJ.shape[1]
    first_KJ = np.repeat(np.geomspace(*_FIRST_LIFTS, NUM_CLASSES)[:, None], num_kinds, axis=1)
    best = _fit(seen_NJ, due_NJ, _FIRST_SHAPE, np.full(NUM_CLASSES, 1 / NUM_CLASSES), first_KJ)
    for shapes in _OTHER_SHAPES:
        for shape in shapes:
            found = _fit(seen_NJ, due_NJ, shape, best.share_K, best.lift_KJ)
            if found.log_likelihood <= best.log_likelihood:
                break
            best = found
    return best


def _fit(
    seen_NJ: NDArray[np.float64],
    due_NJ: NDArray[np.float64],
    shape: float,
    share_K: NDArray[np.float64],
    lift_KJ: NDArray[np.float64],
) -> PairClasses:
    """The likeliest classes from these on: expectation maximisation."""
    from scipy.special import gammaln

    of_shape = float((gammaln(seen_NJ + shape) - gammaln(shape) + seen_NJ * np.log(due_NJ)).sum())
    before = -np.inf
    for _ in range(_MAX_ROUNDS):
        inverse_KJ = shape / lift_KJ
        log_NKJ = np.log(due_NJ[:, None] + inverse_KJ)
        log_NK = np.log(share_K) + (shape * np.log(inverse_KJ) - (seen_NJ[:, None] + shape) * log_NKJ).sum(axis=2)
        most_N = log_NK.max(axis=1, keepdims=True)
        class_NK = np.exp(log_NK - most_N)
        total_N = class_NK.sum(axis=1, keepdims=True)
        class_NK /= total_N
        likelihood = of_shape + float((most_N + np.log(total_N)).sum())
        if likelihood - before < _CONVERGED * len(seen_NJ):
            break
        before = likelihood
        lift_NKJ = (seen_NJ[:, None] + shape) * np.exp(-log_NKJ)
        size_K = class_NK.sum(axis=0)
        share_K = (size_K + _PRIOR_PAIRS) / (size_K.sum() + NUM_CLASSES * _PRIOR_PAIRS)
        lift_KJ = (np.einsum("nk,nkj->kj", class_NK, lift_NKJ) + _PRIOR_PAIRS) / (size_K + _PRIOR_PAIRS)[:, None]
    return PairClasses(shape, share_K, lift_KJ, likelihood)


def with_attraction(pairs: DataFrame, kinds: Sequence[str], most: float = 1.0) -> DataFrame:
    """Adds `attraction`: the rate of the first kind per look after all events; null where a data set has no look.

    Args:
        pairs: dataset, query_id, product_id, trials and for each kind its column of events and, as NAME_mean, the rate
            per look that is expected; read twice, so persist what is dear to compute.
        kinds: names of the columns of events.
        most: rate per look that none is above.
    """
    known = pairs.where((sf.col("trials") > 0) & sf.col(f"{kinds[0]}_mean").isNotNull())
    fits = {dataset: fit_classes(*sample) for dataset, sample in _samples(known, kinds).items()}
    for dataset, found in fits.items():
        classes = zip(found.share_K, found.lift_KJ[:, 0], strict=True)
        told = ", ".join(f"{share:.2f} of lift {lift:.2f}" for share, lift in classes)
        logger.info("attraction in %s: %s; shape %g", dataset, told, found.shape)
    names = [(f"class_{place}", [f"class_{place}_{name}" for name in kinds]) for place in range(NUM_CLASSES)]
    flat = [name for constant, inverses in names for name in (constant, *inverses)]
    schema = ", ".join(["dataset string", "shape double", *(f"{name} double" for name in flat)])
    rows = [(dataset, found.shape, *_constants(found)) for dataset, found in fits.items()]
    joined = pairs.join(sf.broadcast(pairs.sparkSession.createDataFrame(rows, schema)), on="dataset", how="left")
    log_of = {f"log_{place}": _log_of_class(kinds, *columns) for place, columns in enumerate(names)}
    weighed = joined.withColumns(log_of).withColumn("most_likely", sf.greatest(*log_of))
    weighed = weighed.withColumns({name: sf.exp(sf.col(name) - sf.col("most_likely")) for name in log_of})
    first = kinds[0]
    lift = [
        sf.col(name) / (_due(first) + sf.col(inverses[0])) for name, (_, inverses) in zip(log_of, names, strict=True)
    ]
    total = reduce(Column.__add__, map(sf.col, log_of))
    events = sf.col(first) + sf.col("shape")
    rate = sf.col(f"{first}_mean") * events * reduce(Column.__add__, lift) / total
    attraction = sf.when(rate.isNotNull(), sf.least(rate, sf.lit(most)))
    return weighed.withColumn("attraction", attraction).drop("shape", "most_likely", *flat, *log_of)


def _samples(known: DataFrame, kinds: Sequence[str]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Of each data set, events and expected events of up to about MAX_SAMPLE pairs, drawn by a hash of their keys."""
    sizes = {row["dataset"]: row["count"] for row in known.groupBy("dataset").count().collect()}
    kept = [(dataset, min(_BUCKETS, _BUCKETS * MAX_SAMPLE // size)) for dataset, size in sizes.items()]
    bounds = sf.broadcast(known.sparkSession.createDataFrame(kept, "dataset string, bound bigint"))
    bucket = sf.pmod(sf.xxhash64("query_id", "product_id"), sf.lit(_BUCKETS))
    drawn = known.join(bounds, on="dataset").where(bucket < sf.col("bound"))
    seen = [sf.col(name).cast("double").alias(name) for name in kinds]
    table = drawn.select("dataset", *seen, *(_due(name).alias(f"{name}_due") for name in kinds)).toArrow()
    number_ND = np.stack([column.to_numpy() for column in table.drop_columns("dataset").itercolumns()], axis=1)
    dataset_N = table["dataset"].to_numpy()
    return {
        dataset: (number_ND[rows, : len(kinds)], number_ND[rows, len(kinds) :])
        for dataset in sizes
        if len(rows := np.flatnonzero(dataset_N == dataset))
    }


def _due(name: str) -> Column:
    return sf.greatest(sf.col("trials") * sf.col(f"{name}_mean"), sf.lit(_LEAST_DUE))


def _constants(found: PairClasses) -> list[float]:
    """Per class the part of its log probability that hangs on no pair, and shape over lift of each kind of event."""
    inverse_KJ = found.shape / found.lift_KJ
    constant_K = np.log(found.share_K) + found.shape * np.log(inverse_KJ).sum(axis=1)
    return [float(value) for value in np.column_stack([constant_K, inverse_KJ]).ravel()]


def _log_of_class(kinds: Sequence[str], constant: str, inverses: Sequence[str]) -> Column:
    """Log probability of a class and a pair's events together, but for what is the same in all classes."""
    events = [
        (sf.col(name) + sf.col("shape")) * sf.log(_due(name) + sf.col(inverse))
        for name, inverse in zip(kinds, inverses, strict=True)
    ]
    return reduce(Column.__sub__, events, sf.col(constant))
