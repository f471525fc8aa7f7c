import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from conf.load import ConfigError
from embeddings.encoder import EncoderRecipe, build_encoder, encode, save_encoder
from embeddings.export import export_encoder
from embeddings.text import TextRecipe
from tests.tiny_models import tiny_bert_folder


@pytest.fixture
def trained(tmp_path):
    recipe = EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert")), query_prefix="query: ", max_query_tokens=9)
    model = build_encoder(recipe)
    card = {
        "text": TextRecipe(),
        "encoder": recipe,
        "stage": "stage2",
        "fingerprint": "abc",
        "metrics": {"ndcg@10": 0.5},
    }
    save_encoder(model, tmp_path / "encoder", card)
    return model, tmp_path / "encoder"


def test_exported_folder_encodes_like_the_trained_model(trained, tmp_path):
    model, folder = trained
    export_encoder(folder, tmp_path / "out")
    texts = ["red shoes", "lamp " * 50]
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(texts),
        encode(model, texts, "query"),
        atol=1e-6,
    )


def test_card_says_how_to_encode(trained, tmp_path):
    export_encoder(trained[1], tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "64 dimensions",
        "stage2",
        "abc",
        "`by {brand}`",
        "query 'query: '",
        "cut after 9 tokens",
        "| ndcg@10 | 0.5000 |",
    ):
        assert part in readme


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    export_encoder(trained[1], tmp_path / "out", {"recall@100": 0.25})
    before = (tmp_path / "out" / "README.md").read_text()
    assert "recall@100" in before
    with pytest.raises(ValueError, match="empty folder"):
        export_encoder(trained[1], tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == before


def test_a_source_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        export_encoder(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
