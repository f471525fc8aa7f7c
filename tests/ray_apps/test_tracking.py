import logging
import struct
from pathlib import Path

import pytest

from ray_apps.tracking import FINGERPRINT_TAG, NOBODY, Tracking, trackers


def events(folder):
    """(step, name, value) of all event files of a folder: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(Path(folder).iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
            place += size + 16


def test_tensorboard_has_every_step(tmp_path):
    with trackers(Tracking(("tensorboard",), str(tmp_path / "here")), 0) as opened:
        for step in range(3):
            opened[0].add(step, {"train/loss": step / 2})

    assert list(events(tmp_path / "here")) == [(0, "train/loss", 0.0), (1, "train/loss", 0.5), (2, "train/loss", 1.0)]


def test_nothing_is_opened_where_nobody_asks():
    with trackers(NOBODY, 0) as opened:
        assert opened == []


def test_mlflow_has_one_run_for_a_training_however_often_it_goes_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop")
    tracking = Tracking(("mlflow",), name="abc", settings={"train.seed": 7}).here()

    for step in (1, 2):
        with trackers(tracking, 0) as opened:
            opened[0].add(step, {"validation/ndcg@10": step / 4})

    client = mlflow.MlflowClient(f"file:{tmp_path}")
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert run.data.tags[FINGERPRINT_TAG] == run.info.run_name == "abc"
    assert run.data.params == {"train.seed": "7"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "validation/ndcg_at_10")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5)]


def test_a_server_that_does_not_answer_is_told_no_more(monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # nobody listens there
    tracking = Tracking(("mlflow",), name="abc", uri="http://127.0.0.1:9")

    with caplog.at_level(logging.WARNING, logger="ray_apps.tracking"), trackers(tracking, 0) as opened:
        opened[0].add(1, {"loss": 1.0})

    assert [record.message.split(":")[0] for record in caplog.records] == [
        "MLflow gets no metrics of this run, training goes on"
    ]
