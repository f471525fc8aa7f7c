"""Finds models in the lake by the names people use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from conf.load import ConfigError
from lake import runs
from lake.runs import RunRecord
from lake.storage import Lake, LakeError, replace_text

ENCODERS = ("pretrained", "stage1", "stage2")
CHOSEN_FILE = "models/chosen.json"
"""The models that the lake's last loop ended with, name -> folder."""


def encoder_folder(lake: Lake, name: str) -> str:
    """Folder of an encoder: pretrained, stage1 or stage2 of the last loop, else of the newest training, or a path.

    Raises:
        ConfigError: the name is none of these.
        LakeError: that model was not trained in this lake yet.
    """
    if name not in ENCODERS:
        if Path(name).is_dir():
            return name
        raise ConfigError(f"model={name!r}: expected one of {', '.join(ENCODERS)}, or an encoder's folder")
    chosen = _chosen(lake, name)
    if chosen:
        return chosen
    stage = 2 if name == "stage2" else 1
    artifact = "pretrained" if name == "pretrained" else "encoder"
    for record in reversed(runs.records(lake)):
        if record.job == "train_encoder" and _stage(record) == stage and artifact in record.outputs:
            return lake.path(record.outputs[artifact])
    raise LakeError(f"lake={lake.root} holds no {name} encoder; run assay loop demo, or name another lake=DIR")


def labeller_folder(lake: Lake) -> str:
    """Folder of the labeller of the last loop, else of the newest one.

    Raises:
        LakeError: none was trained in this lake yet.
    """
    chosen = _chosen(lake, "labeller")
    if chosen:
        return chosen
    record = runs.newest(lake, "tune_labeller")
    if record is None:
        raise LakeError(f"lake={lake.root} holds no labeller; run tune_labeller, or name another lake=DIR")
    return lake.path(record.outputs["labeller"])


def choose(lake: Lake, folders: Mapping[str, str]) -> None:
    """Keeps which models a loop ended with; paths are relative to the lake."""
    replace_text(lake.path(CHOSEN_FILE), json.dumps(dict(folders), indent=2, sort_keys=True) + "\n")


def _chosen(lake: Lake, name: str) -> str | None:
    file = Path(lake.path(CHOSEN_FILE))
    chosen = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    folder = lake.path(chosen[name]) if name in chosen else ""
    return folder if folder and Path(folder).is_dir() else None


def _stage(record: RunRecord) -> int:
    return int(json.loads(record.recipe)["train"]["stage"])
