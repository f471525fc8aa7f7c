"""Bad rows are data: a checked frame holds every row with the reason for which it is refused.

A checked frame has the columns of its table, `raw_row` (the row as read) and `reason`: null where the row is kept,
REPEATED where it equals a kept row and is only counted, else why it goes to quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import TableSpec

REPEATED = "repeated"


@dataclass(frozen=True)
class Tally:
    """How many raw rows of a data set's table were kept, refused, or dropped as exact repetitions."""

    dataset: str
    num_kept: int
    num_rejected: int
    num_repeated: int

    @property
    def rejected_fraction(self) -> float:
        """Refused rows among all rows read."""
        return self.num_rejected / max(self.num_kept + self.num_rejected + self.num_repeated, 1)


def reason_of(*rules: tuple[Column, Column | str]) -> Column:
    """The reason of the first rule whose condition holds; null where none does."""
    return sf.coalesce(
        *(sf.when(broken, sf.lit(reason) if isinstance(reason, str) else reason) for broken, reason in rules)
    )


def clean_text(name: str) -> Column:
    """A text column with outer and repeated blanks removed; null where nothing is left."""
    return sf.nullif(sf.regexp_replace(sf.trim(sf.regexp_replace(name, r"[\s\p{Z}]+", " ")), r"\x00", ""), sf.lit(""))


def refuse_repeats(
    frame: DataFrame, key: Sequence[str], *, content: str = "raw_row", order: Sequence[str] = ("raw_row",)
) -> DataFrame:
    """Keeps one row per key among the rows without a reason: the first in order, whatever the order read.

    Rows equal to the kept one become REPEATED, rows that differ from it get a reason.

    Args:
        frame: a checked frame.
        key: columns whose values only one row may have.
        content: column by which rows are equal.
        order: columns by which one comes first, the content among them.
    """
    # sorting compares eight bytes of the first column before all else: a hash tells rows apart, a data set's name not
    same_key = Window.partitionBy(sf.xxhash64(*key), *key, sf.col("reason").isNull()).orderBy(*order)
    is_first = sf.row_number().over(same_key) == 1
    reason = (
        sf.when(sf.col("reason").isNotNull() | is_first, sf.col("reason"))
        .when(sf.col(content) == sf.first(content).over(same_key), REPEATED)
        .otherwise(f"another row has the same {key[-1]} and other content")
    )
    return frame.withColumn("reason", reason)


def refuse_unknown(frame: DataFrame, known: DataFrame, key: Sequence[str]) -> DataFrame:
    """Gives a reason to rows whose key is not among the known rows."""
    flagged = known.select(*key, sf.lit(True).alias("is_known"))
    unknown = sf.col("reason").isNull() & sf.col("is_known").isNull()
    reason = sf.when(unknown, f"{key[-1]} is not in the data set").otherwise(sf.col("reason"))
    return frame.join(flagged, on=list(key), how="left").withColumn("reason", reason).drop("is_known")


def refuse_unknown_pair(frame: DataFrame, queries: DataFrame, products: DataFrame) -> DataFrame:
    """Gives a reason to rows whose query or product the data set lacks."""
    known_query = refuse_unknown(frame, queries, ("dataset", "query_id"))
    return refuse_unknown(known_query, products, ("dataset", "product_id"))


def is_refused() -> Column:
    """Whether a row of a checked frame goes to quarantine."""
    return sf.col("reason").isNotNull() & (sf.col("reason") != REPEATED)


def outcomes() -> tuple[Column, Column, Column]:
    """Numbers of rows of a checked frame that are kept, refused and repeated."""
    is_repeated = sf.coalesce(sf.col("reason") == REPEATED, sf.lit(False))
    return sf.count_if(sf.col("reason").isNull()), sf.count_if(is_refused()), sf.count_if(is_repeated)


def kept(checked: DataFrame, spec: TableSpec) -> DataFrame:
    """The rows that go to the table."""
    return checked.where(sf.col("reason").isNull()).select(*spec.column_names)


def rejected(checked: DataFrame, spec: TableSpec) -> DataFrame:
    """The rows that go to quarantine: dataset, table_name, row, reason."""
    return checked.where(is_refused()).select(
        "dataset", sf.lit(spec.name).alias("table_name"), sf.col("raw_row").alias("row"), "reason"
    )


def tally(checked: DataFrame) -> list[Tally]:
    """Counts per data set, in one pass."""
    names = ("num_kept", "num_rejected", "num_repeated")
    counted = (number.alias(name) for name, number in zip(names, outcomes(), strict=True))
    counts = checked.groupBy("dataset").agg(*counted)
    return [Tally(**row.asDict()) for row in counts.orderBy("dataset").collect()]


def check_rejected(counts: Sequence[Tally], table: str, max_fraction: float, place: str) -> None:
    """Refuses a table of which too many rows cannot be used.

    Args:
        place: where the refused rows and their reasons are found.

    Raises:
        ValueError: past the fraction.
    """
    for count in counts:
        if count.rejected_fraction > max_fraction:
            raise ValueError(
                f"{table}: {count.num_rejected} rows of {count.dataset} ({count.rejected_fraction:.1%}) are refused, "
                f"above recipe.max_rejected_fraction={max_fraction:g}; no table was changed, the reasons are in {place}"
            )


def summed(counts: Sequence[Tally]) -> dict[str, int]:
    """Rows over all data sets: "" kept, "_rejected" and "_repeated"."""
    return {
        "": sum(count.num_kept for count in counts),
        "_rejected": sum(count.num_rejected for count in counts),
        "_repeated": sum(count.num_repeated for count in counts),
    }
