from pathlib import Path

import pyarrow as pa
import pytest

from lake.describe import render_markdown
from lake.schemas import CANDIDATE_PAIR, TABLES, Grade, check_schema


def test_docs_tables_is_what_the_specifications_say():
    page = Path(__file__).parents[2] / "docs" / "tables.md"
    assert page.read_text(encoding="utf-8") == render_markdown(), "run make docs"


def test_every_table_has_a_key_of_its_own_columns_and_every_column_a_meaning():
    for spec in TABLES.values():
        assert set(spec.key) <= set(spec.column_names), spec.name
        assert set(spec.partition_by) <= set(spec.column_names), spec.name
        assert all(column.meaning for column in spec.columns), spec.name


def test_every_query_product_and_pair_table_names_its_data_set():
    for spec in TABLES.values():
        if {"query_id", "product_id"} & set(spec.column_names):
            assert "dataset" in spec.column_names, spec.name


def test_grades_are_the_guideline_s_three_levels():
    assert [(grade.name, int(grade)) for grade in Grade] == [("IRRELEVANT", 0), ("PARTIAL", 1), ("EXACT", 2)]


def test_check_schema_takes_any_order_and_large_strings():
    fields = [pa.field(name, pa.large_string()) for name in reversed(CANDIDATE_PAIR.column_names)]
    check_schema(CANDIDATE_PAIR, pa.schema(fields))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.remove(0), "candidate_pair: column 'dataset' is missing"),
        (lambda s: s.append(pa.field("colour", pa.string())), "candidate_pair: column 'colour' is not in the table"),
        (lambda s: s.set(0, pa.field("dataset", pa.int64())), "column 'dataset' expected string, got int64; cast it"),
    ],
)
def test_a_schema_that_does_not_fit_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_schema(CANDIDATE_PAIR, change(CANDIDATE_PAIR.schema))
