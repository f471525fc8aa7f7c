"""Run records and lineage: what ran on which versions, and whether it must run again.

A run's fingerprint is the hash of its job, recipe and inputs at their versions. A step is current when a
record with its fingerprint exists and everything it put out is still there; so unchanged work is never
repeated, and changed inputs are never missed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.load import ConfigError
from lake import tables
from lake.schemas import RUN_RECORD, TABLES
from lake.storage import Lake, LakeError

log = logging.getLogger(__name__)

OWNER_FILE = ".run"
"""In a folder that several runs may replace: the fingerprint of the run whose content it is."""


class Inputs(dict[str, str]):
    """What a run reads, by name; a name that was left out is an error of the settings."""

    def __missing__(self, name: str) -> str:
        raise ConfigError(f"inputs.{name} is empty; give inputs.{name}=newest, or the version or folder to read")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        inputs: table -> version as text, artifact -> fingerprint.
        outputs: table -> version as text, artifact -> path relative to the lake.
    """

    run_id: str
    job: str
    setting: str
    fingerprint: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    counts: Mapping[str, int]
    metrics: Mapping[str, float]
    recipe: str
    rows: int
    seconds: float
    started_at: datetime
    code_version: str

    def to_json(self) -> str:
        """One line of JSON with stable fields, the last line of every job."""
        values = dataclasses.asdict(self) | {
            "started_at": self.started_at.isoformat(),
            "recipe": json.loads(self.recipe),
        }
        return json.dumps(values, sort_keys=True)


@dataclasses.dataclass
class Run:
    """A run under way: collects what the record will say."""

    lake: Lake
    job: str
    setting: str
    fingerprint: str
    inputs: Inputs
    recipe: Any
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: float = dataclasses.field(default_factory=time.monotonic)
    started_at: datetime = dataclasses.field(default_factory=lambda: datetime.now(UTC))

    def claim(self, artifact: str) -> None:
        """Says in a folder that every run of this job replaces that its content is this run's."""
        Path(self.lake.path(artifact), OWNER_FILE).write_text(self.fingerprint, encoding="utf-8")

    def finish(
        self,
        *,
        rows: int,
        outputs: Mapping[str, int | str],
        counts: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> RunRecord:
        """Writes the record and returns it. Outputs are tables with their versions and artifacts with their paths."""
        record = RunRecord(
            run_id=self.run_id,
            job=self.job,
            setting=self.setting,
            fingerprint=self.fingerprint,
            inputs=dict(self.inputs),
            outputs={name: str(value) for name, value in outputs.items()},
            counts={name: int(value) for name, value in (counts or {}).items()},
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            recipe=json.dumps(dataclasses.asdict(self.recipe), sort_keys=True),
            rows=rows,
            seconds=round(time.monotonic() - self.started, 3),
            started_at=self.started_at,
            code_version=metadata.version("assay") if _installed() else "source",
        )
        row = dataclasses.asdict(record)
        for name in ("inputs", "outputs", "counts", "metrics"):
            row[name] = list(row[name].items())
        tables.append_once(
            self.lake,
            RUN_RECORD,
            pa.Table.from_pylist([row], schema=RUN_RECORD.schema),
            run_id=self.run_id,
            part="0",
        )
        log.info("%s: %d rows in %.1f s", self.job, rows, record.seconds)
        return record


def records(lake: Lake) -> list[RunRecord]:
    """All run records, oldest first."""
    if not tables.exists(lake, RUN_RECORD):
        return []
    found = []
    for row in tables.rows(lake, RUN_RECORD).to_pylist():
        for name in ("inputs", "outputs", "counts", "metrics"):
            row[name] = dict(row[name])
        found.append(RunRecord(**row))
    return sorted(found, key=lambda record: record.started_at)


def current(lake: Lake, job: str, fingerprint: str) -> RunRecord | None:
    """The newest record of this very work whose outputs are all still there; None where it must run."""
    written_over: set[str] = set()  # artifacts that later work put in the place of this one's
    for record in reversed(records(lake)):
        artifacts = {path for name, path in record.outputs.items() if name not in TABLES}
        is_same = record.job == job and record.fingerprint == fingerprint
        if is_same and not artifacts & written_over and _outputs_exist(lake, record):
            return record
        if not is_same:
            written_over |= artifacts
    return None


def newest(lake: Lake, job: str) -> RunRecord | None:
    """The newest record of a job."""
    return next((record for record in reversed(records(lake)) if record.job == job), None)


def _outputs_exist(lake: Lake, record: RunRecord) -> bool:
    for name, value in record.outputs.items():
        if name in TABLES:
            held = tables.version(lake, TABLES[name])
            if held is None or held < int(value):
                return False
        elif not Path(lake.path(value)).exists() or _owner(lake.path(value)) not in ("", record.fingerprint):
            return False
        elif name.startswith("raw/") and not _owner(lake.path(value)):
            return False  # a run replaced the folder and was killed before it could say so
    return True


def _owner(path: str) -> str:
    file = Path(path, OWNER_FILE)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def pinned_version(lake: Lake, table: str, wanted: str) -> int:
    """The version an input names: digits, or "newest".

    Raises:
        LakeError: the table does not exist or has no such version.
    """
    held = tables.version(lake, TABLES[table])
    if held is None:
        raise LakeError(tables.missing(lake, TABLES[table]))
    if wanted == "newest":
        return held
    if not wanted.isdigit() or int(wanted) > held:
        raise LakeError(f"{table}@{wanted}: lake={lake.root} holds versions 0 to {held}; give one of them or newest")
    return int(wanted)


def _installed() -> bool:
    try:
        metadata.version("assay")
    except metadata.PackageNotFoundError:
        return False
    return True
