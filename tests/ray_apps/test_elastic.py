"""A training that loses a node and gets one back, on a Ray cluster of two nodes in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embeddings.encoder import build_encoder
from embeddings.training import ContrastiveTrainer
from ray_apps.train import train
from tests.ray_apps.test_train import RECIPE, farthest, make_task, newest, weights, without_key_biases
from tests.tiny_models import tiny_bert_folder

# Ray takes a second or two for each checkpoint, so that steps last until the second node is back
ELASTIC = dataclasses.replace(
    RECIPE, max_steps=100, learning_rate=1e-5, validate_every_steps=100, checkpoint_every_steps=1
)


@pytest.mark.slow
def test_a_training_goes_on_with_fewer_workers_and_takes_back_more(tmp_path):
    """Two workers, one while a node is gone, two again: 2 to 5 minutes, most of it Ray's patience."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_TRAIN_V2_ENABLED": "1",
        # how long Ray waits for the node that is gone before it tries one worker
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "40",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )

    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    workers = [seen["workers"] for seen in told["seen"]]
    steps = [seen["step"] for seen in told["seen"]]
    assert workers == [2, 1, 2]
    assert steps == sorted(steps)
    assert told["metrics"]["steps"] == ELASTIC.max_steps
    # no step was left out, and each held what it holds for any number of workers
    task = make_task(tmp_path / "bert", "alone", ELASTIC)
    alone = ContrastiveTrainer(build_encoder(task.encoder), task.instances, ELASTIC)
    for step in range(alone.num_steps):
        alone.train_step(step)
    found, expected = weights(tmp_path / "elastic"), alone.model.state_dict()
    compared = without_key_biases(expected)
    assert farthest(found, expected, compared) < 1e-4
    assert farthest(found, build_encoder(task.encoder).state_dict(), compared) > 5e-4


def lose_and_find_a_node(cluster, node, snapshot):
    """Workers and steps of checkpoints: of two workers, of one after a node is gone, of two after one came."""
    seen = [wait_for(snapshot, 2, 0)]
    cluster.remove_node(node, allow_graceful=False)
    seen.append(wait_for(snapshot, 1, seen[-1]["step"]))
    cluster.add_node(num_cpus=1)
    return [*seen, wait_for(snapshot, 2, seen[-1]["step"])]


def wait_for(snapshot, workers, after):
    """The newest checkpoint that so many workers wrote past a step."""
    while True:
        metrics = newest(snapshot)
        if metrics.get("workers") == workers and metrics["step"] > after:
            return {"workers": workers, "step": metrics["step"]}
        assert metrics.get("step", 0) < ELASTIC.max_steps, f"it ended before {workers} workers were there"
        time.sleep(0.1)


def main(place):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    task = dataclasses.replace(
        make_task(tiny_bert_folder(place / "bert", dropout=0.0), "elastic", ELASTIC), validation=[]
    )
    how = {"num_workers": 2, "threads_per_worker": 1, "use_gpu": False, "max_failures": 3}
    # Ray starts nodes from the main thread alone
    with ThreadPoolExecutor() as threads:
        training = threads.submit(
            train,
            task,
            str(place / "elastic"),
            storage=str(place / "runs"),
            least_workers=1,
            resize_every_sec=1.0,
            **how,
        )
        seen = lose_and_find_a_node(cluster, node, place / "runs" / "elastic" / "checkpoint_manager_snapshot.json")
        print(json.dumps({"seen": seen, "metrics": training.result()}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
