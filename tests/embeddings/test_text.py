import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.load import ConfigError, load
from embeddings.text import TextRecipe, normalise_query, product_text


def test_product_text_is_a_sentence_of_title_brand_and_two_category_levels():
    text = product_text("Trail  Runner 5", "Acme", "Shoes > Running > Trail", "light", TextRecipe())
    assert text == "Trail Runner 5, by Acme, in Shoes > Running"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("Trail Runner", None, "Shoes > Running", None), "Trail Runner, in Shoes > Running"),
        (("Trail Runner", "  ", "", None), "Trail Runner"),
        ((None, "Acme", None, None), "by Acme"),
        ((None, None, None, None), ""),
        (("{brand} {0}", None, None, None), "{brand} {0}"),
    ],
)
def test_clauses_of_missing_fields_are_left_out(fields, expected):
    assert product_text(*fields, TextRecipe()) == expected


def test_a_description_is_cut_at_a_word():
    recipe = TextRecipe(clauses=("{title}", "{description}"), joint=". ", max_description_chars=12)
    assert product_text("Lamp", None, None, "warm white light", recipe) == "Lamp. warm white"
    assert product_text("Lamp", None, None, "incandescently", recipe) == "Lamp. incandescent"
    assert (
        product_text("Lamp", None, None, "warm", TextRecipe(clauses=("{description}",), max_description_chars=0)) == ""
    )


def test_category_levels_none_leaves_the_category_out():
    assert product_text("Lamp", None, "Home > Light", None, TextRecipe(category_levels=0)) == "Lamp"


def test_a_clause_of_an_unknown_field_is_refused_by_name():
    with pytest.raises(ConfigError, match="colour"):
        load(TextRecipe, {"clauses": ["{title}", "in {colour}"]})


def test_query_is_normalised_to_nfkc_lower_case_and_single_spaces():
    # full-width R, no-break space, the ligature fi
    assert normalise_query("  \uff32ed\tShoes\u00a0\ufb01t ") == "red shoes fit"


@given(st.text())
def test_a_normalised_query_has_single_spaces_only(text):
    query = normalise_query(text)
    assert query.split() == [word for word in query.split(" ") if query]
