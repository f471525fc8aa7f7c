import pyarrow as pa
import pytest
import torch
from torch import Tensor

from embeddings import token_cache
from embeddings.encoder import EncoderRecipe, build_encoder, tokenize, transformers_of
from embeddings.token_cache import TokenCache, token_shard
from tests.tiny_models import tiny_bert_folder

BATCHES = [
    ["red shoes", "a", "garden hose 20 m, in garden > water", "", "red shoes"],
    ["zzz lamp " * 40, "a"],
    ["a"],
    ["garden hose 20 m, in garden > water", "red lamp"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_bert_folder(tmp_path_factory.mktemp("models") / "bert"))


def model_of(folder, **changes):
    recipe = EncoderRecipe(model=folder, query_prefix="query: ", max_query_tokens=8, max_document_tokens=24, **changes)
    return build_encoder(recipe)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_kept_tokens_are_those_of_the_tokenizer(folder, tied, padding):
    model = model_of(folder, tied=tied)
    for transformer in set(transformers_of(model).values()):
        transformer.tokenizer.padding_side = padding
    tokens = TokenCache(model)
    for texts in BATCHES * 2:
        for side in ("query", "document"):
            assert_same(tokens(texts, side), tokenize(model, texts, side))


def test_a_text_is_tokenised_once_on_each_side(folder, monkeypatch):
    asked = []

    def counting(model, texts, side, **others):
        asked.extend((side, text) for text in texts)
        return tokenize(model, texts, side, **others)

    monkeypatch.setattr(token_cache, "tokenize", counting)
    tokens = TokenCache(model_of(folder))
    for texts in BATCHES:
        tokens(texts, "document")
        tokens(texts, "query")
    assert len(asked) == len(set(asked)) == len(tokens) == 2 * len({text for texts in BATCHES for text in texts})


@pytest.mark.parametrize("max_texts", [3, 1000])
def test_tokens_are_counted_as_the_tokenizer_gives_them(folder, monkeypatch, max_texts):
    monkeypatch.setattr(token_cache, "_COUNTED", 2)
    model = model_of(folder)
    texts = [text for batch in BATCHES for text in batch]
    found = TokenCache(model, max_texts=max_texts).counts(texts, "document")
    assert found.tolist() == tokenize(model, texts, "document")["attention_mask"].sum(dim=1).tolist()
    assert len(set(found.tolist())) > 1
    assert TokenCache(model).counts([], "query").tolist() == []


def test_texts_beyond_the_limit_are_tokenised_anew(folder):
    model = model_of(folder)
    tokens = TokenCache(model, max_texts=3)
    for texts in BATCHES:
        assert_same(tokens(texts, "query"), tokenize(model, texts, "query"))
    assert len(tokens) <= 3


def test_a_model_that_reads_more_than_ids_has_none_kept(folder, monkeypatch):
    def with_segments(model, texts, side, **others):
        found = tokenize(model, texts, side, **others)
        return found | {"token_type_ids": torch.ones_like(found["input_ids"])}

    monkeypatch.setattr(token_cache, "tokenize", with_segments)
    tokens = TokenCache(model_of(folder))
    for texts in BATCHES:
        assert tokens(texts, "query")["token_type_ids"].all()
    assert not len(tokens)


def test_tokens_of_shards_are_those_of_the_tokenizer(folder):
    model = model_of(folder)
    texts = sorted({text for batch in BATCHES for text in batch})
    shards = [
        token_shard(model, texts[:3], "document"),
        token_shard(model, texts[3:], "document"),
        token_shard(model, texts[2:4], "query"),
    ]
    # as they come from files: in chunks, one of them empty
    shards[1] = pa.concat_tables([shards[1].slice(0, 1), shards[1].slice(1, 0), shards[1].slice(1)])
    tokens = TokenCache(model, shards=shards)
    for batch in [*BATCHES, ["new"], texts]:
        for side in ("document", "query"):
            assert_same(tokens(batch, side), tokenize(model, batch, side))
            assert tokens.counts(batch, side).tolist() == tokenize(model, batch, side)["attention_mask"].sum(1).tolist()
            assert_same(tokens.packed(batch, side), TokenCache(model).packed(batch, side))
    # what shards hold is not kept again
    unknown = {("document", "new")} | {("query", text) for text in [*texts, "new"] if text not in texts[2:4]}
    assert len(tokens) == len(unknown)


def test_shards_of_nothing(folder):
    model = model_of(folder)
    tokens = TokenCache(model, shards=[token_shard(model, [], "query")])
    assert_same(tokens(["a"], "query"), tokenize(model, ["a"], "query"))


def test_a_model_that_reads_more_than_ids_has_no_shards(folder, monkeypatch):
    def with_segments(model, texts, side, **others):
        found = tokenize(model, texts, side, **others)
        return found | {"token_type_ids": torch.ones_like(found["input_ids"])}

    monkeypatch.setattr(token_cache, "tokenize", with_segments)
    assert token_shard(model_of(folder), ["a"], "query") is None
