"""Class rates of a population of pairs that people did not choose, from a small sample of it that people have graded.

What is sampled, mined or found in another shop's catalogue holds other shares of exact and irrelevant products than the
pairs the labeller was tuned on, and its probabilities lean to those. Without a sample this job draws one, for people to
fill in; with one it fits what Bayes' rule adds to the log probabilities per grade. The ledger stays as it is:
build_instances adds the correction to what it reads.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.load import ConfigError, meaning, settings
from embeddings.calibration import PROBABILITIES, Calibration, fit_class_rates, probabilities_of
from embeddings.labeller import load_labeller_card
from embeddings.labeller_metrics import calibration_error
from jobs import job, labelling
from jobs.grading import addressed
from jobs.label_file import read_pairs
from lake import tables
from lake.ledger import rows_at
from lake.runs import Run, RunRecord
from lake.schemas import CANDIDATE_PAIR, CLASS_RATE, CandidateSource
from lake.storage import replace_text

GRADE_MARKS = ("", "0", "1", "2")
SAMPLE_COLUMNS = ("dataset", "query_id", "product_id", "query", "title", "grade")


@settings
class Inputs:
    """The population's pairs, what the labeller says of them, and what people say of some."""

    candidate_pair: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    pair_grade: job.TableVersion = "newest"
    labeller: Annotated[str, meaning("folder of the labeller, below the lake or anywhere; empty: the newest")] = ""
    file: Annotated[
        str, meaning("graded sample, CSV, JSONL or Parquet: dataset, query_id, product_id, grade; empty draws one")
    ] = ""


@settings
class RatesRecipe:
    """Which population."""

    source: Annotated[CandidateSource, meaning("source of the candidates that are the population")] = "mined"
    draw: Annotated[int, meaning("pairs drawn per data set where no sample is given", "pairs", ge=1)] = 100
    min_pairs: Annotated[int, meaning("graded pairs that a data set needs for rates of its own", "pairs", ge=1)] = 30


@settings
class Config:
    """Settings of correct_class_rates."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: RatesRecipe = RatesRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """Draws a sample into reports/, or fits the rates of a graded one into class_rate."""
    config = labelling.with_newest_labeller(config)
    current = job.begin(config, "correct_class_rates")
    card = load_labeller_card(labelling.labeller_folder(current.lake, config.inputs.labeller))
    texts = labelling.PairTexts(current)
    candidates = labelling.read(current, CANDIDATE_PAIR, [*labelling.PAIR, "source"])
    population = candidates.filter(pc.equal(candidates["source"], config.recipe.source)).select(labelling.PAIR)
    keys = addressed(texts.keys(population), card)
    held = rows_at(current.lake, keys["address"], ["address", *PROBABILITIES])
    row = pc.index_in(keys["address"], value_set=held["address"].combine_chunks())
    keys, row = keys.filter(pc.is_valid(row)), row.drop_null()
    for name in PROBABILITIES:
        keys = keys.append_column(name, held[name].take(row))
    if not len(keys):
        raise ConfigError(
            f"correct_class_rates: no pair of source {config.recipe.source} has a grade by this labeller; "
            "run label_pairs first, or give recipe.source"
        )
    if not config.inputs.file:
        return _draw(current, keys, texts, config.recipe)
    return _fit(current, with_sample(keys, config.inputs.file), card.fingerprint, config.recipe)


def with_sample(keys: pa.Table, path: str) -> pa.Table:
    """Those of the pairs that the file grades, with its grade.

    Raises:
        ConfigError: the file lacks a column, or a grade is none.
    """
    sample, unread = read_pairs(path, required=(*labelling.PAIR, "grade"), added=())
    columns = [sample[name].cast(pa.string()).to_pylist() for name in (*labelling.PAIR, "grade")]
    grades: dict[tuple[str, ...], int] = {}
    for number, (*pair, mark) in enumerate(zip(*columns, strict=True), start=1):
        grade = (mark or "").strip()
        if grade not in GRADE_MARKS:
            unread.append(f"row {number}: grade {grade!r}")
        elif grade:
            grades[tuple(pair)] = int(grade)
    if unread:
        raise ConfigError(f"inputs.file={path!r}: expected grades 0, 1, 2 or nothing, got {unread[0]}")
    pairs = zip(*(keys[name].to_pylist() for name in labelling.PAIR), strict=True)
    found = pa.array([grades.get(pair) for pair in pairs], pa.int8())
    return keys.append_column("grade", found).filter(pc.is_valid(found))


def _draw(current: Run, keys: pa.Table, texts: labelling.PairTexts, recipe: RatesRecipe) -> RunRecord:
    """A CSV of pairs by chance, the same whenever it is drawn, with the grade left to people."""
    order = [hashlib.sha256(name.encode()).hexdigest() for name in keys["address"].to_pylist()]
    keys = keys.append_column("order", pa.array(order)).sort_by([("dataset", "ascending"), ("order", "ascending")])
    datasets = np.array(keys["dataset"].to_pylist())
    place = np.arange(len(keys)) - np.searchsorted(datasets, datasets, side="left")
    drawn = keys.filter(pa.array(place < recipe.draw))
    shown = texts.take(drawn, ("query", "title"))
    stream = io.StringIO()
    lines = csv.writer(stream)
    lines.writerow(SAMPLE_COLUMNS)
    columns = [drawn[name].to_pylist() for name in labelling.PAIR] + [shown[n].to_pylist() for n in ("query", "title")]
    lines.writerows([*row, ""] for row in zip(*columns, strict=True))
    path = f"reports/sample-{recipe.source}-{current.fingerprint}.csv"
    replace_text(current.lake.path(path), stream.getvalue())
    return current.finish(rows=len(drawn), outputs={"sample": path}, counts={"population": len(keys)})


def _fit(current: Run, graded: pa.Table, labeller: str, recipe: RatesRecipe) -> RunRecord:
    rows, counts, metrics = [], {"graded": len(graded)}, {}
    for dataset in sorted(set(graded["dataset"].to_pylist())):
        own = graded.filter(pc.equal(graded["dataset"], dataset))
        counts[f"graded/{dataset}"] = len(own)
        if len(own) < recipe.min_pairs:
            continue
        before_N3, grade_N = probabilities_of(own), own["grade"].to_numpy()
        found = fit_class_rates(Calibration(), before_N3, grade_N)
        after_N3 = found(before_N3)
        for name, value_N3 in (("before", before_N3), ("after", after_N3)):
            metrics[f"{dataset}/ece_{name}"] = calibration_error(value_N3, grade_N)
            metrics[f"{dataset}/accuracy_{name}"] = float((value_N3.argmax(axis=1) == grade_N).mean())
        rows.append(
            {"labeller": labeller, "dataset": dataset, "source": recipe.source, "num_pairs": len(own)}
            | {f"bias_{grade}": float(found.bias[grade]) for grade in range(3)}
            | {"run_id": current.run_id, "created_at": datetime.now(UTC)}
        )
    if not rows:
        raise ConfigError(
            f"correct_class_rates: the sample grades {len(graded)} pairs of source {recipe.source}; "
            f"a data set needs {recipe.min_pairs}; grade more, or lower recipe.min_pairs"
        )
    version = 0
    for row in rows:
        key = {name: row[name] for name in CLASS_RATE.key}
        data = pa.Table.from_pylist([row], schema=CLASS_RATE.schema)
        version = tables.replace(current.lake, CLASS_RATE, data, run_id=current.run_id, where=tables.equal_to(key))
    return current.finish(rows=len(rows), outputs={CLASS_RATE.name: version}, counts=counts, metrics=metrics)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("correct_class_rates", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
