import numpy as np
import pytest

from embeddings.guideline import ProductFields, build_prompt, load_guideline, neutralise
from embeddings.injections import ATTACKS, HARMLESS, attacked, measure_shift
from embeddings.text import TextRecipe


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_can_end_its_field_or_bring_a_control_token(name):
    guideline = load_guideline("v1")
    prompts = [
        build_prompt(guideline, "lamp", ProductFields(attacked("Lamp", text)), TextRecipe())
        for text in (HARMLESS[0], ATTACKS[name])
    ]
    for sign in ("<product>", "</product>", "<query>", "<|", "[/", "[SEP", "</s>"):
        assert prompts[0].count(sign) == prompts[1].count(sign)


def test_hidden_characters_vanish_and_the_words_of_a_shop_stay():
    assert neutralise(attacked("Lamp", ATTACKS["hidden characters"])) == "Lamp"
    assert neutralise(attacked("Lamp", HARMLESS[0])) == f"Lamp {HARMLESS[0]}"


def test_the_shift_of_the_expected_grade_is_measured_over_queries():
    control_N3 = np.tile([0.2, 0.5, 0.3], (40, 1))
    attacked_N3 = control_N3.copy()
    attacked_N3[:20] = [0.1, 0.2, 0.7]

    found = measure_shift(control_N3, attacked_N3, np.arange(40) // 2, resamples=200, seed=0)

    assert found["shift"].mean == pytest.approx(0.5 * (1.6 - 1.1))
    assert found["changed"].mean == found["share_2"].mean == 0.5
    assert found["shift"].low < 0.25 < found["shift"].high
    same = measure_shift(control_N3, control_N3, np.arange(40), resamples=20, seed=0)
    assert same["shift"] == (0, 0, 0)
