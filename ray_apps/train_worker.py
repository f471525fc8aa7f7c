"""One Ray Train worker of an encoder: its trainer, validation and checkpoints."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from embeddings.encoder import build_encoder, build_pretrained, interpolate, load_encoder, save_encoder
from embeddings.recipes import EncoderRecipe
from embeddings.text import TextRecipe
from embeddings.training import ContrastiveTrainer, TwoTower
from embeddings.validation import build_validation, validation_ndcg
from lake.progress import write_progress
from ray_apps.checkpoints import prepare_kernels
from ray_apps.sharding import shard
from ray_apps.tracking import NOBODY, Tracker, trackers
from ray_apps.train import ENCODER_FOLDER, SCORE, TrainTask

_NOT_MEASURED = -1.0
"""Score of a checkpoint between two validations: kept only while it is the newest."""
_STATE_FILE = "trainer.pt"
_EVERY_SEC = 2.0


def save_pretrained(encoder: EncoderRecipe, text: TextRecipe, folder: str) -> None:
    """Writes the untrained encoder, the baseline of every evaluation."""
    card = {"text": text, "encoder": encoder, "stage": "pretrained", "fingerprint": ""}
    save_encoder(build_pretrained(encoder), folder, card)


def blank(start: str, encoder: EncoderRecipe, device: str) -> SentenceTransformer:
    """The encoder that a run starts from, of those names in `TrainTask`."""
    return load_encoder(start, device=device)[0] if start else build_encoder(encoder, device=device)


class TrainWorker:
    """Trainer, validation and checkpoints of one worker.

    Args:
        task: what to train.
        run_folder: of the run's checkpoints.
        threads: of torch.
        tokens: shards of the task's texts as `embeddings.token_cache.token_shard` makes them; none: texts are tokenised
            as they come.
    """

    def __init__(self, task: TrainTask, run_folder: str, threads: int, tokens: Sequence[pa.Table] = ()) -> None:
        torch.set_num_threads(threads)
        prepare_kernels()
        context = ray.train.get_context()
        self.task, self.run_folder = task, run_folder
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.rank == 0 and task.pretrained:
            save_pretrained(task.encoder, task.text, task.pretrained)
        self.trainer = ContrastiveTrainer(
            self._blank(),
            task.instances,
            task.recipe,
            rank=self.rank,
            world_size=self.num_workers,
            wrap=self._wrap,
            catalog=task.catalog,
            compiled=task.compiled,
            recomputed=task.recomputed,
            tokens=tokens,
        )
        # only the first worker publishes; off the device, which needs it at no step
        self.other = self._other() if self.rank == 0 and task.recipe.mixed_share else None
        self.validation = build_validation(task.validation)
        self.start: float | None = None
        self.told = self.began = time.monotonic()
        self.first_step, self.num_texts = 0, 0.0
        self.trackers: Sequence[Tracker] = ()

    def _blank(self) -> SentenceTransformer:
        return blank(self.task.start, self.task.encoder, str(self.device))

    def _other(self) -> SentenceTransformer:
        """The encoder whose weights are mixed into what is published."""
        return load_encoder(self.task.mixed_with)[0] if self.task.mixed_with else build_encoder(self.task.encoder)

    def _wrap(self, tower: TwoTower) -> nn.Module:
        if self.num_workers == 1:
            return tower
        if self.task.sharding == "fsdp":
            # the few numbers that losses learn stay whole
            shard(tower.encoder, self.device.type)
            return tower
        return nn.parallel.DistributedDataParallel(
            tower, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def resume(self) -> None:
        """Takes over the newest checkpoint of this run's name, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, _STATE_FILE), map_location=self.device, weights_only=True)
        self.trainer.load_state_dict(state["trainer"])
        self.start = state["start"]
        self.first_step = self.trainer.step

    def run(self) -> None:
        """All steps that are left; the model of step 0 is measured too, since training may not improve on it.

        In stage 1 it may be the one that is kept. In stage 2 it is stage 1's, which is published already: kept again,
        it would hide what stage 2 does to ranking and separation.
        """
        # the workers compute the same, so one of them tells
        with trackers(self.task.tracking if self.rank == 0 else NOBODY, self.first_step) as self.trackers:
            if self.start is None:
                self.report({}, is_measured=True)
            for step in range(self.trainer.step, self.trainer.num_steps):
                self.step(step)

    def step(self, step: int) -> None:
        """One step, and what is due after it."""
        recipe, last = self.task.recipe, self.trainer.num_steps
        metrics = self.trainer.train_step(step)
        done = step + 1
        self.tell(done, metrics)
        is_measured = done % recipe.validate_every_steps == 0 or done == last
        if is_measured or done % recipe.checkpoint_every_steps == 0:
            self.report(metrics, is_measured=is_measured)

    def report(self, metrics: Mapping[str, float], *, is_measured: bool) -> None:
        """Hands a checkpoint to Ray; every worker takes part, the first one writes."""
        # where weights are spread, no worker has them without the others
        takes_part = self.rank == 0 or self.trainer.is_sharded
        encoder = self.trainer.published(self._blank) if is_measured and takes_part else None
        state = self.trainer.state_dict() if takes_part else {}
        if self.rank > 0:
            ray.train.report({}, checkpoint=None)
            return
        score = _NOT_MEASURED
        if encoder is not None and self.other is not None and self.trainer.step:
            encoder = interpolate(encoder, self.other, self.task.recipe.mixed_share)
        if encoder is not None and self.validation:
            # what is compiled is compiled for training: again for a few validations would take longer than they do
            with torch.compiler.set_stance("force_eager"):
                score = validation_ndcg(encoder, self.validation, bf16=self.trainer.bf16)
            self.track({"validation/ndcg@10": score})
        if self.start is None:
            self.start = score
            score = score if self.task.recipe.stage == 1 else _NOT_MEASURED
        with tempfile.TemporaryDirectory(prefix="assay-checkpoint-") as place:
            torch.save({"trainer": state, "start": self.start}, Path(place, _STATE_FILE))
            if encoder is not None:
                save_encoder(encoder, Path(place, ENCODER_FOLDER), self.task.card)
            told = {**metrics, SCORE: score, "start": self.start, "step": self.trainer.step}
            told |= {"texts": self.trainer.num_texts, "workers": self.num_workers}
            ray.train.report(told, checkpoint=ray.train.Checkpoint.from_directory(place))

    def track(self, metrics: Mapping[str, float]) -> None:
        """Hands metrics of the step just done to the trackers."""
        for tracker in self.trackers:
            tracker.add(self.trainer.step, metrics)

    def tell(self, done: int, metrics: Mapping[str, float]) -> None:
        """Hands on what was measured and, every few seconds, writes how far the run is."""
        self.num_texts += metrics["num_texts"] * self.num_workers
        rate = self.num_texts / (time.monotonic() - self.began)
        self.track({f"train/{name}": value for name, value in metrics.items()} | {"train/texts_per_second": rate})
        if self.rank > 0 or time.monotonic() - self.told < _EVERY_SEC:
            return
        self.told = time.monotonic()
        seconds, last = self.told - self.began, self.trainer.num_steps
        left = seconds / (done - self.first_step) * (last - done)
        cosines = _line(metrics, *(f"similarity_grade_{grade}" for grade in (2, 1, 0)))
        orders = _line(metrics, *(f"order_loss_{pair}" for pair in ("2v1", "1v0", "2v0")))
        note = (
            f"steps, loss {metrics['loss']:.3f}, gradient {metrics['gradient_norm']:.2f}, cosines of 2 1 0: {cosines}, "
            f"order loss of 2v1 1v0 2v0: {orders}, {rate:.0f} texts/s, {left:.0f} s left"
        )
        write_progress(self.run_folder, done=done, total=last, note=note)


def _line(metrics: Mapping[str, float], *names: str) -> str:
    """Values side by side, a dash where a step has none."""
    return " ".join(f"{metrics[name]:.2f}" if name in metrics else "-" for name in names)
