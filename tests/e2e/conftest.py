"""What end-to-end tests share: the loop on 200 products with a tiny model, run once, and a Spark Connect server."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jobs import loop
from lake.storage import Lake
from tests.tiny_models import tiny_bert_folder

SERVER = """
import sys, time
from pyspark.sql import SparkSession
from lake.spark import SparkPlacement, java_home, local_options
import os
os.environ["JAVA_HOME"] = java_home()
builder = SparkSession.builder.master("local[2]").config("spark.connect.grpc.binding.port", sys.argv[1])
builder = builder.config("spark.plugins", "org.apache.spark.sql.connect.SparkConnectPlugin")
for key, value in local_options(SparkPlacement(driver_memory_gib=2)).items():
    builder = builder.config(key, value)
builder.getOrCreate()
time.sleep(3600)
"""


def small_loop(lake_root, model):
    """Words of a demo on 200 products with a tiny model, for `assay loop`."""
    return [
        "demo",
        f"lake={lake_root}",
        "steps.simulate.recipe.num_products=200",
        "steps.simulate.recipe.num_queries=60",
        "steps.simulate.recipe.num_sessions=600",
        "steps.simulate.recipe.annotated_products_per_query=10",
        f"steps.tune_labeller.recipe.model={model}",
        f"steps.tune_labeller.recipe.baseline_model={model}",
        "steps.tune_labeller.recipe.epochs=1",
        f"steps.train_stage1.recipe.encoder.model={model}",
        "steps.train_stage1.recipe.train.epochs=2",
        "steps.train_stage1.recipe.train.lexical.steps=3",
        "steps.train_stage2.recipe.train.epochs=2",
        "steps.mine_hard_pairs.recipe.mining.depth=20",
        "steps.mine_hard_pairs.recipe.mining.max_hard_negatives_per_query=3",
        "steps.mine_hard_pairs.recipe.mining.max_hard_positives_per_query=3",
    ]


def pytest_collection_modifyitems(items):
    """Whoever comes first waits for the whole loop: nineteen jobs, ten minutes on two busy cores."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, spark, ray_cluster):
    """A lake in which the loop has run once: (lake, words of the loop, its JSON)."""
    folder = tmp_path_factory.mktemp("loop")
    words = small_loop(folder / "lake", tiny_bert_folder(folder / "tiny"))
    config = loop.load_config(words[0], words[1:])
    found = loop.summary(Lake(config.lake), loop.run(config))
    return Lake(config.lake), words, found


@pytest.fixture
def connect_url():
    """URL of a Spark Connect server with Delta."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port)]
    server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(120):
        assert server.poll() is None, "the Spark Connect server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(1)
    yield f"sc://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
