"""Packed texts against the same texts padded."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from embeddings import packing
from embeddings.encoder import EncoderRecipe, backbones_of, build_encoder, forward, load_encoder, save_encoder, tokenize
from embeddings.packing import ATTENTION, BOUNDS, first_place, pack, pack_backbones, runs
from embeddings.token_cache import TokenCache
from tests.tiny_models import tiny_bert_folder

TEXTS = ["a", "red shoes", "red lamp", "garden hose 20 m, in garden > water", "", "zzz lamp " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_bert_folder(tmp_path_factory.mktemp("models") / "bert"))


def model_of(folder, **changes):
    model = build_encoder(EncoderRecipe(model=folder, max_document_tokens=24, **changes))
    return model.eval()


def gradients(model, features, side="document"):
    model.zero_grad()
    vector_ND = forward(model, features, side)
    (vector_ND * torch.linspace(-1, 1, vector_ND.numel()).reshape(vector_ND.shape)).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return vector_ND.detach(), {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_vectors_and_gradients_are_those_of_padded_texts(folder, tied, pooling):
    model = model_of(folder, tied=tied, pooling=pooling)
    padded, slopes = gradients(model, tokenize(model, TEXTS, "document"))
    assert pack_backbones(model)
    features = TokenCache(model).packed(TEXTS, "document")
    assert features["input_ids"].shape[0] == 1
    assert "attention_mask" not in features
    assert len(features[BOUNDS]) == len(TEXTS) + 1
    packed, packed_slopes = gradients(model, features)
    assert torch.allclose(packed, padded, atol=1e-6)
    assert {name for name in packed_slopes if "pooler" not in name} == {name for name in slopes if "pooler" not in name}
    for name, slope in packed_slopes.items():
        assert torch.allclose(slope, slopes[name], atol=1e-5), name
    # padded texts have the vectors that they had
    assert torch.equal(forward(model, tokenize(model, TEXTS, "document"), "document"), padded)


def test_more_tokens_in_a_row_than_a_text_may_have(folder):
    model = model_of(folder)
    texts = [f"garden hose {number} m" for number in range(400)]
    expected = forward(model, tokenize(model, texts, "document"), "document")
    assert pack_backbones(model)
    features = TokenCache(model).packed(texts, "document")
    assert features["input_ids"].shape[1] > backbones_of(model)[0].model.config.max_position_embeddings
    assert torch.allclose(forward(model, features, "document"), expected, atol=1e-6)


def test_tokens_that_are_not_kept_are_packed_alike(folder):
    model = model_of(folder)
    kept, none = TokenCache(model).packed(TEXTS, "document"), TokenCache(model, max_texts=0).packed(TEXTS, "document")
    for name in ("input_ids", "position_ids", BOUNDS):
        assert torch.equal(kept[name], none[name])


def test_a_saved_encoder_does_not_ask_for_the_attention(folder, tmp_path):
    model = model_of(folder)
    assert pack_backbones(model)
    assert backbones_of(model)[0].model.config._attn_implementation == ATTENTION
    save_encoder(model, tmp_path / "saved", {})
    assert ATTENTION not in "".join(path.read_text() for path in (tmp_path / "saved").rglob("*.json"))
    again, _ = load_encoder(tmp_path / "saved")
    assert backbones_of(again)[0].model.config._attn_implementation == "sdpa"


def test_a_backbone_whose_vectors_would_differ_is_left_as_it_was(folder, monkeypatch):
    model = model_of(folder)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(packing, "first_place", lambda model, side: 1)
    assert not pack_backbones(model)
    assert backbones_of(model)[0].model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.undo()
    monkeypatch.setattr(packing, "pack", lambda model, features, side: {"inputs": None})
    assert not pack_backbones(model)
    monkeypatch.undo()
    assert pack_backbones(model)


def test_a_decoder_is_not_packed(folder):
    model = model_of(folder)
    backbone = backbones_of(model)[0]
    backbone.model = BertModel(BertConfig(**{**backbone.model.config.to_dict(), "is_decoder": True}))
    assert not pack_backbones(model)


def test_places_of_roberta_begin_behind_the_paddings(folder):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    model = model_of(folder)
    own = backbones_of(model)[0].model.config
    backbones_of(model)[0].model = XLMRobertaModel(XLMRobertaConfig(**own.to_dict()))
    model.eval()
    assert first_place(model, "document") == 1
    features = tokenize(model, TEXTS, "document")
    expected = forward(model, features, "document")
    assert pack_backbones(model)
    assert torch.allclose(forward(model, pack(model, features, "document"), "document"), expected, atol=1e-6)


def test_a_backbone_with_a_window_is_not_packed(folder):
    from transformers import ModernBertConfig, ModernBertModel

    model = model_of(folder)
    own = backbones_of(model)[0].model.config
    sizes = {"vocab_size": own.vocab_size, "hidden_size": own.hidden_size, "intermediate_size": 32}
    tokens = {"pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    backbone = ModernBertModel(ModernBertConfig(**sizes, **tokens, num_hidden_layers=3, num_attention_heads=2))
    backbones_of(model)[0].model = backbone
    assert not pack_backbones(model.eval())
    assert backbone.config._attn_implementation == "sdpa"


def test_runs_are_of_neighbours():
    assert list(runs(torch.tensor([0, 2, 4, 7, 9]))) == [(2, 2), (1, 3), (1, 2)]
