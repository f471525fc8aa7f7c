"""People's grades into the ledger: consensus of marks and experts' verdicts, found again wherever the texts return."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import settings
from embeddings.calibration import PROBABILITIES, probabilities_of
from jobs import job, labelling
from jobs.grading import ledger_rows, with_superseded
from lake import tables
from lake.ledger import Ledger
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, AUDIT_VERDICT, CONSENSUS, JUDGES_PREFIX, PAIR_GRADE

VERDICT = [*labelling.PAIR, "grade", "expert", "decided_at"]


@settings
class Inputs:
    """What people said, and the texts it is about."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = ""


@settings
class HumanRecipe:
    """Nothing to choose: people's grades are what they are."""


@settings
class Config:
    """Settings of record_human_grades."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: HumanRecipe = HumanRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """A row per grade of a pair of texts and who gave it; one that is there already is not written again."""
    current = job.begin(config, "record_human_grades")
    texts, counts = labelling.PairTexts(current), {"grades": 0, "reused": 0, "written": 0}
    # verdicts after marks, which they supersede
    for grades in human_grades(current):
        for name, value in _record(current, texts.keys(grades)).items():
            counts[name] += value
    outputs = {PAIR_GRADE.name: tables.version(current.lake, PAIR_GRADE) or 0}
    return current.finish(rows=counts["written"], outputs=outputs, counts=counts)


def _record(current: Run, keys: pa.Table) -> dict[str, int]:
    columns = [
        keys[name].to_pylist() for name in ("labeller", "nth", "grade", *PROBABILITIES, "query_hash", "product_hash")
    ]
    keys = keys.append_column("address", pa.array([address(*row) for row in zip(*columns, strict=True)], pa.string()))
    keys = keys.take(pa.array(np.unique(keys["address"].to_numpy(zero_copy_only=False), return_index=True)[1]))
    book = Ledger(current.lake, keys["address"])
    fresh = keys.filter(pa.array(~book.holds(keys["address"]), pa.bool_()))
    written = 0
    if len(fresh):
        shares_N3, grade_N = probabilities_of(fresh), fresh["grade"].to_numpy()
        keyed = with_superseded(current.lake, fresh)
        rows = ledger_rows(current, keyed, shares_N3, grade_N, judge="human", labeller=fresh["labeller"])
        written = book.append(rows, run_id=current.run_id)
    return {"grades": len(keys), "reused": len(keys) - len(fresh), "written": written}


def human_grades(current: Run) -> list[pa.Table]:
    """Consensus of the marks, then experts' verdicts in turn: pair, grade, labeller (who), nth, p0, p1, p2.

    The probabilities are the shares of raters that gave each grade; an expert is sure.
    """
    marks = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *labelling.GRADED, "judge"])
    marks = marks.filter(pa.array([judge == "human" for judge in marks["judge"].to_pylist()], pa.bool_()))
    above_N2 = np.stack([marks[f"at_least_{grade}"].to_numpy() for grade in (1, 2)], axis=1)
    share_N3 = np.stack([1 - above_N2[:, 0], above_N2[:, 0] - above_N2[:, 1], above_N2[:, 1]], axis=1)
    found = [_graded(marks, share_N3, [CONSENSUS] * len(marks))]
    if AUDIT_VERDICT.name in current.inputs:
        for verdicts in verdicts_in_turn(labelling.read(current, AUDIT_VERDICT, VERDICT)):
            shares_N3, who = np.eye(3)[verdicts["grade"].to_numpy()], verdicts["expert"].to_pylist()
            found.append(_graded(verdicts, shares_N3, who, verdicts["nth"].to_pylist()))
    return found


def verdicts_in_turn(verdicts: pa.Table) -> list[pa.Table]:
    """The first verdict of every pair, then the second of every pair that has one, and so on.

    So each supersedes the one before it, and the last is the one that counts in the consensus. `nth` says how often
    the expert has given the pair this grade: one who comes back to a grade gives a new one.
    """
    # what labellers decided together stands in the ledger as theirs
    rows = [row for row in verdicts.to_pylist() if not row["expert"].startswith(JUDGES_PREFIX)]
    rows.sort(key=lambda row: (row["expert"], row["grade"]), reverse=True)
    rows.sort(key=lambda row: row["decided_at"])
    turns: list[list[dict[str, Any]]] = []
    places: Counter[tuple[Any, ...]] = Counter()
    times: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        pair = tuple(row[name] for name in labelling.PAIR)
        given = (*pair, row["expert"], row["grade"])
        times[given] += 1
        if places[pair] == len(turns):
            turns.append([])
        turns[places[pair]].append(row | {"nth": times[given]})
        places[pair] += 1
    schema = verdicts.schema.append(pa.field("nth", pa.int32()))
    return [pa.Table.from_pylist(turn, schema) for turn in turns]


def _graded(pairs: pa.Table, share_N3: NDArray[np.float64], who: list[str], times: list[int] | None = None) -> pa.Table:
    columns = {name: pairs[name] for name in (*labelling.PAIR, "grade")} | {"labeller": pa.array(who, pa.string())}
    columns["nth"] = pa.array(times or [1] * len(pairs), pa.int32())
    return pa.table(columns | {name: share_N3[:, grade] for grade, name in enumerate(PROBABILITIES)})


def address(who: str, nth: int, grade: int, p0: float, p1: float, p2: float, query_hash: str, product_hash: str) -> str:
    """Content address of a human grade: who judged, the verdict and the texts, and how often from the second on."""
    verdict = f"{grade} {p0:.6f} {p1:.6f} {p2:.6f}" + (f" {nth}" if nth > 1 else "")
    return hashlib.sha256("\x1f".join(("human", who, verdict, query_hash, product_hash)).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("record_human_grades", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
