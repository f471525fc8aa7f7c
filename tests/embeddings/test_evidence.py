import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from embeddings.encoder import EncoderRecipe, build_pretrained
from embeddings.evidence import (
    ENCODER_FOLDER,
    EVIDENCE_FILE,
    PAIRS_FOR_HEAD,
    PAIRS_FOR_OPINION,
    Evidence,
    EvidenceHead,
    GradedNumbers,
    GradeRegression,
    fit_evidence_head,
)
from embeddings.evidence_encoder import ENCODER_NUMBERS, write_evidence_encoder
from embeddings.evidence_words import WORD_NUMBERS, WordNumbers
from tests.tiny_models import tiny_bert_folder

LEARNED, HELD, FRESH = slice(0, 1500), slice(1500, 2500), slice(2500, 4000)


def judged(num_pairs=4000, seed=0):
    """Pairs whose grade is how many of the query's two words the title holds, and answers that know it a little."""
    rng = np.random.default_rng(seed)
    names = [f"word{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)]
    asked = rng.choice(names, (num_pairs, 2))
    grade_N = rng.integers(0, 3, num_pairs)
    held = [asked[row, :grade].tolist() + rng.choice(names, 4).tolist() for row, grade in enumerate(grade_N)]
    rows = pa.table({"query": [" ".join(pair) for pair in asked], "title": [" ".join(words) for words in held]})
    score_N3 = np.exp(rng.normal(size=(num_pairs, 3)) + 0.5 * np.eye(3)[grade_N])
    return rows, score_N3 / score_N3.sum(axis=1, keepdims=True), grade_N


ROWS, ANSWER_N3, GRADE_N = judged()
EVIDENCE = Evidence(WordNumbers.of(ROWS["title"].to_pylist()))
GRADED = GradedNumbers(
    EVIDENCE.numbers_of(ROWS), (GRADE_N[:, None] >= np.array([1, 2])).astype(float), np.ones(len(GRADE_N))
)


def part(rows, graded=GRADED):
    return graded.take(np.arange(len(GRADE_N))[rows])


def head_of(learned=LEARNED, held=HELD, graded=GRADED, answer_N3=ANSWER_N3):
    return fit_evidence_head(EVIDENCE, part(learned, graded), part(held, graded), answer_N3[held])


def auc(probability_N3, grade_N, low):
    rows = np.isin(grade_N, (low, low + 1))
    return roc_auc_score(grade_N[rows] == low + 1, (probability_N3 @ [0, 1, 2])[rows])


def test_a_head_makes_a_better_answer_of_a_weak_one_and_is_kept_as_it_is(tmp_path):
    head = head_of()

    (tmp_path / EVIDENCE_FILE).write_text(head.text(), encoding="utf-8")
    kept = EvidenceHead.load(tmp_path)
    found_N3 = kept(ANSWER_N3[FRESH], kept.evidence.numbers_of(ROWS[FRESH]))
    np.testing.assert_array_equal(found_N3, head(ANSWER_N3[FRESH], part(FRESH).number_NF))
    np.testing.assert_allclose(found_N3.sum(axis=1), 1, atol=1e-12)
    assert (found_N3 >= 0).all()
    for low in (0, 1):
        assert auc(found_N3, GRADE_N[FRESH], low) > auc(ANSWER_N3[FRESH], GRADE_N[FRESH], low) + 0.1


def test_an_opinion_that_learned_wrong_grades_is_not_believed():
    mixed_N = np.random.default_rng(5).permutation(len(GRADE_N))
    share_N2 = GRADED.share_N2.copy()
    share_N2[LEARNED] = share_N2[mixed_N][LEARNED]

    found_N3 = head_of(graded=dataclasses.replace(GRADED, share_N2=share_N2))(ANSWER_N3, GRADED.number_NF)

    for low in (0, 1):
        assert auc(found_N3[FRESH], GRADE_N[FRESH], low) > auc(ANSWER_N3[FRESH], GRADE_N[FRESH], low) - 0.03


def test_a_head_has_the_rates_of_the_pairs_that_it_weighs_by():
    blurred_N2 = 0.2 + 0.6 * GRADED.share_N2
    blurred_N2[:, 1] *= blurred_N2[:, 0]
    held = part(HELD, dataclasses.replace(GRADED, share_N2=blurred_N2))

    found_N3 = fit_evidence_head(EVIDENCE, part(LEARNED), held, ANSWER_N3[HELD])(ANSWER_N3[HELD], held.number_NF)

    share_1_N, share_2_N = held.share_N2.T
    assert (1 - found_N3[:, 0]).mean() == pytest.approx(share_1_N.mean(), abs=1e-3)
    exact_N = found_N3[:, 2] / (1 - found_N3[:, 0])
    assert (share_1_N * exact_N).mean() == pytest.approx(share_2_N.mean(), abs=1e-3)


def test_a_pair_counts_as_its_weight():
    weight_N = np.where(GRADE_N == 0, 0.25, np.where(GRADE_N == 1, 1.0, 3.0))

    logit_N2 = GradeRegression.fit(dataclasses.replace(GRADED, weight_N=weight_N))(GRADED.number_NF)

    # a regression with a free constant has the weighted rates of what it was fitted on
    relevant_N, exact_N = (1 / (1 + np.exp(-logit_N2))).T
    is_relevant_N = GRADE_N > 0
    relevant_rate = np.average(is_relevant_N, weights=weight_N)
    assert np.average(relevant_N, weights=weight_N) == pytest.approx(relevant_rate, abs=1e-3)
    weights = weight_N[is_relevant_N]
    exact_rate = np.average(GRADE_N[is_relevant_N] == 2, weights=weights)
    assert np.average(exact_N[is_relevant_N], weights=weights) == pytest.approx(exact_rate, abs=1e-3)


def test_few_pairs_get_no_head():
    enough, few = [
        dataclasses.replace(GRADED, weight_N=np.full(len(GRADE_N), weight)) for weight in (1.0, 0.99 * 2 / 3)
    ]

    assert PAIRS_FOR_OPINION == 1000
    assert PAIRS_FOR_HEAD == 250
    assert head_of(graded=few) is None
    assert head_of(held=slice(1500, 1749), graded=enough) is None
    assert head_of(held=slice(1500, 1750), graded=enough) is not None


def test_a_head_with_an_encoder_takes_it_along(tmp_path):
    model = build_pretrained(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    write_evidence_encoder(tmp_path / ENCODER_FOLDER, model, ROWS["title"].to_pylist()[:100])
    evidence = Evidence(EVIDENCE.words, str(tmp_path / ENCODER_FOLDER))
    some = ROWS[:1500]
    graded = dataclasses.replace(part(LEARNED), number_NF=evidence.numbers_of(some))

    head = fit_evidence_head(evidence, graded, graded, ANSWER_N3[LEARNED])

    (tmp_path / EVIDENCE_FILE).write_text(head.text(), encoding="utf-8")
    kept = EvidenceHead.load(tmp_path)
    number_NE = kept.evidence.numbers_of(some)
    assert number_NE.shape == (1500, len(WORD_NUMBERS) + len(ENCODER_NUMBERS))
    np.testing.assert_array_equal(number_NE[:, : len(WORD_NUMBERS)], part(LEARNED).number_NF)
    np.testing.assert_array_equal(number_NE, graded.number_NF)
    np.testing.assert_array_equal(kept(ANSWER_N3[LEARNED], number_NE), head(ANSWER_N3[LEARNED], number_NE))
    assert kept.evidence.numbers_of(some[:0]).shape == (0, number_NE.shape[1])


def test_an_answer_that_is_none_stays_none():
    answer_N3 = ANSWER_N3.copy()
    answer_N3[0] = np.nan

    found_N3 = head_of()(answer_N3, GRADED.number_NF)

    assert np.isnan(found_N3[0]).all()
    assert np.isfinite(found_N3[1:]).all()


def test_the_last_digits_of_numbers_and_answers_move_probabilities_little():
    head, rng = head_of(), np.random.default_rng(1)
    noise = [rng.normal(scale=1e-5, size=values.shape) for values in (ANSWER_N3, GRADED.number_NF)]

    moved_N3 = head(ANSWER_N3 + noise[0] * ANSWER_N3, GRADED.number_NF + noise[1])

    assert np.abs(moved_N3 - head(ANSWER_N3, GRADED.number_NF)).max() < 1e-3


def test_a_folder_without_the_file_has_no_head(tmp_path):
    assert EvidenceHead.load(tmp_path) is None
