"""Shops' logs into events, day by day: only new deliveries are read, and only the days they touch are judged again."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa

from conf.load import ConfigError, fingerprint, meaning, settings
from jobs import job, quality
from jobs.ingest import raw_folders
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import (
    CATALOG_PRODUCT,
    EVENT_QUARANTINE,
    EVENT_TALLY,
    LOGGED_EVENT,
    LOGGED_QUERY,
    PLACE_COUNT,
    QUERY,
    SEARCH_EVENT,
    TableSpec,
)
from lake.spark import SparkPlacement
from spark_etl.recipes import EventLogRecipe, EventsRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

TABLES_WRITTEN = (LOGGED_EVENT, SEARCH_EVENT, PLACE_COUNT, LOGGED_QUERY, EVENT_QUARANTINE, EVENT_TALLY)
COUNTS = ("num_rows", "num_kept", "num_quarantined", "num_repeated", "num_passed_over")
NO_DAY, NO_FOLDER = "", "."
Tally = dict[str, Any]


@settings
class Inputs:
    """Logs, and the tables that say which queries and products there are."""

    logs: Annotated[
        tuple[str, ...],
        meaning(
            "folders, in the lake or elsewhere, whose events/ is the log: a folder per delivery, or files; the last "
            "part of the name is the data set",
            min_length=1,
        ),
    ] = ("raw/market",)
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"


@settings
class Placement:
    """Where Spark runs, and how much at once."""

    spark: SparkPlacement = SparkPlacement()
    rows_per_batch: Annotated[
        int, meaning("days are judged together up to so many rows, which bounds memory and disk", "rows", ge=1)
    ] = 5_000_000


@settings
class Config:
    """Settings of ingest_events."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: EventsRecipe = EventsRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the rows of new deliveries and the days that they touch.

    The tally comes last: what a crash leaves half done is not in it, and is done again by the next run.

    Raises:
        ConfigError: a data set has no queries or products in the lake.
        ValueError: a folder or file is missing or damaged, or too many rows cannot be used.
        GateError: days are not what those before let expect; they and later ones are not replaced.
    """
    from lake import spark as lake_spark
    from spark_etl.raw import reading

    current = job.begin(config, "ingest_events")
    folders = {name: Path(folder, "events") for name, folder in raw_folders(current.lake, config.inputs.logs).items()}
    check_known(current, set(folders))
    for spec in TABLES_WRITTEN:
        tables.create(current.lake, spec)
    spark = lake_spark.session(config.placement.spark)
    known = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    tally: list[Tally] = []
    with tempfile.TemporaryDirectory() as scratch, reading([str(folder) for folder in folders.values()]):
        for dataset, folder in folders.items():
            night = Night(current, spark, config, dataset, known)
            tally += night.ingest(folder, Path(scratch))
    counts = {name: sum(row[name] for row in tally) for name in COUNTS}
    counts["deliveries"] = len({(row["dataset"], row["delivery"]) for row in tally if row["fingerprint"]})
    counts["days"] = len({(row["dataset"], row["event_day"]) for row in tally} - {(name, NO_DAY) for name in folders})
    outputs = {spec.name: tables.version(current.lake, spec) or 0 for spec in TABLES_WRITTEN}
    return current.finish(rows=counts["num_kept"], outputs=outputs, counts=counts)


def check_known(current: Run, datasets: set[str]) -> None:
    """Refuses logs of data sets that the lake does not know.

    Raises:
        ConfigError: naming one.
    """
    for spec in (QUERY, CATALOG_PRODUCT):
        held = tables.datasets(current.lake, spec, int(current.inputs[spec.name]))
        if lost := sorted(datasets - held):
            raise ConfigError(
                f"inputs.logs: {spec.name} of lake={current.lake.root} has no row of {lost[0]}; run ingest with its "
                "raw folder first, or name the folder as the data set is named"
            )


@dataclasses.dataclass(frozen=True)
class Night:
    """What a run does for one data set.

    Attributes:
        known: the tables of queries and products.
    """

    current: Run
    spark: SparkSession
    config: Config
    dataset: str
    known: Mapping[str, DataFrame]

    def ingest(self, folder: Path, scratch: Path) -> list[Tally]:
        """Brings in what is new below the folder: the tally of the files read and of the days judged.

        Args:
            folder: of the log; one that does not exist is an empty log.
            scratch: for unpacked files.
        """
        from spark_etl.raw import find_files

        recipe = self.config.recipe
        found = find_files(folder) if folder.is_dir() else []
        files = {path: _delivery_and_file(folder, path) for path in found}
        prints = {named: _file_print(path, recipe.log) for path, named in files.items()}
        judged = fingerprint("judge_days", recipe.visits)
        held = self._held()
        new = changed_deliveries(prints, held)
        log.info("%s: new or changed are %d of %d deliveries", self.dataset, len(new), len({d for d, _ in prints}))
        touched = {row["event_day"] for row in held if row["delivery"] in new or row["judged"] not in (judged, "")}
        if recipe.judge_again == "all":
            touched |= {row["event_day"] for row in held}
        read = self._read({path: named for path, named in files.items() if named[0] in new}, scratch, prints)
        days = self._judge(touched - {NO_DAY}, new, {row["delivery"] for row in held} | new)
        check_sums(read, days)
        for row in read:  # the other rows of the file stand in their days
            row["num_rows"] = row["num_quarantined"] + row["num_passed_over"]
        gone = touched | {row["event_day"] for row in days}
        stay = [
            row
            for row in held
            if (row["delivery"] not in new if row["event_day"] == NO_DAY else row["event_day"] not in gone)
        ]
        if read or days:
            self._write_tally([*stay, *read, *(row | {"judged": judged} for row in days)])
        return read + days

    def _held(self) -> list[Tally]:
        found: list[Tally] = tables.rows(
            self.current.lake, EVENT_TALLY, where=[("dataset", "=", self.dataset)]
        ).to_pylist()
        return found

    def _read(
        self, files: Mapping[Path, tuple[str, str]], scratch: Path, prints: Mapping[tuple[str, str], str]
    ) -> list[Tally]:
        """Replaces the deliveries' rows; what became of each file's rows by themselves."""
        from pyspark.sql import functions as sf

        from spark_etl import event_log

        if not files:
            return []
        deliveries = {delivery for delivery, _ in files.values()}
        rows = event_log.read_log(self.spark, self.dataset, files, self.config.recipe.log, scratch)
        where = tables.one_of("delivery", deliveries)
        self._replace(LOGGED_EVENT, rows, where)
        logged = self._rows(LOGGED_EVENT).where(where)
        counted = {(row["delivery"], row["file"]): row.asDict() for row in event_log.tally_deliveries(logged).collect()}
        tally = [
            self._tally(delivery, file, NO_DAY, counted.get((delivery, file), {}), prints[delivery, file])
            for delivery, file in files.values()
        ]
        no_event = logged.where(sf.col("event_day").isNull())
        parts = {f"delivery={delivery}" for delivery in deliveries}
        self._replace_refused(event_log.refused_of_deliveries(no_event), parts, tally)
        self._check_rejected(tally)
        return tally

    def _judge(self, touched: set[str], new: set[str], deliveries: set[str]) -> list[Tally]:
        """Replaces the days that are touched or have rows of new deliveries; what became of each file's rows there."""
        from pyspark.sql import functions as sf

        logged = self._rows(LOGGED_EVENT).where("event_day IS NOT NULL").where(tables.one_of("delivery", deliveries))
        days = logged.withColumn("is_new", sf.col("delivery").isin(*new) if new else sf.lit(False)).groupBy("event_day")
        sizes = {
            str(row["event_day"]): row["size"]
            for row in days.agg(sf.count("*").alias("size"), sf.max("is_new").alias("is_new")).collect()
            if row["is_new"] or str(row["event_day"]) in touched
        }
        tally: list[Tally] = []
        for batch in day_batches(dict.fromkeys(touched, 0) | sizes, self.config.placement.rows_per_batch):
            tally += self._judge_batch(logged, batch)
        return tally

    def _judge_batch(self, logged: DataFrame, batch: Sequence[str]) -> list[Tally]:
        from lake import spark as lake_spark
        from spark_etl import visits

        where = _days(batch)
        products, queries = (self.known[spec.name].where(self._mine) for spec in (CATALOG_PRODUCT, QUERY))
        with lake_spark.keeping() as keep:
            judged = keep(visits.judge_days(logged.where(where), queries, products, self.config.recipe.visits))
            tally = [
                self._tally(row["delivery"], row["file"], str(row["event_day"]), row.asDict(), "")
                for row in visits.tally_days(judged).collect()
            ]
            self._replace_refused(visits.refused_of_days(judged), {f"day={day}" for day in batch}, tally)
            self._check_rejected(tally)
            kept = judged.where("reason IS NULL")
            with quality.gated(self.current, {SEARCH_EVENT: kept}, self.config.recipe.quality, part=f"/{batch[0]}"):
                self._replace(SEARCH_EVENT, kept, where)
            self._replace(LOGGED_QUERY, visits.list_new_queries(judged), where)
        self._replace(PLACE_COUNT, visits.count_places(self._rows(SEARCH_EVENT).where(where)), where)
        log.info("%s: judged %d days up to %s", self.dataset, len(batch), batch[-1])
        return tally

    def _replace_refused(self, refused: DataFrame, parts: set[str], tally: Sequence[Tally]) -> None:
        """Replaces parts of the quarantine; where there is nothing to write or to take away, nothing is done."""
        where = tables.one_of("part", parts)
        if any(row["num_quarantined"] for row in tally) or self._rows(EVENT_QUARANTINE).where(where).limit(1).count():
            self._replace(EVENT_QUARANTINE, refused, where)

    def _tally(self, delivery: str, file: str, day: str, counts: Mapping[str, Any], file_print: str) -> Tally:
        named = {"dataset": self.dataset, "delivery": delivery, "file": file, "event_day": day}
        counted = {name: int(counts.get(name, 0)) for name in COUNTS}
        if day != NO_DAY:
            counted["num_rows"] = sum(counted.values())
        return named | counted | {"fingerprint": file_print, "judged": "", "run_id": self.current.run_id}

    def _check_rejected(self, tally: Sequence[Tally]) -> None:
        from spark_etl.checked import Tally as Checked
        from spark_etl.checked import check_rejected

        refused = sum(row["num_quarantined"] for row in tally)
        others = sum(row["num_rows"] - row["num_passed_over"] for row in tally) - refused
        place = f"the table {EVENT_QUARANTINE.name} of lake={self.current.lake.root}"
        count = Checked(self.dataset, others, refused, 0)
        check_rejected([count], SEARCH_EVENT.name, self.config.recipe.max_rejected_fraction, place)

    def _write_tally(self, rows: Sequence[Tally]) -> None:
        found = pa.Table.from_pylist(list(rows), schema=EVENT_TALLY.schema)
        tables.replace(self.current.lake, EVENT_TALLY, found, run_id=self.current.run_id, where=self._mine)

    @property
    def _mine(self) -> str:
        return tables.equal_to({"dataset": self.dataset})

    def _rows(self, spec: TableSpec) -> DataFrame:
        """The data set's rows of a table."""
        from lake import spark as lake_spark

        return lake_spark.rows(self.spark, self.current.lake, spec).where(self._mine)

    def _replace(self, spec: TableSpec, frame: DataFrame, where: str) -> None:
        """Replaces the data set's rows that meet the condition."""
        from lake import spark as lake_spark

        found, mine = frame.select(*spec.column_names), f"{self._mine} AND {where}"
        lake_spark.replace(self.spark, self.current.lake, spec, found, run_id=self.current.run_id, where=mine)


def changed_deliveries(prints: Mapping[tuple[str, str], str], held: Sequence[Tally]) -> set[str]:
    """Deliveries whose files are not those of the tally.

    Args:
        prints: delivery and file -> fingerprint, of the log as it is. A delivery that is there no more is not changed:
            logs are cleared away.
    """
    known: dict[str, dict[str, str]] = {}
    for row in held:
        if row["event_day"] == NO_DAY:
            known.setdefault(row["delivery"], {})[row["file"]] = row["fingerprint"]
    found: dict[str, dict[str, str]] = {}
    for (delivery, file), file_print in prints.items():
        found.setdefault(delivery, {})[file] = file_print
    return {delivery for delivery, files in found.items() if known.get(delivery) != files}


def day_batches(sizes: Mapping[str, int], max_rows: int) -> list[list[str]]:
    """Days in order, as many together as have at most so many rows; a larger day is alone.

    Args:
        sizes: day -> rows.
    """
    batches: list[list[str]] = []
    rows = 0
    for day in sorted(sizes):
        if not batches or rows + sizes[day] > max_rows:
            batches.append([])
            rows = 0
        batches[-1].append(day)
        rows += sizes[day]
    return batches


def check_sums(read: Sequence[Tally], days: Sequence[Tally]) -> None:
    """Checks that no row of the files read was lost between reading and judging.

    Raises:
        RuntimeError: naming the file.
    """
    judged_of: Counter[tuple[str, str]] = Counter()
    for day in days:
        judged_of[day["delivery"], day["file"]] += day["num_rows"]
    for row in read:
        judged = judged_of[row["delivery"], row["file"]]
        if row["num_rows"] != judged + row["num_quarantined"] + row["num_passed_over"]:
            raise RuntimeError(
                f"{row['delivery']}/{row['file']}: {row['num_rows']} rows were read and {judged} judged, "
                f"{row['num_quarantined']} refused, {row['num_passed_over']} passed over; the tally was not written: "
                "run again, and report it if it stays"
            )


def _delivery_and_file(folder: Path, path: Path) -> tuple[str, str]:
    file = path.relative_to(folder)
    # Delta takes an empty name of a partition for none
    return (file.parts[0] if len(file.parts) > 1 else NO_FOLDER), str(file)


def _file_print(path: Path, recipe: EventLogRecipe) -> str:
    held = path.stat()
    return fingerprint(held.st_size, held.st_mtime_ns, recipe)


def _days(days: Iterable[str]) -> str:
    return "event_day IN (" + ", ".join(f"DATE '{day}'" for day in days) + ")"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("ingest_events", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
