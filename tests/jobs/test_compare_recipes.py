import dataclasses
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from conf.load import ConfigError, load, load_job
from embeddings.evaluation import JudgedQuery, measure
from embeddings.recipes import TrainRecipe
from jobs import compare_recipes, train_encoder
from jobs.compare_recipes import ComparedRecipe, ComparedStage, ComparisonRecipe, Config, Trained
from jobs.embed_catalog import Catalog
from jobs.judged_queries import Judged
from lake.runs import Inputs, Run, RunRecord
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    CATALOG_PRODUCT,
    MINED_PAIR,
    QUERY,
    RECIPE_COMPARISON,
    TRAINING_INSTANCE,
)
from tests.fakes import put


def test_the_rate_is_chosen_by_the_first_seed_on_validation_and_kept_for_the_others(lake, monkeypatch):
    for spec in (ANNOTATION_CONSENSUS, CATALOG_PRODUCT, MINED_PAIR, QUERY, TRAINING_INSTANCE):
        put(lake, spec, [])
    scores = {(0.5, 0): 0.2, (1.0, 0): 0.4, (2.0, 0): 0.3}
    asked = []

    def trained(config, current, work):
        asked.extend((factor, seed) for _, factor, seed in work)
        return [
            Trained(f"encoder {factor} {seed}", "pretrained", scores.get((factor, seed), 0.9), 10.0, 1.0)
            for _, factor, seed in work
        ]

    def measured(current, judged, folders, embedding, placement):
        raise InterruptedError(list(folders.items()))

    monkeypatch.setattr(compare_recipes, "_train", trained)
    monkeypatch.setattr(compare_recipes, "read_judged", lambda *given: [])
    monkeypatch.setattr(compare_recipes, "measure_encoders", measured)
    recipe = ComparisonRecipe(rate_factors=(0.5, 1.0, 2.0), seeds=(0, 7), recipes=(ComparedRecipe(name="a"),))

    with pytest.raises(InterruptedError) as stopped:
        compare_recipes.run(Config(lake=lake.root, recipe=recipe))

    assert asked == [(0.5, 0), (1.0, 0), (2.0, 0), (1.0, 7)]
    names = ("pretrained", "a/0", "a/1")
    folders = ("pretrained", "encoder 1.0 0", "encoder 1.0 7")
    assert stopped.value.args[0] == [(name, lake.path(folder)) for name, folder in zip(names, folders, strict=True)]


def test_a_stage_that_recipes_have_in_common_is_trained_once(lake, monkeypatch):
    for spec in (ANNOTATION_CONSENSUS, CATALOG_PRODUCT, MINED_PAIR, QUERY, TRAINING_INSTANCE):
        put(lake, spec, [])
    first = ComparedStage(share=0.5)
    recipes = [
        ComparedRecipe(name=name, stages=(first, ComparedStage(share=0.5, train=TrainRecipe(stage=2, epochs=epochs))))
        for name, epochs in (("a", 1.0), ("b", 2.0))
    ]
    recipes.append(ComparedRecipe(name="c"))
    config = Config(lake=lake.root, recipe=ComparisonRecipe(recipes=tuple(recipes)))
    asked = []

    def run_once(training, job, run):
        asked.append(training)
        outputs = {"encoder": f"encoder {len(asked)}"} | ({} if training.inputs.model else {"pretrained": "start"})
        scores = {"texts": 10.0, compare_recipes.SCORE: len(asked) / 10}
        now = datetime.now(UTC)
        return RunRecord("", job, "dev", "", {}, outputs, {}, scores, "{}", 1, 2.0, now, "")

    monkeypatch.setattr(compare_recipes.job, "run_once", run_once)
    current = Run(lake, "compare_recipes", "dev", "", Inputs(dict.fromkeys(Config().inputs.__dict__, "0")), None)

    found = compare_recipes._train(config, current, [(recipe, 1.0, 0) for recipe in recipes])

    assert [training.inputs.model for training in asked] == ["", "encoder 1", "encoder 1", ""]
    assert found == [
        Trained("encoder 2", "start", 0.2, 20.0, 4.0),
        Trained("encoder 3", "start", 0.3, 20.0, 4.0),
        Trained("encoder 4", "start", 0.4, 10.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": [{"name": "a"}, {"name": "a"}]}, "a name of its own"),
        ({"recipes": [{"name": "pretrained"}]}, "may not be named 'pretrained'"),
        ({"recipes": [{"name": "a", "stages": [{"share": 0.5}]}]}, "sum to 1"),
        ({"recipes": [{"name": "a"}], "reference": "b"}, "expected one of a"),
        ({"recipes": [{"name": "a"}], "seeds": []}, "rate_factors above 0 and seeds"),
        ({"recipes": [{"name": "a", "stages": [{"train": {"los": {}}}]}]}, "los"),
        ({"recipes": [{"name": "a", "stages": [{"share": 0.5}, {"share": 0.5, "mixes": "before"}]}]}, "mixed_share"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        load(Config, {"recipe": changes})


def test_an_encoder_that_would_not_be_mixed_in_is_refused():
    with pytest.raises(ConfigError, match=r"mixed_with: nothing of it .*mixed_share"):
        load(train_encoder.Config, {"inputs": {"mixed_with": "models/x"}})


def test_every_stage_gets_its_share_of_the_budget_and_the_trials_rate(lake):
    for spec in (ANNOTATION_CONSENSUS, CATALOG_PRODUCT, MINED_PAIR, QUERY, TRAINING_INSTANCE):
        put(lake, spec, [])
    config = dataclasses.replace(load_job(Config, "compare_recipes", "dev"), lake=lake.root)
    current = compare_recipes.job.begin(config, "compare_recipes")
    ours, _, mnrl = config.recipe.recipes

    found = compare_recipes._stage_config(config, current, ours, ours.stages[1], 2.0, 5, "models/x")

    train = found.recipe.train
    assert (train.max_texts, train.seed, train.stage) == (1000, 5, 2)
    assert train.learning_rate == 2 * ours.stages[1].train.learning_rate
    branch = dataclasses.replace(ours.stages[1], train=dataclasses.replace(ours.stages[1].train, seed=100))
    other = compare_recipes._stage_config(config, current, ours, branch, 2.0, 5, "models/x")
    assert other.recipe.train == dataclasses.replace(train, seed=105)
    assert (found.inputs.model, found.inputs.mined_pair) == ("models/x", "")
    assert mnrl.stages == (ComparedStage(train=mnrl.stages[0].train),)
    assert not mnrl.stages[0].train.needs_contrast
    for common, expected in ((None, 0.3), (0.0, 0.0), (0.2, 0.2)):
        stage = dataclasses.replace(ours.stages[0], train=dataclasses.replace(ours.stages[0].train, dropout=0.3))
        changed = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, dropout=common))
        assert compare_recipes._stage_config(changed, current, ours, stage, 1.0, 0, "").recipe.train.dropout == expected


def test_rows_are_means_over_seeds_with_what_the_reference_gains(lake):
    query = JudgedQuery("q1", "red shoe", {"a": 2, "b": 1, "c": 0})
    products = pa.table({"product_id": ["a", "b", "c"], "title": ["red shoe", "blue shoe", "lamp"]})
    own = Judged(Catalog("s", products, "", 0), [query], [])

    def encoder(ranking, scores):
        titles = dict(zip(*products.to_pydict().values(), strict=True))
        return measure([query], [list(ranking)], np.array(scores), titles)

    found = {
        ("pretrained", "s"): encoder("cba", [0.1, 0.2, 0.3]),
        ("a/0", "s"): encoder("abc", [0.9, 0.5, 0.1]),
        ("a/1", "s"): encoder("bac", [0.4, 0.5, 0.1]),
        ("b/0", "s"): encoder("acb", [0.9, 0.1, 0.5]),
        ("b/1", "s"): encoder("acb", [0.9, 0.1, 0.5]),
    }
    trained = {name: (2.0, [Trained("", "", 0.5, 10.0, 3.0), Trained("", "", 0.7, 14.0, 5.0)]) for name in "ab"}
    recipe = ComparisonRecipe(recipes=(ComparedRecipe(name="a"), ComparedRecipe(name="b")), seeds=(0, 7))
    current = Run(lake, "compare_recipes", "dev", "", Inputs(), recipe)

    rows = {row["recipe"]: row for row in compare_recipes._rows(current, recipe, own, trained, found)}
    page = compare_recipes._page(list(rows.values()), recipe)

    means = {name: np.mean([found[f"{name}/{place}", "s"].metrics["ndcg@10"] for place in range(2)]) for name in "ab"}
    assert dict(rows["a"]["metrics"])["ndcg@10"] == pytest.approx(means["a"])
    assert dict(rows["b"]["reference_gain"])["ndcg@10"] == pytest.approx(means["a"] - means["b"])
    assert dict(rows["b"]["reference_gain"])["auc_2v1"] == pytest.approx((1 + 0) / 2 - 1)
    assert rows["a"]["reference_gain"] == []
    assert (rows["b"]["texts"], rows["b"]["train_sec"], rows["b"]["validation_ndcg_10"]) == (12.0, 4.0, 0.5)
    assert (rows["pretrained"]["seeds"], rows["pretrained"]["texts"]) == ([], 0.0)
    pa.Table.from_pylist(list(rows.values()), schema=RECIPE_COMPARISON.schema)
    assert [line.split(" | ")[0] for line in page.splitlines()[-3:]] == ["| pretrained", "| a", "| b"]
    assert "[" not in page.splitlines()[-2]
