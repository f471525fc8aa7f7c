"""All raw tables of all data sets, checked against their types and against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from lake.schemas import CATALOG_PRODUCT, GOLD_QUESTION, HUMAN_ANNOTATION, QUERY
from spark_etl import annotations as marks
from spark_etl import catalog, gold, queries
from spark_etl.checked import Tally, kept
from spark_etl.raw import find_files, read_raw
from spark_etl.recipes import IngestRecipe
from spark_etl.splits import with_split

NEEDED = ("catalog", "queries", "annotations")


def check_folders(folders: Mapping[str, str]) -> None:
    """Checks that every data set has the parts without which nothing can follow; gold is optional.

    Raises:
        ValueError: a part has no file.
    """
    for dataset, folder in folders.items():
        for part in NEEDED:
            if not find_files(Path(folder) / part):
                raise ValueError(
                    f"{folder}/{part}: no data file for {dataset}; expected .jsonl, .csv or .parquet there"
                )


def check_tables(
    spark: SparkSession,
    folders: Mapping[str, str],
    recipe: IngestRecipe,
    *,
    scratch: Path,
    keep: Callable[[DataFrame], DataFrame],
) -> dict[str, DataFrame]:
    """Table -> checked frame (see spark_etl.checked).

    Args:
        folders: data set -> its raw folder.
        recipe: what rows must look like.
        scratch: folder for unpacked files; must outlive the frames.
        keep: persists a frame, since each is counted before it is written.
    """

    def read(part: str, columns: Sequence[str]) -> DataFrame:
        return read_raw(spark, folders, part, columns, scratch)

    product = keep(catalog.check_products(read("catalog", catalog.COLUMNS), recipe))
    query = keep(with_split(queries.check_queries(read("queries", queries.COLUMNS), recipe), recipe.splits))
    products, query_rows = kept(product, CATALOG_PRODUCT), kept(query, QUERY)
    annotation = marks.check_annotations(read("annotations", marks.COLUMNS), query_rows, products)
    known = gold.check_gold(read("gold", gold.COLUMNS), query_rows, products)
    return {
        CATALOG_PRODUCT.name: product,
        QUERY.name: query,
        HUMAN_ANNOTATION.name: keep(annotation),
        GOLD_QUESTION.name: keep(known),
    }


def read_rejected(spark: SparkSession, folders: Mapping[str, str], scratch: Path) -> DataFrame:
    """Rows that the importer of a data set refused, as quarantine takes them."""
    raw = read_raw(spark, folders, "rejected", ("table", "row", "reason"), scratch)
    return raw.select(
        "dataset",
        sf.coalesce("table", sf.lit("unknown")).alias("table_name"),
        sf.coalesce("row", "raw_row").alias("row"),
        sf.coalesce("reason", sf.lit("refused by the source without a reason")).alias("reason"),
    )


def check_kept(counts: Mapping[str, Sequence[Tally]], folders: Mapping[str, str], place: str) -> None:
    """Refuses data sets of which no product or no query is left.

    Args:
        place: where refused rows and their reasons are found.

    Raises:
        ValueError: naming the folder.
    """
    for table, part in ((CATALOG_PRODUCT.name, "catalog"), (QUERY.name, "queries")):
        by_dataset = {count.dataset: count for count in counts[table]}
        for dataset, folder in folders.items():
            count = by_dataset.get(dataset)
            if count is None:
                raise ValueError(f"{folder}/{part}: is empty; give rows")
            if not count.num_kept:
                raise ValueError(f"{folder}/{part}: all {count.num_rejected} rows are refused; see why in {place}")
