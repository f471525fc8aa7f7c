import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.load import ConfigError
from embeddings import quantised
from embeddings.backbone import SHIPPED, resolve_model
from embeddings.encoder import EncoderRecipe, build_encoder, encode, load_encoder, save_encoder
from embeddings.parity import compare_vectors
from embeddings.quantised import load_quantised
from embeddings.text import TextRecipe
from tests.embeddings.test_encoder import perturb
from tests.tiny_models import tiny_bert_folder

SHIPPED_MODEL = next(iter(SHIPPED))
WORDS = ["red", "blue", "garden", "steel", "lamp", "shoes", "hose", "20 m", "for kids", "pack of 3", "cordless drill"]
PRODUCTS = [f"{one} {two} {three}" for one in WORDS for two in WORDS for three in ("", "kitchen", "with a stand")]
QUERIES = [f"{one} {two}" for one in WORDS for two in WORDS[:3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("int8")
    recipe = EncoderRecipe(model=str(tiny_bert_folder(place / "bert")), query_prefix="query: ", max_query_tokens=8)
    model = build_encoder(recipe)
    perturb(model)
    save_encoder(model, place / "encoder", {"text": TextRecipe(), "encoder": recipe})
    return place / "encoder"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    pytest.importorskip("nncf", reason="the extra int8 is not installed")
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("side", ["query", "document"])
def test_each_side_keeps_its_head_prefix_and_limit_in_int8(folder, cache, side):
    int8 = load_quantised(folder, side, cache=cache, calibration=PRODUCTS[:64])
    model, _ = load_encoder(folder)
    texts = [*QUERIES, "lamp " * 40, ""]
    other = "document" if side == "query" else "query"
    own, others = (encode(model, texts, name) for name in (side, other))
    vectors = int8.encode(texts)
    assert (vectors * own).sum(axis=1).mean() > 0.98
    assert (vectors * own).sum(axis=1).mean() > (vectors * others).sum(axis=1).mean()


def test_int8_vectors_come_in_input_order_whatever_the_batches(folder, cache):
    int8 = load_quantised(folder, "document", cache=cache, calibration=PRODUCTS[:64])
    texts = [*PRODUCTS[:30], PRODUCTS[3], "", "lamp " * 30]
    together = int8.encode(texts)
    assert (together.dtype, together.shape) == (np.float32, (len(texts), 64))
    np.testing.assert_array_equal(together[3], together[30])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    one_by_one = np.concatenate([int8.encode([text], batch_tokens=1) for text in texts])
    # padding changes float sums, so that a component now and then rounds to the next of 255 steps
    assert (together * one_by_one).sum(axis=1).min() > 0.999
    assert int8.encode([]).shape == (0, 64)


def test_a_cached_file_is_used_again_until_weights_or_texts_change(folder, cache, monkeypatch, tmp_path):
    load_quantised(folder, "document", cache=cache, calibration=PRODUCTS[:64])

    def refuse(*_):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(quantised, "_quantise", refuse)
    load_quantised(folder, "document", cache=cache, calibration=PRODUCTS[:64][::-1])
    with pytest.raises(AssertionError, match="calibrated again"):
        load_quantised(folder, "document", cache=cache, calibration=PRODUCTS[:63])
    model, _ = load_encoder(folder)
    perturb(model)
    save_encoder(model, tmp_path / "encoder", {})
    with pytest.raises(AssertionError, match="calibrated again"):
        load_quantised(tmp_path / "encoder", "document", cache=cache, calibration=PRODUCTS[:64])
    assert all(entry.name.endswith("-document") or entry.name.endswith("-query") for entry in cache.iterdir())


@pytest.mark.slow
def test_int8_of_the_shipped_model_ranks_real_titles_as_float32_does(cache, tmp_path):
    """Calibrates the shipped model: a minute."""
    if resolve_model(SHIPPED_MODEL) == SHIPPED_MODEL:
        pytest.skip(f"the package that ships {SHIPPED_MODEL} is not installed")
    if "ASSAY_DATA" not in os.environ:
        pytest.skip("ASSAY_DATA names no folder with titles/titles.parquet")
    column = pq.read_table(Path(os.environ["ASSAY_DATA"], "titles", "titles.parquet"), columns=["title"])["title"]
    titles = sorted(set(column.to_pylist()[::500]))
    save_encoder(build_encoder(EncoderRecipe(model=SHIPPED_MODEL)), tmp_path / "encoder", {})
    model, _ = load_encoder(tmp_path / "encoder")
    int8 = load_quantised(tmp_path / "encoder", "document", cache=cache, calibration=titles[1::6])
    few, many = titles[::12], titles[2::2]
    exact = encode(model, few, "document"), encode(model, many, "document")
    report = compare_vectors(*exact, int8.encode(few), int8.encode(many))
    assert report.mean_cosine > 0.99
    assert report.min_cosine > 0.95
    assert report.overlap_at_100 > 0.9


def test_without_texts_there_is_nothing_to_calibrate_with(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected texts to calibrate the query side"):
        load_quantised(folder, "query", cache=tmp_path)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(quantised, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"package {package}, found none; pip install 'assay\[int8\]'"):
        getattr(quantised, f"_{package}")()
