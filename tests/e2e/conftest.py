"""The loop on 200 products with a tiny model, run once for all end-to-end tests."""

import pytest

from jobs import loop
from lake.storage import Lake
from tests.tiny_models import tiny_bert_folder


def small_loop(lake_root, model):
    """Words of a demo on 200 products with a tiny model, for `assay loop`."""
    return [
        "demo",
        f"lake={lake_root}",
        "steps.simulate.recipe.num_products=200",
        "steps.simulate.recipe.num_queries=60",
        "steps.simulate.recipe.num_sessions=600",
        "steps.simulate.recipe.annotated_products_per_query=10",
        f"steps.tune_labeller.recipe.model={model}",
        f"steps.tune_labeller.recipe.baseline_model={model}",
        "steps.tune_labeller.recipe.epochs=1",
        f"steps.train_stage1.recipe.encoder.model={model}",
        "steps.train_stage1.recipe.train.epochs=2",
        "steps.train_stage1.recipe.train.lexical.steps=3",
        "steps.train_stage2.recipe.train.epochs=2",
        "steps.mine_hard_pairs.recipe.mining.depth=20",
        "steps.mine_hard_pairs.recipe.mining.max_hard_negatives_per_query=3",
        "steps.mine_hard_pairs.recipe.mining.max_hard_positives_per_query=3",
    ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, spark, ray_cluster):
    """A lake in which the loop has run once: (lake, words of the loop, its JSON)."""
    folder = tmp_path_factory.mktemp("loop")
    words = small_loop(folder / "lake", tiny_bert_folder(folder / "tiny"))
    config = loop.load_config(words[0], words[1:])
    found = loop.summary(Lake(config.lake), loop.run(config))
    return Lake(config.lake), words, found
