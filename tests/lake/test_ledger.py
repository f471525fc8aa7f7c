import multiprocessing
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from lake import ledger, tables
from lake.ledger import Ledger
from lake.schemas import PAIR_GRADE
from lake.storage import Lake

WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def rows(*addresses, **changes):
    plain = dict.fromkeys(PAIR_GRADE.column_names, "x") | {"p0": 0.1, "p1": 0.2, "p2": 0.7, "grade": 2}
    plain |= {"created_at": WHEN, "supersedes": None} | changes
    return pa.Table.from_pylist([plain | {"address": address} for address in addresses], schema=PAIR_GRADE.schema)


def opened(lake, *wanted):
    return Ledger(lake, pa.array(wanted, pa.string()))


def addresses(lake):
    return sorted(tables.rows(lake, PAIR_GRADE)["address"].to_pylist())


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"))


def test_what_is_there_is_not_written_again(lake):
    assert opened(lake, "a", "b").append(rows("a", "b"), run_id="r") == 2
    again = opened(lake, "a", "b", "c")
    assert again.holds(pa.array(["a", "b", "c"])).tolist() == [True, True, False]
    assert again.append(rows("b", "c"), run_id="s") == 1
    assert addresses(lake) == ["a", "b", "c"]


def test_what_another_writer_put_there_in_between_is_left_out_and_counted(lake):
    first, second = opened(lake, "a", "b", "c"), opened(lake, "a", "b", "c")
    first.append(rows("a", "b"), run_id="first")
    assert second.append(rows("b", "c"), run_id="second") == 1
    assert second.append(rows("a"), run_id="second") == 0
    assert (first.doubles, second.doubles) == (0, 2)
    assert addresses(lake) == ["a", "b", "c"]


def test_an_append_that_loses_the_race_looks_again_before_it_writes(lake, monkeypatch):
    late, real, other = opened(lake, "a", "b"), ledger.write_deltalake, []

    def overtaken(table, data, **options):
        if not other:
            other.append(opened(lake, "a"))
            other[0].append(rows("a"), run_id="other")
        real(table, data, **options)

    monkeypatch.setattr(ledger, "write_deltalake", overtaken)
    assert late.append(rows("a", "b"), run_id="late") == 1
    assert addresses(lake) == ["a", "b"]


def write_all(root, run_id, names):
    own = opened(Lake(root), *names)
    for start in range(0, len(names), 3):
        own.append(rows(*names[start : start + 3]), run_id=run_id)


def test_processes_that_write_the_same_rows_at_once_leave_each_once(lake):
    names = [f"{number:03d}" for number in range(30)]
    tables.create(lake, PAIR_GRADE)
    context = multiprocessing.get_context("spawn")
    orders = (names, names[::-1], names[15:] + names[:15])
    writers = [context.Process(target=write_all, args=(lake.root, str(n), own)) for n, own in enumerate(orders)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert addresses(lake) == names


def test_compaction_keeps_rows_and_a_writer_that_knew_the_old_files(lake):
    writer = opened(lake, "a", "b", "c", "d")
    for name in ("a", "b", "c"):
        writer.append(rows(name), run_id=name)
    assert ledger.compact(lake, from_files=4) == 0
    assert ledger.compact(lake, from_files=3) == 3
    assert len(tables.open_table(lake, PAIR_GRADE).file_uris()) == 1
    assert writer.append(rows("c", "d"), run_id="d") == 1
    assert addresses(lake) == ["a", "b", "c", "d"]


def test_the_newest_row_of_a_pair_is_found_by_its_texts(lake):
    writer = opened(lake, *"abcd")
    writer.append(rows("a", query_hash="q", product_hash="p"), run_id="r")
    writer.append(rows("b", query_hash="q", product_hash="p", created_at=WHEN + timedelta(days=1)), run_id="r")
    writer.append(rows("c", query_hash="q", product_hash="other"), run_id="r")
    queries, products = pa.chunked_array([["q", "q", "new"]]), pa.chunked_array([["p", "other", "p"]])
    assert ledger.newest_of_pairs(lake, queries, products) == ["b", "c", None]
    assert ledger.newest_of_pairs(Lake(lake.root + "-none"), queries, products) == [None] * 3


def test_a_ledger_of_an_earlier_version_gains_the_new_columns(lake):
    import dataclasses

    old = dataclasses.replace(PAIR_GRADE, columns=PAIR_GRADE.columns[:-1])
    tables.append_once(lake, old, rows("a").drop_columns(["supersedes"]), run_id="r", part="0")
    assert tables.rows(lake, PAIR_GRADE)["supersedes"].to_pylist() == [None]
    opened(lake, "b").append(rows("b", supersedes="a"), run_id="s")
    held = tables.rows(lake, PAIR_GRADE).sort_by("address")
    assert held["supersedes"].to_pylist() == [None, "a"]
