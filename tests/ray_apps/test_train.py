"""Training on Ray Train: one worker and two learn the same, and a killed run ends like an unbroken one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from embeddings.batches import BatchRecipe, Instance
from embeddings.encoder import build_encoder, encode, load_encoder
from embeddings.recipes import EncoderRecipe, TrainRecipe
from embeddings.text import TextRecipe
from ray_apps import train as ray_train
from ray_apps.cluster import RayPlacement, connect
from ray_apps.tracking import Tracking
from ray_apps.train import TrainTask, drop_checkpoints, tokenise, train
from tests.ray_apps.test_tracking import events
from tests.tiny_models import tiny_bert_folder

WORDS = ["lamp", "hose", "shoe", "drill", "sofa", "kettle", "paint", "rug"]
RECIPE = TrainRecipe(
    max_steps=12,
    validate_every_steps=4,
    checkpoint_every_steps=2,
    deterministic=True,
    learning_rate=1e-3,
    batch=BatchRecipe(queries_per_step=4, max_products_per_query=4),
)


def make_task(bert, name, recipe=RECIPE, pretrained=""):
    instances = [
        Instance(
            ("toy", f"{colour}{number}"),
            f"{colour} {word}",
            [f"{word} {colour}", f"{word[:2]} {colour}", f"{WORDS[number - 1]} 7", f"{WORDS[number - 3]} 9"],
            np.array([2, 1, 0, 0], dtype=np.int8),
        )
        for colour in ("red", "blue")
        for number, word in enumerate(WORDS)
    ]
    return TrainTask(
        instances, instances[:6], recipe, EncoderRecipe(model=str(bert)), TextRecipe(), "", "", pretrained, name
    )


def run_training(place, task, num_workers=1):
    return train(
        task,
        str(place / task.fingerprint),
        storage=str(place / "runs"),
        num_workers=num_workers,
        threads_per_worker=1,
        use_gpu=False,
        max_failures=0,
    )


def weights(folder):
    return load_encoder(folder)[0].state_dict()


def without_key_biases(names):
    """No attention depends on a bias of its keys: its gradient is rounding alone, of which Adam makes whole steps."""
    return [name for name in names if not name.endswith("attention.self.key.bias")]


def farthest(left, right, names):
    """The largest difference between two encoders' weights of these names."""
    return max((left[name] - right[name]).abs().max().item() for name in names)


def test_two_workers_learn_what_one_learns(ray_cluster, tmp_path, monkeypatch):
    bert = tiny_bert_folder(tmp_path / "bert", dropout=0.0)
    recipe = dataclasses.replace(RECIPE, max_steps=4, learning_rate=1e-4)
    pretrained = str(tmp_path / "pretrained")
    # without validation queries the last checkpoint is the one that is kept
    tracking = Tracking(("tensorboard",), str(tmp_path / "told"))
    tasks = [
        make_task(bert, "one", recipe, pretrained),
        dataclasses.replace(make_task(bert, "two", recipe), tracking=tracking),
    ]
    one = run_training(tmp_path, dataclasses.replace(tasks[0], validation=[]))
    # two read their tokens in shards
    shards = []
    monkeypatch.setattr(ray_train, "TOKENISED_FROM", 10)
    monkeypatch.setattr(ray_train, "TEXTS_PER_SHARD", 16)
    monkeypatch.setattr(ray_train, "tokenise", lambda *task: shards.extend(tokenise(*task)) or shards)
    two = run_training(tmp_path, dataclasses.replace(tasks[1], validation=[]), num_workers=2)
    texts = {("query", one.query) for one in tasks[1].instances}
    texts |= {("document", product) for one in tasks[1].instances for product in one.products}
    assert [len(shard) for shard in ray.get(shards)] == [16] * 4 == [16] * (len(texts) // 16)
    monkeypatch.undo()
    assert one["steps"] == two["steps"] == one["published_step"] == 4
    assert [step for step, name, _ in events(tmp_path / "told") if name == "train/loss"] == [1, 2, 3, 4]
    start = build_encoder(EncoderRecipe(model=str(bert)))
    left, right, before = weights(tmp_path / "one"), weights(tmp_path / "two"), start.state_dict()
    compared = without_key_biases(left)
    assert len(compared) == len(left) - 2
    assert farthest(left, right, compared) < 1e-4
    assert farthest(left, before, left) > 2e-4
    # the baseline is saved, and an identity head does not change its vectors
    texts = ["red shoe", "lamp"]
    np.testing.assert_allclose(
        encode(load_encoder(pretrained)[0], texts, "query"), encode(start, texts, "query"), atol=1e-6
    )
    # the same name again goes on from the last checkpoint, even where the encoder has gone
    again = run_training(tmp_path, dataclasses.replace(tasks[0], validation=[]))
    assert again == one
    drop_checkpoints(str(tmp_path / "runs"), "one")
    assert not (tmp_path / "runs" / "one").exists()


@pytest.mark.slow
def test_weights_spread_over_two_workers_are_published_whole_and_without_adapters(ray_cluster, tmp_path):
    """Two trainings, one of two workers: a minute and a half."""
    bert = tiny_bert_folder(tmp_path / "bert", dropout=0.0)
    recipe = dataclasses.replace(RECIPE, max_steps=8, learning_rate=1e-3, lora_rank=4, publish_best=False)
    one = run_training(tmp_path, make_task(bert, "one", recipe))
    task = dataclasses.replace(make_task(bert, "two", recipe), sharding="fsdp", recomputed=True)
    two = run_training(tmp_path, task, num_workers=2)
    assert two["published_step"] == 8
    assert two["validation_ndcg@10_last"] == pytest.approx(one["validation_ndcg@10_last"], abs=1e-3)
    left, right, before = (
        weights(tmp_path / "one"),
        weights(tmp_path / "two"),
        build_encoder(task.encoder).state_dict(),
    )
    assert left.keys() == right.keys() == before.keys()
    compared = without_key_biases(left)
    assert farthest(left, right, compared) < 1e-4
    assert farthest(left, before, compared) > 1e-3


@pytest.mark.slow
def test_the_last_step_is_published_where_validation_may_not_choose(ray_cluster, tmp_path):
    """Two trainings: half a minute."""
    bert = tiny_bert_folder(tmp_path / "bert", dropout=0.0)
    # such a rate breaks the model, so that an earlier step is the best by validation
    recipe = dataclasses.replace(RECIPE, learning_rate=1.0, warmup_share=0.0)
    best = run_training(tmp_path, make_task(bert, "best", recipe))
    last = run_training(tmp_path, make_task(bert, "last", dataclasses.replace(recipe, publish_best=False)))
    assert best["published_step"] < 12
    assert best["validation_ndcg@10"] > last["validation_ndcg@10"]
    assert last["published_step"] == last["steps"] == 12
    assert last["validation_ndcg@10"] == last["validation_ndcg@10_last"] == best["validation_ndcg@10_last"]


def test_killed_run_resumes_to_the_same_bits(ray_cluster, tmp_path):
    bert = tiny_bert_folder(tmp_path / "bert")
    recipe = dataclasses.replace(RECIPE, max_steps=40)
    whole = run_training(tmp_path, make_task(bert, "whole", recipe))
    driver = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    snapshot = tmp_path / "runs" / "killed" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 240
    while (step := reached(snapshot)) < 6:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert step < 40
    assert not (tmp_path / "killed").exists()
    resumed = run_training(tmp_path, make_task(bert, "killed", recipe))
    assert resumed == whole
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def newest(snapshot):
    """Metrics of the newest checkpoint of a run under way."""
    try:
        return json.loads(snapshot.read_text())["latest_checkpoint_result"]["metrics"]
    except (OSError, ValueError, TypeError):
        return {}


def reached(snapshot):
    """Step of the newest checkpoint of a run under way."""
    return newest(snapshot).get("step", 0)


def test_a_half_written_list_of_checkpoints_starts_the_run_anew(tmp_path):
    from ray_apps.train import _drop_unreadable

    (tmp_path / "run" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text('{"ray_version": ')
    _drop_unreadable(tmp_path / "run")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    connect(RayPlacement(address="local", num_cpus=2))
    folder = Path(sys.argv[1])
    run_training(folder, make_task(folder / "bert", "killed", dataclasses.replace(RECIPE, max_steps=40)))
