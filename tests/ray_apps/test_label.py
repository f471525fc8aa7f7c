import math
import warnings

import numpy as np
import pyarrow as pa
import pytest

from conf.load import ConfigError
from embeddings.calibration import Calibration
from embeddings.guideline import SHARED_BLOCK_TOKENS, load_guideline
from embeddings.labeller import LabellerCard, LabellerRecipe, PairEncoder, load_pair_encoder, save_labeller
from embeddings.labeller_model import build_labeller, save_weights
from embeddings.text import TextRecipe
from ray_apps.cluster import RayPlacement
from ray_apps.label import _answer, _engine_config, check_servable, label_pairs
from ray_apps.placements import LabelPlacement
from tests.tiny_models import tiny_bert_folder, tiny_causal_lm_folder, tiny_evidence_head, tiny_guideline_file

RAY = RayPlacement(address="local", num_cpus=2)


def labeller_folder(tmp_path, kind, *, width=64, head=None):
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
        head=head,
    )
    return target


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_the_engine_gives_the_probabilities_of_plain_torch(tmp_path, kind):
    folder = labeller_folder(tmp_path, kind, head=tiny_evidence_head() if kind == "classifier" else None)
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

    if kind == "classifier":
        (tmp_path / "plain").mkdir()
        without = labeller_folder(tmp_path / "plain", kind)
        (plain,) = label_pairs(pairs, without, LabelPlacement(engine="torch"))
        assert np.abs(plain["p2"].to_numpy() - by_torch["p2"].to_numpy()).min() > 0.01
    assert max(map(len, parts)) <= 16
    assert by_engine["address"].to_pylist() == pairs["address"].to_pylist()
    for name in ("p0", "p1", "p2"):
        np.testing.assert_allclose(by_engine[name].to_numpy(), by_torch[name].to_numpy(), atol=1e-3)
    total = sum(by_engine[name].to_numpy() for name in ("p0", "p1", "p2"))
    np.testing.assert_allclose(total, 1, atol=1e-9)
    cost = by_engine.to_pydict()
    assert (
        cost["tokens"] == by_torch["tokens"].to_pylist() == list(map(len, load_pair_encoder(folder).encode_rows(pairs)))
    )
    assert {cached % SHARED_BLOCK_TOKENS for cached in cost["cached_tokens"]} == {0}
    assert (max(cost["cached_tokens"]) >= SHARED_BLOCK_TOKENS) is (kind == "generative")


def card(kind="generative"):
    ids = (5, 6, 7) if kind == "generative" else ()
    return LabellerCard(
        kind=kind, guideline="v1", prompt="p", text=TextRecipe(), max_tokens=512, grade_token_ids=ids, calibrations={},
        metrics={}, fingerprint="f",
    )  # fmt: skip


def engine_config(labeller, placement):
    with warnings.catch_warnings():
        # what Ray imports for it warns of deprecated spellings of its own
        warnings.simplefilter("ignore")
        return _engine_config("folder", labeller, placement)


def test_an_engine_on_a_processor_shares_the_smallest_blocks_its_attention_takes():
    config = engine_config(card(), LabelPlacement(threads_per_engine=3, kv_cache_gib=2))

    engine = config.engine_kwargs
    assert (engine["block_size"], engine["enable_prefix_caching"], engine["max_model_len"]) == (32, True, 513)
    assert (engine["dtype"], engine["logprobs_mode"]) == ("float32", "processed_logprobs")
    assert "max_num_batched_tokens" not in engine
    assert config.placement_group_config["bundles"] == [{"CPU": 1, "GPU": 0}]
    environment = config.runtime_env["env_vars"]
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_CPU_KVCACHE_SPACE"]) == ("3", "2")
    classifier = engine_config(card("classifier"), LabelPlacement()).engine_kwargs
    assert not {"block_size", "logprobs_mode"} & classifier.keys()


def test_engines_on_graphics_cards_take_a_bundle_for_each_card_they_share():
    placement = LabelPlacement(
        num_engines=3, use_gpu=True, tensor_parallel=4, max_concurrent_batches=6, max_num_batched_tokens=8192
    )

    config = engine_config(card(), placement)

    assert config.placement_group_config["bundles"] == [{"CPU": 1, "GPU": 1}] * 4
    assert (config.concurrency, config.max_concurrent_batches) == (3, 6)
    engine = config.engine_kwargs
    assert (engine["tensor_parallel_size"], engine["max_num_batched_tokens"]) == (4, 8192)
    assert "block_size" not in engine
    assert "OMP_NUM_THREADS" not in config.runtime_env["env_vars"]


def test_placement_changes_nothing_of_an_engine_that_could_change_a_grade():
    deciding = ("dtype", "max_model_len", "logprobs_mode", "max_logprobs")
    placements = (LabelPlacement(), LabelPlacement(num_engines=2, use_gpu=True, tensor_parallel=2, max_num_seqs=7))

    told = [engine_config(card(), placement).engine_kwargs for placement in placements]

    assert [told[0][name] for name in deciding] == [told[1][name] for name in deciding]


def test_an_engine_is_split_only_over_cards_that_divide_its_heads(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9, "hidden_size": 576}', encoding="utf-8")

    check_servable(str(tmp_path), LabelPlacement(use_gpu=True, tensor_parallel=3))
    with pytest.raises(ConfigError, match=r"tensor_parallel=2: the 9 attention heads .* do not split evenly"):
        check_servable(str(tmp_path), LabelPlacement(use_gpu=True, tensor_parallel=2))
    with pytest.raises(ConfigError, match=r"tensor_parallel=3: only graphics cards share an engine"):
        check_servable(str(tmp_path), LabelPlacement(tensor_parallel=3))


@pytest.mark.usefixtures("ray_cluster")
def test_more_cards_than_the_cluster_has_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_apps.label.check_servable", lambda *_: None)
    folder = labeller_folder(tmp_path, "generative")
    pairs = pa.table({"address": ["a"], "query": ["red shoe"], "title": ["shoe"]})
    placement = LabelPlacement(ray=RAY, num_engines=2, use_gpu=True, tensor_parallel=2)

    with pytest.raises(ConfigError, match="5 CPU asked for"):
        list(label_pairs(pairs, folder, placement))


KEY = {"address": "a", "dataset": "d", "evidence": [], "tokens": 3}


def test_an_answer_without_every_grade_is_no_answer():
    def logprob(value):
        return {"logprob": math.log(value)}

    whole = _answer(KEY | {"logprobs": [{5: logprob(0.2), 6: logprob(0.3), 7: logprob(0.5)}]}, (5, 6, 7))
    assert whole["probability"] == pytest.approx([0.2, 0.3, 0.5])
    assert (whole["cached_tokens"], math.isnan(whole["answered"])) == (0, True)
    short = _answer(KEY | {"logprobs": [{5: logprob(0.2), 6: logprob(0.8)}]}, (5, 6, 7))
    assert np.isnan(short["probability"]).any()
    for row in ({"logprobs": None}, {"logprobs": []}):
        assert np.isnan(_answer(KEY | row, (5, 6, 7))["probability"]).all()
    for values in (None, np.array([0.5, 0.5])):
        assert np.isnan(_answer(KEY | {"embeddings": values}, ())["probability"]).all()


def test_auto_takes_the_engine_where_its_start_pays():
    placement = LabelPlacement(engine="auto", vllm_from_pairs=100)

    assert [placement.engine_for(number) for number in (99, 100)] == ["torch", "vllm"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_that_keeps_dying_ends_in_one_sentence(tmp_path, monkeypatch):
    """An engine that starts and dies: a minute and a half."""
    folder = labeller_folder(tmp_path, "classifier", width=32)  # heads of 16
    pairs = pa.table({"address": ["a"], "query": ["red shoe"], "title": ["shoe"]})
    placement = LabelPlacement(ray=RAY, max_engine_restarts=0)
    with pytest.raises(ConfigError, match=r"heads are 16 wide, .* placement\.engine=torch"):
        list(label_pairs(pairs, folder, placement))
    monkeypatch.setattr("ray_apps.label.check_servable", lambda *_: None)
    with pytest.raises(RuntimeError, match="the vLLM engine died"):
        list(label_pairs(pairs, folder, placement))
