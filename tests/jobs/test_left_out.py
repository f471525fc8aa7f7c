import pytest

from conf.load import load_job
from embeddings.lexical import CatalogText
from jobs.compare_recipes import ComparedStage, Config
from jobs.train_encoder import EncoderTrainingRecipe, _train_instance

PRODUCTS = {("shop", name): CatalogText(f"the {name}", name) for name in "abcd"}
ROW = {
    "dataset": "shop",
    "query_id": "q",
    "query": "a thing",
    "product_ids": ["a", "b", "c", "d"],
    "sources": ["human", "mined", "mined", "sampled"],
    "grades": [2, 0, 1, 0],
    "at_least_1": None,
    "at_least_2": None,
}


@pytest.mark.parametrize(
    ("leave_out", "learned", "left_out"),
    [
        ((), ["the a", "the b", "the c", "the d"], []),
        (("sampled",), ["the a", "the b", "the c"], ["the d"]),
        (("mined:1", "mined:2"), ["the a", "the b", "the d"], ["the c"]),
        (("human", "sampled:1"), ["the b", "the c", "the d"], ["the a"]),
    ],
)
def test_sources_and_grades_of_sources_are_left_out_and_stay_known_as_graded(leave_out, learned, left_out):
    instance = _train_instance(ROW, PRODUCTS, leave_out)
    assert list(instance.products) == learned
    assert list(instance.left_out) == left_out


@pytest.mark.parametrize("recipe", [EncoderTrainingRecipe, ComparedStage])
@pytest.mark.parametrize("entry", ["mind", "mined:3", "mined:", ":1"])
def test_what_is_no_source_is_refused(recipe, entry):
    with pytest.raises(ValueError, match="expected one of expert, human"):
        recipe(leave_out=(entry,))


def test_the_ablations_change_one_thing_each():
    recipes = load_job(Config, "compare_recipes", "ablations").recipe.recipes
    assert len({(one.stages, one.encoder, one.text) for one in recipes}) == len(recipes)
