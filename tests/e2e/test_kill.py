"""The loop killed with SIGKILL in the middle of labelling and of training goes on like an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lake import runs, tables
from lake.schemas import PAIR_GRADE
from lake.storage import Lake
from tests.e2e.conftest import small_loop
from tests.tiny_models import tiny_bert_folder

PARTS = ["steps.label_sampled.placement.part_rows=50", "steps.label_sampled.placement.batch_rows=25"]


def start(words):
    """The loop in a process group of its own."""
    command = [sys.executable, "-m", "jobs.cli", "loop", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill_when(words, is_time, limit_sec=600):
    """Starts the loop and kills it with SIGKILL once `is_time()` holds."""
    process = start(words)
    deadline = time.monotonic() + limit_sec
    try:
        while not is_time():
            assert process.poll() is None, "the loop ended before it could be killed"
            assert time.monotonic() < deadline, "the loop never came to the place where it is to be killed"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(5)  # Ray's processes notice that their driver is gone


def ledger(lake):
    """Address -> probabilities."""
    rows = tables.rows(lake, PAIR_GRADE).to_pylist()
    assert len({row["address"] for row in rows}) == len(rows)
    return {row["address"]: (row["p0"], row["p1"], row["p2"]) for row in rows}


def weights(lake):
    """Weights of the newest encoder, by name."""
    folder = Path(lake.path(runs.newest(lake, "train_encoder").outputs["encoder"]))
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{name}": value for name, value in load_file(path).items()}
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_killed_loop_ends_like_an_unbroken_one(tmp_path):
    """About 12 minutes: four starts of Ray and six of vLLM."""
    model = tiny_bert_folder(tmp_path / "tiny")
    more = [
        "deterministic=true",
        *PARTS,
        "steps.train_stage2.recipe.train.epochs=40",
        "steps.train_stage2.recipe.train.checkpoint_every_steps=4",
        "steps.train_stage2.recipe.train.validate_every_steps=1000",
    ]
    whole, broken = Lake(str(tmp_path / "whole")), Lake(str(tmp_path / "broken"))
    assert start([*small_loop(whole.root, model), *more]).wait() == 0

    words = [*small_loop(broken.root, model), *more]
    kill_when(words, lambda: tables.exists(broken, PAIR_GRADE) and tables.rows(broken, PAIR_GRADE).num_rows >= 50)
    labelled = tables.rows(broken, PAIR_GRADE).num_rows
    assert runs.newest(broken, "label_pairs") is None

    def is_in_stage_2():
        built = [record for record in runs.records(broken) if record.job == "build_instances"]
        checkpoints = Path(broken.path("runs")).glob("*/checkpoint_*")
        return len(built) > 1 and any(path.stat().st_mtime > built[-1].started_at.timestamp() for path in checkpoints)

    kill_when(words, is_in_stage_2)
    assert start(words).wait() == 0

    first, second = ledger(whole), ledger(broken)
    assert 0 < labelled < len(second)
    assert first.keys() == second.keys()
    for address, shares in first.items():
        assert second[address] == pytest.approx(shares, abs=1e-3)
    resumed, unbroken = weights(broken), weights(whole)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
