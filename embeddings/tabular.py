"""Reads CSV, TSV, JSONL and Parquet files, packed or not, as tables of trimmed text; empty is null."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

_DELIMITERS = "\t,;|"
_NULL_WORDS = ["", "NaN", "nan", "null", "NULL"]
_PACKINGS = (".gz", ".zst", ".bz2")


class Source:
    """Reads the files of one data set's folder; a file that is asked for twice is read once.

    Attributes:
        broken: lines that could not be parsed: the file's name, the line and the reason.
    """

    def __init__(self, root: Path, encoding: str = "utf-8") -> None:
        self.root = root
        self.encoding = encoding
        self.broken: list[tuple[str, str, str]] = []
        self._tables: dict[str, pa.Table] = {}

    def find(self, *names: str) -> str | None:
        """The first of the names that exists in the folder, plain or packed."""
        packed = [name + packing for name in names for packing in ("", *_PACKINGS)]
        return next((name for name in packed if (self.root / name).is_file()), None)

    def read(self, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
        """Those columns of a file, as text; an optional column that is absent is all null.

        Raises:
            ValueError: the file is missing or unreadable, or lacks a required column.
        """
        table = self._load(name)
        for column in required:
            if column not in table.column_names:
                known = ", ".join(table.column_names)
                raise ValueError(f"{self.root / name}: expected a column {column!r}; the file has {known}")
        nulls = pa.nulls(len(table), pa.string())
        columns = {
            column: as_text(table[column]) if column in table.column_names else nulls
            for column in dict.fromkeys([*required, *optional])
        }
        return pa.table(columns)

    def has_column(self, name: str, column: str) -> bool:
        """Whether a file has a column."""
        return column in self._load(name).column_names

    def _load(self, name: str) -> pa.Table:
        if name not in self._tables:
            path = self.root / name
            if not path.is_file():
                found = sorted(entry.name for entry in self.root.iterdir()) if self.root.is_dir() else []
                held = f"the folder holds {', '.join(found) or 'nothing'}"
                raise ValueError(f"{path}: no such file; {held if self.root.is_dir() else 'nor such a folder'}")
            try:
                self._tables[name] = self._parse(path)
            except (pa.ArrowException, OSError, UnicodeError, EOFError, LookupError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{path}: cannot be read, is it whole and of that format? {reason}") from error
        return self._tables[name]

    def _parse(self, path: Path) -> pa.Table:
        suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKINGS]
        suffix = suffixes[-1].lower() if suffixes else ""
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix in (".jsonl", ".ndjson"):
            return self._parse_jsonl(path)
        if suffix in (".csv", ".tsv", ".txt"):
            return self._parse_csv(path)
        raise ValueError(f"{path}: expected .csv, .tsv, .jsonl or .parquet, plain or packed; rename or convert it")

    def _parse_jsonl(self, path: Path) -> pa.Table:
        rows: list[dict[str, Any]] = []
        with pa.input_stream(str(path), compression="detect") as stream:
            text = stream.read().decode(self.encoding).removeprefix("\ufeff")
        for line in filter(str.strip, text.split("\n")):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                self.broken.append((path.name, line, f"not JSON: {error.msg}"))
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                self.broken.append((path.name, line, "not a JSON object"))
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: pa.array([_plain_text(row.get(name)) for row in rows], pa.string()) for name in names})

    def _parse_csv(self, path: Path) -> pa.Table:
        with pa.input_stream(str(path), compression="detect") as stream:
            head = stream.read(1 << 16).decode(self.encoding, errors="replace").removeprefix("\ufeff")
        header = head.partition("\n")[0].rstrip("\r")
        delimiter = max(_DELIMITERS, key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])

        swallowed: list[str] = []

        def skip(row: pa_csv.InvalidRow) -> str:
            reason = f"expected {row.expected_columns} fields, got {row.actual_columns}"
            # a quote that is never closed takes the lines after it along: only the first is broken
            first, newline, rest = str(row.text).partition("\n")
            self.broken.append((path.name, first, reason))
            if newline:
                swallowed.append(rest)
            return "skip"

        def parse(text: BinaryIO) -> pa.Table:
            return pa_csv.read_csv(
                text,
                # One thread: the handler of invalid rows is Python, and rejected rows keep the file's order.
                read_options=pa_csv.ReadOptions(encoding=self.encoding, use_threads=False),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    null_values=_NULL_WORDS,
                    strings_can_be_null=True,
                ),
            )

        with pa.input_stream(str(path), compression="detect") as stream:
            tables = [parse(stream)]
        while swallowed:
            tables.append(parse(io.BytesIO(f"{header}\n{swallowed.pop()}".encode(self.encoding))))
        return pa.concat_tables(tables)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values as trimmed text; whole floats without `.0`, lists as a path `A > B`, null where empty."""
    if pa.types.is_floating(column.type) or pa.types.is_nested(column.type):
        column = pa.chunked_array([pa.array([_plain_text(value) for value in column.to_pylist()], pa.string())])
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(text, value_set=pa.array(_NULL_WORDS)), pa.scalar(None, pa.string()), text)


def as_id(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as text: "12.0", which a tool made of 12, is "12" again."""
    return pc.replace_substring_regex(text, r"^(-?\d+)\.0+$", r"\1")


def _plain_text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, list):
        return " > ".join(str(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
