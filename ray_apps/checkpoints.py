"""Runs of Ray Train: starting one, and whether one can go on after a death in the middle of a write."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer

from conf.load import ConfigError
from ray_apps.progress import following

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints; it is written in place, so a kill can cut it off."""


def is_resumable(run_folder: Path) -> bool:
    """Whether a start under this run's name would find what it needs, or nothing at all.

    Ray refuses to start a run whose list is cut off, names a checkpoint that is gone, or is of another Ray version.
    """
    snapshot = run_folder / SNAPSHOT_FILE
    if not snapshot.is_file():
        return True
    try:
        state = json.loads(snapshot.read_text(encoding="utf-8"))
        names = [kept["checkpoint_dir_name"] for kept in state["checkpoint_results"]]
        return state["ray_version"] == ray.__version__ and all((run_folder / name).is_dir() for name in names)
    except (ValueError, KeyError, TypeError):
        return False


def fit(trainer: TorchTrainer, run_folder: Path) -> ray.train.Result:
    """Runs a trainer to its end and logs how far it is.

    Raises:
        ConfigError: a worker found a setting that cannot be used.
        ValueError: training failed; the message names the first cause.
        KeyboardInterrupt: somebody pressed Ctrl-C; Ray would end the process as if all were well.
    """
    try:
        with _own_interrupt_handler(), following(str(run_folder)):
            return trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = list(getattr(error, "worker_failures", {}).values()) or [error]
        cause = _last_line(causes[0])
        kind, _, sentence = cause.partition(": ")
        if kind.rpartition(".")[2] == ConfigError.__name__:
            raise ConfigError(sentence) from error
        raise ValueError(f"training failed: {cause}") from error
    except SystemExit as ended:
        raise KeyboardInterrupt from ended


def set_ray_train_defaults() -> None:
    """Patience for busy machines, and no overhead of large clusters on a single one; values set outside stay."""
    # a busy machine takes more than the default minute to start a process that imports torch; after the loss of a node
    # it is what passes before fewer workers are tried
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    if len(ray.nodes()) == 1:
        # a watcher of preempted nodes is a process more, and the controller looks at its workers every 2 s by default
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def prepare_kernels() -> None:
    """What the libraries below torch read at their first call in a worker; values set outside stay."""
    # wanted where deterministic kernels are asked for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # every step has shapes of its own, and kernels are kept with working memory for the last 1,024 of them
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


@contextmanager
def _own_interrupt_handler() -> Iterator[None]:
    """Puts back the handler of Ctrl-C that Ray Train replaces for good, which later steps would trip over."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
