import os
import re
import stat
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from lake import storage, tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    CANDIDATE_PAIR,
    CLICK_MODEL,
    CLICK_MODEL_ROUND,
    ENGAGEMENT,
    HUMAN_ANNOTATION,
    MINED_PAIR,
    PAIR_GRADE,
    QUARANTINE,
    SEARCH_EVENT,
)
from lake.storage import Lake, LakeError, atomic_folder


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"))


def rejected(*numbers, reason="no title"):
    row = {"run_id": "r", "part": "p", "dataset": "d", "table_name": "t", "row": "{}", "reason": reason}
    rows = [row | {"row_number": number, "created_at": datetime.now(UTC)} for number in numbers]
    return pa.Table.from_pylist(rows, schema=QUARANTINE.schema)


def ledger_row(address="a", **changes):
    row = dict.fromkeys(PAIR_GRADE.column_names, "x") | {"p0": 0.1, "p1": 0.2, "p2": 0.7, "grade": 2}
    row |= {"address": address, "created_at": datetime.now(UTC)} | changes
    return pa.Table.from_pylist([row], schema=PAIR_GRADE.schema)


def test_replayed_part_is_not_appended_twice(lake):
    assert tables.append_once(lake, QUARANTINE, rejected(0, 1), run_id="r", part="0")
    assert not tables.append_once(lake, QUARANTINE, rejected(0, 1), run_id="r", part="0")
    assert tables.append_once(lake, QUARANTINE, rejected(2), run_id="r", part="1")
    assert sorted(tables.rows(lake, QUARANTINE).column("row_number").to_pylist()) == [0, 1, 2]


def test_an_older_version_can_be_read_again(lake):
    tables.append_once(lake, QUARANTINE, rejected(0), run_id="r", part="0")
    before = tables.version(lake, QUARANTINE)
    tables.append_once(lake, QUARANTINE, rejected(1), run_id="r", part="1")
    assert tables.rows(lake, QUARANTINE, version=before).num_rows == 1
    assert tables.rows(lake, QUARANTINE).num_rows == 2


def test_replace_of_a_part_leaves_the_other_rows(lake):
    def mined(round_number, *products):
        row = {"dataset": "d", "query_id": "q", "rank": 1, "score": 0.5, "band": "top", "shard": 0, "model": "m"}
        rows = [row | {"product_id": item, "round": round_number, "run_id": "r"} for item in products]
        return pa.Table.from_pylist(rows, schema=MINED_PAIR.schema)

    tables.replace(lake, MINED_PAIR, mined(1, "a", "b"), run_id="r", where="round = 1")
    tables.replace(lake, MINED_PAIR, mined(2, "c"), run_id="r", where="round = 2")
    tables.replace(lake, MINED_PAIR, mined(1, "d"), run_id="r", where="round = 1")
    assert sorted(tables.rows(lake, MINED_PAIR).column("product_id").to_pylist()) == ["c", "d"]


def test_a_grade_outside_the_scale_is_refused_by_the_table_itself(lake):
    tables.create(lake, PAIR_GRADE)
    with pytest.raises(Exception, match=r"(?i)grade"):
        tables.append_once(lake, PAIR_GRADE, ledger_row(grade=3), run_id="r", part="0")
    assert tables.rows(lake, PAIR_GRADE).num_rows == 0


BROKEN = [
    (SEARCH_EVENT, "position", 0),
    (HUMAN_ANNOTATION, "num_marks", 0),
    (ANNOTATION_CONSENSUS, "agreement", 1.5),
    (ANNOTATION_CONSENSUS, "at_least_2", 0.9),
    (CLICK_MODEL, "examination", 0.0),
    (CLICK_MODEL, "clicks", 6),
    (CLICK_MODEL_ROUND, "round", 0),
    (ENGAGEMENT, "carts", -1),
    (ENGAGEMENT, "corrected_rate", 0.0),
    (ENGAGEMENT, "click_rate", 1.2),
    (AUDIT_CONFLICT, "impressions", -1),
]
SOUND = {"kind": "click", "position": 1, "grade": 1, "grade_value": 1.0, "num_marks": 1, "mark_number": 1}
SOUND |= {"agreement": 1.0, "at_least_1": 0.5, "at_least_2": 0.0, "examination": 1.0, "impressions": 5, "clicks": 5}
SOUND |= {"first_position": 1, "round": 1, "carts": 0, "purchases": 0, "expected_clicks": 0.0, "corrected_rate": 1.0}
FILLED = {pa.string(): "x", pa.float64(): 1.0, pa.bool_(): True}


@pytest.mark.parametrize(("spec", "column", "value"), BROKEN)
def test_what_cannot_be_is_refused_by_the_table_itself_and_what_can_be_is_not(lake, spec, column, value):
    """Columns that may be null are null but the broken one."""
    row = {
        one.name: SOUND.get(one.name, FILLED.get(one.type, datetime.now(UTC)))
        for one in spec.columns
        if not one.nullable
    }
    table = tables.create(lake, spec)
    write_deltalake(table, pa.Table.from_pylist([row], schema=spec.schema), mode="append")
    with pytest.raises(Exception, match=f"(?i){column}"):
        write_deltalake(table, pa.Table.from_pylist([row | {column: value}], schema=spec.schema), mode="append")
    assert tables.rows(lake, spec).num_rows == 1


def test_a_null_in_a_required_column_is_named(lake):
    with pytest.raises(ValueError, match="pair_grade: column 'labeller' holds nulls"):
        tables.append_once(lake, PAIR_GRADE, ledger_row(labeller=None), run_id="r", part="0")
    assert not tables.exists(lake, PAIR_GRADE)


def test_rows_that_repeat_the_key_are_refused(lake):
    twice = pa.concat_tables([ledger_row(), ledger_row()])
    with pytest.raises(ValueError, match=r"pair_grade: rows repeat the key \('address',\)"):
        tables.append_once(lake, PAIR_GRADE, twice, run_id="r", part="0")


def test_only_the_owner_writes_a_table(lake):
    with pytest.raises(ValueError, match="candidate_pair: is written by spark only"):
        tables.append_once(lake, CANDIDATE_PAIR, CANDIDATE_PAIR.schema.empty_table(), run_id="r", part="0")


def test_a_table_carries_its_meanings_and_checks_whichever_engine_writes_it(lake):
    for spec in (CANDIDATE_PAIR, PAIR_GRADE):
        table = tables.create(lake, spec)
        comments = {field.name: field.metadata["comment"] for field in table.schema().fields}
        assert comments == {column.name: column.meaning for column in spec.columns}
        assert {f"delta.constraints.{name}" for name, _ in spec.checks} <= set(table.metadata().configuration)


def test_a_missing_table_says_what_to_do(lake):
    with pytest.raises(LakeError, match=r"pair_grade: no such table in lake=.*; run the job that writes it"):
        tables.rows(lake, PAIR_GRADE)


def test_a_corrupt_data_file_is_one_sentence(lake):
    tables.append_once(lake, QUARANTINE, rejected(0), run_id="r", part="0")
    (data_file,) = [path for path in os.scandir(lake.table("quarantine")) if path.name.endswith(".parquet")]
    with open(data_file.path, "wb") as stream:
        stream.write(b"not parquet at all")
    with pytest.raises(LakeError, match=r"quarantine@newest in .* cannot be read") as caught:
        tables.rows(lake, QUARANTINE)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(LakeError, match=r"cannot write there"):
        Lake(str(tmp_path / "lake")).check_writable()


def test_a_lake_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LakeError, match=r"cannot write there .*; choose another lake=DIR"):
        Lake(str(tmp_path / "file" / "lake")).check_writable()


def test_a_lake_with_a_scheme_is_refused():
    with pytest.raises(LakeError, match="only local folders"):
        Lake("gs://bucket/lake")


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def fail_midway():
        with atomic_folder(str(target)) as scratch:
            (scratch / "half").write_text("x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(str(target)) as scratch:
        (scratch / "whole").write_text("x")
    assert [path.name for path in target.iterdir()] == ["whole"]


def failing_first(monkeypatch, error, times):
    """Makes the resolving of storage options fail so often; returns the pauses between the tries."""
    left, pauses = [error] * times, []

    def options(self):
        if left:
            raise left.pop()
        return {}

    monkeypatch.setattr(Lake, "storage_options", property(options))
    monkeypatch.setattr(storage, "sleep", pauses.append)
    return pauses


def test_a_failing_storage_is_tried_again_with_growing_pauses(lake, monkeypatch):
    pauses = failing_first(monkeypatch, OSError("connection refused"), 7)
    tables.append_once(lake, QUARANTINE, rejected(0), run_id="r", part="0")
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]
    assert tables.rows(lake, QUARANTINE).num_rows == 1


def test_a_storage_that_fails_for_too_long_and_what_waiting_does_not_mend_are_raised(lake, monkeypatch):
    pauses = failing_first(monkeypatch, OSError("connection refused"), 1)
    monkeypatch.setattr(storage, "PATIENCE_SEC", -1.0)
    with pytest.raises(OSError, match="connection refused"):
        tables.exists(lake, QUARANTINE)
    monkeypatch.undo()
    full = OSError("Generic LocalFileSystem error\n  No space left on device")
    for error in (PermissionError(13, "no"), OSError("Read-only file system"), full):
        pauses = failing_first(monkeypatch, error, 1)
        with pytest.raises(type(error), match=re.escape(str(error))):
            tables.exists(lake, QUARANTINE)
    assert pauses == []
