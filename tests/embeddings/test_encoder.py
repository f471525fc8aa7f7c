import dataclasses

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conf.load import ConfigError
from embeddings.encoder import (
    SIDES,
    EncoderRecipe,
    build_encoder,
    build_pretrained,
    encode,
    fit_lengths,
    interpolate,
    load_encoder,
    read_card,
    save_encoder,
    transformers_of,
)
from embeddings.text import TextRecipe
from tests.tiny_models import tiny_bert_folder

TEXTS = ["red shoes", "a", "garden hose 20 m, in garden > water", "", "red shoes", "zzz lamp " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_bert_folder(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def recipe(folder, request):
    return EncoderRecipe(
        model=folder,
        tied=request.param,
        query_prefix="query: ",
        document_prefix="passage: ",
        max_query_tokens=8,
        max_document_tokens=24,
    )


def perturb(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sub_modules" in name:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn_like(parameter) * 0.3)


def test_identity_heads_give_the_pretrained_vectors(recipe):
    with_heads, plain = build_encoder(recipe), build_pretrained(recipe)
    for side in ("query", "document"):
        np.testing.assert_allclose(encode(with_heads, TEXTS, side), encode(plain, TEXTS, side), atol=1e-6)


def test_untied_sides_start_alike_and_share_no_weight(folder, tmp_path):
    model = build_encoder(EncoderRecipe(model=folder, tied=False))
    query, document = (transformers_of(model)[side] for side in SIDES)
    assert query is not document
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.mul_(1.5)
    plain = build_pretrained(EncoderRecipe(model=folder))
    np.testing.assert_allclose(encode(model, TEXTS, "document"), encode(plain, TEXTS, "document"), atol=1e-6)
    assert np.abs(encode(model, TEXTS, "query") - encode(plain, TEXTS, "query")).max() > 1e-2
    tied = build_encoder(EncoderRecipe(model=folder))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, tied, query)]
    assert sizes[0] == sizes[1] + sizes[2]
    save_encoder(tied, tmp_path / "tied", {"text": TextRecipe()})
    with pytest.raises(ConfigError, match="has heads on one backbone"):
        build_encoder(EncoderRecipe(model=str(tmp_path / "tied"), tied=False))


def test_a_narrow_projection_is_the_normalised_head_of_the_vector(folder):
    wide = encode(build_encoder(EncoderRecipe(model=folder)), TEXTS, "document")
    narrow = encode(build_encoder(EncoderRecipe(model=folder, projection_width=8)), TEXTS, "document")
    expected = wide[:, :8] / np.linalg.norm(wide[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(narrow, expected, atol=1e-6)


def test_too_wide_a_projection_is_refused(folder):
    with pytest.raises(ConfigError, match="at most the 64 dimensions"):
        build_encoder(EncoderRecipe(model=folder, projection_width=65))


def test_saved_folder_gives_the_same_vectors_through_sentence_transformers(recipe, tmp_path):
    model = build_encoder(recipe)
    perturb(model)
    query_ND, document_ND = encode(model, TEXTS, "query"), encode(model, TEXTS, "document")
    save_encoder(model, tmp_path / "encoder", {"text": TextRecipe(), "encoder": recipe, "stage": "stage1"})
    loaded = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(TEXTS), query_ND, atol=1e-6)
    np.testing.assert_allclose(loaded.encode_document(TEXTS), document_ND, atol=1e-6)
    assert not np.allclose(query_ND, document_ND, atol=1e-3)


def test_each_side_is_cut_at_its_own_token_limit(recipe, tmp_path):
    save_encoder(build_encoder(recipe), tmp_path / "encoder", {})
    model, _ = load_encoder(tmp_path / "encoder")
    assert model.preprocess(["lamp " * 99], task="query")["input_ids"].shape[1] == 8
    assert model.preprocess(["lamp " * 99], task="document")["input_ids"].shape[1] == 24


def test_limits_follow_the_percentile_of_lengths_within_the_recipes(folder):
    queries = ["lamp " * number for number in range(1, 21)]
    wide = EncoderRecipe(model=folder, max_query_tokens=200, max_document_tokens=96, length_percentile=50.0)
    tokenizer = transformers_of(build_pretrained(wide))["query"].tokenizer
    half = np.percentile([len(tokenizer(text)["input_ids"]) for text in queries], 50)
    fitted = fit_lengths(wide, queries, ["lamp"])
    assert fitted.max_query_tokens == 8 * np.ceil(half / 8) < 200
    assert (fitted.max_document_tokens, fitted.length_percentile) == (8, 0.0)
    narrow = dataclasses.replace(wide, max_query_tokens=8, length_percentile=100.0)
    assert fit_lengths(narrow, queries, []).max_query_tokens == 8
    assert fit_lengths(fitted, queries, []) is fitted


def test_vectors_come_in_input_order_whatever_the_batches(recipe):
    model = build_encoder(recipe)
    one_by_one = np.concatenate([encode(model, [text], "document") for text in TEXTS])
    for batch_tokens in (1, 40, 8192):
        vectors = encode(model, TEXTS, "document", batch_tokens=batch_tokens)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, one_by_one, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(one_by_one, axis=1), 1.0, atol=1e-6)
    assert encode(model, [], "query").shape == (0, 64)


def test_vectors_are_sentence_transformers_own_whatever_the_threads_and_scripts(recipe):
    model = build_encoder(recipe)
    perturb(model)
    # as many characters, yet many more tokens
    texts = [
        f"{word} {number}" for number in range(40) for word in ("lamp", "灯具", "ランプ", "a, b; c", "garden hose")
    ]
    expected, before = model.encode_document(texts), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for batch_tokens in (64, 4096):
                vectors = encode(model, texts, "document", batch_tokens=batch_tokens)
                np.testing.assert_allclose(vectors, expected, atol=1e-6)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_bf16_vectors_stay_close_and_normalised(recipe):
    model = build_encoder(recipe)
    exact, fast = (encode(model, TEXTS, "query", bf16=bf16) for bf16 in (False, True))
    assert (exact * fast).sum(axis=1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1.0, atol=1e-6)


def test_saving_replaces_the_folder_and_leaves_nothing_beside_it(recipe, tmp_path):
    model = build_encoder(recipe)
    for stage in ("stage1", "stage2"):
        save_encoder(model, tmp_path / "encoder", {"stage": stage, "text": TextRecipe(joint=" | ")})
    assert read_card(tmp_path / "encoder")["stage"] == "stage2"
    assert load_encoder(tmp_path / "encoder")[1].joint == " | "
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def test_a_failed_save_keeps_the_former_folder(recipe, tmp_path):
    model = build_encoder(recipe)
    save_encoder(model, tmp_path / "encoder", {"stage": "stage1"})
    with pytest.raises(TypeError):
        save_encoder(model, tmp_path / "encoder", {"stage": object()})
    assert read_card(tmp_path / "encoder") == {"stage": "stage1"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_from_elsewhere_loads_with_the_default_text_recipe(folder, tmp_path):
    SentenceTransformer(folder, device="cpu").save(str(tmp_path / "plain"), create_model_card=False)
    model, text = load_encoder(tmp_path / "plain")
    assert text == TextRecipe()
    np.testing.assert_allclose(
        encode(model, TEXTS, "document"), model.encode(TEXTS, normalize_embeddings=True), atol=1e-6
    )


def test_an_encoder_with_heads_keeps_them_when_built_again(recipe, tmp_path):
    model = build_encoder(recipe)
    perturb(model)
    save_encoder(model, tmp_path / "encoder", {})
    again = build_encoder(EncoderRecipe(**{**vars(recipe), "model": str(tmp_path / "encoder")}))
    np.testing.assert_allclose(encode(again, TEXTS, "query"), encode(model, TEXTS, "query"), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_lies_between_the_weights_and_changes_neither_model(recipe, share):
    pretrained, trained = build_encoder(recipe), build_encoder(recipe)
    perturb(trained)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    mixed = interpolate(trained, pretrained, share).state_dict()
    for name, start in pretrained.state_dict().items():
        torch.testing.assert_close(mixed[name], share * start + (1 - share) * before[name])
        assert torch.equal(trained.state_dict()[name], before[name])


def test_encoders_of_two_shapes_have_nothing_between_them(recipe):
    narrow = build_encoder(EncoderRecipe(**{**vars(recipe), "projection_width": 8}))
    with pytest.raises(ValueError, match="encoders of one recipe"):
        interpolate(build_encoder(recipe), narrow, 0.5)


@pytest.mark.parametrize(("pooling", "expected"), [("auto", "mean"), ("cls", "cls"), ("lasttoken", "lasttoken")])
def test_pooling_is_the_models_own_unless_named(folder, pooling, expected):
    assert build_encoder(EncoderRecipe(model=folder, pooling=pooling))[1].pooling_mode == expected


def test_missing_models_and_broken_cards_are_named(recipe, tmp_path):
    with pytest.raises(ConfigError, match="found none"):
        load_encoder(tmp_path / "nothing")
    save_encoder(build_encoder(recipe), tmp_path / "encoder", {"text": {"joints": ","}})
    with pytest.raises(ConfigError, match=r"assay_encoder\.json: unknown key 'joints'; did you mean 'joint'"):
        load_encoder(tmp_path / "encoder")
