"""Raw products into the catalogue: types, clean text, one row per id, and reasons for what is refused."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from spark_etl.checked import clean_text, reason_of, refuse_repeats
from spark_etl.recipes import IngestRecipe

COLUMNS = ("product_id", "title", "description", "brand", "category", "attributes", "price")
TEXT_FIELDS = ("title", "description", "brand", "category", "attributes")
"""What makes a product's text, in the order in which it is hashed."""


def check_products(raw: DataFrame, recipe: IngestRecipe) -> DataFrame:
    """Typed products with `raw_row` and `reason`.

    A product id that comes with two contents keeps the one whose row sorts first; exact repetitions are dropped.

    Args:
        raw: raw frame with COLUMNS as text.
    """
    price = sf.trim("price").try_cast("double")
    has_price = sf.coalesce(sf.trim("price"), sf.lit("")) != ""
    is_number = price.isNotNull() & ~sf.isnan(price) & (sf.abs(price) < float("inf"))
    texts = raw.select(
        "dataset",
        sf.nullif(sf.trim("product_id"), sf.lit("")).alias("product_id"),
        *(clean_text(name).alias(name) for name in TEXT_FIELDS),
        sf.when(is_number, price).alias("price"),
        "raw_row",
        "unparsed",
        (has_price & ~is_number).alias("has_bad_price"),
    ).withColumn("category", sf.regexp_replace("category", r"\s*>\s*", " > "))
    reason = reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        (sf.col("product_id").isNull(), "product_id is missing"),
        (sf.col("title").isNull(), "title is missing"),
        (sf.char_length("title") > recipe.max_title_chars, f"title is longer than {recipe.max_title_chars} characters"),
        (sf.col("has_bad_price"), "price is not a number"),
    )
    hashed = sf.sha2(sf.concat_ws("\x1f", *(sf.coalesce(name, sf.lit("")) for name in TEXT_FIELDS)), 256)
    checked = texts.withColumns({"product_hash": hashed, "reason": reason}).drop("unparsed", "has_bad_price")
    return refuse_repeats(checked, ("dataset", "product_id"))
