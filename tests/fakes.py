"""Stand-ins for unit tests only."""

from datetime import UTC, datetime

from lake.runs import RunRecord


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
