import math

import numpy as np
import pyarrow as pa
import pytest

from conf.load import ConfigError
from embeddings.calibration import Calibration
from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder, save_labeller
from embeddings.labeller_model import build_labeller, save_weights
from ray_apps.cluster import RayPlacement
from ray_apps.label import _answer, label_pairs
from ray_apps.placements import LabelPlacement
from tests.tiny_models import tiny_bert_folder, tiny_causal_lm_folder, tiny_guideline_file

RAY = RayPlacement(address="local", num_cpus=2)


def labeller_folder(tmp_path, kind, *, width=64):
    model = (
        tiny_bert_folder(tmp_path / "model", width=width)
        if kind == "classifier"
        else tiny_causal_lm_folder(tmp_path / "model")
    )
    guideline = str(tiny_guideline_file(tmp_path / "guideline.yaml"))
    recipe = LabellerRecipe(
        kind=kind, model=str(model), guideline=guideline, max_tokens=64 if kind == "classifier" else 512
    )
    encoder = PairEncoder(recipe.model, recipe, load_guideline(guideline))
    save_weights(build_labeller(recipe, encoder, device="cpu"), encoder, tmp_path / "weights")
    ids, target = encoder.grade_token_ids, str(tmp_path / "labeller")
    save_labeller(
        tmp_path / "weights",
        target,
        recipe,
        grade_token_ids=ids,
        calibrations={"": Calibration(temperature=1.4)},
        metrics={},
    )
    return target


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_the_engine_gives_the_probabilities_of_plain_torch(tmp_path, kind):
    folder = labeller_folder(tmp_path, kind)
    pairs = pa.table(
        {
            "address": [f"a{row:02d}" for row in range(40)],
            "query": [f"red shoe {row % 7}" for row in range(40)],
            "title": [f"shoe number {row} " + "long " * row for row in range(40)],
            "brand": [None if row % 2 else "acme" for row in range(40)],
        }
    )

    parts = list(label_pairs(pairs, folder, LabelPlacement(ray=RAY, part_rows=16, batch_rows=8)))
    by_engine = pa.concat_tables(parts).sort_by("address")
    by_torch = pa.concat_tables(label_pairs(pairs, folder, LabelPlacement(engine="torch"))).sort_by("address")

    assert max(map(len, parts)) <= 16
    assert by_engine["address"].to_pylist() == pairs["address"].to_pylist()
    for name in ("p0", "p1", "p2"):
        np.testing.assert_allclose(by_engine[name].to_numpy(), by_torch[name].to_numpy(), atol=1e-3)
    total = sum(by_engine[name].to_numpy() for name in ("p0", "p1", "p2"))
    np.testing.assert_allclose(total, 1, atol=1e-9)


KEY = {"address": "a", "dataset": "d"}


def test_an_answer_without_every_grade_is_no_answer():
    def logprob(value):
        return {"logprob": math.log(value)}

    whole = _answer(KEY | {"logprobs": [{5: logprob(0.2), 6: logprob(0.3), 7: logprob(0.5)}]}, (5, 6, 7))
    assert whole["probability"] == pytest.approx([0.2, 0.3, 0.5])
    short = _answer(KEY | {"logprobs": [{5: logprob(0.2), 6: logprob(0.8)}]}, (5, 6, 7))
    assert np.isnan(short["probability"]).any()
    for row in ({"logprobs": None}, {"logprobs": []}):
        assert np.isnan(_answer(KEY | row, (5, 6, 7))["probability"]).all()
    for values in (None, np.array([0.5, 0.5])):
        assert np.isnan(_answer(KEY | {"embeddings": values}, ())["probability"]).all()


def test_auto_takes_the_engine_where_its_start_pays():
    placement = LabelPlacement(engine="auto", vllm_from_pairs=100)

    assert [placement.engine_for(number) for number in (99, 100)] == ["torch", "vllm"]


@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_that_keeps_dying_ends_in_one_sentence(tmp_path, monkeypatch):
    folder = labeller_folder(tmp_path, "classifier", width=32)  # heads of 16
    pairs = pa.table({"address": ["a"], "query": ["red shoe"], "title": ["shoe"]})
    placement = LabelPlacement(ray=RAY, max_engine_restarts=0)
    with pytest.raises(ConfigError, match=r"heads are 16 wide, .* placement\.engine=torch"):
        list(label_pairs(pairs, folder, placement))
    monkeypatch.setattr("ray_apps.label.check_servable", lambda *_: None)
    with pytest.raises(RuntimeError, match="the vLLM engine died"):
        list(label_pairs(pairs, folder, placement))
