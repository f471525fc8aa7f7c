"""Grades the pairs of a CSV, JSONL or Parquet file with the trained labeller."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv, parquet

from conf.load import ConfigError, meaning, settings
from jobs import job, models
from lake.runs import RunRecord
from ray_apps.placements import LabelPlacement

REQUIRED = ("query", "title")
OPTIONAL = ("description", "brand", "category", "attributes")
ADDED = ("grade", "p0", "p1", "p2", "reason")
FORMATS = (".csv", ".jsonl", ".parquet")


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
    table = read_pairs(config.inputs.file)
    check_columns(config.out, table)
    current = job.begin(config, "label_file")
    folder = config.inputs.labeller and job.find_path(current.lake, config.inputs.labeller)
    folder = folder or (config.inputs.labeller or models.labeller_folder(current.lake))
    reasons = refusals(table, config.recipe)
    rows = np.flatnonzero([reason is None for reason in reasons])
    probability_N3 = np.full((len(table), 3), np.nan)
    if len(rows):
        from ray_apps.label import label_pairs

        texts = [name for name in (*REQUIRED, *OPTIONAL) if name in table.column_names]
        asked = pa.table({name: table[name].cast(pa.string()) for name in texts}).take(rows)
        asked = asked.append_column("address", pa.array([f"{row:012d}" for row in rows]))
        asked = asked.append_column("dataset", pa.array([config.inputs.dataset] * len(rows), pa.string()))
        for part in label_pairs(asked, folder, config.placement):
            places = [int(address) for address in part["address"].to_pylist()]
            probability_N3[places] = np.stack([part[f"p{grade}"].to_numpy() for grade in range(3)], axis=1)
    for row in rows[np.isnan(probability_N3[rows]).any(axis=1)]:
        reasons[row] = "the labeller gave no probabilities"
    write_pairs(with_grades(table, probability_N3, reasons), config.out)
    num_refused = sum(reason is not None for reason in reasons)
    counts = {"rows": len(table), "labelled": len(table) - num_refused, "rejected": num_refused}
    return current.finish(rows=counts["labelled"], outputs={"file": str(Path(config.out).resolve())}, counts=counts)


def read_pairs(path: str) -> pa.Table:
    """The file's rows; CSV columns as text, so that nothing is reformatted.

    Raises:
        ConfigError: no such file, a format we do not read, or a column is missing or taken.
        ValueError: the file cannot be read as what its name says.
    """
    kind = Path(path).suffix
    if not Path(path).is_file() or kind not in FORMATS:
        raise ConfigError(f"inputs.file={path!r}: expected an existing file that ends in {', '.join(FORMATS)}")
    try:
        table = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": parquet.read_table}[kind](path)
    except (pa.ArrowException, OSError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from error
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{path}: has the column {repeated[0]!r} more than once; rename one")
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; columns are {', '.join(table.column_names)}")
    taken = [name for name in ADDED if name in table.column_names]
    if taken:
        raise ConfigError(f"{path}: has a column {taken[0]!r} already, which the grades would overwrite; rename it")
    return table


def _read_csv(path: str) -> pa.Table:
    with csv.open_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)) as reader:
        names = reader.schema.names
    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
        ),
    )


def _read_jsonl(path: str) -> pa.Table:
    """Rows of JSON objects; values keep their types where a column has one, and are JSON text where it has several."""
    rows = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is no JSON object; give one object per line")
            if row:
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


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
    reasons: list[str | None] = []
    for query, title in zip(*(table[name].cast(pa.string()).to_pylist() for name in REQUIRED), strict=True):
        if not (query or "").strip():
            reasons.append("query is empty")
        elif not (title or "").strip():
            reasons.append("title is empty")
        elif len(query) > recipe.max_query_chars:
            reasons.append(f"query is longer than {recipe.max_query_chars} characters")
        else:
            reasons.append(None)
    return reasons


def with_grades(table: pa.Table, probability_N3: NDArray[np.float64], reasons: list[str | None]) -> pa.Table:
    """The rows with their grades; the column reason is there only where a row needs one."""
    missing_N = np.isnan(probability_N3).any(axis=1)
    best_N = np.where(missing_N, 0, np.nan_to_num(probability_N3).argmax(axis=1))
    table = table.append_column("grade", pa.array(best_N, pa.int8(), mask=missing_N))
    for grade in range(3):
        table = table.append_column(f"p{grade}", pa.array(probability_N3[:, grade], pa.float64(), mask=missing_N))
    if any(reasons):
        table = table.append_column("reason", pa.array(reasons, pa.string()))
    return table


def write_pairs(table: pa.Table, out: str) -> None:
    """Writes the rows in the format of the name; the file appears whole or not at all."""
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.part")
    try:
        if target.suffix == ".csv":
            csv.write_csv(table, scratch)
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
