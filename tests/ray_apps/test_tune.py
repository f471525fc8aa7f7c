import dataclasses
import json
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification

from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder
from embeddings.labeller_model import GradeModel, LabellerTrainer, build_labeller, plain_probabilities
from ray_apps.checkpoints import SNAPSHOT_FILE
from ray_apps.cluster import RayPlacement
from ray_apps.placements import TunePlacement
from ray_apps.tune import STATE_FILE, _TuneRun, salvage, target_shares, tune_labeller
from tests.tiny_models import tiny_bert_folder

PLACEMENT = TunePlacement(
    ray=RayPlacement(address="local", num_cpus=2), threads_per_worker=1, checkpoint_every_steps=2, max_failures=0
)


def graded_pairs():
    rows = []
    for split, number in (("train", 24), ("validation", 8), ("calibration", 8), ("test", 8)):
        for row in range(number):
            grade = row % 3
            title = ("knife", "blue shoe", "red shoe")[grade]
            row_shares = {"at_least_1": float(grade >= 1), "at_least_2": float(grade >= 2)}
            rows.append(
                {"split": split, "query": ("red shoe", "shoe")[row % 2], "title": title, "grade": grade} | row_shares
            )
    texts = [(name, pa.string()) for name in ("split", "query", "title")]
    schema = pa.schema([*texts, ("grade", pa.int8()), ("at_least_1", pa.float64()), ("at_least_2", pa.float64())])
    return pa.Table.from_pylist(rows, schema=schema)


def trainer_of(recipe, pairs):
    """A trainer on the train pairs, and the encoder of pairs."""
    encoder, train = PairEncoder(recipe.model, recipe, load_guideline("v1")), pairs.slice(0, 24)
    model = build_labeller(recipe, encoder, device="cpu")
    queries = train["query"].to_pylist()
    return LabellerTrainer(model, encoder.encode_rows(train), target_shares(train, recipe), queries, recipe), encoder


def leave_checkpoint(run_folder, trainer):
    """What a start leaves that was killed where the trainer stands."""
    left = run_folder / "checkpoint_1"
    left.mkdir(parents=True)
    best = {"epoch": 0, "kappa": -2.0, "weights": None}
    torch.save({"trainer": trainer.state_dict(), "best": best}, left / STATE_FILE)


@contextmanager
def one_thread():
    """As many as a worker of PLACEMENT has: sums of more are other sums in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(PLACEMENT.threads_per_worker)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_goes_on_from_its_checkpoint_ends_like_an_unbroken_one(tmp_path):
    recipe = LabellerRecipe(
        model=str(tiny_bert_folder(tmp_path / "model")),
        max_tokens=32,
        batch_size=8,
        epochs=1.5,
        learning_rate=3e-3,
        deterministic=True,
    )
    pairs, storage = graded_pairs(), str(tmp_path / "runs")
    whole = tune_labeller(pairs, recipe, PLACEMENT, storage=storage, name="whole")

    # killed after its second step of five, while Train wrote its snapshot
    trainer, _ = trainer_of(recipe, pairs)
    with one_thread():
        trainer.train_step()
        trainer.train_step()
    torch.use_deterministic_algorithms(False)
    leave_checkpoint(tmp_path / "runs" / "cut", trainer)
    (tmp_path / "runs" / "cut" / SNAPSHOT_FILE).write_text('{"checkpoint_results": [', encoding="utf-8")
    resumed = tune_labeller(pairs, recipe, PLACEMENT, storage=storage, name="cut")

    np.testing.assert_allclose(resumed.probability_N3, whole.probability_N3, atol=1e-8)
    assert resumed.best_epoch == whole.best_epoch
    assert np.isnan(whole.probability_N3[:24]).all()
    np.testing.assert_allclose(whole.probability_N3[24:].sum(axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_goes_on_with_its_weights_spread_over_two_workers(tmp_path, tuning):
    recipe = LabellerRecipe(
        model=str(tiny_bert_folder(tmp_path / "model")),
        max_tokens=32,
        batch_size=8,
        epochs=1.5,
        learning_rate=3e-3,
        dropout=0.0,
        tuning=tuning,
        keep_epoch="last",
        precision="fp32",
        preference_weight=0.5,
    )
    pairs = graded_pairs()
    alone, encoder = trainer_of(recipe, pairs)
    alone.train_step()
    leave_checkpoint(tmp_path / "runs" / "cut", alone)
    while alone.step < alone.num_steps:
        alone.train_step()
    expected = plain_probabilities(alone.model, encoder.encode_rows(pairs.slice(24)))

    spread = dataclasses.replace(PLACEMENT, num_workers=2, sharding="fsdp")
    tuned = tune_labeller(pairs, recipe, spread, storage=str(tmp_path / "runs"), name="cut")

    np.testing.assert_allclose(tuned.probability_N3[24:], expected, atol=1e-4)
    saved = GradeModel(AutoModelForSequenceClassification.from_pretrained(tuned.weights), encoder)
    np.testing.assert_allclose(plain_probabilities(saved, encoder.encode_rows(pairs.slice(24))), expected, atol=1e-4)


@pytest.mark.parametrize(("patience", "num_epochs"), [(1, 2), (3, 4), (None, 6)])
def test_tuning_stops_when_patience_ends(tmp_path, monkeypatch, patience, num_epochs):
    monkeypatch.setattr("ray_apps.tune.broadcast_from_rank_zero", lambda told: told)
    # at this rate no pass changes a grade, so that the first stays the best
    recipe = LabellerRecipe(
        model=str(tiny_bert_folder(tmp_path / "model")),
        max_tokens=32,
        batch_size=8,
        epochs=6,
        learning_rate=1e-12,
        patience=patience,
    )
    pairs = graded_pairs()
    trainer, encoder = trainer_of(recipe, pairs)
    watched = pairs.slice(24, 8)
    run = _TuneRun(trainer, str(tmp_path), checkpoint_every=1000, is_first=True)

    run.train(encoder.encode_rows(watched), watched["grade"].to_numpy())

    assert trainer.step == num_epochs * trainer.steps_per_epoch
    assert run.best["epoch"] == 1


def test_a_snapshot_cut_off_in_writing_is_removed_and_the_newest_whole_checkpoint_taken(tmp_path):
    assert salvage(tmp_path / "none") is None
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3"):
        (tmp_path / name).mkdir()
        torch.save({"step": 1}, tmp_path / name / STATE_FILE)
    (tmp_path / "checkpoint_3" / STATE_FILE).write_bytes(b"PK cut off")
    snapshot = tmp_path / SNAPSHOT_FILE

    known = {"ray_version": ray.__version__, "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}
    snapshot.write_text(json.dumps(known), encoding="utf-8")
    assert salvage(tmp_path) is None
    assert snapshot.exists()
    snapshot.write_text('{"checkpoint_results": [', encoding="utf-8")
    assert salvage(tmp_path) == str(tmp_path / "checkpoint_2")
    assert not snapshot.exists()
