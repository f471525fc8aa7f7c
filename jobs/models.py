"""Finds models in the lake by the names people use."""

from __future__ import annotations

import json
from pathlib import Path

from conf.load import ConfigError
from lake import runs
from lake.runs import RunRecord
from lake.storage import Lake, LakeError

ENCODERS = ("pretrained", "stage1", "stage2")


def encoder_folder(lake: Lake, name: str) -> str:
    """Folder of an encoder: pretrained, stage1 or stage2 of the newest training, or a folder's own path.

    Raises:
        ConfigError: the name is none of these.
        LakeError: that model was not trained in this lake yet.
    """
    if name not in ENCODERS:
        if Path(name).is_dir():
            return name
        raise ConfigError(f"model={name!r}: expected one of {', '.join(ENCODERS)}, or an encoder's folder")
    stage = 2 if name == "stage2" else 1
    artifact = "pretrained" if name == "pretrained" else "encoder"
    for record in reversed(runs.records(lake)):
        if record.job == "train_encoder" and _stage(record) == stage:
            return lake.path(record.outputs[artifact])
    raise LakeError(f"lake={lake.root} holds no {name} encoder; run assay loop demo, or name another lake=DIR")


def labeller_folder(lake: Lake) -> str:
    """Folder of the newest labeller.

    Raises:
        LakeError: none was trained in this lake yet.
    """
    record = runs.newest(lake, "tune_labeller")
    if record is None:
        raise LakeError(f"lake={lake.root} holds no labeller; run tune_labeller, or name another lake=DIR")
    return lake.path(record.outputs["labeller"])


def _stage(record: RunRecord) -> int:
    return int(json.loads(record.recipe)["train"]["stage"])
