"""How far a run is, told through a file in its folder, so that any process can tell and any can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lake.storage import replace_text

PROGRESS_FILE = "progress.json"


class State(NamedTuple):
    """How far a run is: units done of a total, and a word on them."""

    done: int
    total: int
    note: str


def write_progress(run_folder: str | Path, *, done: int, total: int, note: str = "") -> None:
    """Tells whoever follows the run how far it is; the file is replaced in one step."""
    told = json.dumps({"done": done, "total": total, "note": note})
    replace_text(Path(run_folder, PROGRESS_FILE), told)


def read_progress(run_folder: str | Path) -> State | None:
    """The newest state; None where nothing was told yet."""
    try:
        told = json.loads((Path(run_folder) / PROGRESS_FILE).read_text())
        return State(int(told["done"]), int(told["total"]), str(told["note"]))
    except (OSError, ValueError, KeyError):
        return None
