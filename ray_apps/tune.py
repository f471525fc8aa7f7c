"""Fine-tuning the labeller on Ray Train: 1..n workers, checkpoints, resume.

A run lives in one folder named by what it computes. Started again after any death, it goes on from its newest
checkpoint; every worker computes its share of the same steps, so the number of workers changes speed and the draws of
dropout, nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray import train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn

from embeddings.backbone import resolve_model
from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder
from embeddings.labeller_model import LabellerTrainer, build_labeller, plain_probabilities, save_weights
from embeddings.metrics import labeller_agreement
from lake.progress import write_progress
from ray_apps.checkpoints import SNAPSHOT_FILE, fit, is_resumable, prepare_kernels, set_ray_train_defaults
from ray_apps.cluster import check_resources, connect
from ray_apps.placements import TunePlacement
from ray_apps.sharding import shard

log = logging.getLogger(__name__)

STATE_FILE, WEIGHTS_FOLDER, PROBABILITY_FILE = "state.pt", "labeller", "probabilities.npz"
TELL_EVERY_SEC = 2.0


class TunedLabeller:
    """What a finished run leaves: its last checkpoint.

    Attributes:
        weights: Hugging Face folder.
        probability_N3: uncalibrated probabilities of the pairs of all splits but train; nan there.
        grade_token_ids: tokens of the grades; empty for a classifier.
        best_epoch: epoch that was kept, first is 1.
        pairs_per_sec: training speed of the last start.
    """

    def __init__(self, checkpoint: str) -> None:
        self.weights = str(Path(checkpoint, WEIGHTS_FOLDER))
        with np.load(Path(checkpoint, PROBABILITY_FILE)) as held:
            self.probability_N3: NDArray[np.float32] = held["probability"]
            self.grade_token_ids = tuple(int(item) for item in held["grade_token_ids"])
            self.best_epoch, self.pairs_per_sec = int(held["best_epoch"]), float(held["pairs_per_sec"])


def tune_labeller(
    pairs: pa.Table, recipe: LabellerRecipe, placement: TunePlacement, *, storage: str, name: str
) -> TunedLabeller:
    """Trains on the pairs of split train and keeps the best epoch on validation.

    Args:
        pairs: columns split, query, title, brand, category, description, attributes, grade, at_least_1, at_least_2.
        recipe: what to train.
        placement: where.
        storage: folder of all runs, which all workers see.
        name: of this run; the same name goes on where the last start stopped.
    """
    connect(placement.ray)
    check_resources(placement.num_workers * placement.threads_per_worker, placement.num_workers * placement.use_gpu)
    set_ray_train_defaults()
    settings_of_run = {
        "pairs": ray.put(pairs),
        "recipe": _absolute(recipe),
        "placement": placement,
        "run_folder": os.path.join(storage, name),
        "salvaged": salvage(Path(storage, name)),
    }
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=settings_of_run,
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker={"CPU": placement.threads_per_worker} | ({"GPU": 1} if placement.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=placement.max_failures),
        ),
    )
    result = fit(trainer, Path(storage, name))
    return TunedLabeller(result.checkpoint.path)


def _absolute(recipe: LabellerRecipe) -> LabellerRecipe:
    """The recipe with local paths made absolute, since workers run in another directory."""
    local = {name: getattr(recipe, name) for name in ("model", "guideline") if os.path.exists(getattr(recipe, name))}
    return dataclasses.replace(recipe, **{name: os.path.abspath(path) for name, path in local.items()})


def salvage(run_folder: Path) -> str | None:
    """Makes a run's folder usable for Ray Train after a death in the middle of a write.

    Train writes its snapshot in place; one that is cut off, or names a checkpoint that is gone, would stop
    every later start. It is removed then, and the newest whole checkpoint returned to go on from.
    """
    snapshot = run_folder / SNAPSHOT_FILE
    if snapshot.is_file() and is_resumable(run_folder):
        return None
    whole = sorted(p.parent for p in run_folder.glob(f"checkpoint_*/{STATE_FILE}") if zipfile.is_zipfile(p))
    if snapshot.is_file():
        log.warning("%s: the list of checkpoints is broken; going on from the newest one", run_folder)
        snapshot.unlink()
    return str(whole[-1]) if whole else None


def _train_worker(given: dict[str, Any]) -> None:
    """One worker: trains its share of every step; rank 0 validates, saves and, at the end, grades."""
    recipe: LabellerRecipe = given["recipe"]
    placement: TunePlacement = given["placement"]
    torch.set_num_threads(placement.threads_per_worker)
    prepare_kernels()
    context, device = train.get_context(), get_device()
    pairs = ray.get(given["pairs"])
    encoder = PairEncoder(resolve_model(recipe.model), recipe, load_guideline(recipe.guideline))
    tokens, split_N, grade_N = encoder.encode_rows(pairs), pairs["split"].to_numpy(), pairs["grade"].to_numpy()
    rows = np.flatnonzero(split_N == "train")
    num_workers = context.get_world_size()
    is_sharded = placement.sharding == "fsdp" and num_workers > 1

    def wrap(module: nn.Module) -> nn.Module:
        if is_sharded:
            return shard(module, device.type)
        return prepare_model(module) if num_workers > 1 else module

    trainer = LabellerTrainer(
        # of a model to be spread no card needs to hold all
        build_labeller(recipe, encoder, device="cpu" if is_sharded else str(device)),
        [tokens[row] for row in rows],
        target_shares(pairs, recipe)[rows],
        pairs["query"].take(rows).to_pylist(),
        recipe,
        rank=context.get_world_rank(),
        world_size=num_workers,
        wrap=wrap,
    )
    run = _TuneRun(
        trainer, given["run_folder"], placement.checkpoint_every_steps, is_first=context.get_world_rank() == 0
    )
    run.resume(given["salvaged"])
    watched = np.flatnonzero(split_N == "validation")
    run.train([tokens[row] for row in watched], grade_N[watched])
    run.finish(encoder, tokens, split_N != "train")


def target_shares(pairs: pa.Table, recipe: LabellerRecipe) -> NDArray[np.float64]:
    """What a labeller learns of each pair: shares of raters at or above grades 1 and 2, [N, 2]."""
    if recipe.targets == "hard":
        return np.asarray(pairs["grade"].to_numpy()[:, None] >= np.array([1, 2]), dtype=np.float64)
    return np.stack([pairs[f"at_least_{grade}"].to_numpy() for grade in (1, 2)], axis=1)


class _TuneRun:
    """A worker's way through the run: best epoch so far, speed, checkpoints."""

    def __init__(self, trainer: LabellerTrainer, run_folder: str, checkpoint_every: int, *, is_first: bool) -> None:
        self.trainer, self.checkpoint_every, self.is_first = trainer, checkpoint_every, is_first
        # one that holds a part of the weights is needed for every pass and every copy of them
        self.takes_part = is_first or trainer.is_sharded
        self.run_folder = run_folder
        self.best: dict[str, Any] = {"epoch": 0, "kappa": -2.0, "weights": None}
        self.seen, self.started, self.told = 0, time.monotonic(), 0.0

    def resume(self, salvaged: str | None) -> None:
        """Takes over the newest checkpoint, if there is one."""
        checkpoint = train.get_checkpoint()
        folder = checkpoint.path if checkpoint else salvaged
        if folder is None:
            return
        state = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
        self.trainer.load_state_dict(state["trainer"])
        self.best = state["best"]

    def train(self, validation: list[list[int]], grade_N: NDArray[np.int8]) -> None:
        """Steps to the end, or to where patience ends, with a validation after every epoch and at the end."""
        trainer, loss = self.trainer, 0.0
        self.started = time.monotonic()
        while trainer.step < trainer.num_steps:
            loss += trainer.train_step()
            self.seen += trainer.recipe.batch_size
            if trainer.step % trainer.steps_per_epoch == 0 or trainer.step == trainer.num_steps:
                self._validate(validation, grade_N)
                if self._is_out_of_patience():
                    break
            if time.monotonic() - self.told > TELL_EVERY_SEC and self.is_first:
                self.told = time.monotonic()
                mean_loss = loss * trainer.world_size / self.seen
                note = f"steps, mean loss {mean_loss:.3f}, {self.pairs_per_sec:.0f} pairs/s"
                write_progress(self.run_folder, done=trainer.step, total=trainer.num_steps, note=note)
            if trainer.step % self.checkpoint_every == 0 and trainer.step < trainer.num_steps:
                self._report(lambda _: None)

    def finish(self, encoder: PairEncoder, tokens: list[list[int]], wanted_N: NDArray[np.bool_]) -> None:
        """Last checkpoint: the kept epoch as a Hugging Face folder, and its probabilities of the wanted pairs."""
        trainer, rows = self.trainer, np.flatnonzero(wanted_N)
        if self.best["epoch"]:
            trainer.set_weights(self.best["weights"])
        probability_N3 = np.full((len(tokens), 3), np.nan, dtype=np.float32)
        model = trainer.model
        if self.takes_part:
            probability_N3[rows] = plain_probabilities(model, [tokens[row] for row in rows])
        if trainer.is_sharded:
            weights = trainer.weights()
            if self.is_first:
                model = build_labeller(trainer.recipe, encoder, device="cpu")
                model.load_state_dict(weights, strict=False)

        def write(folder: Path) -> None:
            np.savez(
                folder / PROBABILITY_FILE,
                probability=probability_N3,
                grade_token_ids=np.array(encoder.grade_token_ids, dtype=np.int64),
                best_epoch=self.best["epoch"],
                pairs_per_sec=self.pairs_per_sec,
            )
            save_weights(model, encoder, folder / WEIGHTS_FOLDER)

        self._report(write)

    @property
    def pairs_per_sec(self) -> float:
        """Pairs trained per second since this start."""
        return self.seen / max(time.monotonic() - self.started, 1e-9)

    def _validate(self, validation: list[list[int]], grade_N: NDArray[np.int8]) -> None:
        trainer = self.trainer
        epoch = math.ceil(trainer.step / trainer.steps_per_epoch)
        if not self.takes_part:
            return
        kappa = self.best["kappa"]
        if validation:
            probability_N3 = plain_probabilities(trainer.model, validation, bf16=trainer.bf16)
            kappa = labeller_agreement(grade_N, probability_N3.argmax(axis=1))["quadratic_weighted_kappa"]
        if kappa > self.best["kappa"] or not validation or trainer.recipe.keep_epoch == "last":
            self.best = {"epoch": epoch, "kappa": kappa, "weights": trainer.weights()}

    def _is_out_of_patience(self) -> bool:
        """The same answer on every worker: only the first knows the kappas."""
        patience = self.trainer.recipe.patience
        if patience is None:
            return False
        passed = self.trainer.step // self.trainer.steps_per_epoch
        return bool(broadcast_from_rank_zero(passed - self.best["epoch"] >= patience))

    def _report(self, write_more: Any) -> None:
        """A checkpoint of rank 0; all workers meet here."""
        metrics = {"step": self.trainer.step}
        state = self.trainer.state_dict() if self.takes_part else {}
        if not self.is_first:
            train.report(metrics, checkpoint=None)
            return
        scratch = Path(tempfile.mkdtemp(prefix="assay-tune-"))
        try:
            torch.save({"trainer": state, "best": self.best}, scratch / STATE_FILE)
            write_more(scratch)
            train.report(metrics, checkpoint=Checkpoint.from_directory(os.fspath(scratch)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
