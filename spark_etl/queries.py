"""Raw queries into the query table, but for the split: trimmed text, normal form, hash, reasons for refusals."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from spark_etl.checked import clean_text, reason_of, refuse_repeats
from spark_etl.recipes import IngestRecipe

COLUMNS = ("query_id", "query", "split")

_DOTTED_I = ("tr", "az")
"""Languages in which capital I is a dotless i."""
_INSIDE_WORDS = r"(\p{L})['\u2019](?=\p{L})|(\d),(?=\d{3})"
"""men's is mens, 1,000 is 1000. Java does not look behind at letters beyond the first 65,536, so they are groups."""
_NO_MEANING = r"""(?<!\d)[./'"\u2019]|[./](?!\d)|[^\p{L}\p{M}\p{N}%+#&$°./'"\u2019\s]"""
"""Signs that carry meaning stay: 50%, c++, 1.5, 3/4, 36" and 6' (only after a digit)."""


def normal_form(text: Column, locale: Column | None = None) -> Column:
    """Unicode NFKC, lower case, signs without meaning and repeated blanks removed; never empty where the text is not.

    `embeddings.text.normal_form` is the same function for serving. The column is nondeterministic in Spark's eyes, so
    that it stands in a select of its own, not in a condition or an aggregate.

    Args:
        locale: language tags, for the case of letters (Turkish and Azeri); None: as in most languages.
    """
    composed = _compose(text)
    if locale is not None:
        is_dotted = sf.lower(sf.substring_index(sf.replace(locale, sf.lit("_"), sf.lit("-")), "-", 1)).isin(*_DOTTED_I)
        composed = sf.when(is_dotted, sf.translate(composed, "I\u0130", "\u0131i")).otherwise(composed)
    # what one half says in capitals has a composed form again in small letters: once more
    lower = sf.translate(_compose(sf.lower(composed)), "\u2044", "/")
    words = sf.regexp_replace(sf.regexp_replace(lower, _INSIDE_WORDS, "$1$2"), _NO_MEANING, " ")
    return sf.coalesce(sf.nullif(sf.trim(sf.regexp_replace(words, r"[\s\p{Z}]+", " ")), sf.lit("")), lower)


def _compose(text: Column) -> Column:
    """NFKC by the ICU that Spark ships with, since Spark has no function for it; ASCII and null stay as they are."""
    is_plain = sf.coalesce(text.rlike(r"^[\x00-\x7F]*$"), sf.lit(True))
    return sf.when(is_plain, text).otherwise(
        sf.reflect(sf.lit("com.ibm.icu.text.Normalizer"), sf.lit("compose"), text, sf.lit(True))
    )


def check_queries(raw: DataFrame, recipe: IngestRecipe) -> DataFrame:
    """Queries without `split`, with `raw_row` and `reason`.

    Args:
        raw: raw frame with COLUMNS as text; `split` is empty, train or test.
    """
    text, given = clean_text("query"), sf.lower(clean_text("split"))
    reason = reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        (sf.col("query_id").isNull() | (sf.trim("query_id") == ""), "query_id is missing"),
        (sf.col("text").isNull(), "query is empty"),
        (sf.char_length("text") > recipe.max_query_chars, f"query is longer than {recipe.max_query_chars} characters"),
        (
            ~sf.coalesce("given_split", sf.lit("train")).isin("train", "test"),
            "split is neither train nor test nor empty",
        ),
    )
    typed = raw.select(
        "dataset",
        sf.trim("query_id").alias("query_id"),
        text.alias("text"),
        given.alias("given_split"),
        "raw_row",
        "unparsed",
    )
    checked = typed.withColumns(
        {"normalised": normal_form(sf.col("text")), "query_hash": sf.sha2("text", 256), "reason": reason}
    )
    return refuse_repeats(checked.drop("unparsed"), ("dataset", "query_id"))
