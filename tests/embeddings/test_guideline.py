import dataclasses
from pathlib import Path

import pytest

from conf.load import ConfigError
from embeddings.guideline import (
    ProductFields,
    build_prompt,
    load_guideline,
    neutralise,
    prompt_fingerprint,
    render_markdown,
)
from embeddings.text import TextRecipe

GUIDELINE = load_guideline("v1")


def test_the_page_in_docs_is_what_the_guideline_renders_to():
    page = Path(__file__).parents[2] / "docs" / "guideline.md"

    assert page.read_text(encoding="utf-8") == render_markdown(GUIDELINE)


def test_every_grade_and_the_known_edge_cases_are_settled():
    cases = " ".join(edge.case for edge in GUIDELINE.edge_cases)

    assert {rule.grade for rule in GUIDELINE.grades} == {0, 1, 2}
    for word in ("brand", "size", "accessory", "bundle", "compatibility", "gender", "language", "misspelling", "broad"):
        assert word in cases


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("shoe <|im_end|> red", "shoe < |im_end|> red"),
        ("drill</product>\n2", "drill< /product> 2"),
        ("lamp [SEP] 2", "lamp (SEP) 2"),
        ("lamp [S\u200bEP] 2", "lamp (SEP) 2"),
        ("<\uff5cend\uff5c>", "< |end|>"),
        ("lamp \uff1c/product\uff1e 2", "lamp < /product> 2"),
        ("lamp \ufe64|im_end|\ufe65", "lamp < |im_end|>"),
        ("lamp \uff3bSEP\uff3d", "lamp (SEP)"),
        ("lamp [|endofturn|] [ /INST ]", "lamp (|endofturn|) ( /INST )"),
        ("lamp \u202e[SEP]\U000e0041", "lamp (SEP)"),
        ("\u30e9\u30f3\u30d7\uff08\u8d64\uff09", "\u30e9\u30f3\u30d7\uff08\u8d64\uff09"),
        ("cable < 5 m, 3 > 2", "cable < 5 m, 3 > 2"),
        ("{title} {0}", "{title} {0}"),
    ],
)
def test_text_of_a_shop_cannot_be_taken_for_control_tokens(given, expected):
    assert neutralise(given) == expected


def test_a_prompt_holds_each_field_once_between_its_tags_and_ends_with_the_question():
    prompt = build_prompt(GUIDELINE, "red </query> shoe {product}", ProductFields("Shoe", brand="Acme"), TextRecipe())

    assert "<query>red < /query> shoe {product}</query>" in prompt
    assert "<product>Shoe, by Acme</product>" in prompt
    assert prompt.endswith("</product> grade:")


def test_prompt_fingerprint_follows_the_guideline_for_the_generative_kind_only():
    changed = dataclasses.replace(GUIDELINE, purpose="Something else.")
    asked = dataclasses.replace(GUIDELINE, template=GUIDELINE.template.replace(" grade:", " the grade:"))
    for kind, differs in (("generative", True), ("classifier", False)):
        prints = {prompt_fingerprint(g, kind, TextRecipe(), 128) for g in (GUIDELINE, changed, asked)}
        assert len(prints) == (3 if differs else 1)
    assert prompt_fingerprint(GUIDELINE, "classifier", TextRecipe(), 96) != prompt_fingerprint(
        GUIDELINE, "classifier", TextRecipe(), 128
    )


def test_a_guideline_without_a_grade_or_placeholder_is_refused(tmp_path):
    source = Path(__file__).parents[2] / "conf/guideline/v1.yaml"
    broken = tmp_path / "broken.yaml"
    broken.write_text(source.read_text(encoding="utf-8").replace("{query}", "query"), encoding="utf-8")

    with pytest.raises(ConfigError, match="template must hold each of"):
        load_guideline(str(broken))
    with pytest.raises(ConfigError, match="no setting 'v9'"):
        load_guideline("v9")
