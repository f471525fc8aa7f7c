"""What grading will take, before anything runs: pairs, tokens, engine-hours and money, from measured rates."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from embeddings.labeller import load_pair_encoder
from jobs import labelling
from lake import runs
from lake.runs import Run
from ray_apps.placements import LabelPlacement

SAMPLE_PAIRS = 500
"""Pairs whose tokens are counted."""
TIMED_PAIRS = 128
"""Of those, pairs that are graded where no run has measured this labeller yet."""
LEAST_ASKED = 200
"""Pairs that a run must have asked for its rate to count."""
SAMPLE = "a sample, graded by torch in this process"


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """What grading will take.

    Attributes:
        pairs: that the engine will be asked for.
        tokens: of all of them.
        tokens_per_pair: mean of a sample.
        tokens_per_sec: of all engines.
        start_sec: until the engine's first answers.
        engine_hours: of all engines together; GPU-hours where they have graphics cards.
        cost: in `currency`; 0 where `placement.price_per_hour` is not given.
        measured_by: the run whose rate this is, or `SAMPLE`.
        on_gpu: whether the engines have graphics cards.
    """

    pairs: int
    tokens: int
    tokens_per_pair: float
    tokens_per_sec: float
    start_sec: float
    engine_hours: float
    cost: float
    currency: str
    measured_by: str
    on_gpu: bool

    def metrics(self) -> dict[str, float]:
        """For the run record, beside what it took then."""
        names = ("pairs", "tokens", "engine_hours", "cost")
        return {f"planned_{name}": float(getattr(self, name)) for name in names}


def plan_cost(
    current: Run, waiting: pa.Table, texts: labelling.PairTexts, folder: str, placement: LabelPlacement
) -> CostPlan:
    """The plan for pairs that are not in the ledger.

    Args:
        current: the run that would grade them.
        waiting: keys of `texts`.
        texts: that they refer to.
        folder: of the labeller.
        placement: engine and price.
    """
    if not len(waiting):
        return _plan(placement, 0, 0.0, _Rate(0.0, 0.0, ""))
    rows = np.unique(np.linspace(0, len(waiting) - 1, min(SAMPLE_PAIRS, len(waiting))).astype(np.int64))
    sample = texts.take(waiting.take(pa.array(rows)))
    tokens = [len(pair) for pair in load_pair_encoder(folder).encode_rows(sample)]
    rate = _measured(current, placement, placement.engine_for(len(waiting)))
    if rate is None:
        few = sample.slice(0, TIMED_PAIRS)
        rate = _Rate(sum(tokens[: len(few)]) / _timed(few, folder), 0.0, SAMPLE)
    return _plan(placement, len(waiting), float(np.mean(tokens)), rate)


class _Rate(NamedTuple):
    """Tokens per second of all engines, seconds until their first answers, and who measured it."""

    tokens_per_sec: float
    start_sec: float
    by: str


def _plan(placement: LabelPlacement, pairs: int, tokens_per_pair: float, rate: _Rate) -> CostPlan:
    tokens = round(pairs * tokens_per_pair)
    seconds = rate.start_sec + tokens / rate.tokens_per_sec if pairs else 0.0
    return CostPlan(
        pairs=pairs,
        tokens=tokens,
        tokens_per_pair=tokens_per_pair,
        tokens_per_sec=rate.tokens_per_sec,
        start_sec=rate.start_sec,
        engine_hours=seconds * placement.num_engines / 3600,
        cost=placement.cost(seconds),
        currency=placement.currency,
        measured_by=rate.by,
        on_gpu=placement.use_gpu,
    )


def _measured(current: Run, placement: LabelPlacement, engine: str) -> _Rate | None:
    """The rate of the newest run with this labeller on this kind of engine, for as many engines as are asked for."""
    for record in reversed(runs.records(current.lake)):
        found = record.metrics
        is_same = (
            record.inputs.get("labeller") == current.inputs["labeller"]
            and record.counts.get("asked", 0) >= LEAST_ASKED
            and (found["is_vllm"], found["on_gpu"]) == (engine == "vllm", placement.use_gpu)
        )
        if is_same:
            engines = placement.num_engines / found["num_engines"]
            return _Rate(found["tokens_per_sec"] * engines, found["start_sec"], f"run {record.run_id}")
    return None


def _timed(sample: pa.Table, folder: str) -> float:
    """Seconds that torch takes for the sample in this process, its start apart."""
    own = LabelPlacement(engine="torch")
    labelling.graded_in_order(sample.slice(0, 8), folder, own)
    began = time.monotonic()
    labelling.graded_in_order(sample, folder, own)
    return max(time.monotonic() - began, 1e-9)


def affordable(plan: CostPlan, placement: LabelPlacement, *, max_pairs: int, max_hours: float, max_cost: float) -> int:
    """How many of the plan's pairs every budget allows; 0 stands for no bound of its kind."""
    allowed = float(max_pairs or plan.pairs)
    hours = [max_hours] if max_hours else []
    if max_cost and placement.price_per_hour:
        hours.append(max_cost / placement.price_per_hour)
    for bound in hours:
        seconds = bound * 3600 / placement.num_engines - plan.start_sec
        allowed = min(allowed, max(0.0, seconds * plan.tokens_per_sec / max(plan.tokens_per_pair, 1e-9)))
    return min(plan.pairs, int(allowed))


def scaled(plan: CostPlan, pairs: int, placement: LabelPlacement) -> CostPlan:
    """The plan for some of its pairs."""
    rate = _Rate(plan.tokens_per_sec, plan.start_sec, plan.measured_by)
    return _plan(placement, pairs, plan.tokens_per_pair, rate)


def render(plan: CostPlan) -> str:
    """The plan in words, one fact per line."""
    if not plan.pairs:
        return "nothing to grade: every pair is in the ledger, or the budget allows none"
    money = f"{plan.cost:,.4g} {plan.currency}" if plan.cost else "unknown; give placement.price_per_hour"
    return "\n".join(
        [
            f"pairs          {plan.pairs:,}",
            f"tokens         {plan.tokens:,} ({plan.tokens_per_pair:.1f} a pair)",
            f"tokens/s       {plan.tokens_per_sec:,.0f}, measured by {plan.measured_by}",
            f"{'GPU-hours' if plan.on_gpu else 'engine-hours':<14} {plan.engine_hours:.4g}",
            f"money          {money}",
        ]
    )
