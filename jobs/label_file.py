"""Grades the pairs of a CSV, JSONL or Parquet file with the trained labeller."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from conf.load import ConfigError, meaning, settings
from embeddings.calibration import grades_of
from embeddings.labeller import load_labeller_card
from jobs import job, labelling, models
from lake.runs import RunRecord
from ray_apps.placements import LabelPlacement

REQUIRED = ("query", "title")
OPTIONAL = ("description", "brand", "category", "attributes")
ADDED = ("grade", "p0", "p1", "p2", "reason")
FORMATS = (".csv", ".jsonl", ".parquet")
MAX_SHOWN_CHARS = 200
MAX_LINES_OF_ROW = 100
"""Lines that a quoted field may span."""


@settings
class Inputs:
    """The file and the judge."""

    file: Annotated[str, meaning("CSV, JSONL or Parquet file with the columns query and title")] = ""
    labeller: Annotated[str, meaning("folder of the labeller; empty takes the lake's newest")] = ""
    dataset: Annotated[
        str, meaning("data set whose judged pairs these are like, for its calibration; empty: of any other pairs")
    ] = ""


@settings
class FileRecipe:
    """Which rows are graded; the others keep an empty grade and say why."""

    max_query_chars: Annotated[int, meaning("longest query that is graded", "characters", ge=1)] = 1000
    max_text_chars: Annotated[int, meaning("longest text of a product that is graded", "characters", ge=1)] = 50_000


@settings
class Config:
    """Settings of label_file."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    out: Annotated[str, meaning("file to write; .csv, .jsonl or .parquet")] = ""
    inputs: Inputs = Inputs()
    recipe: FileRecipe = FileRecipe()
    placement: LabelPlacement = LabelPlacement(engine="auto")


def run(config: Config) -> RunRecord:
    """All columns of the file plus grade, p0, p1 and p2, and reason where any row could not be graded."""
    if Path(config.out).suffix not in FORMATS:
        raise ConfigError(f"out={config.out!r}: expected a name that ends in {', '.join(FORMATS)}")
    table, unread = read_pairs(config.inputs.file)
    check_columns(config.out, table)
    current = job.begin(config, "label_file")
    folder = config.inputs.labeller and job.find_path(current.lake, config.inputs.labeller)
    folder = folder or (config.inputs.labeller or models.labeller_folder(current.lake))
    reasons = refusals(table, config.recipe)
    rows = np.flatnonzero([reason is None for reason in reasons])
    probability_N3 = np.full((len(table), 3), np.nan)
    if len(rows):
        texts = [name for name in (*REQUIRED, *OPTIONAL) if name in table.column_names]
        asked = pa.table({name: table[name].cast(pa.string()) for name in texts}).take(rows)
        asked = asked.append_column("dataset", pa.array([config.inputs.dataset] * len(rows), pa.string()))
        probability_N3[rows] = labelling.graded_in_order(asked, folder, config.placement)
    for row in rows[np.isnan(probability_N3[rows]).any(axis=1)]:
        reasons[row] = "the labeller gave no probabilities"
    grade_N = grades_of(load_labeller_card(folder).calibrations, [config.inputs.dataset] * len(table), probability_N3)
    write_pairs(with_grades(table, probability_N3, grade_N, reasons, unread), config.out)
    num_refused = sum(reason is not None for reason in reasons) + len(unread)
    num_rows = len(table) + len(unread)
    counts = {"rows": num_rows, "labelled": num_rows - num_refused, "rejected": num_refused}
    return current.finish(rows=counts["labelled"], outputs={"file": str(Path(config.out).resolve())}, counts=counts)


def read_pairs(
    path: str, required: Sequence[str] = REQUIRED, added: Sequence[str] = ADDED
) -> tuple[pa.Table, list[str]]:
    """The file's rows, CSV columns as text, so that nothing is reformatted; and what is wrong with those it has not.

    Args:
        path: of the file.
        required: columns it must have.
        added: columns it must not have, since they will be added.

    Raises:
        ConfigError: no such file, a format we do not read, or a column is missing or taken.
        ValueError: the file cannot be read as what its name says.
    """
    kind = Path(path).suffix
    if not Path(path).is_file() or kind not in FORMATS:
        raise ConfigError(f"inputs.file={path!r}: expected an existing file that ends in {', '.join(FORMATS)}")
    try:
        table, unread = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[kind](path)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from error
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{path}: has the column {repeated[0]!r} more than once; rename one")
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; columns are {', '.join(table.column_names)}")
    taken = [name for name in added if name in table.column_names]
    if taken:
        raise ConfigError(f"{path}: has a column {taken[0]!r} already, which the grades would overwrite; rename it")
    return table, unread


def _read_parquet(path: str) -> tuple[pa.Table, list[str]]:
    return parquet.read_table(path), []


def _read_csv(path: str) -> tuple[pa.Table, list[str]]:
    """Quoted fields may span lines; a line that no row can be made of costs itself alone, not those after it."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        lines = stream.readlines()
    rows: list[list[str]] = []
    unread: list[str] = []
    start = 0
    while start < len(lines):
        row, end, error = _csv_row(lines, start)
        width = len(rows[0]) if rows else len(row)
        if error or (row and len(row) != width):
            shown = error or f"{len(row)} fields instead of {width}"
            unread.append(f"line {start + 1} is no row ({shown}): {_shortened(lines[start])}")
            end = start + 1
        elif row:
            rows.append(row)
        start = end
    names, *values = rows or [[]]
    columns = [pa.array([value or None for value in column], pa.string()) for column in zip(*values, strict=True)]
    return pa.table(columns or [pa.array([], pa.string())] * len(names), names=names), unread


def _csv_row(lines: list[str], start: int) -> tuple[list[str], int, str]:
    """The row that begins at a line, the line after it, and what is wrong with it."""
    for end in range(start + 1, min(start + MAX_LINES_OF_ROW, len(lines)) + 1):
        try:
            row = next(csv.reader(lines[start:end], strict=True), [])
        except csv.Error as error:
            if "end of data" not in str(error):
                return [], end, str(error)
        else:
            return row, end, ""
    return [], start + 1, "a quote is not closed"


def _read_jsonl(path: str) -> tuple[pa.Table, list[str]]:
    """Rows of JSON objects; values keep their types where a column has one, and are JSON text where it has several."""
    rows, unread = [], []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                unread.append(f"line {number} is no JSON ({error.msg}): {_shortened(line)}")
                continue
            if not isinstance(row, dict):
                unread.append(f"line {number} is no JSON object: {_shortened(line)}")
            elif row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _json_column([row.get(name) for row in rows]) for name in names}), unread


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN_CHARS else f"{line[:MAX_SHOWN_CHARS]}..."


def _json_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # several types, or an integer past 64 bits
        texts = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
        return pa.array(texts, pa.string())


def check_columns(out: str, table: pa.Table) -> None:
    """Refuses columns that could not be written, before anything is graded.

    Raises:
        ConfigError: the format of `out` cannot hold one.
    """
    nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
    if Path(out).suffix == ".csv" and nested:
        raise ConfigError(f"out={out}: CSV cannot hold column {nested[0]!r}, which has lists or objects; give .jsonl")


def refusals(table: pa.Table, recipe: FileRecipe) -> list[str | None]:
    """Why a row is not graded; None where it is."""
    names = [name for name in (*REQUIRED, *OPTIONAL) if name in table.column_names]
    rows = zip(*(table[name].cast(pa.string()).to_pylist() for name in names), strict=True)
    return [_refusal(dict(zip(names, row, strict=True)), recipe) for row in rows]


def _refusal(row: dict[str, str | None], recipe: FileRecipe) -> str | None:
    query = row.pop("query") or ""
    if not query.strip():
        return "query is empty"
    if not (row["title"] or "").strip():
        return "title is empty"
    if len(query) > recipe.max_query_chars:
        return f"query is longer than {recipe.max_query_chars} characters"
    long = [name for name, text in row.items() if len(text or "") > recipe.max_text_chars]
    return f"{long[0]} is longer than {recipe.max_text_chars} characters" if long else None


def with_grades(
    table: pa.Table,
    probability_N3: NDArray[np.float64],
    grade_N: NDArray[np.int64],
    reasons: list[str | None],
    unread: list[str],
) -> pa.Table:
    """The rows with their grades; what could not be read stands last, with nothing but the reason.

    The column reason is there only where a row needs one.
    """
    missing_N = np.isnan(probability_N3).any(axis=1)
    table = table.append_column("grade", pa.array(grade_N, pa.int8(), mask=missing_N))
    for grade in range(3):
        table = table.append_column(f"p{grade}", pa.array(probability_N3[:, grade], pa.float64(), mask=missing_N))
    if any(reasons) or unread:
        table = table.append_column("reason", pa.array(reasons, pa.string()))
        table = pa.concat_tables([table, pa.Table.from_pylist([{"reason": one} for one in unread], table.schema)])
    return table


def write_pairs(table: pa.Table, out: str) -> None:
    """Writes the rows in the format of the name; the file appears whole or not at all."""
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.part")
    try:
        if target.suffix == ".csv":
            arrow_csv.write_csv(table, scratch)
        elif target.suffix == ".parquet":
            parquet.write_table(table, scratch)
        else:
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist())
            scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("label_file", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
