"""Stand-ins for unit tests only."""

import hashlib
from datetime import UTC, datetime

import pyarrow as pa
from deltalake import write_deltalake

from lake.runs import RunRecord
from lake.storage import Lake

SHOP_SPLITS = ("train", "train", "train", "validation", "calibration", "test")
"""Splits of the queries q0, q1, ... of the fixture `shop`, over and over."""


def record(**changes):
    """A run record with plain values."""
    values = {
        "run_id": "r",
        "job": "mine",
        "setting": "dev",
        "fingerprint": "f",
        "inputs": {},
        "outputs": {},
        "counts": {},
        "metrics": {},
        "recipe": "{}",
        "rows": 0,
        "seconds": 0.0,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC),
        "code_version": "0",
    }
    return RunRecord(**(values | changes))


def shares(grade):
    """Columns of a consensus that all raters gave."""
    return {f"at_least_{bound}": float(grade >= bound) for bound in (1, 2)}


def put(lake: Lake, spec, rows):
    """Writes a table whichever engine owns it, without starting Spark."""
    filled = [{column.name: row.get(column.name) for column in spec.columns} for row in rows]
    write_deltalake(lake.table(spec.name), pa.Table.from_pylist(filled, schema=spec.schema), mode="append")


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()
