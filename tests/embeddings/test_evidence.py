import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from embeddings.encoder import EncoderRecipe, build_pretrained, save_encoder
from embeddings.evidence import ENCODER_FOLDER, EVIDENCE, EVIDENCE_FILE, EvidenceHead, fit_evidence_head
from embeddings.guideline import ProductFields
from embeddings.labeller_baseline import pair_cosines
from tests.tiny_models import tiny_bert_folder

NUM_TEXTS = 99
HEAD = EvidenceHead(NUM_TEXTS, {"pipe": 49, "steel": 9}, [0.0], [1.0], [0.0])


def numbers(query, title, **more):
    found = HEAD.numbers([query], [ProductFields(title, *(more.get(name) for name in ProductFields._fields[1:]))])
    return dict(zip(EVIDENCE, found[0].tolist(), strict=True))


def test_numbers_say_what_the_words_of_a_pair_share():
    found = list(numbers("Galvinized steel pipes", "Steel pipe, 10 ft").values())

    rarity = np.log(np.array([100 / 0.5, 100 / 9.5, 100 / 49.5]))
    least, weighted, last, rarest, mean, place, asked, titled, anywhere = found
    assert least == pytest.approx(0, abs=0.2)
    assert weighted == pytest.approx((rarity @ [least, 1, 1]) / rarity.sum())
    assert (last, place, asked, titled) == (1, pytest.approx((0 + 0.25) / 2), 3, 4)
    assert (rarest, mean) == (pytest.approx(rarity.max()), pytest.approx(rarity.mean()))
    assert anywhere == pytest.approx(rarity[1:].sum() / rarity.sum())


def test_a_misspelt_word_is_nearly_there_and_another_text_of_the_product_may_hold_a_word():
    likeness, anywhere = EVIDENCE[0], EVIDENCE[-1]

    assert 0.5 < numbers("galvinized", "galvanized pipe")[likeness] < 1
    assert numbers("pipe", "galvanized pipe")[likeness] == 1
    assert numbers("copper", "pipe", attributes="material: Copper")[anywhere] == 1
    assert numbers("copper", "pipe")[anywhere] == 0


@pytest.mark.parametrize("query", ["", "...", "管道", "ß\u0130\u202e"])
def test_any_text_has_finite_numbers(query):
    assert np.isfinite(list(numbers(query, "").values())).all()
    assert np.isfinite(list(numbers(query, "管道 pipe " * 10_000).values())).all()


def judged(num_pairs=3000, seed=0):
    """Pairs whose grade is whether the title holds the query's two words, and answers that know it a little."""
    rng = np.random.default_rng(seed)
    names = [f"word{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)]
    asked = rng.choice(names, (num_pairs, 2))
    grade_N = rng.integers(0, 3, num_pairs)
    held = [asked[row, :grade].tolist() + rng.choice(names, 4).tolist() for row, grade in enumerate(grade_N)]
    rows = pa.table({"query": [" ".join(pair) for pair in asked], "title": [" ".join(words) for words in held]})
    score_N3 = np.exp(rng.normal(size=(num_pairs, 3)) + 0.5 * np.eye(3)[grade_N])
    return rows, score_N3 / score_N3.sum(axis=1, keepdims=True), grade_N


def shares(grade_N):
    return (grade_N[:, None] >= np.array([1, 2])).astype(float)


def test_a_head_makes_a_better_answer_of_a_weak_one(tmp_path):
    rows, answer_N3, grade_N = judged()
    fitted, fresh = slice(0, 1500), slice(1500, None)
    weight_N = np.ones(1500)

    head = fit_evidence_head(
        rows["title"].to_pylist(), rows[fitted], answer_N3[fitted], shares(grade_N[fitted]), weight_N
    )

    (tmp_path / EVIDENCE_FILE).write_text(head.text(), encoding="utf-8")
    kept = EvidenceHead.load(tmp_path)
    found_N3 = kept(answer_N3[fresh], kept.numbers_of(rows[fresh]))
    np.testing.assert_array_equal(found_N3, head(answer_N3[fresh], head.numbers_of(rows[fresh])))
    np.testing.assert_allclose(found_N3.sum(axis=1), 1, atol=1e-12)
    assert (found_N3 >= 0).all()
    expected_N, before_N = found_N3 @ [0, 1, 2], answer_N3[fresh] @ [0, 1, 2]
    for low, gain in ((0, -0.01), (1, 0.1)):
        rows_N = np.isin(grade_N[fresh], (low, low + 1))
        is_high_N = grade_N[fresh][rows_N] == low + 1
        assert roc_auc_score(is_high_N, expected_N[rows_N]) > roc_auc_score(is_high_N, before_N[rows_N]) + gain
    # words say nothing of what is irrelevant
    np.testing.assert_allclose(found_N3[:, 0], answer_N3[fresh][:, 0], atol=1e-12)


def exact_of(probability_N3):
    return probability_N3[:, 2] / (1 - probability_N3[:, 0])


def test_a_head_reads_soft_shares():
    rows, answer_N3, grade_N = judged()
    blurred_N2 = 0.2 + 0.6 * shares(grade_N)
    blurred_N2[:, 1] *= blurred_N2[:, 0]

    head = fit_evidence_head([], rows, answer_N3, blurred_N2, np.ones(len(grade_N)))

    found_N3 = head(answer_N3, head.numbers_of(rows))
    share_1_N, share_2_N = blurred_N2.T
    np.testing.assert_allclose((share_1_N * exact_of(found_N3)).mean(), share_2_N.mean(), atol=1e-3)


def test_random_pairs_change_what_is_exact_no_more_than_its_scale():
    rows, answer_N3, grade_N = judged(1200)
    is_some_N = grade_N > 0
    few = rows.filter(pa.array(is_some_N)), answer_N3[is_some_N], shares(grade_N)[is_some_N]
    weights = [np.full(len(kept), 1.5) for kept in (few[1], answer_N3)]

    heads = [
        fit_evidence_head([], *few, weights[0]),
        fit_evidence_head([], rows, answer_N3, shares(grade_N), weights[1]),
    ]

    exact = [exact_of(head(answer_N3, head.numbers_of(rows))) for head in heads]
    assert np.abs(exact[0] - exact[1]).mean() < 0.03


def test_few_pairs_get_no_head():
    rows, answer_N3, grade_N = judged(1200)

    assert fit_evidence_head([], rows, answer_N3, shares(grade_N), np.full(1200, 0.8)) is None
    assert fit_evidence_head([], rows, answer_N3, shares(grade_N), np.ones(1200)) is not None


def test_a_head_with_an_encoder_reads_its_cosine_too(tmp_path):
    rows, answer_N3, grade_N = judged(1200)
    model = build_pretrained(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    save_encoder(model, tmp_path / ENCODER_FOLDER, {})

    head = fit_evidence_head(
        [], rows, answer_N3, shares(grade_N), np.ones(1200), encoder=str(tmp_path / ENCODER_FOLDER)
    )
    (tmp_path / EVIDENCE_FILE).write_text(head.text(), encoding="utf-8")
    kept = EvidenceHead.load(tmp_path)

    by_hand_N = pair_cosines(rows["query"].to_pylist(), rows["title"].to_pylist(), model)
    number_NE = kept.numbers_of(rows)
    np.testing.assert_allclose(number_NE[:, -1], by_hand_N, atol=1e-5)
    assert number_NE.shape == (1200, len(EVIDENCE) + 1)
    found_N3 = kept(answer_N3, number_NE)
    np.testing.assert_array_equal(found_N3, head(answer_N3, number_NE))
    # what is irrelevant has the rate of the pairs that the head was fitted on, whatever the answer's
    assert found_N3[:, 0].mean() == pytest.approx((grade_N == 0).mean(), abs=1e-3)
    assert np.abs(found_N3[:, 0] - answer_N3[:, 0]).mean() > 0.02
    assert kept.numbers_of(rows[:0]).shape[0] == 0


def test_an_answer_that_is_none_stays_none():
    rows, answer_N3, grade_N = judged(1200)
    head = fit_evidence_head([], rows, answer_N3, shares(grade_N), np.ones(1200))
    answer_N3[0] = np.nan

    found_N3 = head(answer_N3, head.numbers_of(rows))

    assert np.isnan(found_N3[0]).all()
    assert np.isfinite(found_N3[1:]).all()


def test_a_folder_without_the_file_has_no_head(tmp_path):
    assert EvidenceHead.load(tmp_path) is None
