import numpy as np
import pytest

from embeddings.evidence_words import WORD_NUMBERS, WordNumbers
from embeddings.guideline import ProductFields

NUMBERS = WordNumbers(99, {"pipe": 49, "steel": 9})
LIKENESS, LACKED, ANYWHERE, NEIGHBOURS = (WORD_NUMBERS[place] for place in (0, 5, 7, 8))


def numbers(query, title, **more):
    found = NUMBERS([query], [ProductFields(title, *(more.get(name) for name in ProductFields._fields[1:]))])
    return dict(zip(WORD_NUMBERS, found[0].tolist(), strict=True))


def test_numbers_say_what_the_words_of_a_pair_share():
    found = list(numbers("Galvinized steel pipes 10 ft", "Steel pipe, 10 mm").values())

    # of galvinized, steel, pipe, 10, ft; those of the title are steel, pipe, 10, mm
    rarity = np.log(np.array([100 / 0.5, 100 / 9.5, 100 / 49.5, 100 / 0.5, 100 / 0.5]))
    least, weighted, last, rarest, mean, lacked, share, anywhere, neighbours, place, *sizes = found
    assert least == last == 0
    assert weighted == pytest.approx(rarity[1:4].sum() / rarity.sum())
    assert (rarest, mean) == (pytest.approx(rarity.max()), pytest.approx(rarity.mean()))
    assert lacked == pytest.approx(rarity[0])
    assert share == pytest.approx(3 / 5)
    assert anywhere == pytest.approx(rarity[1:4].sum() / rarity.sum())
    assert neighbours == pytest.approx(2 / 4)
    assert place == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert sizes == [5, 1, 1, 4, pytest.approx(rarity[1:].mean())]


def test_a_misspelt_word_is_nearly_there_and_another_text_of_the_product_may_hold_a_word():
    assert 0.5 < numbers("galvinized", "galvanized pipe")[LIKENESS] < 1
    assert numbers("pipe", "galvanized pipe")[LIKENESS] == 1
    assert numbers("copper", "pipe", attributes="material: Copper")[ANYWHERE] == 1
    assert numbers("copper", "pipe")[ANYWHERE] == 0
    assert numbers("pipe", "galvanized pipe")[LACKED] == 0
    assert numbers("pipe", "galvanized pipe")[NEIGHBOURS] == -1


def test_words_are_counted_once_a_title_and_singly_occurring_ones_are_left_out():
    found = WordNumbers.of(["pipe pipes", "steel pipe", "hammer"])

    assert found.values() == {"num_texts": 3, "counts": {"pipe": 2}}
    assert WordNumbers(**found.values()).counts == found.counts


@pytest.mark.parametrize("query", ["", "...", "管道", "ß\u0130\u202e"])
def test_any_text_has_finite_numbers(query):
    assert np.isfinite(list(numbers(query, "").values())).all()
    assert np.isfinite(list(numbers(query, "管道 pipe " * 10_000).values())).all()


def test_no_pairs_have_no_numbers():
    assert NUMBERS([], []).shape == (0, len(WORD_NUMBERS))
