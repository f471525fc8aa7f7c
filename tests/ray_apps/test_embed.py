from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from embeddings.encoder import build_encoder, encode, load_encoder, save_encoder
from embeddings.recipes import EncoderRecipe
from embeddings.shards import plan_shards, read_rows
from embeddings.text import TextRecipe
from ray_apps.embed import embed, plan_products, plan_queries
from tests.tiny_models import tiny_bert_folder

pytestmark = pytest.mark.usefixtures("ray_cluster")
NAMES = ["lamp", "hose", "shoe", "drill", "sofa", "kettle", "paint"]
CATALOG = pa.table(
    {
        "product_id": [f"p{number}" for number in range(7)],
        "title": NAMES,
        "brand": pa.array(["acme"] * 7),
        "category": pa.array([None] * 7, pa.string()),
        "description": pa.array(["long"] * 7),
    }
)


@pytest.mark.parametrize("own_texts", [0, 100], ids=["by an actor", "in this process"])
def test_encodes_with_the_models_own_texts_and_never_twice(tmp_path, own_texts, monkeypatch):
    if own_texts:
        monkeypatch.setattr(ray.data, "from_arrow", None)
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    recipe = TextRecipe(clauses=("{title}", "{brand}"), joint=" ")
    folder = str(tmp_path / "model")
    save_encoder(model, folder, {"text": recipe, "stage": 1, "fingerprint": "x"})
    shards = plan_shards(tmp_path / "vectors", 7, 3)
    parts = [
        *plan_products(folder, CATALOG, shards),
        plan_queries(folder, ["  Red LAMP ", "hose"], tmp_path / "vectors"),
    ]
    where = {"num_workers": 1, "threads_per_worker": 1, "use_gpu": False, "batch_tokens": 1024, "own_texts": own_texts}
    threads = torch.get_num_threads()
    assert embed(parts, **where, run_folder=str(tmp_path / "run")) == 9
    assert torch.get_num_threads() == threads
    reloaded, _ = load_encoder(folder)
    expected = encode(reloaded, [f"{name} acme" for name in NAMES], "document")
    assert np.abs(read_rows(shards, np.arange(7)) - expected).max() < 0.02  # bfloat16 where hardware has it
    queries = np.load(parts[-1].path)
    assert np.abs(queries - encode(reloaded, ["red lamp", "hose"], "query")).max() < 0.02
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)

    # a killed run left one file out: only that one is made again
    kept = Path(shards[0].path).stat().st_mtime_ns
    Path(shards[1].path).unlink()
    assert embed(parts, **where, run_folder=str(tmp_path / "run")) == shards[1].num_rows
    assert Path(shards[0].path).stat().st_mtime_ns == kept
    assert embed(parts, **where, run_folder=str(tmp_path / "run")) == 0
