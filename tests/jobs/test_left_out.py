import numpy as np
import pytest

from conf.load import load_job
from embeddings.batches import BatchRecipe
from embeddings.lexical import CatalogText
from embeddings.recipes import LossRecipe, LossTerm, TrainRecipe
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


def test_of_a_soft_source_the_shares_alone_are_learned():
    row = ROW | {"at_least_1": [1.0, 0.2, 0.8, 0.1], "at_least_2": [0.7, 0.1, 0.3, 0.0]}
    instance = _train_instance(row, PRODUCTS, ("sampled",), ("mined",))
    assert instance.grades.tolist() == [2, -1, -1]
    np.testing.assert_allclose(instance.shares, [[1.0, 0.7], [0.2, 0.1], [0.8, 0.3]], rtol=1e-6)
    assert list(instance.left_out) == ["the d"]


SOFT_BATCH = BatchRecipe(soft_per_query=4)
KL = LossRecipe(terms=(LossTerm(loss="infonce", in_batch=True), LossTerm(loss="listwise_kl")))


@pytest.mark.parametrize("recipe", [EncoderTrainingRecipe, ComparedStage])
@pytest.mark.parametrize(
    ("soft", "train", "message"),
    [
        (("mind",), TrainRecipe(loss=KL, batch=SOFT_BATCH), "expected one of expert, human"),
        (("mined",), TrainRecipe(loss=KL), "expected both"),
        ((), TrainRecipe(loss=KL, batch=SOFT_BATCH), "expected both"),
        (("mined",), TrainRecipe(batch=SOFT_BATCH), "add listwise_kl, margin_mse or ordinal_kl"),
    ],
)
def test_soft_sources_that_nothing_reads_are_refused(recipe, soft, train, message):
    recipe(soft=("mined",), train=TrainRecipe(loss=KL, batch=SOFT_BATCH))
    with pytest.raises(ValueError, match=message):
        recipe(soft=soft, train=train)


@pytest.mark.parametrize("recipe", [EncoderTrainingRecipe, ComparedStage])
@pytest.mark.parametrize("entry", ["mind", "mined:3", "mined:", ":1"])
def test_what_is_no_source_is_refused(recipe, entry):
    with pytest.raises(ValueError, match="expected one of expert, human"):
        recipe(leave_out=(entry,))


def test_the_ablations_change_one_thing_each():
    recipes = load_job(Config, "compare_recipes", "ablations").recipe.recipes
    assert len({(one.stages, one.encoder, one.text) for one in recipes}) == len(recipes)
