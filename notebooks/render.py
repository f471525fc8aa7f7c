"""Runs a notebook in a kernel of its own and writes it with all results as one HTML file.

    python notebooks/render.py NAME [lake=DIR] [query=TEXT] [labeller=FINGERPRINT] [connect_url=URL] [out=FILE]

Notebooks are Databricks sources; a cell with an error ends in exit code 1 and one sentence, and no file is written.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conf.load import ConfigError
from jobs import job
from lake.storage import replace_text

FIRST_LINE, BETWEEN_CELLS = "# Databricks notebook source", "# COMMAND ----------"
SETTINGS = ("lake", "query", "labeller", "connect_url")
FROM_OUTSIDE = re.compile(r"<script[^>]*\ssrc=\"https?://[^\"]*\"[^>]*>\s*</script>")
"""Scripts for formulas and widgets, which no notebook here has: a page of a shop's data asks nobody for anything."""
DEFAULT_OUT = ".assay/notebooks"


class NotebookError(RuntimeError):
    """A notebook cannot be read, or a cell of it failed; the message is one sentence."""


class Cell(NamedTuple):
    """A cell of a notebook: Markdown or Python."""

    is_markdown: bool
    text: str


def parse(source: str, name: str) -> list[Cell]:
    """The cells of a Databricks source.

    Raises:
        NotebookError: it is none, or it has a magic that is no Markdown.
    """
    first, _, rest = source.partition("\n")
    if first.strip() != FIRST_LINE:
        raise NotebookError(f"{name}: expected {FIRST_LINE!r} as the first line, got {first[:60]!r}")
    texts = [part.strip("\n") for part in re.split(rf"^{BETWEEN_CELLS}$", rest, flags=re.MULTILINE)]
    return [_cell(text, name) for text in texts if text.strip()]


def _cell(text: str, name: str) -> Cell:
    lines = text.splitlines()
    if not any(line.startswith("# MAGIC") for line in lines):
        return Cell(is_markdown=False, text=text)
    shown = [line.removeprefix("# MAGIC").removeprefix(" ") for line in lines if line.startswith("# MAGIC")]
    if len(shown) < len(lines) or not shown[0].startswith("%md"):
        raise NotebookError(f"{name}: expected Python or a cell of '# MAGIC %md' lines alone, got {lines[0][:60]!r}")
    shown[0] = shown[0].removeprefix("%md").strip()
    return Cell(is_markdown=True, text="\n".join(shown).strip())


def find_notebook(name: str) -> Path:
    """The file of a notebook.

    Raises:
        ConfigError: there is none of this name.
    """
    path = ROOT / "notebooks" / f"{name.removesuffix('.py')}.py"
    known = sorted(file.stem for file in path.parent.glob("*.py") if file.name != "render.py")
    if path.stem not in known:
        raise ConfigError(f"NAME={name!r}: no such notebook; give one of {', '.join(known)}")
    return path


def executed(cells: Sequence[Cell], name: str, settings: dict[str, str]) -> Any:
    """The notebook with its results, as an object of nbformat.

    Raises:
        NotebookError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    make = nbformat.v4
    notebook = make.new_notebook(
        cells=[
            make.new_markdown_cell(cell.text) if cell.is_markdown else make.new_code_cell(cell.text) for cell in cells
        ]
    )
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    told = {f"ASSAY_{key.upper()}": value for key, value in settings.items()}
    # a folder of its own, so that nobody's start-up scripts run in it
    with tempfile.TemporaryDirectory() as scratch:
        try:
            client.execute(env=os.environ | told | {"IPYTHONDIR": scratch, "PYTHONPATH": _python_path()})
        except CellExecutionError as error:
            place = next(place for place, cell in enumerate(notebook.cells, 1) if _has_failed(cell))
            message = str(error.evalue).strip().splitlines() or [""]
            raise NotebookError(f"notebook {name}, cell {place}: {error.ename}: {message[0]}") from error
    for cell in notebook.cells:
        _take_errors_out(cell)
    return notebook


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _has_failed(cell: Any) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def _take_errors_out(cell: Any) -> None:
    """What Spark and libraries say beside goes to our standard error, not to the page."""
    said = [output for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    for output in said:
        print(output.text, end="", file=sys.stderr)
        cell.outputs.remove(output)


def render(name: str, settings: dict[str, str], out: Path) -> None:
    """Runs a notebook and writes its HTML."""
    from nbconvert import HTMLExporter

    path = find_notebook(name)
    notebook = executed(parse(path.read_text(encoding="utf-8"), path.stem), path.stem, settings)
    html, _ = HTMLExporter().from_notebook_node(notebook, resources={"metadata": {"name": f"Assay: {path.stem}"}})
    replace_text(out, FROM_OUTSIDE.sub("", html))
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line printed is the path of the file."""
    words = list(sys.argv[1:] if argv is None else argv)
    return job.guarded(lambda: _run(words))


def _run(words: Sequence[str]) -> None:
    names = [word for word in words if "=" not in word]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = sorted(set(given) - {*SETTINGS, "out"})
    if len(names) != 1 or unknown:
        raise ConfigError(
            f"expected NAME and some of {', '.join(f'{key}=' for key in (*SETTINGS, 'out'))}; "
            f"got {' '.join(words) or 'none'}"
        )
    out = given.pop("out", "") or f"{DEFAULT_OUT}/{Path(names[0]).stem}.html"
    # the kernel works in the project's folder, the caller may not
    given["lake"] = os.path.abspath(given.get("lake") or job.DEFAULT_LAKE)
    render(names[0], given, Path(out))


if __name__ == "__main__":
    sys.exit(main())
