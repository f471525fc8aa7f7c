from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch

from embeddings.encoder import build_encoder, encode, load_encoder, save_encoder
from embeddings.recipes import EncoderRecipe
from embeddings.text import TextRecipe
from embeddings.vectors import VectorStore
from lake.storage import LakeError
from ray_apps import embed as app
from ray_apps.embed import embed, plan_products, plan_queries
from tests.tiny_models import tiny_bert_folder

pytestmark = pytest.mark.usefixtures("ray_cluster")
HERE = {"num_workers": 1, "threads_per_worker": 1, "use_gpu": False, "batch_tokens": 1024, "own_texts": 100}
NAMES = ["lamp", "hose", "shoe", "drill", "sofa", "kettle", "paint"]
CATALOG = pa.table(
    {
        "product_id": [f"p{number}" for number in range(7)],
        "product_hash": [f"hash of {name}" for name in NAMES],
        "title": NAMES,
        "brand": pa.array(["acme"] * 7),
        "category": pa.array([None] * 7, pa.string()),
        "description": pa.array(["long"] * 7),
    }
)


def products_of(catalog):
    """Hashes of a catalogue, and the function that gives texts by them."""
    hashes = catalog["product_hash"].combine_chunks()
    return catalog["product_hash"], lambda asked: catalog.take(pc.index_in(asked.cast(pa.string()), value_set=hashes))


@pytest.mark.parametrize("own_texts", [0, 100], ids=["by an actor", "in this process"])
def test_encodes_with_the_models_own_texts_and_never_twice(tmp_path, own_texts, monkeypatch):
    if own_texts:
        monkeypatch.setattr(ray.data, "from_arrow", None)
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    recipe = TextRecipe(clauses=("{title}", "{brand}"), joint=" ")
    folder = str(tmp_path / "model")
    save_encoder(model, folder, {"text": recipe, "stage": 1, "fingerprint": "x"})
    store = VectorStore(tmp_path / "vectors")
    monkeypatch.setattr(app, "FILE_ROWS", 3)
    where = HERE | {"own_texts": own_texts}

    def run(catalog):
        parts = [
            *plan_products(folder, *products_of(catalog), store, "float16", 1),
            plan_queries(folder, ["  Red LAMP ", "hose"], tmp_path / "vectors"),
        ]
        return parts, embed(parts, **where, run_folder=str(tmp_path / "run"))

    threads = torch.get_num_threads()
    twice = pa.concat_tables([CATALOG, CATALOG.slice(2, 1)])  # a text that two products share
    parts, encoded = run(twice)
    assert encoded == 9
    assert len(parts) == 4
    assert torch.get_num_threads() == threads
    reloaded, _ = load_encoder(folder)
    expected = encode(reloaded, [f"{name} acme" for name in [*NAMES, NAMES[2]]], "document")
    vectors = store.vectors(twice["product_hash"])
    assert np.abs(vectors.take(np.arange(8)) - expected).max() < 0.02  # bfloat16 where hardware has it
    queries = np.load(parts[-1].path)
    assert np.abs(queries - encode(reloaded, ["red lamp", "hose"], "query")).max() < 0.02
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)

    # a killed run left one file out: only that one is made again
    kept = Path(parts[0].path).stat().st_mtime_ns
    Path(parts[1].path).unlink()
    assert run(twice)[1] == len(parts[1].hashes)
    assert Path(parts[0].path).stat().st_mtime_ns == kept
    assert run(twice)[1] == 0

    # of a catalogue that changed only the new texts are encoded
    changed = CATALOG.set_column(
        1, "product_hash", pa.array([*CATALOG["product_hash"].to_pylist()[:5], "new", "newer"])
    )
    assert run(changed)[1] == 2
    assert np.array_equal(store.vectors(changed["product_hash"]).take(np.arange(5)), vectors.take(np.arange(5)))


def test_texts_of_a_large_catalogue_are_read_some_at_a_time(tmp_path, monkeypatch):
    folder, store = str(tmp_path / "model"), VectorStore(tmp_path / "vectors")
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    save_encoder(model, folder, {"text": TextRecipe(clauses=("{title}",)), "stage": 1, "fingerprint": "x"})
    monkeypatch.setattr(app, "FILE_ROWS", 2)
    monkeypatch.setattr(app, "_TEXTS_AT_ONCE", 4)
    (hashes, texts_of), asked = products_of(CATALOG), []

    def counted(some):
        asked.append(len(some))
        return texts_of(some)

    parts = [
        *plan_products(folder, hashes, counted, store, "float32", 1),
        plan_queries(folder, ["lamp"], store.folder),
    ]
    assert embed(parts, **HERE, run_folder=str(tmp_path / "run")) == 8
    assert asked == [3, 4]
    expected = encode(load_encoder(folder)[0], NAMES, "document")
    assert np.abs(store.vectors(hashes).take(np.arange(7)) - expected).max() < 0.02


def test_a_disk_without_room_for_the_rest_ends_it_after_the_first_file(tmp_path, monkeypatch):
    folder, store = str(tmp_path / "model"), VectorStore(tmp_path / "vectors")
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    save_encoder(model, folder, {"text": TextRecipe(), "stage": 1, "fingerprint": "x"})
    monkeypatch.setattr(app, "FILE_ROWS", 3)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=100))
    parts = plan_products(folder, *products_of(CATALOG), store, "float16", 1)
    with pytest.raises(LakeError, match=r"vectors of 5 more texts take about 0 MB, .* has 0 MB free; make room"):
        embed(parts, **HERE, run_folder=str(tmp_path / "run"))
    assert [part.is_complete for part in parts] == [True, False, False]
    monkeypatch.undo()
    assert embed(parts, **HERE, run_folder=str(tmp_path / "run")) == 5


def test_products_may_be_computed_in_int8_by_one_graph_for_all_nights(tmp_path):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    pytest.importorskip("nncf", reason="the extra int8 is not installed")
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    folder, recipe = str(tmp_path / "model"), TextRecipe(clauses=("{title}",))
    save_encoder(model, folder, {"text": recipe, "stage": 1, "fingerprint": "x"})
    store = VectorStore(tmp_path / "vectors")
    for products in (CATALOG.slice(0, 5), CATALOG):
        parts = plan_products(folder, *products_of(products), store, "float16", 1, in_int8=True)
        embed(parts, **HERE, run_folder=str(tmp_path / "run"))
    assert len(list(store.folder.glob("int8/*/*.xml"))) == 1
    vectors = store.vectors(CATALOG["product_hash"]).take(np.arange(7))
    exact = encode(load_encoder(folder)[0], NAMES, "document")
    cosines = (vectors * exact).sum(axis=1)
    assert cosines.min() > 0.9
    assert np.abs(vectors - exact).max() > 1e-4  # not the encoder's own
    report = app.parity(folder, store, CATALOG, batch_tokens=1024)
    assert (report.num_queries, report.num_products) == (1, 7)
    assert report.min_cosine == pytest.approx(min(1.0, cosines.min()), abs=2e-3)
