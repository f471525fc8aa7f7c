"""Labellers judge the review queue again; where they agree a pair is settled, the rest goes to experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import ConfigError, meaning, settings
from embeddings.calibration import PROBABILITIES
from embeddings.labeller import LabellerCard, load_labeller_card
from jobs import job, labelling
from jobs.export_review import read_batch
from jobs.grading import Graded, GradingRecipe, addressed, grade_pairs, held_grades
from jobs.import_verdicts import append_verdicts
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import AUDIT_VERDICT, JUDGES_PREFIX, PAIR_GRADE, REVIEW_GRADE, REVIEW_ROUTE, ROUTES
from ray_apps.placements import LabelPlacement

KEPT, CHANGED, TO_EXPERT = ROUTES


@settings
class Inputs:
    """The queue, its texts and who judges."""

    review_queue: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    labellers: Annotated[
        tuple[str, ...],
        meaning("folders of labellers that had not learned from these pairs, below the lake or anywhere"),
    ] = ()


@settings
class ReviewRecipe(GradingRecipe):
    """Which batch is judged, and when labellers settle a pair."""

    batch: Annotated[str, meaning("batch of the queue; empty: the newest")] = ""
    min_probability: Annotated[
        float, meaning("that every labeller gives the grade they agree on, for a grade to change", "0..1", ge=0, le=1)
    ] = 0.8
    accept_agreed: Annotated[
        bool, meaning("another grade that all agree on becomes a verdict; else the pair goes to experts")
    ] = False


@settings
class Config:
    """Settings of review_conflicts."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ReviewRecipe = ReviewRecipe()
    placement: LabelPlacement = LabelPlacement()


class Routed(NamedTuple):
    """Where N pairs go.

    Attributes:
        route_N: of ROUTES.
        agreed_N: whether all labellers give one other grade than people, surely enough.
        joint_N: most probable grade of all labellers together; -1 where one gave none.
        least_N: probability that the least sure of them gives it; nan where one gave none.
    """

    route_N: NDArray[np.str_]
    agreed_N: NDArray[np.bool_]
    joint_N: NDArray[np.int64]
    least_N: NDArray[np.float64]


def run(config: Config) -> RunRecord:
    """Replaces the batch's rows of review_grade and review_route; the grades stand in the ledger, each asked once.

    Raises:
        ConfigError: no labeller is named, or there is no such batch.
        GateError: a labeller answers otherwise than when it was tuned.
    """
    if not config.inputs.labellers:
        raise ConfigError("inputs.labellers: a review needs a labeller or more; give inputs.labellers=[DIR]")
    current = job.begin(config, "review_conflicts")
    folders = [labelling.labeller_folder(current.lake, one, "inputs.labellers") for one in config.inputs.labellers]
    cards, texts = [load_labeller_card(folder) for folder in folders], labelling.PairTexts(current)
    batch, queue = read_batch(current, config.recipe.batch)
    keys = texts.keys(_pairs(queue))
    graded = [
        grade_pairs(current, addressed(keys, card), texts, folder, config.recipe, config.placement)
        for card, folder in zip(cards, folders, strict=True)
    ]
    probability_JN3, grade_JN = held_grades(current.lake, keys, cards)
    routed = route_pairs(keys["grade"].to_numpy(), probability_JN3, grade_JN, config.recipe)
    outputs = _write(current, batch, keys, cards, routed, probability_JN3, grade_JN)
    accepted = 0
    if config.recipe.accept_agreed:
        accepted = append_verdicts(current, _new_verdicts(current, batch, keys, cards, routed))
        outputs[AUDIT_VERDICT.name] = tables.version(current.lake, AUDIT_VERDICT) or 0
    by_route = {route: int((routed.route_N == route).sum()) for route in ROUTES}
    by_route["agreed_on_another"] = int(routed.agreed_N.sum())
    missing = len(queue) - len(keys)
    return current.finish(
        rows=len(keys),
        outputs=outputs,
        counts={"queued": len(queue), "without_text": missing, "verdicts": accepted} | by_route | _counts(graded),
        metrics=_costs(graded, config.placement),
    )


def route_pairs(
    human_N: NDArray[np.integer],
    probability_JN3: NDArray[np.floating],
    grade_JN: NDArray[np.integer],
    recipe: ReviewRecipe,
) -> Routed:
    """Where pairs go: kept where all labellers give the human grade, else to experts unless the change is accepted.

    Args:
        human_N: the grade in doubt.
        probability_JN3: of the labellers; nan where one gave none.
        grade_JN: their grades; -1 where one gave none.
        recipe: how sure all must be of another grade, and whether that is accepted without an expert.
    """
    is_told_N = np.asarray((grade_JN >= 0).all(axis=0))
    agree_N = is_told_N & (grade_JN == grade_JN[0]).all(axis=0)
    mean_N3 = np.where(is_told_N[:, None], probability_JN3.mean(axis=0), 0.0)
    joint_N = np.where(agree_N, grade_JN[0], mean_N3.argmax(axis=1))
    least_N = np.take_along_axis(probability_JN3.min(axis=0), joint_N[:, None], axis=1)[:, 0]
    is_other_N = agree_N & (joint_N != human_N) & (least_N >= recipe.min_probability)
    route_N = np.where(agree_N & (joint_N == human_N), KEPT, TO_EXPERT)
    if recipe.accept_agreed:
        route_N = np.where(is_other_N, CHANGED, route_N)
    return Routed(route_N, is_other_N, np.where(is_told_N, joint_N, -1), np.where(is_told_N, least_N, np.nan))


def _pairs(queue: Sequence[Mapping[str, Any]]) -> pa.Table:
    kinds = {name: pa.string() for name in labelling.PAIR} | {"grade": pa.int8()}
    return pa.Table.from_pylist([{name: row[name] for name in kinds} for row in queue], pa.schema(list(kinds.items())))


def _write(
    current: Run,
    batch: str,
    keys: pa.Table,
    cards: Sequence[LabellerCard],
    routed: Routed,
    probability_JN3: NDArray[np.floating],
    grade_JN: NDArray[np.integer],
) -> dict[str, int | str]:
    """Replaces the batch's rows; returns the tables' versions."""
    where = tables.equal_to({"batch": batch})
    outputs: dict[str, int | str] = {PAIR_GRADE.name: tables.version(current.lake, PAIR_GRADE) or 0}
    per_labeller = []
    for card, probability_N3, grade_N in zip(cards, probability_JN3, grade_JN, strict=True):
        told = {"grade": pa.array(grade_N, pa.int8())}
        told |= {name: pa.array(probability_N3[:, place]) for place, name in enumerate(PROBABILITIES)}
        rows = _rows(current, batch, keys, told | {"labeller": _repeated(card.fingerprint, len(keys))})
        per_labeller.append(rows.filter(pa.array(grade_N >= 0, pa.bool_())))
    routes = {
        "route": pa.array(routed.route_N.tolist(), pa.string()),
        "joint_grade": pa.array(routed.joint_N, pa.int8(), mask=routed.joint_N < 0),
        "least_probability": pa.array(routed.least_N, pa.float64(), mask=np.isnan(routed.least_N)),
        "labellers": _repeated(" ".join(sorted(card.fingerprint for card in cards)), len(keys)),
    }
    found = ((REVIEW_GRADE, pa.concat_tables(per_labeller)), (REVIEW_ROUTE, _rows(current, batch, keys, routes)))
    for spec, rows in found:
        outputs[spec.name] = tables.replace(current.lake, spec, rows, run_id=current.run_id, where=where)
    return outputs


def _rows(current: Run, batch: str, keys: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    fixed = {name: keys[name] for name in labelling.PAIR} | {
        name: _repeated(value, len(keys)) for name, value in (("batch", batch), ("run_id", current.run_id))
    }
    now = pa.array([datetime.now(UTC)] * len(keys), pa.timestamp("us", tz="UTC"))
    return pa.table(fixed | dict(columns) | {"created_at": now})


def _repeated(value: str, times: int) -> pa.Array:
    return pa.array([value] * times, pa.string())


def _new_verdicts(
    current: Run, batch: str, keys: pa.Table, cards: Sequence[LabellerCard], routed: Routed
) -> list[dict[str, Any]]:
    """Verdicts of the labellers on pairs that they change, without those they have given for this batch already."""
    expert = JUDGES_PREFIX + "+".join(sorted(card.fingerprint for card in cards))
    names = [*labelling.PAIR, "grade"]
    held: set[tuple[Any, ...]] = set()
    if tables.exists(current.lake, AUDIT_VERDICT):
        own = [("expert", "=", expert), ("batch", "=", batch)]
        rows = tables.rows(current.lake, AUDIT_VERDICT, columns=names, where=own)
        held = {tuple(row.values()) for row in rows.to_pylist()}
    told = {"expert": expert, "decided_at": current.started_at, "batch": batch}
    told |= {"guideline": " ".join(sorted({card.guideline for card in cards}))}
    pairs = keys.select(labelling.PAIR).to_pylist()
    verdicts = [
        pairs[row] | told | {"grade": int(routed.joint_N[row]), "note": f"each at least {routed.least_N[row]:.2f} sure"}
        for row in np.flatnonzero(routed.route_N == CHANGED)
    ]
    return [row for row in verdicts if tuple(row[name] for name in names) not in held]


def _counts(graded: Sequence[Graded]) -> dict[str, int]:
    """Of all labellers together."""
    counts = [one.counts() for one in graded]
    return {name: sum(one[name] for one in counts) for name in counts[0]}


def _costs(graded: Sequence[Graded], placement: LabelPlacement) -> dict[str, float]:
    """Engine-hours and money of all labellers together; nothing where no engine was asked."""
    metrics = [one.metrics(placement) for one in graded]
    return {name: sum(one.get(name, 0.0) for one in metrics) for name in ("engine_hours", "cost") if any(metrics)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("review_conflicts", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
