"""The one shape of a job: parse SETTING and key=value, pin the inputs, run, print the record.

A job's config has `lake`, `setting` and three sections: `inputs` (which table at which version, which artifact),
`recipe` (what is computed; bears identity) and `placement` (where and how; never identity).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from conf.load import ConfigError, describe, fingerprint, list_settings, load_job, meaning, settings
from lake import runs, tables
from lake.runs import Inputs, Run, RunRecord
from lake.schemas import TABLES
from lake.storage import FULL, Lake

DONE, FAILED, BAD_USAGE, GATE_SAID_NO = 0, 1, 2, 3
DEFAULT_LAKE = ".assay/demo"

LakeRoot = Annotated[str, meaning("folder of the lake")]
SettingName = Annotated[str, meaning("name of the setting, for the run record")]
TableVersion = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    meaning('version to read: a number, "newest", or "if_there", the newest of a table that may not exist yet'),
]
IF_THERE = "if_there"
"""Version of an input that counts as left out while its table does not exist."""


OUTSIDE = ("root", "mapping", "file")
"""Inputs that name what lies outside the lake; a folder of that name inside it is none of them."""
LISTED = ("logs",)
"""Inputs known by the names, sizes and times of their files alone: reading all that was read before costs too much."""
RECIPE_PATHS = ("model", "baseline_model", "guideline")
"""Settings of recipes that may name a local folder or file."""


@settings
class InProcess:
    """Placement of a job that runs in this process: nothing to choose."""


class GateError(RuntimeError):
    """A quality gate said no; the message says which and by how much."""


def begin(config: Any, job: str) -> Run:
    """Opens a run: pins every input to a version or a content hash, and computes the fingerprint.

    Raises:
        LakeError: the lake cannot be written, or a table, version or folder that the inputs name does not exist.
    """
    Lake(config.lake).check_writable()
    return pin(config, job)


def pin(config: Any, job: str) -> Run:
    """What `begin` opens, without touching the lake.

    Raises:
        LakeError: a table, version or folder that the inputs name does not exist.
    """
    lake = Lake(config.lake)
    inputs = Inputs(_pinned(lake, config.inputs) | _recipe_files(config.recipe))
    return Run(
        lake=lake,
        job=job,
        setting=config.setting,
        fingerprint=fingerprint(job, config.recipe, inputs),
        inputs=inputs,
        recipe=config.recipe,
    )


def run_once(config: Any, job: str, run: Callable[[Any], RunRecord]) -> RunRecord:
    """The record of this very work where the lake has it and its outputs; else that of running it now."""
    opened = begin(config, job)
    return runs.current(opened.lake, job, opened.fingerprint) or run(config)


def _pinned(lake: Lake, inputs: Any) -> dict[str, str]:
    pinned: dict[str, str] = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if value in ("", ()):
            continue
        if field.name in TABLES:
            if value != IF_THERE:
                pinned[field.name] = str(runs.pinned_version(lake, field.name, value))
            elif tables.exists(lake, TABLES[field.name]):
                pinned[field.name] = str(runs.pinned_version(lake, field.name, "newest"))
            continue
        for item in value if isinstance(value, tuple) else (value,):
            folder = item if field.name in OUTSIDE and os.path.exists(item) else find_path(lake, item)
            pinned[f"{field.name}:{item}" if isinstance(value, tuple) else field.name] = (
                _hash_of(field.name)(folder, without=lake.path()) if folder else item
            )
    return pinned


def _hash_of(name: str) -> Callable[..., str]:
    return listing_hash if name in LISTED else content_hash


def _recipe_files(recipe: Any, prefix: str = "recipe") -> dict[str, str]:
    """Content of local models and files that a recipe names: a path alone does not say what is in it."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(recipe):
        value, key = getattr(recipe, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            found |= _recipe_files(value, key)
        elif isinstance(value, str) and value and field.name in RECIPE_PATHS and os.path.exists(value):
            found[key] = content_hash(value)
    return found


def find_path(lake: Lake, value: str) -> str | None:
    """The file or folder an input names, inside the lake first; None where it names none."""
    return next((path for path in (lake.path(value), value) if os.path.exists(path)), None)


def content_hash(path: str, without: str = "") -> str:
    """16 hex digits over a file, or over all files of a folder by relative name; equal content, equal hash.

    Args:
        path: file or folder; what is hidden in a folder is no content.
        without: a folder left out, since a lake may lie below its own input.
    """
    root, digest = Path(path), hashlib.sha256()
    files = [root] if root.is_file() else sorted(_content_files(root, Path(without) if without else None))
    for item in files:
        digest.update(b"" if item == root else str(item.relative_to(root)).encode() + b"\0")
        with item.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def listing_hash(path: str, without: str = "") -> str:
    """16 hex digits over names, sizes and times of a folder's files; see `content_hash`."""
    files = sorted(_content_files(Path(path), Path(without) if without else None))
    stats = [(str(item.relative_to(path)), item.stat().st_size, item.stat().st_mtime_ns) for item in files]
    return fingerprint(stats)


def _content_files(root: Path, without: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name[0] != "." and (not without or Path(folder, name).resolve() != without)
        ]
        yield from (Path(folder, name) for name in names if name[0] != ".")


def main(job: str, config_class: type[Any], run: Callable[[Any], RunRecord], argv: Sequence[str] | None) -> int:
    """`python -m jobs.<job> SETTING key=value ...`: runs the job; the last line is its record as JSON.

    Returns:
        0 done, 1 failed, 2 bad usage or configuration, 3 a quality gate said no.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(help_text(job, config_class, next((word for word in words if word in list_settings(job)), "dev")))
        return DONE
    set_up_logging(logging.INFO)
    return guarded(lambda: print(run(parse(job, config_class, words)).to_json(), flush=True))


def set_up_logging(level: int) -> None:
    """Log lines to standard error: ours from `level` on, those of libraries from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    # py4j tells of a retried command, with its traceback, through the root logger
    for name in ("__main__", "conf", "lake", "embeddings", "spark_etl", "ray_apps", "jobs"):
        logging.getLogger(name).setLevel(level)


def parse(job: str, config_class: type[Any], words: Sequence[str]) -> Any:
    """SETTING and key=value words, in any order, into the job's config.

    Raises:
        ConfigError: no setting, more than one, or a bad key or value.
    """
    named = [word for word in words if "=" not in word and word != "--json"]
    if len(named) != 1 or named[0].startswith("-"):
        known = ", ".join(list_settings(job))
        raise ConfigError(
            f"{job}: expected one SETTING and key=value words, got {' '.join(named) or 'none'}; settings: {known}"
        )
    overrides = [word for word in words if "=" in word]
    return load_job(config_class, job, named[0], [f"setting={named[0]}", *overrides])


def guarded(action: Callable[[], object]) -> int:
    """Runs an action and turns what goes wrong into one sentence and an exit code."""
    try:
        action()
    except ConfigError as error:
        return _fail(error, BAD_USAGE)
    except GateError as error:
        return _fail(error, GATE_SAID_NO)
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return _fail(one_sentence(error), FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped", FAILED)
    except Exception as error:  # engines raise classes of their own; ASSAY_DEBUG=1 shows where
        if os.environ.get("ASSAY_DEBUG"):
            raise
        return _fail(one_sentence(error), FAILED)
    return DONE


def _reader_is_gone() -> bool:
    """Whether standard output is what broke (assay ... | head); then it leads nowhere from now on."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def one_sentence(error: BaseException) -> str:
    """What went wrong in one line: of a remote error its cause, of an engine's report the line that says it."""
    if isinstance(error, ImportError) and error.name:
        return f"{error.name} is not installed; install the extra of assay that brings it"
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error)
    if any(part in text for part in FULL):
        return (
            "the disk is full; what was written before stays and nothing half-written is visible: make room and give "
            "the same command again, which goes on where this one stopped"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    if not lines:
        return type(error).__name__
    return lines[-1] if lines[0].startswith(("Traceback", "ray::", "\x1b")) else lines[0]


def _fail(what: object, code: int) -> int:
    print(f"assay: {what}", file=sys.stderr)
    return code


def help_text(job: str, config_class: type[Any], setting: str) -> str:
    """Every setting of a job with type, default under `setting`, unit and meaning."""
    config = load_job(config_class, job, setting) if setting in list_settings(job) else None
    head = f"{job} SETTING [key=value ...]\nsettings: {', '.join(list_settings(job))} (defaults below: {setting})\n"
    return "\n".join([head, *settings_lines(config_class, config)])


def settings_lines(config_class: type[Any], config: Any) -> list[str]:
    """One entry per setting: key, default, type, meaning and unit."""
    lines = []
    for item in describe(config_class, config):
        unit = f" [{item.unit}]" if item.unit else ""
        lines.append(f"  {item.key}={item.default}\n      {item.type}: {item.meaning}{unit}")
    return lines
