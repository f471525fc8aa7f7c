"""Where a lake lies: a local folder now. The one place that turns a lake's root into paths and options."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)

PATIENCE_SEC = 180.0
"""How long a storage that fails is tried again before a run gives up."""
FIRST_WAIT_SEC, LONGEST_WAIT_SEC = 0.2, 10.0
FULL = ("No space left", "Disk quota exceeded")
"""What engines say of a full disk, each in a message of its own."""
LASTING = (*FULL, "Permission denied", "Read-only file system", "Not a directory")
"""What the messages of failures say that waiting does not mend."""

P = ParamSpec("P")
R = TypeVar("R")


class LakeError(RuntimeError):
    """The lake cannot be used as asked; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Lake:
    """A lake's root and where its parts lie below it.

    Layout: tables/ (Delta), raw/ (input files as imported), truth/ (simulation's ground truth, read only by
    evaluation), models/, vectors/, runs/ (checkpoints of unfinished runs), reports/, reviews/,
    evaluation/ (lakes of data sets that encoders were measured on).
    """

    root: str

    def __post_init__(self) -> None:
        if "://" in self.root:
            raise LakeError(f"lake={self.root}: only local folders are supported; give a path without a scheme")

    def path(self, *parts: str) -> str:
        """Absolute path of something inside the lake."""
        return str(Path(self.root).resolve().joinpath(*parts))

    def table(self, name: str) -> str:
        """Absolute path of a table."""
        return self.path("tables", name)

    def relative(self, path: str) -> str:
        """A path inside the lake relative to its root, so that a lake can be moved."""
        return os.path.relpath(path, self.path())

    @property
    def storage_options(self) -> dict[str, str]:
        """Options every Delta client gets; a local folder needs none."""
        return {}

    def check_writable(self) -> None:
        """Makes the root where it is missing and tries a write.

        Raises:
            LakeError: the folder cannot be written.
        """
        try:
            Path(self.path()).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path()):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise LakeError(f"lake={self.root}: cannot write there ({reason}); choose another lake=DIR") from error


def patient(action: Callable[P, R]) -> Callable[P, R]:
    """An action on the lake that is tried again while the storage fails, with growing pauses.

    Only actions that may run twice: reading, and writes that carry a transaction. What waiting does not mend (a full
    disk, a missing file, missing rights) is raised at once.
    """

    @functools.wraps(action)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        began, wait = monotonic(), FIRST_WAIT_SEC
        while True:
            try:
                return action(*args, **kwargs)
            except OSError as error:
                passed = monotonic() - began
                if is_lasting(error) or passed > PATIENCE_SEC:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                log.warning("the storage fails (%s); tried again in %.1f s, %.0f s passed", reason, wait, passed)
                sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SEC)

    return tried


def free_space(folder: str | Path) -> tuple[Path, int]:
    """The folder, or what of its path is there, and how many bytes its disk has free."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def check_space(folder: str | Path, num_bytes: int, what: str) -> None:
    """Refuses work whose files the disk has no room for.

    Args:
        folder: where they are written; may be absent.
        num_bytes: that they take.
        what: names them.

    Raises:
        LakeError: less is free.
    """
    place, free = free_space(folder)
    if num_bytes > free:
        raise LakeError(
            f"{what} take about {num_bytes / 1e6:,.0f} MB, {place} has {free / 1e6:,.0f} MB free; make room and give "
            "the same command again, which goes on where this one stopped"
        )


def is_lasting(error: OSError) -> bool:
    """Whether waiting does not mend this failure of the storage."""
    return isinstance(error, FileNotFoundError | PermissionError) or any(part in str(error) for part in LASTING)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file that readers see whole or as it was before; makes its folder where that is missing."""
    with atomic_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A scratch file of the same ending that takes the place of `path` when the block ends well, and vanishes when not.

    Makes its folder where that is missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield fresh
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str) -> Iterator[Path]:
    """A scratch folder that takes the place of `target` when the block ends well, and vanishes when not.

    An old folder is renamed aside first and removed last: a reader finds the old one, for an instant none, or the
    new one, and never a part of either.
    """
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        yield scratch
        scratch.chmod(0o755)
        if final.exists():
            os.replace(final, old)
        os.replace(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
