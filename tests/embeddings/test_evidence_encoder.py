import numpy as np
import pytest

from embeddings import evidence_encoder
from embeddings.encoder import EncoderRecipe, build_pretrained, encode
from embeddings.evidence_encoder import ENCODER_NUMBERS, TITLES_FILE, EncoderNumbers, write_evidence_encoder
from tests.tiny_models import tiny_bert_folder

TITLES = [f"{colour} {kind} {size}" for colour in ("red", "blue") for kind in ("shoe", "lamp") for size in range(20)]
QUERIES = ["red shoe", "blue lamp 3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_pretrained(EncoderRecipe(model=str(tiny_bert_folder(tmp_path_factory.mktemp("model") / "bert"))))


@pytest.fixture
def folder(model, tmp_path):
    write_evidence_encoder(tmp_path / "encoder", model, TITLES)
    return tmp_path / "encoder"


def test_numbers_are_cosines_with_the_titles_that_are_not_the_pair_s_own(model, folder):
    queries, titles = [QUERIES[0], QUERIES[0], QUERIES[1]], [TITLES[0], "a new lamp", TITLES[-1]]

    found_N8 = EncoderNumbers(folder)(queries, titles)[:, 4:]

    known_TD = encode(model, TITLES, "document")
    for number_8, query, title in zip(found_N8, queries, titles, strict=True):
        query_D, title_D = encode(model, [query], "query")[0], encode(model, [title], "document")[0]
        others = [index for index, known in enumerate(TITLES) if known != title]
        others.sort(key=lambda index: -(known_TD[index] @ query_D))
        cosines, like = known_TD[others] @ query_D, known_TD[others] @ title_D
        mean_D = known_TD[others[:10]].mean(axis=0)
        expected = [query_D @ title_D, *cosines[[0, 9, 49]]]
        length = np.linalg.norm(mean_D)
        expected += [title_D @ mean_D / length, length, like[:20].max(), like[:20].mean()]
        # vectors of titles are bfloat16 where hardware computes it
        np.testing.assert_allclose(number_8, expected, atol=5e-3)


def test_tokens_are_compared_without_those_of_the_model_s_own(model, folder):
    numbers = EncoderNumbers(folder)

    same, turned, other, empty = numbers(["red shoe"] * 3 + [""], ["red shoe", "shoe red", "blue lamp", "lamp"])[:, :4]

    np.testing.assert_allclose(same, 1, atol=1e-5)
    assert (turned[:2] < 1).all()
    assert (other[:3] < same[:3]).all()
    np.testing.assert_array_equal(empty, 0)


def test_a_pair_s_numbers_hang_on_no_other_pair(folder, monkeypatch):
    numbers = EncoderNumbers(folder)
    queries, titles = QUERIES * 5, [*TITLES[::8], "a much longer title of some other red lamp and a blue shoe " * 2] * 2
    queries = queries[: len(titles)] + ["lamp"] * (len(titles) - len(queries))
    together_N12 = numbers(queries, titles)

    monkeypatch.setattr(evidence_encoder, "_BATCH_PAIRS", 4)
    alone = [numbers([query], [title])[0] for query, title in zip(queries, titles, strict=True)]

    np.testing.assert_allclose(numbers(queries, titles), together_N12, atol=1e-5)
    np.testing.assert_allclose(np.array(alone), together_N12, atol=1e-5)


def test_a_shop_of_one_title_and_no_pairs(model, tmp_path):
    write_evidence_encoder(tmp_path / "encoder", model, ["red shoe", "red shoe"])
    numbers = EncoderNumbers(tmp_path / "encoder")

    own, other = numbers(["shoe", "shoe"], ["red shoe", "lamp"])

    assert (own[5:] == 0).all()
    assert (other[5:8] == other[5]).all()
    assert numbers([], []).shape == (0, len(ENCODER_NUMBERS))


def test_of_many_titles_the_same_few_are_kept_in_any_order(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_encoder, "MAX_TITLES", 7)

    for name, titles in (("a", TITLES), ("b", TITLES[::-1])):
        write_evidence_encoder(tmp_path / name, model, titles)

    kept = [np.load(tmp_path / name / TITLES_FILE) for name in ("a", "b")]
    assert kept[0].shape[0] == 7
    np.testing.assert_array_equal(*kept)
