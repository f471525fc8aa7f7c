"""Raw files of any format into frames of text columns, with what cannot be parsed kept as text.

Every column is read as text under an explicit schema: types are checked where the reason for a refusal can be
given. Beside the columns asked for, a raw frame has `dataset`, `raw_row` (the row as read) and `unparsed` (true where
it is not a row of its format).
"""

from __future__ import annotations

import csv
import gzip
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.types import StringType, StructField, StructType

FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")
PACKINGS = (".gz", ".zst")
_CORRUPT = "_corrupt"


def find_files(folder: Path) -> list[Path]:
    """Data files of a folder, sorted; hidden files and markers of writers are passed over.

    Raises:
        ValueError: a file has a format that is not read.
    """
    found = sorted(item for item in folder.rglob("*") if item.is_file() and item.name[0] not in "._")
    for item in found:
        if _format(item) not in FORMATS:
            raise ValueError(
                f"{item}: expected .jsonl, .ndjson, .csv or .parquet, plain, .gz or .zst; convert or remove it"
            )
    return found


def read_raw(
    spark: SparkSession, folders: Mapping[str, str], part: str, columns: Sequence[str], scratch: Path
) -> DataFrame:
    """The files below `part` of every data set's raw folder as one frame of text columns.

    Args:
        folders: data set -> its raw folder.
        columns: columns to read; a file without one of them gives nulls.
        scratch: folder for unpacked .zst files, which Spark cannot read; must outlive the frame.
    """
    frames = [
        _read(spark, files, columns, dataset).drop("file_path")
        for dataset, folder in folders.items()
        for files in _by_kind(list(_plain(find_files(Path(folder) / part), scratch)))
    ]
    if frames:
        return reduce(DataFrame.unionByName, frames)
    names = ["dataset", *columns, "raw_row"]
    return spark.createDataFrame([], ", ".join(f"{name} string" for name in names) + ", unparsed boolean")


def read_files(
    spark: SparkSession, dataset: str, files: Mapping[Path, tuple[str, str]], columns: Sequence[str], scratch: Path
) -> DataFrame:
    """Files of one data set as one frame of text columns, with `delivery` and `file` of every row.

    Args:
        files: path -> its delivery and its name; at least one.
        columns: as of `read_raw`.
        scratch: as of `read_raw`.
    """
    plain = _plain(files, scratch)
    named = [(str(path), *files[given]) for path, given in plain.items()]
    names = spark.createDataFrame(named, "file_path string, delivery string, file string")
    frames = [_read(spark, paths, columns, dataset) for paths in _by_kind(list(plain))]
    # Spark tells a path as a URL: file:/a%20folder/events.csv
    path = sf.url_decode(sf.replace(sf.regexp_replace("file_path", "^file:/+", "/"), sf.lit("+"), sf.lit("%2B")))
    rows = reduce(DataFrame.unionByName, frames).withColumn("file_path", path)
    return rows.join(sf.broadcast(names), on="file_path", how="left").drop("file_path")


@contextmanager
def reading(folders: Sequence[str]) -> Iterator[None]:
    """Turns Spark's failure on a damaged file into one sentence that names the file.

    Raises:
        ValueError: a raw file cannot be read to its end.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a failed task is a Py4J error locally and a PySpark error through Connect
        for item in (item for folder in folders for item in find_files(Path(folder))):
            if damage := _damage(item):
                raise ValueError(f"{item}: cannot be read ({damage}); replace the file and run again") from error
        raise


def _format(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in PACKINGS else path).suffix


def _plain(files: Iterable[Path], scratch: Path) -> dict[Path, Path]:
    """What Spark reads for each file, and the file: itself, or unpacked where Spark cannot."""
    return {_unpacked(item, scratch) if item.suffix == ".zst" else item: item for item in files}


def _by_kind(paths: Sequence[Path]) -> list[list[Path]]:
    """Files that one reader takes together: equal format and, for CSV, equal header."""
    kinds: dict[tuple[str, ...], list[Path]] = {}
    for path in paths:
        kinds.setdefault((_format(path), *(_csv_header(path) if _format(path) == ".csv" else ())), []).append(path)
    return list(kinds.values())


def _unpacked(path: Path, scratch: Path) -> Path:
    target = scratch / f"{len(list(scratch.iterdir()))}-{path.with_suffix('').name}"
    try:
        with pa.input_stream(str(path), compression="zstd") as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); replace the file and run again") from error
    return target


def _csv_header(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream), [])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); replace the file and run again") from error


def _read(spark: SparkSession, files: Sequence[Path], columns: Sequence[str], dataset: str) -> DataFrame:
    paths, kind = [str(path) for path in files], _format(files[0])
    if kind == ".parquet":
        present, frame = _parquet_columns(files), spark.read.parquet(*paths)
        frame = frame.withColumn(_CORRUPT, sf.lit(None).cast("string"))
    else:
        present = _csv_header(files[0]) if kind == ".csv" else list(columns)
        reader = spark.read.schema(StructType([StructField(name, StringType()) for name in [*present, _CORRUPT]]))
        reader = reader.option("mode", "PERMISSIVE").option("columnNameOfCorruptRecord", _CORRUPT)
        # RFC 4180: a quote inside quotes is doubled, and a field may span lines.
        rfc_4180 = {"header": True, "multiLine": True, "escape": '"'}
        frame = reader.options(**rfc_4180).csv(paths) if kind == ".csv" else reader.json(paths)
    named = [(sf.col(f"`{name}`") if name in present else sf.lit(None)).cast("string").alias(name) for name in columns]
    return frame.select(*named, _CORRUPT, sf.col("_metadata.file_path").alias("file_path")).select(
        sf.lit(dataset).alias("dataset"),
        *columns,
        sf.coalesce(_CORRUPT, sf.to_json(sf.struct(*columns))).alias("raw_row"),
        sf.col(_CORRUPT).isNotNull().alias("unparsed"),
        "file_path",
    )


def _parquet_columns(files: Sequence[Path]) -> list[str]:
    """Columns of the files, from their footers.

    Raises:
        ValueError: a file is no Parquet file, or the files differ in their columns.
    """
    names: list[str] = []
    for path in files:
        try:
            found = pq.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: is not a whole Parquet file ({reason}); replace it and run again") from error
        if names and set(found) != set(names):
            raise ValueError(
                f"{path}: expected the columns {sorted(names)} of its folder, got {sorted(found)}; align them"
            )
        names = found
    return names


def _damage(path: Path) -> str:
    """Why a file cannot be read to its end; empty where it can."""
    try:
        if _format(path) == ".parquet":
            for _ in pq.ParquetFile(path).iter_batches():
                pass
        elif path.suffix == ".gz":
            with gzip.open(path) as stream:
                while stream.read(1 << 20):
                    pass
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        return str(error).splitlines()[0]
    return ""
