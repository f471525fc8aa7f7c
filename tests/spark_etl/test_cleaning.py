"""Raw rows into typed rows: reasons, repetitions, normal form, splits."""

import hashlib
from datetime import UTC, datetime
from unicodedata import ucd_3_2_0

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from embeddings.text import normal_form as python_normal_form
from spark_etl.annotations import check_annotations
from spark_etl.catalog import check_products
from spark_etl.checked import REPEATED, tally
from spark_etl.gold import check_gold, known_grades
from spark_etl.queries import check_queries, normal_form
from spark_etl.recipes import IngestRecipe, SplitRecipe
from spark_etl.splits import with_split

PRODUCT = "dataset string, product_id string, title string, description string, brand string, category string"
PRODUCT += ", attributes string, price string, raw_row string, unparsed boolean"
QUERY = "dataset string, query_id string, query string, split string, raw_row string, unparsed boolean"


def product(product_id, title, price="1.5", *, description=None, category=None, raw_row=None, unparsed=False):
    row = raw_row or f"{product_id}|{title}|{price}|{description}|{category}"
    return ("d", product_id, title, description, None, category, None, price, row, unparsed)


def query(query_id, text, split=None, dataset="d"):
    return (dataset, query_id, text, split, f"{query_id}|{text}|{split}", False)


def test_broken_products_get_reasons_and_good_ones_types(spark):
    rows = [
        product(" p1 ", "  Red\u00a0 shoe ", "9.90", description="a\n b", category="Shoes>Running  >Road"),
        product("p2", "Blue shoe", None),
        product("", "no id"),
        product("p3", "  "),
        product("p4", "dear", "12 dollars"),
        product("p5", "not a number", "NaN"),
        product("p6", "t" * 1001),
        product(None, None, None, raw_row="{broken", unparsed=True),
    ]
    checked = {
        row["raw_row"][:4]: row
        for row in check_products(spark.createDataFrame(rows, PRODUCT), IngestRecipe()).collect()
    }
    first = checked[" p1 "]
    assert (first["product_id"], first["title"], first["description"]) == ("p1", "Red shoe", "a b")
    assert (first["category"], first["price"], first["reason"]) == ("Shoes > Running > Road", 9.9, None)
    text = "\x1f".join(["Red shoe", "a b", "", "Shoes > Running > Road", ""])
    assert first["product_hash"] == hashlib.sha256(text.encode()).hexdigest()
    assert {key: row["reason"] for key, row in checked.items() if row["reason"]} == {
        "|no ": "product_id is missing",
        "p3| ": "title is missing",
        "p4|d": "price is not a number",
        "p5|n": "price is not a number",
        "p6|t": "title is longer than 1000 characters",
        "{bro": "the line is not a row of its file's format",
    }
    assert checked["p2|B"]["price"] is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_repeated_id_keeps_one_row_whatever_the_order_read(spark, order):
    rows = [product("p1", "Anvil"), product("p1", "Anvil"), product("p1", "Bellows"), product("p2", "Anvil")][::order]
    checked = check_products(spark.createDataFrame(rows, PRODUCT), IngestRecipe()).persist()
    found = sorted((row["product_id"], row["title"], row["reason"] or "") for row in checked.collect())
    assert found == [
        ("p1", "Anvil", ""),
        ("p1", "Anvil", REPEATED),
        ("p1", "Bellows", "another row has the same product_id and other content"),
        ("p2", "Anvil", ""),
    ]
    (count,) = tally(checked)
    assert (count.num_kept, count.num_rejected, count.num_repeated, count.rejected_fraction) == (2, 1, 1, 0.25)


def test_normal_form_keeps_signs_that_carry_meaning(spark):
    texts = {
        '  36" TV,  wall-mount!! ': '36" tv wall mount',
        "Men's shoes (size 9.5).": "mens shoes size 9.5",
        "3/4 in. plywood 1,000 pcs": "3/4 in plywood 1000 pcs",
        "C++ & 50% off": "c++ & 50% off",
        "Crème brûlée": "crème brûlée",
        "???": "???",
    }
    frame = spark.createDataFrame([(text,) for text in texts], "text string")
    found = {row[0]: row[1] for row in frame.select("text", normal_form(frame["text"]).alias("form")).collect()}
    assert found == texts


ASSIGNED = st.characters(exclude_categories=("Cs",)).filter(lambda char: ucd_3_2_0.category(char) != "Cn")
"""What all Unicode tables know: Java 17, ICU and Python are of different versions, and the oldest lacks new letters."""
HARD = st.sampled_from(
    [
        "I\u0307",
        "\u0130",
        "\u0131",
        "\ufb01",
        "\u00bd",
        "\u2177",
        "\u03a3",
        "\u03c2",
        "\u00df",
        "\u1e9e",
        "e\u0301",
        "\u00c5",
        "\u2460",
        "\u2026",
        "\u2103",
        "'",
        "1,000",
    ]
)
TYPED = st.lists(st.one_of(ASSIGNED, HARD, st.sampled_from(" .,/'\"%0159aZ")), max_size=12).map("".join)


# without shrinking, which would run a Spark job for every step: the failing text is named
@settings(max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.tuples(TYPED, st.sampled_from(["", "en", "tr", "az_AZ", "TR-tr", "xx"])), min_size=150))
def test_the_normal_form_is_the_same_in_spark_and_in_python(spark, texts):
    frame = spark.createDataFrame(texts, "text string, locale string")
    for row in frame.select("*", normal_form(frame["text"], frame["locale"]).alias("form")).collect():
        expected = python_normal_form(row["text"], row["locale"])
        assert row["form"] == expected, ascii((row["text"], row["locale"], row["form"], expected))


@pytest.mark.parametrize(
    ("text", "locale", "form"),
    [
        ("\uff2e\uff49\uff4b\uff45\u3000\uff21\uff29\uff32", "", "nike air"),
        ("\u00bd in. drive", "", "1/2 in drive"),
        ("e\u0301clair", "", "\u00e9clair"),
        ("ISPARTA \u0130NC\u0130", "tr", "\u0131sparta inci"),
        ("ISPARTA", "", "isparta"),
        ("\u039f\u0394\u039f\u03a3", "el", "\u03bf\u03b4\u03bf\u03c2"),
        ("", "", ""),
    ],
)
def test_the_normal_form_is_free_of_what_keyboards_differ_in(text, locale, form):
    assert python_normal_form(text, locale) == form


def test_queries_that_cannot_be_used_get_reasons(spark):
    rows = [
        query("q1", " Red  shoe "),
        query("q2", "x" * 10_000),
        query("q3", "   "),
        query("q4", "ok", "dev"),
        query(None, "no id"),
        query("q5", "blue", "TEST"),
    ]
    checked = check_queries(spark.createDataFrame(rows, QUERY), IngestRecipe()).collect()
    reasons = {row["query_id"]: row["reason"] for row in checked}
    assert reasons == {
        "q1": None,
        "q2": "query is longer than 1000 characters",
        "q3": "query is empty",
        "q4": "split is neither train nor test nor empty",
        None: "query_id is missing",
        "q5": None,
    }
    first = next(row for row in checked if row["query_id"] == "q1")
    assert (first["text"], first["normalised"]) == ("Red shoe", "red shoe")
    assert first["query_hash"] == hashlib.sha256(b"Red shoe").hexdigest()


def place(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16) % 10_000 / 10_000


def reference_split(text, fitted):
    at = place(text) * fitted
    return "train" if at < 0.7 else "validation" if at < 0.8 else "calibration" if at < 0.9 else "test"


def test_split_is_by_hash_of_the_text_and_given_train_is_never_test(spark):
    texts = [f"text {number}" for number in range(300)]
    rows = [("d", text, given, None) for text in texts for given in (None, "train")]
    rows = [("free" if given is None else "given", f"{given} {text}", given, None) for _, text, given, _ in rows]
    frame = spark.createDataFrame(rows, "dataset string, normalised string, given_split string, reason string")
    found = with_split(frame, SplitRecipe()).collect()
    for row in found:
        fitted = 1.0 if row["given_split"] is None else 0.9
        assert row["split"] == reference_split(row["normalised"], fitted)
    given = [row["split"] for row in found if row["given_split"] == "train"]
    assert set(given) == {"train", "validation", "calibration"}


def test_no_text_is_test_in_one_data_set_and_train_in_another(spark):
    shared = [f"shared {number}" for number in range(200)]
    rows = [("a", text, None, None) for text in shared]
    rows += [("b", text, "test" if number % 2 else "train", None) for number, text in enumerate(shared)]
    rows += [("c", text, "test", "refused") for text in shared]
    frame = spark.createDataFrame(rows, "dataset string, normalised string, given_split string, reason string")
    found = [row for row in with_split(frame, SplitRecipe()).collect() if row["reason"] is None]
    by_text = {}
    for row in found:
        by_text.setdefault(row["normalised"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_text.values())
    for number, text in enumerate(shared):
        assert (by_text[text] == {"test"}) == bool(number % 2)


def test_marks_are_numbered_and_bad_ones_get_reasons(spark):
    schema = "dataset string, query_id string, product_id string, mark string, scale string, num_marks string"
    schema += ", annotator string, grade string, grade_value string, guideline string, raw_row string, unparsed boolean"
    marks = [
        ("q1", "p1", "2", "1", "ann", "2", "a"),
        ("q1", "p1", "1", "1", "ann", "1", "b"),
        ("q1", "p1", "2", None, None, "2", "c"),
        ("q1", "p1", "2", None, None, "2", "c"),
        ("q1", "p9", "2", "1", None, "2", "unknown product"),
        ("q9", "p1", "2", "1", None, "2", "unknown query"),
        ("q1", "p1", "5", "1", None, "3", "grade 3"),
        ("q1", "p1", "5", "0", None, "2", "no raters"),
        ("q1", "p1", "2.5", "3", "mean", "1", "0.5"),
        ("q1", "p1", "2.5", "3", "mean", "1", "2.5"),
        ("q1", "p1", "2.5", "3", "mean", "1", "high"),
    ]
    raw = [
        (
            "d",
            q,
            p,
            mark,
            "s",
            num,
            who,
            grade,
            row if who == "mean" else None,
            " v2 " if row == "b" else " ",
            row,
            False,
        )
        for q, p, mark, num, who, grade, row in marks
    ]
    queries = spark.createDataFrame([("d", "q1")], "dataset string, query_id string")
    products = spark.createDataFrame([("d", "p1")], "dataset string, product_id string")
    found = check_annotations(spark.createDataFrame(raw, schema), queries, products).collect()
    kept = sorted(
        (
            row["annotator"] or "",
            *(row[name] for name in ("mark_number", "grade", "num_marks", "grade_value", "guideline")),
        )
        for row in found
        if not row["reason"]
    )
    assert kept == [
        ("", 1, 2, 1, 2.0, None),
        ("", 2, 2, 1, 2.0, None),
        ("ann", 1, 2, 1, 2.0, None),
        ("ann", 2, 1, 1, 1.0, "v2"),
        ("mean", 1, 1, 3, 0.5, None),
    ]
    assert {row["raw_row"]: row["reason"] for row in found if row["reason"]} == {
        "unknown product": "product_id is not in the data set",
        "unknown query": "query_id is not in the data set",
        "grade 3": "grade is not 0, 1 or 2",
        "no raters": "num_marks is not a number of raters",
        "2.5": "grade_value is not between 0 and 2",
        "high": "grade_value is not between 0 and 2",
    }


def test_gold_questions_are_typed_and_contradicting_ones_are_all_refused(spark):
    schema = "dataset string, query_id string, product_id string, grade string, source string, note string"
    schema += ", guideline string, raw_row string, unparsed boolean"
    rows = [
        ("q1", "p1", "2", " panel ", "brand  matches", "v1", "good"),
        ("q1", "p1", "2", " panel ", "brand  matches", "v1", "good"),
        ("q1", "p2", "0", None, None, None, "torn 0"),
        ("q1", "p2", "1", None, None, None, "torn 1"),
        ("q1", "p3", "1", None, " ", None, "a first"),
        ("q1", "p3", "1", "later", None, None, "b second"),
        ("q1", "p1", "3", None, None, None, "grade"),
        ("q1", "", "1", None, None, None, "product"),
        ("q9", "p1", "1", None, None, None, "query"),
    ]
    queries = spark.createDataFrame([("d", "q1")], "dataset string, query_id string")
    products = spark.createDataFrame([("d", f"p{n}") for n in (1, 2, 3)], "dataset string, product_id string")
    raw = spark.createDataFrame([("d", *row, False) for row in rows], schema)
    checked = check_gold(raw, queries, products).persist()
    found = checked.collect()
    kept = [
        tuple(row[name] for name in ("product_id", "grade", "source", "note", "guideline"))
        for row in found
        if row["reason"] is None
    ]
    assert sorted(kept) == [("p1", 2, "panel", "brand matches", "v1"), ("p3", 1, None, None, None)]
    assert {row["raw_row"]: row["reason"] for row in found if row["reason"] and row["raw_row"] != "good"} == {
        "torn 0": "another row gives the pair another grade",
        "torn 1": "another row gives the pair another grade",
        "b second": "another row has the same product_id and other content",
        "grade": "grade is not 0, 1 or 2",
        "product": "product_id is missing",
        "query": "query_id is not in the data set",
    }
    (count,) = tally(checked)
    assert (count.num_kept, count.num_repeated, count.num_rejected) == (2, 1, 6)


def test_a_verdict_is_gold_too_and_goes_before_a_question(spark):
    pair = "dataset string, query_id string, product_id string, grade tinyint"
    day = [datetime(2026, 1, number, tzinfo=UTC) for number in (1, 2)]
    questions = spark.createDataFrame([("d", "q", "asked", 2), ("d", "q", "both", 2)], pair)
    decided = [("d", "q", "both", 1, "eva", day[0]), ("d", "q", "both", 0, "eva", day[1])]
    decided.append(("d", "q", "decided", 1, "eva", day[0]))
    verdicts = spark.createDataFrame(decided, f"{pair}, expert string, decided_at timestamp")
    found = {row["product_id"]: (row["gold"], row["is_verdict"]) for row in known_grades(questions, verdicts).collect()}
    assert found == {"asked": (2, False), "both": (0, True), "decided": (1, True)}
    assert known_grades(questions, None).count() == known_grades(None, verdicts).count() == 2
    assert known_grades(None, None) is None
