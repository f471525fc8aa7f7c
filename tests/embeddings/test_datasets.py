import csv
import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.load import ConfigError, load
from embeddings.datasets import DatasetMapping, import_esci, import_home_depot, import_mapped
from embeddings.judged import check_cuts, grade_of_mark
from embeddings.tabular import Source

MAPPING = {
    "dataset": "shop",
    "queries": {"file": "queries.csv", "id": "query_id", "text": "query"},
    "products": {"file": "products.parquet", "id": "product_id", "title": "title", "category": "path"},
    "judgements": {"file": "judgements.csv", "query": "query_id", "product": "product_id", "mark": "relevance"},
    "grade_cuts": {0: [1], 1: [2, "3"], 2: [4]},
}


def mapping(**changes):
    return load(DatasetMapping, {**MAPPING, **changes})


def read_raw(folder):
    catalog = gzip.decompress((folder / "catalog" / "part-00000.jsonl.gz").read_bytes()).decode()
    queries = gzip.decompress((folder / "queries" / "part-00000.csv.gz").read_bytes()).decode()
    rejected = folder / "rejected" / "part-00000.jsonl"
    return (
        {row["product_id"]: row for row in map(json.loads, catalog.rstrip("\n").split("\n"))},
        {row["query_id"]: row for row in csv.DictReader(io.StringIO(queries))},
        pq.read_table(folder / "annotations" / "part-00000.parquet").to_pylist(),
        [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.exists() else [],
    )


def write_shop(root, judgements="query_id,product_id,relevance\n1,10,4\n1,11.0,2.0\n2.0,10,1\n"):
    root.mkdir(exist_ok=True)
    (root / "queries.csv").write_text('\ufeffquery_id,query\n1,red shoes\n2,"lamp, desk"\n', encoding="utf-8")
    products = {"product_id": [10.0, 11.0, 12.0], "title": ["Shoe", "Sandal", "Pot"], "path": ["A/B", "A | B", None]}
    pq.write_table(pa.table(products), root / "products.parquet")
    (root / "judgements.csv").write_text(judgements)


@pytest.fixture(scope="module")
def data():
    if "ASSAY_DATA" not in os.environ:
        pytest.skip("ASSAY_DATA is not set: the folder with the real data sets esci/ and home_depot/")
    return Path(os.environ["ASSAY_DATA"])


def test_esci_counts_are_those_of_its_description(data, tmp_path):
    counts = import_esci(data / "esci", tmp_path / "raw")
    assert counts == {"products": 6764, "queries": 117, "marks": 5203, "rejected": 0}
    catalog, queries, marks, _ = read_raw(tmp_path / "raw")
    assert Counter(row["split"] for row in queries.values()) == {"train": 73, "test": 44}
    grades = Counter((row["mark"], row["grade"]) for row in marks)
    assert grades == {("E", 2): 2610, ("S", 1): 1507, ("C", 1): 250, ("I", 0): 836}
    assert any(" > " in (row["category"] or "") for row in catalog.values())
    assert any(row["attributes"] == "color: Black" for row in catalog.values())


def test_home_depot_counts_are_those_of_its_description(data, tmp_path):
    counts = import_home_depot(data / "home_depot", tmp_path / "raw")
    assert (counts["products"], counts["queries"], counts["marks"]) == (31181, 5944, 37378)
    catalog, queries, marks, rejected = read_raw(tmp_path / "raw")
    assert catalog["100001"]["brand"] == "Simpson Strong-Tie"
    assert {row["split"] for row in queries.values()} == {""}
    assert {(row["mark"], row["grade"]) for row in marks} >= {
        ("2.33", 1),
        ("2.5", 2),
        ("1.5", 0),
        ("3.0", 2),
        ("1.0", 0),
    }
    assert {row["num_marks"] for row in marks} == {3}
    assert {row["reason"] for row in rejected} == {"an earlier product has the same id"}


def test_official_esci_without_extra_columns_and_with_two_locales(tmp_path):
    examples = {
        "query_id": [1, 1, 2], "query": ["tv", "tv", "radio"], "product_id": ["B1", "B2", "B1"],
        "product_locale": ["us", "us", "es"], "esci_label": ["E", "I", "S"], "split": ["train", "train", "test"],
    }  # fmt: skip
    products = {
        "product_id": ["B1", "B2", "B1"], "product_title": ["TV", "Pan", "Tele"], "product_locale": ["us", "us", "es"],
        "product_description": ["<p>big</p>", None, None], "product_bullet_point": ["flat", None, ""],
        "product_brand": ["Acme", None, None], "product_color": ["red", None, None],
    }  # fmt: skip
    pq.write_table(pa.table(examples), tmp_path / "shopping_queries_dataset_examples.parquet")
    pq.write_table(pa.table(products), tmp_path / "shopping_queries_dataset_products.parquet")
    assert import_esci(tmp_path, tmp_path / "raw")["marks"] == 2
    catalog, queries, _, _ = read_raw(tmp_path / "raw")
    assert catalog["B1"]["description"] == "flat\n<p>big</p>"
    assert catalog["B2"] == {**dict.fromkeys(catalog["B2"]), "product_id": "B2", "title": "Pan"}
    assert list(queries) == ["1"]
    import_esci(tmp_path, tmp_path / "raw", locales=("us", "es"))
    catalog, _, marks, _ = read_raw(tmp_path / "raw")
    assert set(catalog) == {"us:B1", "us:B2", "es:B1"}
    assert {row["product_id"] for row in marks} == set(catalog)


def test_home_depot_latin_1_and_descriptions(tmp_path):
    train = "id,product_uid,product_title,search_term,relevance\n"
    train += "2,1,Caf\xe9 table,table,3.0\n3,1,Caf\xe9 table,caf\xe9,1.67\n"
    (tmp_path / "train.csv").write_bytes(train.encode("latin-1"))
    (tmp_path / "attributes.csv").write_text(
        "product_uid,name,value\n1,MFG Brand Name,Acme\n1,Color,Red\n1,Bullet01,Easy\n1,Width,\n"
    )
    (tmp_path / "product_descriptions.csv").write_text("product_uid,product_description\n1,A table\n")
    assert import_home_depot(tmp_path, tmp_path / "raw") == {"products": 1, "queries": 2, "marks": 2, "rejected": 0}
    catalog, queries, marks, _ = read_raw(tmp_path / "raw")
    assert catalog["1"] == {
        "product_id": "1", "title": "Café table", "description": "Easy A table", "brand": "Acme", "category": None,
        "attributes": "Color: Red", "price": None,
    }  # fmt: skip
    found = [(queries[row["query_id"]]["query"], row["grade"], round(row["grade_value"], 9)) for row in marks]
    assert found == [("table", 2, 2.0), ("café", 1, 0.67)]


def test_mapped_files_with_a_mark_order_mark_float_ids_and_other_separators(tmp_path):
    write_shop(tmp_path)
    counts = import_mapped(tmp_path, mapping(), tmp_path / "raw")
    assert counts == {"products": 3, "queries": 2, "marks": 3, "rejected": 0}
    catalog, queries, marks, _ = read_raw(tmp_path / "raw")
    assert [catalog[key]["category"] for key in ("10", "11", "12")] == ["A > B", "A > B", None]
    assert queries["2"]["query"] == "lamp, desk"
    found = [(row["query_id"], row["product_id"], row["mark"], row["grade"]) for row in marks]
    assert found == [("1", "10", "4", 2), ("1", "11", "2.0", 1), ("2", "10", "1", 0)]


def test_rows_that_cannot_be_used_are_kept_with_their_reason(tmp_path):
    write_shop(tmp_path, "query_id,product_id,relevance\n1,10,4\n9,10,4\n1,99,4\n1,11,7\n1,11,\n1,11,4,extra\n")
    products = {"product_id": ["10", "11", "11", "13", None], "title": ["a", "b", "c", "NaN", "e"], "path": ["x"] * 5}
    pq.write_table(pa.table(products), tmp_path / "products.parquet")
    counts = import_mapped(tmp_path, mapping(), tmp_path / "raw")
    assert counts == {"products": 2, "queries": 2, "marks": 1, "rejected": 8}
    *_, rejected = read_raw(tmp_path / "raw")
    assert Counter(row["reason"] for row in rejected) == {
        "the title is missing": 1,
        "the product id is missing": 1,
        "an earlier product has the same id": 1,
        "no such query": 1,
        "no such product": 1,
        "the mark is in none of the grade cuts": 1,
        "the mark is missing": 1,
        "expected 3 fields, got 4": 1,
    }
    assert all(isinstance(json.loads(row["row"]), dict) for row in rejected if row["table"] != "judgements.csv")


def test_the_guideline_s_version_comes_with_the_marks_where_it_is_told(tmp_path):
    (tmp_path / "all.csv").write_text(
        "q,sku,name,score,who,version\nshoe,1,Shoe,2,ann,v1\nshoe,1,Shoe,2,ann,v1\nshoe,1,Shoe,2,ann,v2\nshoe,1,Shoe,0,bob,\n"
    )
    judgements = {"file": "all.csv", "query": "q", "product": "sku", "mark": "score", "annotator": "who"}
    mapping = {
        "dataset": "shop",
        "queries": {"file": "all.csv", "text": "q"},
        "products": {"file": "all.csv", "id": "sku", "title": "name"},
        "judgements": judgements | {"guideline": "version"},
        "grade_cuts": {0: [0], 1: [1], 2: [2]},
    }
    counts = import_mapped(tmp_path, load(DatasetMapping, mapping), tmp_path / "raw")
    marks = pq.read_table(tmp_path / "raw" / "annotations").to_pylist()
    assert [(row["annotator"], row["grade"], row["guideline"]) for row in marks] == [
        ("ann", 2, "v1"),
        ("ann", 2, "v2"),
        ("bob", 0, None),
    ]
    assert counts["rejected"] == 1
    without = load(DatasetMapping, mapping | {"judgements": judgements})
    import_mapped(tmp_path, without, tmp_path / "raw")
    assert "guideline" not in pq.read_schema(tmp_path / "raw" / "annotations" / "part-00000.parquet").names


def test_one_tab_separated_file_with_text_keys_bounds_splits_and_annotators(tmp_path):
    rows = [
        ("red shoe", "p1", "Shoe", "1.0", "ann", "Train"), ("red shoe", "p1", "Shoe", "2.5", "bob", "Train"),
        ("red shoe", "p1", "Shoe", "2.5", "bob", "Train"), ("lamp", "p2", "Lamp, big", "2.49", "ann", "TEST"),
        ("lamp", "p1", "Shoe", "x", "ann", "test"),
    ]  # fmt: skip
    text = "\n".join("\t".join(row) for row in [("q", "sku", "name", "score", "who", "fold"), *rows])
    (tmp_path / "all.csv.gz").write_bytes(gzip.compress(text.encode()))
    one_file = load(
        DatasetMapping,
        {
            "dataset": "one",
            "queries": {"file": "all.csv.gz", "text": "q"},
            "products": {"file": "all.csv.gz", "id": "sku", "title": "name"},
            "judgements": {"file": "all.csv.gz", "query": "q", "product": "sku", "mark": "score", "annotator": "who"},
            "grade_cuts": {0: 1.5, 1: 2.49},
            "split": "fold",
        },
    )
    counts = import_mapped(tmp_path, one_file, tmp_path / "raw")
    assert counts == {"products": 2, "queries": 2, "marks": 3, "rejected": 2}
    _, queries, marks, rejected = read_raw(tmp_path / "raw")
    assert {row["query"]: row["split"] for row in queries.values()} == {"red shoe": "train", "lamp": "test"}
    assert [(row["annotator"], row["grade"]) for row in marks] == [("ann", 0), ("bob", 2), ("ann", 1)]
    assert {row["reason"] for row in rejected} == {
        "the annotator gave this mark before", "the mark is in none of the grade cuts"
    }  # fmt: skip


def test_split_of_the_judgements_file_reaches_the_queries(tmp_path):
    write_shop(tmp_path, "query_id,product_id,relevance,fold\n1,10,4,train\n1,11,2,test\n2,10,1,train\n")
    import_mapped(tmp_path, mapping(split="fold"), tmp_path / "raw")
    _, queries, _, _ = read_raw(tmp_path / "raw")
    assert {key: row["split"] for key, row in queries.items()} == {"1": "test", "2": "train"}
    write_shop(tmp_path, "query_id,product_id,relevance,fold\n1,10,4,dev\n")
    with pytest.raises(ValueError, match="split: expected train or test, got dev"):
        import_mapped(tmp_path, mapping(split="fold"), tmp_path / "raw")


def test_jsonl_with_a_broken_line(tmp_path):
    write_shop(tmp_path)
    lines = ['{"query_id": 1, "query": "red shoes"}', '{"query_id": 2, "que', '{"query_id": 2.0, "query": "lamp"}']
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    queries = {"file": "queries.jsonl", "id": "query_id", "text": "query"}
    counts = import_mapped(tmp_path, mapping(queries=queries), tmp_path / "raw")
    assert (counts["queries"], counts["rejected"]) == (2, 1)


def test_missing_file_missing_column_and_corrupt_parquet_end_in_one_sentence(tmp_path):
    write_shop(tmp_path)
    with pytest.raises(ValueError, match="'nope'; the file has query_id, product_id, relevance"):
        import_mapped(tmp_path, mapping(judgements={**MAPPING["judgements"], "mark": "nope"}), tmp_path / "raw")
    with pytest.raises(ValueError, match=r"gone.csv: no such file; the folder holds judgements.csv, "):
        import_mapped(tmp_path, mapping(queries={**MAPPING["queries"], "file": "gone.csv"}), tmp_path / "raw")
    (tmp_path / "products.parquet").write_bytes(b"PAR1 this is not Parquet")
    with pytest.raises(ValueError, match=r"products.parquet: cannot be read") as caught:
        import_mapped(tmp_path, mapping(), tmp_path / "raw")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("mark", ["4", "4.0", 4, 4.0, " 4 "])
def test_a_mark_is_the_same_as_text_and_as_number(mark):
    assert grade_of_mark(str(mark), {0: [1], 1: [2, 3], 2: ["4"]}) == 2


def test_cuts_must_tell_every_grade_once():
    with pytest.raises(ValueError, match=r"expected the grades \[0, 1, 2\], got \[0, 2\]"):
        check_cuts({0: [1], 2: [2]})
    with pytest.raises(ValueError, match="marks with two grades"):
        check_cuts({0: [1], 1: ["1.0"], 2: [2]})
    with pytest.raises(ValueError, match="bound of 0 below"):
        check_cuts({0: 2.0, 1: 1.0})
    with pytest.raises(ConfigError, match="unknown key"):
        load(DatasetMapping, {**MAPPING, "splt": "x"})


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path):
    lines = [f"{number},Lamp {number},plain" for number in range(100)]
    lines[50] = '50,"unclosed title,plain'
    (tmp_path / "products.csv").write_text("\n".join(["product_id,title,text", *lines]) + "\n", encoding="utf-8")
    source = Source(tmp_path)
    assert source.read("products.csv", ["product_id", "title"]).num_rows == 99
    assert [text for _, text, _ in source.broken] == [lines[50]]
