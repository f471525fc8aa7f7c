"""Metrics of a training for those who watch it: TensorBoard files in the lake, runs on an MLflow server.

Both are optional. Neither can end a training: what a tracker cannot write is dropped with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

log = logging.getLogger(__name__)

Kind = Literal["tensorboard", "mlflow"]

FINGERPRINT_TAG = "assay.fingerprint"
"""Tag by which a resumed training finds its MLflow run."""
_EVERY_SEC = 5.0
_MOST, _MOST_SETTINGS = 1000, 100
"""Metrics and parameters that MLflow takes at once."""


@dataclass(frozen=True)
class Tracking:
    """Where to.

    Attributes:
        kinds: of trackers.
        folder: of TensorBoard's files.
        name: of the run in MLflow; its fingerprint, by which it is found again.
        settings: parameters of the run in MLflow.
        uri: of MLflow's server; empty leaves it to MLflow.
        experiment: of MLflow.
    """

    kinds: Sequence[Kind] = ()
    folder: str = ""
    name: str = ""
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    uri: str = ""
    experiment: str = "assay"

    def here(self) -> Tracking:
        """With server and experiment of this process's environment, which workers elsewhere do not have."""
        return dataclasses.replace(
            self,
            uri=self.uri or os.environ.get("MLFLOW_TRACKING_URI", ""),
            experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME", self.experiment),
        )


NOBODY = Tracking()


class Tracker(Protocol):
    """Takes metrics of steps."""

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, by name; a name may have groups with "/" between them."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


@contextmanager
def trackers(tracking: Tracking, first_step: int) -> Iterator[list[Tracker]]:
    """The open trackers of a run that begins or goes on at a step.

    Raises:
        ImportError: mlflow is asked for and not installed.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for kind in tracking.kinds:
            opened.append(_TensorBoard(tracking, first_step) if kind == "tensorboard" else _Mlflow(tracking))
            stack.callback(opened[-1].close)
        yield opened


class _TensorBoard:
    """Event files in a folder; steps that a resumed run repeats are taken back first."""

    def __init__(self, tracking: Tracking, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(tracking.folder, purge_step=first_step or None)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    """A run of an experiment, written in portions by the client without MLflow's global state.

    A server that refuses once is told no more: the client's patience with it would be the training's.
    """

    def __init__(self, tracking: Tracking) -> None:
        from mlflow import MlflowClient

        self._waiting: list[Any] = []
        self._told, self._run_id = time.monotonic(), ""
        self._client = MlflowClient(tracking_uri=tracking.uri or None)
        with self._listening():
            self._run_id = self._open(tracking)

    def _open(self, tracking: Tracking) -> str:
        from mlflow.entities import Param

        client = self._client
        found = client.get_experiment_by_name(tracking.experiment)
        experiment = found.experiment_id if found else client.create_experiment(tracking.experiment)
        known = client.search_runs([experiment], f"tags.`{FINGERPRINT_TAG}` = '{tracking.name}'", max_results=1)
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        opened = client.create_run(experiment, tags={FINGERPRINT_TAG: tracking.name}, run_name=tracking.name)
        settings = [Param(key, str(value)) for key, value in tracking.settings.items()]
        for start in range(0, len(settings), _MOST_SETTINGS):
            client.log_batch(opened.info.run_id, params=settings[start : start + _MOST_SETTINGS])
        return str(opened.info.run_id)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow knows no @ in names
        self._waiting += [Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._told > _EVERY_SEC:
            self._flush()

    def close(self) -> None:
        self._flush()
        with self._listening():
            if self._run_id:
                self._client.set_terminated(self._run_id)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        with self._listening():
            for start in range(0, len(waiting) if self._run_id else 0, _MOST):
                self._client.log_batch(self._run_id, metrics=waiting[start : start + _MOST])
        self._told = time.monotonic()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Turns a refusal into a warning, the last thing that is asked of the server."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            self._run_id = ""
            log.warning("MLflow gets no metrics of this run, training goes on: %s", error)
