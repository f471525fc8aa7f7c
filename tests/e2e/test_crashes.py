"""Grading through deaths of every process, a full disk, a failing storage and a second nightly run at once.

Whatever happens, the finished ledger is that of an unbroken run: the same addresses, each once, probabilities within
1e-3.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from embeddings.encoder import build_encoder, save_encoder
from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder, save_labeller
from embeddings.labeller_model import build_labeller, save_weights
from embeddings.recipes import EncoderRecipe
from embeddings.text import TextRecipe
from jobs import label_pairs
from lake import tables
from lake.schemas import CANDIDATE_PAIR, CATALOG_PRODUCT, ENGAGEMENT, PAIR_GRADE, QUERY
from lake.storage import Lake
from ray_apps.placements import LabelPlacement
from tests.fakes import hash_of, put
from tests.tiny_models import tiny_bert_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_QUERIES, NUM_PRODUCTS = 60, 50
PORTIONS = ["placement.part_rows=100", "placement.batch_rows=20", "placement.engine=vllm"]
PAIRS = NUM_QUERIES * NUM_PRODUCTS
ENGINE = ("CountingStage", "EngineCore")


def fill(lake):
    """Queries, products and every pair of them as a candidate."""
    queries = [f"colour {number % 9} thing {number}" for number in range(NUM_QUERIES)]
    titles = [
        f"thing {number} of colour {number % 9} " + "with more words " * (number % 5) for number in range(NUM_PRODUCTS)
    ]
    plain = {"dataset": "s", "split": "train"}
    put(
        lake,
        QUERY,
        [
            plain | {"query_id": f"q{n}", "text": t, "normalised": t, "query_hash": hash_of(t)}
            for n, t in enumerate(queries)
        ],
    )
    put(
        lake,
        CATALOG_PRODUCT,
        [plain | {"product_id": f"p{n}", "title": t, "product_hash": hash_of(t)} for n, t in enumerate(titles)],
    )
    pairs = [(f"q{q}", f"p{p}") for q in range(NUM_QUERIES) for p in range(NUM_PRODUCTS)]
    put(lake, CANDIDATE_PAIR, [{"dataset": "s", "query_id": q, "product_id": p, "source": "sampled"} for q, p in pairs])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny labeller and a tiny encoder."""
    place = tmp_path_factory.mktemp("models")
    # wide, so that the engine is at work for some time
    model = str(tiny_bert_folder(place / "bert", width=1024))
    recipe = LabellerRecipe(model=model, max_tokens=64)
    encoder = PairEncoder(recipe.model, recipe, load_guideline("v1"))
    tuned = build_labeller(recipe, encoder, device="cpu")
    # a head drawn for 64 numbers gives logits of 20 from 1,024, where torch and the engine differ by more than 1e-3
    tuned.backbone.classifier.weight.data.mul_(0.1)
    save_weights(tuned, encoder, place / "weights")
    labeller = str(place / "labeller")
    save_labeller(place / "weights", labeller, recipe, grade_token_ids=(), calibrations={}, metrics={})
    save_encoder(
        build_encoder(EncoderRecipe(model=model)),
        str(place / "encoder"),
        {"text": TextRecipe(), "stage": 1, "fingerprint": "x"},
    )
    return labeller, str(place / "encoder")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, models):
    """The ledger of a run that nothing happened to, by torch alone."""
    lake = Lake(str(tmp_path_factory.mktemp("unbroken") / "lake"))
    fill(lake)
    inputs = label_pairs.Inputs(labeller=models[0])
    label_pairs.run(label_pairs.Config(lake=lake.root, inputs=inputs, placement=LabelPlacement(engine="torch")))
    return ledger(lake)


@pytest.fixture
def lake(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    fill(lake)
    return lake


def ledger(lake):
    """Address -> probabilities."""
    rows = tables.rows(lake, PAIR_GRADE).to_pylist()
    assert len({row["address"] for row in rows}) == len(rows)
    return {row["address"]: (row["p0"], row["p1"], row["p2"]) for row in rows}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for address, shares in expected.items():
        assert found[address] == pytest.approx(shares, abs=1e-3)


def num_rows(lake):
    return tables.rows(lake, PAIR_GRADE, columns=["address"]).num_rows if tables.exists(lake, PAIR_GRADE) else 0


def start(job, setting, lake, words):
    command = [sys.executable, "-m", f"jobs.{job}", setting, f"lake={lake.root}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def grading(lake, models, *more):
    return start("label_pairs", "dev", lake, [f"inputs.labeller={models[0]}", *PORTIONS, *more])


def wait_for(what, process, limit_sec=300):
    """Waits until something holds, which it returns, while the process runs."""
    deadline = time.monotonic() + limit_sec
    while not (found := what()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
    return found


def is_under_way(lake):
    """Whether some parts are in the ledger; it goes up to `PAIRS`."""
    return num_rows(lake) >= 100


def children(process, *names):
    """Ray's processes below a driver whose title holds one of the names."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(child.cmdline())
            if any(name in title for name in names):
                found.append(child)
    return found


def kill(victims):
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def ended(process, code=0):
    """The run record of a process that has ended."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors[-3000:]
    # Ray tells of the deaths on standard output as well
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1]) if code == 0 else errors


def test_the_driver_is_killed(lake, models, unbroken):
    """About 1 minute."""
    process = grading(lake, models)
    wait_for(lambda: is_under_way(lake), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = num_rows(lake)
    assert there < PAIRS
    again = ended(grading(lake, models))
    assert again["counts"]["reused"] == there
    assert again["counts"]["asked"] == PAIRS - there
    assert_same(ledger(lake), unbroken)


def test_a_ray_worker_and_the_engine_are_killed(lake, models, unbroken):
    """About 1 minute."""
    process = grading(lake, models, "placement.max_engine_restarts=2")
    kill(wait_for(lambda: children(process, "ray::MapBatches(_encode)"), process))
    wait_for(lambda: is_under_way(lake), process)
    kill(children(process, *ENGINE))
    assert num_rows(lake) < PAIRS
    ended(process)
    assert_same(ledger(lake), unbroken)


def test_an_engine_that_may_not_start_again_ends_the_run_and_the_next_one_goes_on(lake, models, unbroken):
    """About 1 minute."""
    process = grading(lake, models, "placement.max_engine_restarts=0")
    wait_for(lambda: is_under_way(lake), process)
    kill(children(process, *ENGINE))
    assert "the vLLM engine died" in ended(process, code=1)
    there = num_rows(lake)
    assert 0 < there < PAIRS
    assert ended(grading(lake, models))["counts"]["asked"] == PAIRS - there
    assert_same(ledger(lake), unbroken)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_the_disk_is_full(tmp_path, models, unbroken):
    """About 1 minute."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        lake = Lake(str(small / "lake"))
        fill(lake)
        ballast = small / "ballast"
        ballast.write_bytes(b"x" * (shutil.disk_usage(small).free - 200 * 1024))
        errors = ended(grading(lake, models), code=1)
        assert "assay: the disk is full" in errors.splitlines()[-1]
        assert len(ledger(lake)) < PAIRS
        ballast.unlink()
        ended(grading(lake, models))
        assert_same(ledger(lake), unbroken)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_storage_fails_for_a_minute(lake, models, unbroken, monkeypatch, ray_cluster):
    """About 2 minutes."""
    fails, refused = threading.Event(), []
    plain = Lake.storage_options.fget

    def failing(self):
        if fails.is_set():
            refused.append(time.monotonic())
            raise OSError("Generic S3 error: connection refused")
        return plain(self)

    monkeypatch.setattr(Lake, "storage_options", property(failing))

    def outage():
        while not (tables.exists(lake, PAIR_GRADE) and num_rows(lake) >= 200):
            time.sleep(0.05)
        fails.set()
        time.sleep(60)
        fails.clear()

    thread = threading.Thread(target=outage)
    thread.start()
    placement = LabelPlacement(engine="vllm", part_rows=100, batch_rows=20)
    config = label_pairs.Config(lake=lake.root, inputs=label_pairs.Inputs(labeller=models[0]), placement=placement)
    record = label_pairs.run(config)
    thread.join()
    assert refused[-1] - refused[0] > 50
    assert record.counts["labelled"] == PAIRS
    assert_same(ledger(lake), unbroken)


def test_two_nightly_runs_at_once_leave_each_address_once(lake, models, tmp_path):
    """About 2 minutes."""
    labeller, encoder = models
    words = [f"inputs.labeller={labeller}", f"inputs.model={encoder}", "inputs.annotation_consensus="]
    words += ["placement.embed.threads_per_worker=1", "placement.embed.ray.num_cpus=2"]
    words += ["placement.label.part_rows=20", "placement.label.engine=torch"]
    alone = Lake(str(tmp_path / "alone"))
    seen = {"clicks": 0, "carts": 0, "purchases": 0, "expected_clicks": 1.0, "corrected_rate": 1.0, "dataset": "s"}
    for one in (lake, alone):
        put(one, ENGAGEMENT, [seen | {"query_id": "q1", "product_id": "p1", "impressions": 9}])
    fill(alone)
    single = ended(start("label_catalog", "nightly", alone, words))
    both = [start("label_catalog", "nightly", lake, words) for _ in range(2)]
    records = [ended(process) for process in both]
    assert_same(ledger(lake), ledger(alone))
    counts = [record["counts"] for record in records]
    written = sum(count["labelled"] for count in counts)
    assert written == single["counts"]["labelled"] == len(ledger(alone))
    for count in counts:
        assert count["asked"] == count["labelled"] + count["written_meanwhile"]
