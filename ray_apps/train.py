"""Training of the encoder on Ray Train workers: DDP, checkpoints, resume, and the best model by validation.

Every validated step reports a checkpoint with its NDCG; Ray keeps the best and the newest. A run of the same name in
the same folder goes on from the newest, whether the former one was killed or ended. What a step does follows from
(recipe, step) alone, so the resumed run computes what the unbroken one would, bit for bit in `deterministic`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.train
from ray.train.torch import TorchTrainer

from embeddings.batches import Instance
from embeddings.lexical import CatalogText
from embeddings.recipes import CARD_FILE, EncoderRecipe, TrainRecipe
from embeddings.text import TextRecipe
from lake.storage import atomic_folder
from ray_apps.checkpoints import fit, is_resumable, set_ray_train_defaults
from ray_apps.cluster import check_resources
from ray_apps.tracking import NOBODY, Tracking

log = logging.getLogger(__name__)

SCORE = "validation_ndcg@10"
TOKENISED_FROM = 200_000
"""Texts of a training set from which on they are tokenised before it begins, and lie once on each node; of fewer, each
worker keeps those that come to it."""
TEXTS_PER_SHARD = 100_000
_SHARDS_WITHIN_SEC = 120.0
ENCODER_FOLDER = "encoder"
"""Below a checkpoint that was measured."""


@dataclass(frozen=True)
class TrainTask:
    """What is trained, on what.

    Attributes:
        instances: the training set.
        validation: queries that choose the best checkpoint.
        recipe: how to train.
        encoder: the pretrained encoder that stage 1 starts from.
        text: how product texts were made; goes into the card.
        start: folder of the encoder to go on from; empty builds it from `encoder`.
        mixed_with: folder of the encoder of `recipe.mixed_share`; empty for the pretrained one.
        pretrained: where the untrained baseline is saved; empty for nowhere.
        fingerprint: of the run; goes into the card.
        catalog: products for the lexical steps, a sample of the catalogue; empty where the recipe has none.
        compiled: whether the backbone is compiled for training.
        recomputed: whether layers are computed again for the gradient.
        sharding: whether several workers hold all weights each (none) or a part of them (fsdp).
        tracking: where metrics of steps and validations go.
    """

    instances: Sequence[Instance]
    validation: Sequence[Instance]
    recipe: TrainRecipe
    encoder: EncoderRecipe
    text: TextRecipe
    start: str
    mixed_with: str
    pretrained: str
    fingerprint: str
    catalog: Sequence[CatalogText] = ()
    compiled: bool = False
    recomputed: bool = False
    sharding: Literal["none", "fsdp"] = "none"
    tracking: Tracking = NOBODY

    @property
    def card(self) -> dict[str, Any]:
        """What the folder of the encoder says of itself."""
        return {
            "text": self.text,
            "encoder": self.encoder,
            "stage": self.recipe.stage,
            "fingerprint": self.fingerprint,
        }


def train(
    task: TrainTask,
    out_folder: str,
    *,
    storage: str,
    num_workers: int,
    threads_per_worker: int,
    use_gpu: bool,
    max_failures: int,
    least_workers: int | None = None,
    resize_every_sec: float = 60.0,
) -> dict[str, float]:
    """Trains and writes the best encoder to `out_folder`.

    Args:
        task: what to train.
        out_folder: replaced in one step at the end.
        storage: folder of checkpoints, seen by all workers; the run's own is `storage/<task.fingerprint>`.
        num_workers: DDP workers, gloo on CPUs and nccl on GPUs.
        threads_per_worker: CPUs and torch threads of each.
        use_gpu: one GPU per worker.
        max_failures: restarts from the newest checkpoint after a worker died.
        least_workers: with how many it starts and goes on while the cluster has no room for all; None: only with all.
            What a step holds does not hang on their number.
        resize_every_sec: how often a run of fewer looks for nodes that came; it goes on from the newest checkpoint
            then. Ray counts nodes, not what other work has taken of them.

    Returns:
        `validation_ndcg@10` of the published, `_start` and `_last` of the first and last model (where there are
        validation queries), `published_step`, `steps`, `texts` through the encoder, and the last step's loss and
        temperature.

    Raises:
        ValueError: training failed; the message names the first cause.
    """
    least = num_workers if least_workers is None else min(least_workers, num_workers)
    check_resources(least * threads_per_worker, least * int(use_gpu))
    has_validation = any((instance.grades > 0).any() for instance in task.validation)
    if not has_validation:
        log.warning("no validation query has a grade above 0; the last checkpoint is kept instead of the best")
    takes_best = has_validation and task.recipe.publish_best
    set_ray_train_defaults()
    run_folder = Path(storage, task.fingerprint)
    _drop_unreadable(run_folder)
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "task": ray.put(task),
            "tokens": tokenise(task),
            "threads": threads_per_worker,
            "run_folder": str(run_folder),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers if least == num_workers else (least, num_workers),
            elastic_resize_monitor_interval_s=resize_every_sec,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": threads_per_worker, "GPU": int(use_gpu)},
        ),
        run_config=ray.train.RunConfig(
            name=task.fingerprint,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=SCORE if takes_best else None
            ),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    result = fit(trainer, run_folder)
    published, measured = result.checkpoint, result.metrics
    metrics = {name: result.metrics[name] for name in ("loss", "temperature", "texts") if name in result.metrics}
    if takes_best:
        published, measured = max(result.best_checkpoints, key=lambda kept: kept[1][SCORE])
    if has_validation:
        metrics |= {
            SCORE: measured[SCORE],
            f"{SCORE}_start": measured["start"],
            f"{SCORE}_last": result.metrics[SCORE],
        }
    metrics |= {"published_step": float(measured["step"]), "steps": float(result.metrics["step"])}
    _publish(Path(published.path, ENCODER_FOLDER), out_folder, metrics)
    return metrics


def tokenise(task: TrainTask) -> list[ray.ObjectRef[pa.Table | None]]:
    """Shards of the tokens of a large training set's texts, tables in the cluster's memory; none of a small one."""
    queries = sorted({instance.query for instance in task.instances})
    products = sorted({product for instance in task.instances for product in (*instance.products, *instance.contrasts)})
    if len(queries) + len(products) < TOKENISED_FROM:
        return []
    shard = ray.remote(_token_shard).options(num_cpus=1)
    shards = [
        shard.remote(task.start, task.encoder, texts[start : start + TEXTS_PER_SHARD], side)
        for side, texts in (("query", queries), ("document", products))
        for start in range(0, len(texts), TEXTS_PER_SHARD)
    ]
    # before the workers take the CPUs
    ray.wait(shards, num_returns=len(shards), fetch_local=False)
    return shards


def _token_shard(
    start: str, encoder: EncoderRecipe, texts: Sequence[str], side: Literal["query", "document"]
) -> pa.Table | None:
    from embeddings.token_cache import token_shard
    from ray_apps.train_worker import blank

    return token_shard(blank(start, encoder, "cpu"), texts, side)


def drop_checkpoints(storage: str, name: str) -> None:
    """Removes the checkpoints of a run whose encoder is saved and recorded."""
    shutil.rmtree(Path(storage, name), ignore_errors=True)


def absolute_model(recipe: EncoderRecipe) -> EncoderRecipe:
    """The recipe with a local folder as an absolute path, since workers run in another directory."""
    return dataclasses.replace(recipe, model=os.path.abspath(recipe.model)) if os.path.isdir(recipe.model) else recipe


def build_pretrained(encoder: EncoderRecipe, text: TextRecipe, folder: str) -> None:
    """Writes the untrained baseline from a process of its own."""
    ray.get(ray.remote(_build_pretrained).options(num_cpus=1).remote(encoder, text, folder))


def _build_pretrained(encoder: EncoderRecipe, text: TextRecipe, folder: str) -> None:
    from ray_apps.train_worker import save_pretrained

    save_pretrained(encoder, text, folder)


def _work(config: Mapping[str, Any]) -> None:
    """One worker, from its start to the last step."""
    # imported here: driver and controller load this module and need not wait for sentence-transformers
    from ray_apps.train_worker import TrainWorker

    try:
        # of a node's workers each reads the shards where the node holds them
        tokens = [shard for shard in ray.get(config["tokens"], timeout=_SHARDS_WITHIN_SEC) if shard is not None]
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError) as error:
        # a lost node's shards would be made again by CPUs that the workers have
        log.warning("texts are tokenised as they come, since their shards are not to be had: %s", error)
        tokens = []
    worker = TrainWorker(ray.get(config["task"]), config["run_folder"], config["threads"], tokens)
    worker.resume()
    worker.run()


def _publish(source: Path, out_folder: str, metrics: Mapping[str, float]) -> None:
    """Copies the best encoder to its place, with the run's metrics on its card."""
    with atomic_folder(out_folder) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        card_path = scratch / CARD_FILE
        card = json.loads(card_path.read_text(encoding="utf-8")) | {"metrics": dict(metrics)}
        card_path.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _drop_unreadable(run_folder: Path) -> None:
    """Removes a run that Ray could not go on with; training begins anew then and ends with the same weights."""
    if not is_resumable(run_folder):
        log.warning("%s: its checkpoints cannot be used; training starts anew", run_folder)
        shutil.rmtree(run_folder)
