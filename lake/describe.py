"""docs/tables.md, generated from lake/schemas.py: `python -m lake.describe > docs/tables.md`."""

from __future__ import annotations

from lake.schemas import TABLES, Column, TableSpec


def render_markdown() -> str:
    """Every table with its writer, key and columns, as one Markdown page."""
    head = (
        "# Tables\n\nGenerated from `lake/schemas.py` by `make docs`; edit there. Every table is a Delta table under "
        "`LAKE/tables/`, written by the one engine named and read by all.\n"
    )
    return "\n".join([head, *(_table(spec) for spec in TABLES.values())])


def _table(spec: TableSpec) -> str:
    facts = f"Written by {spec.writer}. Key: {', '.join(f'`{name}`' for name in spec.key)}."
    if spec.partition_by:
        facts += f" Replaced by {', '.join(f'`{name}`' for name in spec.partition_by)}."
    lines = [
        f"## {spec.name}",
        "",
        f"{spec.meaning} {facts}",
        "",
        "| column | type | meaning | unit |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(column) for column in spec.columns), ""])


def _row(column: Column) -> str:
    kind = f"{column.type}{' or null' if column.nullable else ''}"
    return f"| `{column.name}` | {kind} | {column.meaning.replace('|', '/')} | {column.unit} |"


if __name__ == "__main__":
    print(render_markdown(), end="")
