"""What grading will take, before anything runs: pairs, tokens, engine-hours and money, from measured rates."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embeddings.labeller import load_pair_encoder
from embeddings.sampling import evenly_spread
from jobs import labelling
from jobs.grading import STRONGER, GradingRecipe, expected_squared_error
from lake import runs
from lake.runs import Run
from ray_apps.placements import LabelPlacement

SAMPLE_PAIRS = 500
"""Pairs whose tokens are counted."""
TIMED_PAIRS = 128
"""Of those, pairs that are graded where no run has measured a labeller yet, or to see how many are abstentions."""
LEAST_ASKED = 200
"""Pairs that a run must have asked for its rate to count."""
SAMPLE = "a sample, graded by torch in this process"
Role = Literal["labeller", "stronger"]
"""Name of the input that says which labeller it is."""


@dataclasses.dataclass(frozen=True)
class CostPlan:
    """What grading will take.

    Attributes:
        pairs: that the engine will be asked for.
        tokens: of all of them.
        tokens_per_pair: mean of a sample.
        tokens_per_sec: of all engines.
        start_sec: until the engine's first answers.
        engine_hours: of all engines together, the stronger labeller's among them; GPU-hours where they have graphics
            cards.
        cost: of these, in `currency`; 0 where `placement.price_per_hour` is not given.
        measured_by: the run whose rate this is, or `SAMPLE`.
        on_gpu: whether the engines have graphics cards.
        abstaining: share of the pairs that will go to the stronger labeller, of a sample; 0 without one.
        stronger: what those will take; None without one.
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
    abstaining: float = 0.0
    stronger: CostPlan | None = None

    def render(self) -> str:
        """The plan in words, one fact per line."""
        if not self.pairs:
            return "nothing to grade: every pair is in the ledger, or the budget allows none"
        money = f"{self.cost:,.4g} {self.currency}" if self.cost else "unknown; give placement.price_per_hour"
        lines = _facts(self)
        if self.stronger:
            lines += ["to the stronger labeller", *(f"  {line}" for line in _facts(self.stronger)), "both"]
        return "\n".join(
            [
                *lines,
                f"{'GPU-hours' if self.on_gpu else 'engine-hours':<14} {self.engine_hours:.4g}",
                f"money          {money}",
            ]
        )

    def metrics(self) -> dict[str, float]:
        """For the run record, beside what it took then."""
        names = ("pairs", "tokens", "engine_hours", "cost")
        found = {f"planned_{name}": float(getattr(self, name)) for name in names}
        return found | ({"planned_stronger_pairs": float(self.stronger.pairs)} if self.stronger else {})

    @property
    def sec_per_pair(self) -> float:
        """Of all engines, the stronger labeller's share in it."""
        own = self.tokens_per_pair / self.tokens_per_sec
        return own + (self.abstaining * self.stronger.sec_per_pair if self.stronger else 0.0)


def plan_cost(
    current: Run,
    waiting: pa.Table,
    texts: labelling.PairTexts,
    folders: tuple[str, str],
    recipe: GradingRecipe,
    placement: LabelPlacement,
) -> CostPlan:
    """The plan for pairs that are not in the ledger.

    Args:
        current: the run that would grade them.
        waiting: keys of `texts`.
        texts: that they refer to.
        folders: of the labeller and of the stronger one that abstentions go to, empty for none.
        recipe: what is an abstention.
        placement: engine and price.
    """
    if not len(waiting):
        return _plan(placement, 0, _Judge(0.0, 1.0, 0.0, ""))
    pairs = texts.take(waiting.take(pa.array(evenly_spread(len(waiting), SAMPLE_PAIRS))))
    sample = _Sample(pairs, folders[0])
    first = _judge(current, "labeller", sample, len(waiting), placement)
    if not folders[1]:
        return _plan(placement, len(waiting), first)
    answer_N3, _ = sample.graded
    answer_N3 = answer_N3[np.isfinite(answer_N3).all(axis=1)]
    doubtful_N = expected_squared_error(answer_N3, answer_N3.argmax(axis=1)) > recipe.abstain_risk
    abstaining = float(doubtful_N.mean()) if len(doubtful_N) else 0.0
    expected = max(1, round(len(waiting) * abstaining))
    second = _judge(current, "stronger", _Sample(pairs, folders[1]), expected, placement)
    return _plan(placement, len(waiting), first, abstaining, second)


class _Sample:
    """Some of the waiting pairs before one labeller, which grades them once and only where that is asked for."""

    def __init__(self, pairs: pa.Table, folder: str) -> None:
        self._pairs, self._folder = pairs, folder

    @cached_property
    def tokens(self) -> list[int]:
        """Of each pair."""
        return [len(pair) for pair in load_pair_encoder(self._folder).encode_rows(self._pairs)]

    @cached_property
    def graded(self) -> tuple[NDArray[np.float64], float]:
        """Answers of torch in this process to the first TIMED_PAIRS, and the seconds for them, its start apart."""
        own, few = LabelPlacement(engine="torch"), self._pairs.slice(0, TIMED_PAIRS)
        labelling.graded_in_order(few.slice(0, 8), self._folder, own)
        began = time.monotonic()
        answer_N3 = labelling.graded_in_order(few, self._folder, own)
        return answer_N3, max(time.monotonic() - began, 1e-9)


class _Judge(NamedTuple):
    """What a pair takes: its tokens, those that all engines do in a second, seconds until their first answers."""

    tokens_per_pair: float
    tokens_per_sec: float
    start_sec: float
    by: str


def _plan(
    placement: LabelPlacement, pairs: int, judge: _Judge, abstaining: float = 0.0, stronger: _Judge | None = None
) -> CostPlan:
    second = _plan(placement, round(pairs * abstaining), stronger) if stronger else None
    tokens = round(pairs * judge.tokens_per_pair)
    seconds = judge.start_sec + tokens / judge.tokens_per_sec if pairs else 0.0
    return CostPlan(
        pairs=pairs,
        tokens=tokens,
        tokens_per_pair=judge.tokens_per_pair,
        tokens_per_sec=judge.tokens_per_sec,
        start_sec=judge.start_sec,
        engine_hours=seconds * placement.num_engines / 3600 + (second.engine_hours if second else 0.0),
        cost=placement.cost(seconds) + (second.cost if second else 0.0),
        currency=placement.currency,
        measured_by=judge.by,
        on_gpu=placement.use_gpu,
        abstaining=abstaining,
        stronger=second,
    )


def _judge(current: Run, role: Role, sample: _Sample, num_pairs: int, placement: LabelPlacement) -> _Judge:
    """By the newest run with this labeller on this kind of engine, for as many engines, or by a sample."""
    per_pair, engine = float(np.mean(sample.tokens)), placement.engine_for(num_pairs)
    for record in reversed(runs.records(current.lake)):
        for other, prefix in (("labeller", ""), ("stronger", STRONGER)):
            found = {name[len(prefix) :]: value for name, value in record.metrics.items() if name.startswith(prefix)}
            is_same = (
                record.inputs.get(other) == current.inputs[role]
                and record.counts.get(f"{prefix}asked", 0) >= LEAST_ASKED
                and (found["is_vllm"], found["on_gpu"]) == (engine == "vllm", placement.use_gpu)
            )
            if is_same:
                engines = placement.num_engines / found["num_engines"]
                return _Judge(per_pair, found["tokens_per_sec"] * engines, found["start_sec"], f"run {record.run_id}")
    return _Judge(per_pair, sum(sample.tokens[:TIMED_PAIRS]) / sample.graded[1], 0.0, SAMPLE)


def affordable(plan: CostPlan, placement: LabelPlacement, *, max_pairs: int, max_hours: float, max_cost: float) -> int:
    """How many of the plan's pairs every budget allows; 0 stands for no bound of its kind."""
    allowed = float(max_pairs or plan.pairs)
    hours = [max_hours] if max_hours else []
    if max_cost and placement.price_per_hour:
        hours.append(max_cost / placement.price_per_hour)
    start_sec = plan.start_sec + (plan.stronger.start_sec if plan.stronger else 0.0)
    for bound in hours:
        seconds = bound * 3600 / placement.num_engines - start_sec
        allowed = min(allowed, max(0.0, seconds / max(plan.sec_per_pair, 1e-9)))
    return min(plan.pairs, int(allowed))


def scaled(plan: CostPlan, pairs: int, placement: LabelPlacement) -> CostPlan:
    """The plan for some of its pairs."""
    judges = [
        _Judge(own.tokens_per_pair, own.tokens_per_sec, own.start_sec, own.measured_by)
        for own in (plan, plan.stronger)
        if own is not None
    ]
    return _plan(placement, pairs, judges[0], plan.abstaining, *judges[1:])


def _facts(plan: CostPlan) -> list[str]:
    return [
        f"pairs          {plan.pairs:,}",
        f"tokens         {plan.tokens:,} ({plan.tokens_per_pair:.1f} a pair)",
        f"tokens/s       {plan.tokens_per_sec:,.0f}, measured by {plan.measured_by}",
    ]
