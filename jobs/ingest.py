"""Raw files into catalogue, queries with splits, marks and gold; bad rows go to quarantine with reasons."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pyarrow as pa

from conf.load import ConfigError, meaning, settings
from jobs import job, quality
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import CATALOG_PRODUCT, GOLD_QUESTION, HUMAN_ANNOTATION, QUARANTINE, QUERY, TABLES
from lake.spark import SparkPlacement
from lake.storage import Lake
from spark_etl.recipes import IngestRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@settings
class Inputs:
    """Raw folders, one per data set."""

    raw: Annotated[
        tuple[str, ...],
        meaning("raw folders, in the lake or elsewhere; the last part names the data set", min_length=1),
    ] = ("raw/market",)


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of ingest."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: IngestRecipe = IngestRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the four tables, each in one commit, after every row of all of them has been checked.

    Raises:
        ValueError: a folder or file is missing or damaged, too many rows cannot be used, or the lake holds other
            data sets; no table but quarantine is changed then.
        GateError: the tables are not what the last ones let expect.
    """
    from lake import spark as lake_spark
    from spark_etl import checked, ingest
    from spark_etl.raw import reading

    current = job.begin(config, "ingest")
    folders = raw_folders(current.lake, config.inputs.raw)
    ingest.check_folders(folders)
    check_held(current.lake, set(folders))
    spark = lake_spark.session(config.placement.spark)
    with (
        tempfile.TemporaryDirectory() as scratch,
        reading(list(folders.values())),
        lake_spark.keeping() as keep,
    ):
        frames = ingest.check_tables(spark, folders, config.recipe, scratch=Path(scratch), keep=keep)
        counts = {name: checked.tally(frame) for name, frame in frames.items()}
        by_source = quarantine(current, "source", ingest.read_rejected(spark, folders, Path(scratch)))
        for name, frame in frames.items():
            if any(count.num_rejected for count in counts[name]):
                quarantine(current, name, checked.rejected(frame, TABLES[name]))
        place = f"the table quarantine of lake={config.lake}, run_id={current.run_id}"
        ingest.check_kept(counts, folders, place)
        for name, found in counts.items():
            checked.check_rejected(found, name, config.recipe.max_rejected_fraction, place)
        # Products and queries before what names them. A crash in between leaves no record: the next run replaces all.
        specs = (CATALOG_PRODUCT, QUERY, HUMAN_ANNOTATION, GOLD_QUESTION)
        kept = {spec: checked.kept(frames[spec.name], spec) for spec in specs}
        with quality.gated(current, kept, config.recipe.quality):
            outputs = {
                spec.name: lake_spark.replace(spark, current.lake, spec, rows, run_id=current.run_id)
                for spec, rows in kept.items()
            }
    summed = {
        f"{name}{kind}": number for name, found in counts.items() for kind, number in checked.summed(found).items()
    }
    rows_written = sum(summed[name] for name in counts)
    return current.finish(rows=rows_written, outputs=outputs, counts=summed | {"rejected_by_source": by_source})


def raw_folders(lake: Lake, inputs: Sequence[str]) -> dict[str, str]:
    """Data set -> its raw folder.

    Raises:
        ValueError: a folder does not exist, or two have the same name.
    """
    folders: dict[str, str] = {}
    for item in inputs:
        folder, dataset = job.find_path(lake, item), Path(item).name
        if folder is None:
            raise ValueError(f"{item}: no such folder in lake={lake.root}; run simulate or import_dataset first")
        if dataset in folders:
            raise ValueError(f"two folders are named {dataset!r}, which names the data set; rename one")
        folders[dataset] = folder
    return folders


def check_held(lake: Lake, datasets: set[str]) -> None:
    """Refuses to drop data sets that the lake holds and this run does not bring.

    Raises:
        ConfigError: there are such data sets.
    """
    for spec in (CATALOG_PRODUCT, QUERY):
        held = tables.datasets(lake, spec) if tables.exists(lake, spec) else set()
        if lost := ", ".join(sorted(held - datasets)):
            raise ConfigError(
                f"lake={lake.root} also holds {lost}, which this run would drop; name all data sets in inputs.raw "
                "or another lake=DIR"
            )


def quarantine(current: Run, part: str, refused: DataFrame) -> int:
    """Hands refused rows to delta-rs as one part of the run; returns their number."""
    found = refused.toArrow().sort_by([("dataset", "ascending"), ("row", "ascending"), ("reason", "ascending")])
    size = found.num_rows
    if size:
        columns = {
            "run_id": pa.array([current.run_id] * size),
            "part": pa.array([part] * size),
            "row_number": pa.array(range(size), pa.int64()),
            "created_at": pa.array([datetime.now(UTC)] * size, pa.timestamp("us", tz="UTC")),
        }
        for name, values in columns.items():
            found = found.append_column(name, values)
        tables.append_once(current.lake, QUARANTINE, found, run_id=current.run_id, part=part)
    return int(size)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("ingest", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
