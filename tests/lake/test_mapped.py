import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lake import mapped, tables
from lake.mapped import in_order, take_rows
from lake.schemas import CATALOG_PRODUCT, Column, TableSpec
from lake.storage import Lake, LakeError

SCHEMA = pa.schema([("shop", pa.string()), ("number", pa.int64()), ("text", pa.string())])


def some_rows(count, seed=0):
    numbers = np.random.default_rng(seed).permutation(count)
    texts = [None if number % 5 == 0 else f"text {number}" for number in numbers]
    return pa.table([["a" if number % 2 else "b" for number in numbers], numbers, texts], schema=SCHEMA)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where mapped files are written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_mapped_rows_are_those_of_the_parts_and_leave_no_file(scratch):
    table = some_rows(50)
    found = mapped.mapped([table.slice(0, 7), table.slice(7, 0), table.slice(7)], SCHEMA)
    assert found.equals(table)
    assert os.listdir(scratch) == []
    assert mapped.mapped([], SCHEMA).equals(SCHEMA.empty_table())


def test_a_writer_that_fails_leaves_no_file(scratch):
    def failing():
        yield some_rows(3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        mapped.mapped(failing(), SCHEMA)
    assert os.listdir(scratch) == []


def test_a_full_disk_is_told_with_what_to_do(scratch, monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(os, "fdopen", lambda number, mode: full)
        with pytest.raises(LakeError, match=r"is full: .* set TMPDIR to a folder"):
            mapped.mapped([some_rows(50)], SCHEMA)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_rows_are_sorted_whatever_the_blocks(monkeypatch, block_rows):
    monkeypatch.setattr(mapped, "BLOCK_ROWS", block_rows)
    table = some_rows(50)
    chunked = mapped.mapped([table.slice(start, 9) for start in range(0, 50, 9)], SCHEMA)
    expected = table.sort_by([("shop", "ascending"), ("number", "ascending")])
    assert in_order(chunked, ["shop", "number"]).equals(expected)
    assert in_order(SCHEMA.empty_table(), ["shop"]).equals(SCHEMA.empty_table())


def test_rows_come_in_the_order_asked_for_as_often_as_asked(scratch):
    table = some_rows(50)
    chunked = mapped.mapped([table.slice(start, 9) for start in range(0, 50, 9)], SCHEMA)
    row_N = np.array([49, 0, 8, 9, 9, 0, 31])
    assert take_rows(chunked, row_N).equals(table.take(pa.array(row_N)))
    assert take_rows(chunked.slice(5, 20), np.array([19, 0])).equals(table.take(pa.array([24, 5])))
    assert take_rows(chunked, np.array([], dtype=np.int64)).equals(SCHEMA.empty_table())


def test_sorted_rows_are_those_of_the_table_with_columns_that_it_gained(tmp_path):
    lake, name = Lake(str(tmp_path)), CATALOG_PRODUCT.name
    columns = (Column("dataset", pa.string(), "shop"), Column("product_id", pa.string(), "product"))
    before = TableSpec(name, "products", "delta-rs", ("dataset", "product_id"), columns)
    ids = [f"p{number:02d}" for number in np.random.default_rng(1).permutation(30)]
    for dataset in ("b", "a"):
        rows = pa.table({"dataset": [dataset] * 30, "product_id": ids})
        tables.replace(lake, before, rows, run_id="r", where=f"dataset = '{dataset}'")
    version = tables.version(lake, before)
    names = ["product_id", "dataset", "brand"]
    found = tables.sorted_rows(lake, CATALOG_PRODUCT, version=version, columns=names, by=["dataset", "product_id"])
    expected = [{"product_id": each, "dataset": name, "brand": None} for name in "ab" for each in sorted(ids)]
    assert found.to_pylist() == expected
    with pytest.raises(LakeError, match="run the job that writes it"):
        tables.sorted_rows(Lake(str(tmp_path / "none")), CATALOG_PRODUCT, version=0, columns=names, by=["dataset"])
