"""Delta tables through delta-rs: create, rows, append_once, replace, versions.

Every write compares schema and key with the TableSpec first, since engines do not (some drop extra columns
without a word), and carries an application transaction, so that a replayed part is written once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Field, Schema, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lake.mapped import in_order, mapped
from lake.schemas import TableSpec, check_schema
from lake.storage import Lake, LakeError, patient

log = logging.getLogger(__name__)

CONFIGURATION = {"delta.enableDeletionVectors": "false"}
"""delta-rs can neither read nor write tables with deletion vectors."""

REPLACE_TRIES = 5


@patient
def exists(lake: Lake, spec: TableSpec) -> bool:
    """Whether the table has been created."""
    return bool(DeltaTable.is_deltatable(lake.table(spec.name), storage_options=lake.storage_options))


def version(lake: Lake, spec: TableSpec) -> int | None:
    """Newest version of the table; None where it does not exist."""
    return open_table(lake, spec).version() if exists(lake, spec) else None


@patient
def open_table(lake: Lake, spec: TableSpec, version: int | None = None) -> DeltaTable:
    """The Delta table; every client of one is opened here."""
    return DeltaTable(lake.table(spec.name), version=version, storage_options=lake.storage_options)


@patient
def create(lake: Lake, spec: TableSpec) -> DeltaTable:
    """The table, made from its specification where it does not exist yet, whichever engine writes its rows.

    Made here for Spark as well: creating and each check took Spark a job of seconds. A table of an earlier version
    gets the nullable columns that the specification has gained since.
    """
    if not exists(lake, spec):
        lake.check_writable()
        DeltaTable.create(
            lake.table(spec.name),
            schema=Schema(_delta_fields(spec)),
            mode="ignore",
            partition_by=list(spec.partition_by) or None,
            name=spec.name,
            description=spec.meaning,
            configuration=CONFIGURATION,
            storage_options=lake.storage_options,
        )
    table = open_table(lake, spec)
    held_columns = {field.name for field in table.schema().fields}
    if gained := [field for field in _delta_fields(spec) if field.name not in held_columns and field.nullable]:
        table.alter.add_columns(gained)
    # Delta takes checks only after the table is there; a crash in between is made good here.
    held = table.metadata().configuration
    checks = {name: condition for name, condition in spec.checks if f"delta.constraints.{name.lower()}" not in held}
    if checks:
        table.alter.add_constraint(checks)
    return table


def _delta_fields(spec: TableSpec) -> list[Field]:
    fields = [
        field.with_metadata({"comment": column.meaning})
        for field, column in zip(spec.schema, spec.columns, strict=True)
    ]
    return list(Schema.from_arrow(pa.schema(fields)).fields)


def rows(
    lake: Lake,
    spec: TableSpec,
    *,
    version: int | None = None,
    columns: Sequence[str] | None = None,
    where: Any = None,
) -> pa.Table:
    """Rows of a table as Arrow, in the specification's column order.

    Args:
        version: Delta version; None reads the newest.
        where: pyarrow filters in DNF, e.g. [("split", "=", "test")].

    Raises:
        LakeError: the table or the version does not exist, or a data file cannot be read.
    """
    with _readable(lake, spec, version):
        table = open_table(lake, spec, version)
        names = list(columns) if columns else spec.column_names
        found = table.to_pyarrow_table(columns=_held(table, names), filters=where)
        return plain(with_gained(spec, found, names))


def sorted_rows(
    lake: Lake,
    spec: TableSpec,
    *,
    version: int,
    columns: Sequence[str],
    by: Sequence[str],
    where: pc.Expression | None = None,
) -> pa.Table:
    """Rows in the order of columns, in a mapped file (`lake.mapped`): of tables that need not fit into memory.

    Args:
        version: Delta version.
        columns: wanted, those of `by` among them.
        by: columns that they ascend by.
        where: which rows.

    Raises:
        LakeError: the table or the version does not exist, a data file cannot be read, or the disk is full.
    """
    with _readable(lake, spec, version):
        table = open_table(lake, spec, version)
        # no more than a few blocks at once
        batches = table.to_pyarrow_dataset().to_batches(
            columns=_held(table, columns), filter=where, batch_readahead=2, fragment_readahead=1
        )
        kinds = pa.schema([(name, spec.schema.field(name).type) for name in columns])
        parts = (with_gained(spec, pa.Table.from_batches([batch]), columns).cast(kinds) for batch in batches)
        return in_order(mapped(parts, kinds), by)


def _held(table: DeltaTable, names: Sequence[str]) -> list[str]:
    """Those of the columns that the table has; its specification may have gained others since."""
    held = {field.name for field in table.schema().fields}
    return [name for name in names if name in held]


@contextmanager
def _readable(lake: Lake, spec: TableSpec, version: int | None) -> Iterator[None]:
    """Failures to read a table as a LakeError that names it."""
    try:
        yield
    except TableNotFoundError as error:
        raise LakeError(missing(lake, spec)) from error
    except (DeltaError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise LakeError(f"{spec.name}@{version or 'newest'} in {lake.root} cannot be read: {reason}") from error


def with_gained(spec: TableSpec, found: pa.Table, names: Sequence[str]) -> pa.Table:
    """The columns by name; nulls for those that the specification gained after the table was written."""
    kinds = {column.name: column.type for column in spec.columns if column.nullable}
    for name in names:
        if name not in found.column_names and name in kinds:
            found = found.append_column(name, pa.nulls(len(found), kinds[name]))
    return found.select(list(names))


def missing(lake: Lake, spec: TableSpec) -> str:
    """The sentence for a table that is not there."""
    return f"{spec.name}: no such table in lake={lake.root}; run the job that writes it, or name another lake=DIR"


@patient
def append_once(lake: Lake, spec: TableSpec, data: pa.Table, *, run_id: str, part: str) -> bool:
    """Appends a part of a run unless it was appended before.

    Returns:
        Whether the rows were written now.

    Raises:
        ValueError: the rows do not fit the specification.
    """
    check_writer(spec, "delta-rs")
    conformed = conform(spec, data)
    table, name = create(lake, spec), f"{run_id}/{part}"
    if table.transaction_version(name) is not None:
        log.info("%s: part %s is there already", spec.name, name)
        return False
    write_deltalake(
        table,
        conformed,
        mode="append",
        commit_properties=CommitProperties(
            custom_metadata={"run_id": run_id, "part": part}, app_transactions=[Transaction(name, 1)]
        ),
    )
    return True


@patient
def replace(lake: Lake, spec: TableSpec, data: pa.Table, *, run_id: str, where: str | None = None) -> int:
    """Replaces the table, or the rows that meet the SQL condition `where`, in one commit.

    Of two runs that replace the same rows at once the later wins.

    Returns:
        The version written.
    """
    check_writer(spec, "delta-rs")
    conformed = conform(spec, data)
    for tries_left in reversed(range(REPLACE_TRIES)):
        try:
            write_deltalake(
                create(lake, spec),
                conformed,
                mode="overwrite",
                predicate=where,
                commit_properties=CommitProperties(custom_metadata={"run_id": run_id}),
            )
            break
        except CommitFailedError:
            if not tries_left:
                raise
    return int(open_table(lake, spec).version())


def datasets(lake: Lake, spec: TableSpec, version: int | None = None) -> set[str]:
    """The data sets of which a table has rows."""
    return set(rows(lake, spec, version=version, columns=["dataset"]).column("dataset").unique().to_pylist())


def equal_to(key: Mapping[str, str]) -> str:
    """The SQL condition that columns have these values."""
    return " AND ".join(f"{name} = {_quoted(value)}" for name, value in key.items())


def one_of(column: str, values: Iterable[str]) -> str:
    """The SQL condition that a column has one of these values; of none it has none."""
    listed = ", ".join(map(_quoted, sorted(values)))
    return f"{column} IN ({listed})" if listed else "false"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def conform(spec: TableSpec, data: pa.Table) -> pa.Table:
    """The rows in the specification's column order and exact types, after all checks.

    Raises:
        ValueError: schema, nullability or key is violated.
    """
    check_schema(spec, data.schema)
    ordered = data.select(spec.column_names)
    for column in spec.columns:
        if not column.nullable and ordered.column(column.name).null_count:
            raise ValueError(f"{spec.name}: column {column.name!r} holds nulls; the job must fill or quarantine them")
    if pc.any(pc.greater(ordered.group_by(list(spec.key)).aggregate([([], "count_all")])["count_all"], 1)).as_py():
        raise ValueError(f"{spec.name}: rows repeat the key {spec.key}; deduplicate in the job before writing")
    return ordered.cast(spec.schema)


def check_writer(spec: TableSpec, engine: str) -> None:
    """Refuses an engine that does not own the table."""
    if spec.writer != engine:
        raise ValueError(f"{spec.name}: is written by {spec.writer} only, not by {engine}; use lake.{_verbs(spec)}")


def _verbs(spec: TableSpec) -> str:
    return "spark" if spec.writer == "spark" else "tables"


def plain(table: pa.Table) -> pa.Table:
    """Arrow rows with plain strings, whichever engine wrote them."""
    fields = []
    for field in table.schema:
        kind = (
            pa.string() if pa.types.is_string_view(field.type) or pa.types.is_large_string(field.type) else field.type
        )
        fields.append(field.with_type(kind))
    return table.cast(pa.schema(fields))
