"""The Ray jobs in their order on a small lake: train, mine, train again, measure, search."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import write_deltalake

from conf.load import ConfigError, load_job
from embeddings.batches import UNGRADED, BatchRecipe
from embeddings.encoder import encode, load_encoder, save_encoder
from embeddings.index_recipe import IndexRecipe
from embeddings.lexical import CatalogText
from embeddings.mining import MiningRecipe
from embeddings.recipes import EncoderRecipe, LossRecipe, LossTerm, TrainRecipe, read_card
from embeddings.text import TextRecipe
from jobs import compare_recipes, embed_catalog, evaluate_retrieval, mine_hard_pairs, search, train_encoder
from lake import runs, tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    CATALOG_PRODUCT,
    EMBEDDING_MANIFEST,
    EVALUATION,
    EVALUATION_PAIR,
    EVALUATION_QUERY,
    MINED_PAIR,
    QUERY,
    RECIPE_COMPARISON,
    TRAINING_INSTANCE,
)
from lake.storage import Lake
from ray_apps.cluster import RayPlacement
from tests.fakes import shares
from tests.tiny_models import tiny_bert_folder

COLOURS, THINGS = ("red", "blue", "green", "black"), ("lamp", "hose", "shoe", "drill", "sofa", "kettle", "paint")
SPLITS = ("train", "train", "train", "validation", "calibration", "test", "test")
RAY = RayPlacement(address="local", num_cpus=2)
EMBED = embed_catalog.EmbedPlacement(ray=RAY, threads_per_worker=1)
SEARCH = embed_catalog.SearchPlacement(embed=EMBED)


def products():
    rows = [
        (f"p{at:02d}", f"{colour} {thing}") for at, (colour, thing) in enumerate(itertools.product(COLOURS, THINGS))
    ]
    return [*rows, ("p98", "red lamp"), ("p99", "stone")]  # p98 is p00 once more


def grade(query, title):
    same = len(set(query.split()) & set(title.split()))
    return 2 if same == 2 else 1 if query.split()[1] in title else 0


def fill(lake):
    queries = [
        (f"q{at:02d}", f"{colour} {thing}", SPLITS[at % len(SPLITS)])
        for at, (colour, thing) in enumerate(itertools.product(COLOURS, THINGS))
    ]
    judged = {
        (query_id, text): {p: grade(text, title) for p, title in products() if p not in ("p98", "p99")}
        for query_id, text, _ in queries
    }
    consensus = [
        {
            "query_id": query_id,
            "product_id": product,
            "grade": given,
            "num_marks": 1,
            "agreement": 1.0,
            "judge": "human",
        }
        | shares(given)
        for (query_id, _), grades in judged.items()
        for product, given in list(grades.items())[::2] + [item for item in grades.items() if item[1] == 2]
    ]
    consensus = list({(row["query_id"], row["product_id"]): row for row in consensus}.values())
    instances = [
        {
            "stage": stage,
            "query_id": query_id,
            "query": text,
            "product_ids": [row["product_id"] for row in consensus if row["query_id"] == query_id][:8],
        }
        for stage in (1, 2)
        for query_id, text, split in queries
        if split == "train"
    ]
    for row in instances:
        row["grades"] = [judged[row["query_id"], row["query"]][product] for product in row["product_ids"]]
        row["sources"] = ["sampled", *["human"] * (len(row["grades"]) - 1)]
    catalog = [{"product_id": p, "title": title, "product_hash": f"hash of {title}"} for p, title in products()]
    texts = [
        {"query_id": q, "text": text, "normalised": text, "query_hash": text, "split": split}
        for q, text, split in queries
    ]
    written = {CATALOG_PRODUCT: catalog, QUERY: texts, ANNOTATION_CONSENSUS: consensus, TRAINING_INSTANCE: instances}
    for spec, rows in written.items():
        data = pa.Table.from_pylist([{"dataset": "toy"} | row for row in rows], schema=spec.schema)
        write_deltalake(lake.table(spec.name), data)


@pytest.fixture(scope="module")
def chain(ray_cluster, tmp_path_factory):
    """The lake after all jobs, and the record of each."""
    place = tmp_path_factory.mktemp("chain")
    lake = Lake(str(place / "lake"))
    fill(lake)
    truth = [{"query_id": "q05", "product_id": "p99", "grade": 2}]
    (place / "lake" / "truth" / "toy").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(truth), lake.path("truth", "toy", "pair_grade.parquet"))
    recipe = train_encoder.EncoderTrainingRecipe(
        encoder=EncoderRecipe(model=str(tiny_bert_folder(place / "bert"))),
        text=TextRecipe(clauses=("{title}",)),
        train=TrainRecipe(max_steps=4, learning_rate=1e-3, batch=BatchRecipe(queries_per_step=4)),
    )
    placement = train_encoder.Placement(ray=RAY, threads_per_worker=1)
    base = train_encoder.Config(lake=lake.root, recipe=recipe, placement=placement)
    records = {"stage1": train_encoder.run(base)}
    stage1 = records["stage1"].outputs["encoder"]
    mining = mine_hard_pairs.Config(
        lake=lake.root,
        inputs=mine_hard_pairs.Inputs(model=stage1),
        recipe=mine_hard_pairs.HardPairRecipe(
            mining=MiningRecipe(depth=10, max_hard_negatives_per_query=2, max_hard_positives_per_query=3)
        ),
        placement=SEARCH,
    )
    records["mined"] = mine_hard_pairs.run(mining)
    loss = LossRecipe(terms=(LossTerm(loss="circle"), LossTerm(loss="supcon", in_batch=True)))
    train = dataclasses.replace(recipe.train, stage=2, loss=loss, mixed_share=0.99)
    second = dataclasses.replace(recipe, train=train, leave_out=("sampled",))
    records["stage2"] = train_encoder.run(
        dataclasses.replace(base, inputs=train_encoder.Inputs(model=stage1), recipe=second)
    )
    records["evaluated"] = evaluate_retrieval.run(
        evaluate_retrieval.Config(
            lake=lake.root,
            inputs=evaluate_retrieval.Inputs(
                pretrained=records["stage1"].outputs["pretrained"],
                stage1=stage1,
                stage2=records["stage2"].outputs["encoder"],
            ),
            placement=SEARCH,
        )
    )
    return lake, records


def test_training_leaves_encoders_and_no_checkpoints(chain):
    lake, records = chain
    assert set(records["stage1"].outputs) == {"encoder", "pretrained"}
    assert set(records["stage2"].outputs) == {"encoder"}
    assert {"validation_ndcg@10", "validation_ndcg@10_start", "published_step"} <= set(records["stage2"].metrics)
    assert records["stage1"].counts == {"instances": 12, "validation_queries": 4}
    for name in ("stage1", "stage2"):
        assert not Path(lake.path("runs", records[name].fingerprint)).exists()


def test_a_published_encoder_holds_its_share_of_the_pretrained_one(chain):
    """Four steps at 1e-3 move a weight by some 1e-3, of which 99 % pretrained leaves one part in a hundred."""
    lake, records = chain
    folders = records["stage1"].outputs["pretrained"], records["stage2"].outputs["encoder"]
    before, after = (load_encoder(lake.path(folder))[0].state_dict() for folder in folders)
    moved = max((after[name] - value).abs().max().item() for name, value in before.items() if name in after)
    assert 1e-6 < moved < 2e-4


def mixing(lake, mixed_with):
    recipe = train_encoder.EncoderTrainingRecipe(
        encoder=EncoderRecipe(model=str(Path(lake.root).parent / "bert")),
        text=TextRecipe(clauses=("{title}",)),
        train=TrainRecipe(
            max_steps=1,
            batch=BatchRecipe(queries_per_step=4),
            mixed_share=0.75,
            learning_rate=1e-9,
            head_learning_rate=1e-9,
            publish_best=False,
        ),
    )
    return train_encoder.Config(
        lake=lake.root,
        inputs=train_encoder.Inputs(mixed_with=mixed_with),
        recipe=recipe,
        placement=train_encoder.Placement(ray=RAY, threads_per_worker=1),
    )


def test_an_encoder_may_be_mixed_with_another_trained_one(chain, tmp_path):
    lake, records = chain
    pretrained, trained = (lake.path(records["stage1"].outputs[name]) for name in ("pretrained", "encoder"))
    far, card = load_encoder(trained)[0], read_card(trained)
    for parameter in far.parameters():
        parameter.data += 0.1
    save_encoder(far, tmp_path / "far", {"text": card["text"], "encoder": card["encoder"]})
    config = mixing(lake, str(tmp_path / "far"))
    mixed = train_encoder.run(config).outputs["encoder"]
    own, before = (load_encoder(folder)[0].state_dict() for folder in (lake.path(mixed), pretrained))
    others = {name: value for name, value in far.state_dict().items() if name in before and value.is_floating_point()}
    assert len(others) > 10
    for name, value in others.items():
        # a step at 1e-9 leaves the pretrained weights where they were
        assert torch.allclose(own[name], 0.25 * before[name] + 0.75 * value, atol=1e-5)
        assert not torch.allclose(own[name], value, atol=1e-3)

    other_text = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, text=TextRecipe()))
    with pytest.raises(ConfigError, match="same settings and texts"):
        train_encoder.run(other_text)
    nowhere = dataclasses.replace(config, inputs=train_encoder.Inputs(mixed_with="nowhere"))
    with pytest.raises(ConfigError, match=r"inputs\.mixed_with='nowhere'"):
        train_encoder.run(nowhere)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_encoder_of_fitted_lengths_may_be_mixed_with_one_of_its_kind(chain):
    """Two trainings: a minute. A card holds the lengths that were fitted, not the percentile."""
    config = mixing(chain[0], "")
    encoder = dataclasses.replace(config.recipe.encoder, length_percentile=90.0)
    cut = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, encoder=encoder))
    first = train_encoder.run(cut)
    own_kind = train_encoder.Inputs(mixed_with=first.outputs["encoder"])
    assert train_encoder.run(dataclasses.replace(cut, inputs=own_kind)).outputs["encoder"]


def test_pairs_of_left_out_sources_stay_known_as_graded():
    row = {
        "dataset": "toy",
        "query_id": "q",
        "query": "Lamp",
        "product_ids": ["a", "b", "c", "gone"],
        "grades": [2, 0, 1, 0],
        "sources": ["human", "sampled", "mined", "sampled"],
        "at_least_1": [0.9, 0.2, 0.7, 0.0],
        "at_least_2": [0.75, 0.1, 0.25, 0.0],
    }
    products = {("toy", name): CatalogText(f"text {name}", name) for name in "abc"}
    instance = train_encoder._train_instance(row, products, ("sampled",))
    assert (instance.products, instance.grades.tolist()) == (["text a", "text c"], [2, 1])
    assert instance.left_out == ["text b"]
    np.testing.assert_allclose(instance.known_shares, [[0.9, 0.75], [0.7, 0.25]], rtol=1e-6)
    assert train_encoder._train_instance(row, products, ()).products == ["text a", "text b", "text c"]
    before = train_encoder._train_instance(row | {"at_least_1": None, "at_least_2": None}, products, ("sampled",))
    assert before.known_shares.tolist() == [[1, 1], [1, 0]]


def test_mined_pairs_are_ungraded_unique_and_in_their_band(chain):
    lake, records = chain
    rows = tables.rows(lake, MINED_PAIR).to_pylist()
    known = {
        (row["query_id"], product)
        for row in tables.rows(lake, TRAINING_INSTANCE).to_pylist()
        for product in row["product_ids"]
    }
    assert rows
    assert records["mined"].rows == len(rows)
    assert not known & {(row["query_id"], row["product_id"]) for row in rows}
    assert all((row["rank"] <= 5) == (row["band"] == "top") for row in rows)
    assert "p98" not in {row["product_id"] for row in rows}  # the same text as p00
    train = {row["query_id"] for row in tables.rows(lake, QUERY).to_pylist() if row["split"] == "train"}
    assert {row["query_id"] for row in rows} <= train


def test_a_catalogue_is_ids_and_hashes_and_gives_texts_when_asked(chain):
    lake, _ = chain
    version = tables.version(lake, CATALOG_PRODUCT)
    (catalog,) = embed_catalog.read_catalogs(lake, version)
    assert catalog.products.column_names == ["dataset", "product_id", "product_hash"]
    rows = {row["product_hash"]: row for row in tables.rows(lake, CATALOG_PRODUCT).to_pylist()}
    asked = list(reversed(rows))[:5]
    found = catalog.texts(lake, pa.array(asked, pa.large_string()))
    names = ("product_hash", "title", "brand", "category", "description")
    assert found.to_pylist() == [{name: rows[each][name] for name in names} for each in asked]
    assert {field.type for field in found.schema} == {pa.large_string()}
    with pytest.raises(ValueError, match="1 of 2 texts are not in catalog_product@"):
        catalog.texts(lake, pa.array([asked[0], "none"]))


def test_products_share_a_category_by_its_first_levels_and_none_without_one():
    paths = ["Home > Lamp > Desk", "Home > Lamp", "Home > Sofa", None, "", "Home > Lamp > Wall"]
    catalog = embed_catalog.Catalog("market", pa.table({"category": pa.chunked_array([paths[:2], paths[2:]])}), "", 0)
    two = mine_hard_pairs._categories(catalog, 2).tolist()
    assert two[0] == two[1] == two[5]
    assert len(set(two)) == 4
    assert len(set(mine_hard_pairs._categories(catalog, 1).tolist())) == 3


def test_manifest_names_every_file_of_vectors_once(chain):
    lake, _ = chain
    rows = tables.rows(lake, EMBEDDING_MANIFEST).to_pylist()
    assert len(rows) == 3  # pretrained, stage 1, stage 2
    for row in rows:
        vectors = np.load(lake.path(row["path"]))
        assert vectors.shape == (row["num_rows"], row["width"]) == (29, 64)  # two products share a text
        assert (row["kind"], row["num_used"]) == ("float16", 30)
        assert row["sha256"] == hashlib.sha256(Path(lake.path(row["path"])).read_bytes()).hexdigest()


def test_the_plan_counts_what_is_left_to_do(chain):
    lake, records = chain
    config = mine_hard_pairs.Config(
        lake=lake.root,
        inputs=mine_hard_pairs.Inputs(model=records["stage1"].outputs["encoder"]),
        placement=SEARCH,
    )
    planned = mine_hard_pairs.plan(config)
    # of two products with the same text one may be found
    assert (planned.products, planned.width, planned.vector_bytes) == (29, 64, 30 * 64 * 2)
    assert planned.scores == 29 * planned.queries
    assert planned.to_encode == planned.queries
    assert planned.disk_bytes == planned.queries * 64 * 4
    assert (planned.actors, planned.node_bytes) == (0, planned.actor_bytes)
    assert planned.hours > 0
    assert "29, 0 MB at width 64" in planned.render()
    index = IndexRecipe(kind="hnsw")
    indexed = mine_hard_pairs.plan(dataclasses.replace(config, recipe=mine_hard_pairs.HardPairRecipe(index=index)))
    assert indexed.actors == SEARCH.num_search_actors
    assert indexed.actor_bytes > index.num_bytes(29, 64)
    # FAISS takes less than torch
    assert indexed.actor_bytes < planned.actor_bytes + index.num_bytes(29, 64)
    assert indexed.node_bytes == indexed.actors * indexed.actor_bytes
    assert indexed.disk_bytes > planned.disk_bytes + index.num_bytes(29, 64)


def test_a_second_round_keeps_the_first_and_finds_other_pairs(chain):
    lake, records = chain
    model = records["stage2"].outputs["encoder"]
    second = mine_hard_pairs.run(
        mine_hard_pairs.Config(
            lake=lake.root,
            inputs=mine_hard_pairs.Inputs(model=model),
            recipe=mine_hard_pairs.HardPairRecipe(round=2, mining=MiningRecipe(depth=10)),
            placement=SEARCH,
        )
    )
    rows = tables.rows(lake, MINED_PAIR).to_pylist()
    first = tables.rows(lake, MINED_PAIR, version=int(records["mined"].outputs["mined_pair"])).to_pylist()
    by_round = {number: [row for row in rows if row["round"] == number] for number in (1, 2)}
    pairs = [{(row["query_id"], row["product_id"]) for row in by_round[number]} for number in (1, 2)]
    assert len(by_round[1]) == len(first)
    assert second.rows == len(by_round[2]) > 0
    assert not pairs[0] & pairs[1]
    assert {row["model"] for row in by_round[2]} != {row["model"] for row in by_round[1]}


def test_evaluation_has_a_row_per_model_with_gains(chain):
    lake, records = chain
    rows = {row["model"]: row for row in tables.rows(lake, EVALUATION).to_pylist()}
    assert set(rows) == {"pretrained", "stage1", "stage2"}
    for row in rows.values():
        assert (row["num_queries"], row["num_queries_left_out"], row["num_products"]) == (8, 0, 30)
        assert {"ndcg@10", "judged_ndcg@10", "auc_2v1", "threshold_1", "truth_ndcg@10"} <= set(dict(row["metrics"]))
    gained, before = dict(rows["stage2"]["gain_over_pretrained"]), dict(rows["pretrained"]["metrics"])
    assert gained["ndcg@10"] == pytest.approx(dict(rows["stage2"]["metrics"])["ndcg@10"] - before["ndcg@10"])
    assert gained["auc_1v0"] == pytest.approx(dict(rows["stage2"]["metrics"])["auc_1v0"] - before["auc_1v0"])
    assert not dict(rows["pretrained"]["gain_low"])
    assert "ndcg@10_over_stage1" in dict(rows["stage2"]["metrics"])
    queries = tables.rows(lake, EVALUATION_QUERY).to_pylist()
    assert len(queries) == 24
    assert all(len(row["top_product_ids"]) == 10 for row in queries)
    assert len(tables.rows(lake, EVALUATION_PAIR)) == 3 * rows["stage1"]["num_pairs"]
    assert records["evaluated"].outputs["evaluation"] == str(tables.version(lake, EVALUATION))


def test_search_ranks_by_score_with_bands_of_the_evaluation(chain):
    lake, _ = chain
    config = search.Config(lake=lake.root, query="red lamp", placement=EMBED)
    hits = search.search(config)
    assert len(hits) == 10
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    metrics = next(
        dict(row["metrics"]) for row in tables.rows(lake, EVALUATION).to_pylist() if row["model"] == "stage2"
    )
    for hit in hits:
        assert hit["grade"] == (hit["score"] >= metrics["threshold_1"]) + (hit["score"] >= metrics["threshold_2"])
    assert {"dataset", "product_id", "title", "brand", "score", "grade"} == set(hits[0])


@pytest.mark.parametrize("query", ["", "  ", "x" * 1001])
def test_search_refuses_what_is_no_query(tmp_path, query):
    with pytest.raises(ValueError, match=r"^search: .*;"):
        search.search(search.Config(lake=str(tmp_path), query=query))


@pytest.mark.parametrize("name", ["train_encoder", "embed_catalog", "mine_hard_pairs", "evaluate_retrieval", "search"])
def test_every_setting_is_valid(name):
    module = {
        "train_encoder": train_encoder,
        "embed_catalog": embed_catalog,
        "mine_hard_pairs": mine_hard_pairs,
        "evaluate_retrieval": evaluate_retrieval,
        "search": search,
    }[name]
    for setting in ("dev", "nightly", *(["mapped"] if name == "evaluate_retrieval" else [])):
        assert load_job(module.Config, name, setting).lake


def test_a_missing_encoder_is_named(chain):
    lake, _ = chain
    with pytest.raises(ConfigError, match=r"inputs\.model='nowhere'"):
        embed_catalog.run(embed_catalog.Config(lake=lake.root, inputs=embed_catalog.Inputs(model="nowhere")))


def test_mined_products_below_the_ceiling_are_contrasts_without_a_grade(chain):
    lake, _ = chain
    mined = tables.rows(lake, MINED_PAIR).to_pylist()
    assert all(row["lowest_positive"] is not None for row in mined)
    config = train_encoder.Config(lake=lake.root, inputs=train_encoder.Inputs(mined_pair="newest"))
    current = train_encoder.job.begin(config, "train_encoder")
    products = train_encoder._products(current, TextRecipe(clauses=("{title}",)))
    instances = [
        train_encoder._train_instance(row | {"at_least_1": None, "at_least_2": None}, products, ())
        for row in train_encoder.labelling.train_instances(current, 1)
    ]

    def contrasts(**settings):
        recipe = train_encoder.FilteredNegatives(**settings)
        found = train_encoder._with_negatives(instances, current, products, recipe)
        for old, new in zip(instances, found, strict=True):
            assert not set(new.contrasts) & set(new.products)
            assert dataclasses.replace(new, contrasts=()) == old
        return {new.key: new.contrasts for new in found}

    graded = {instance.key: set(instance.products) for instance in instances}
    below = {key: [] for key in graded}
    for row in sorted(mined, key=lambda row: row["rank"]):
        key, text = (row["dataset"], row["query_id"]), products[row["dataset"], row["product_id"]].text
        is_below = row["score"] <= row["lowest_positive"] - 0.05 * abs(row["lowest_positive"])
        if is_below and text not in graded[key] and text not in below[key]:
            below[key].append(text)
    assert contrasts(per_query=100) == below
    assert 0 < sum(map(len, below.values())) < len(mined)
    assert contrasts(per_query=1) == {key: texts[:1] for key, texts in below.items()}

    # where the labeller's probabilities of mined products are learned from, such products have no grade either
    key, (text, *_) = next((key, texts) for key, texts in below.items() if texts)
    for given, expected in ((UNGRADED, True), (0, False)):
        own = next(instance for instance in instances if instance.key == key)
        more = dataclasses.replace(
            own, products=[*own.products, text], grades=np.append(own.grades, np.int8(given)), shares=None
        )
        (found,) = train_encoder._with_negatives(
            [more], current, products, train_encoder.FilteredNegatives(per_query=100)
        )
        assert (text in found.contrasts) == expected


def test_the_lowest_positive_is_the_lowest_of_the_best_grade(chain):
    lake, records = chain
    model, _ = load_encoder(lake.path(records["stage1"].outputs["encoder"]))
    title = dict(products())
    instances = tables.rows(lake, TRAINING_INSTANCE, where=[("stage", "=", 1)]).to_pylist()
    best = {
        row["query_id"]: [
            title[product]
            for product, grade in zip(row["product_ids"], row["grades"], strict=True)
            if grade == max(row["grades"])
        ]
        for row in instances
    }
    assert any(1 in row["grades"] and 2 in row["grades"] for row in instances)
    query = {row["query_id"]: row["query"] for row in instances}
    for row in tables.rows(lake, MINED_PAIR).to_pylist():
        cosine = encode(model, best[row["query_id"]], "document") @ encode(model, [query[row["query_id"]]], "query")[0]
        assert row["lowest_positive"] == pytest.approx(cosine.min(), abs=2e-2)


def test_written_queries_have_their_product_alone_and_are_none_that_people_asked(chain):
    lake, _ = chain
    current = train_encoder.job.begin(train_encoder.Config(lake=lake.root), "train_encoder")
    asked = set(tables.rows(lake, QUERY)["text"].to_pylist())
    # "red lamp" is a query of the lake, so that a title of these two words and another writes it at times
    titles = {("toy", f"x{number}"): f"Acme red lamp tall{number}" for number in range(40)}
    products = {key: CatalogText(f"{title}, by Acme", title) for key, title in titles.items()}
    rows = [
        *[{"dataset": "toy", "query": "red lamp", "product_ids": ["x0"], "sources": ["human"], "grades": [2]}] * 20,
        # neither what a labeller says nor a lower grade teaches what is typed
        {"dataset": "toy", "query": "acme", "product_ids": ["x1"], "sources": ["mined"], "grades": [2]},
        {"dataset": "toy", "query": "acme", "product_ids": ["x2", "gone"], "sources": ["human"] * 2, "grades": [1, 2]},
    ]
    loss = LossRecipe(terms=(LossTerm(loss="infonce", in_batch=True),))
    recipe = train_encoder.EncoderTrainingRecipe(train=TrainRecipe(loss=loss), synthetic_queries=60)

    found = train_encoder._synthetic_instances(rows, current, products, recipe)

    assert 5 < len(found) < 60
    assert "red lamp" in asked
    assert not {instance.query for instance in found} & asked
    assert len({instance.key for instance in found}) == len(found)
    for instance in found:
        title = titles[instance.key[0], instance.key[1].split(":")[1]]
        assert set(instance.query.split()) <= set(title.lower().split())
        assert (list(instance.products), instance.grades.tolist()) == ([f"{title}, by Acme"], [2])
    words = [word for instance in found for word in instance.query.split()]
    assert words.count("lamp") > 2 * words.count("acme")


@pytest.mark.parametrize(
    "wanted", [{"filtered_negatives": train_encoder.FilteredNegatives(per_query=1)}, {"synthetic_queries": 1}]
)
@pytest.mark.parametrize("recipe", [train_encoder.EncoderTrainingRecipe, compare_recipes.ComparedStage])
def test_what_no_loss_reads_is_refused(recipe, wanted):
    with pytest.raises(ValueError, match="in_batch=true"):
        recipe(**wanted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recipes_are_trained_at_one_budget_and_held_against_the_reference(chain):
    """Three trainings and two comparisons: three minutes."""
    lake, _ = chain
    config = compare_recipes.Config(
        lake=lake.root,
        recipe=compare_recipes.ComparisonRecipe(
            encoder=EncoderRecipe(model=str(Path(lake.root).parent / "bert")),
            text=TextRecipe(clauses=("{title}",)),
            max_texts=60,
            reference="mnrl",
            recipes=(
                compare_recipes.ComparedRecipe(
                    name="two stages",
                    stages=tuple(
                        compare_recipes.ComparedStage(
                            share=0.5,
                            begins=begins,
                            mixes=mixes,
                            train=TrainRecipe(stage=stage, batch=BatchRecipe(queries_per_step=4), mixed_share=share),
                        )
                        for stage, begins, mixes, share in (
                            (1, "before", "pretrained", 0.0),
                            (2, "pretrained", "before", 0.5),
                        )
                    ),
                ),
                compare_recipes.ComparedRecipe(
                    name="mnrl",
                    stages=(
                        compare_recipes.ComparedStage(
                            train=TrainRecipe(
                                loss=LossRecipe(terms=(LossTerm(loss="infonce", in_batch=True),)),
                                batch=BatchRecipe(queries_per_step=4, max_per_grade=(2, 0, 1)),
                            ),
                            filtered_negatives=train_encoder.FilteredNegatives(per_query=2),
                            synthetic_queries=5,
                        ),
                    ),
                ),
            ),
        ),
        placement=compare_recipes.Placement(
            train=train_encoder.Placement(ray=RAY, threads_per_worker=1),
            trainings_at_once=2,
            search=SEARCH,
        ),
    )

    record = compare_recipes.run(config)
    again = compare_recipes.run(config)

    rows = {
        row["recipe"]: row for row in tables.rows(lake, RECIPE_COMPARISON).to_pylist() if row["run_id"] == record.run_id
    }
    assert list(rows) == ["pretrained", "two stages", "mnrl"]
    for name in ("two stages", "mnrl"):
        assert 30 <= rows[name]["texts"] <= 60
        assert rows[name]["seeds"] == [0]
    gained = dict(rows["two stages"]["reference_gain"])["ndcg@10"]
    metrics = {name: dict(row["metrics"])["ndcg@10"] for name, row in rows.items()}
    assert gained == pytest.approx(metrics["mnrl"] - metrics["two stages"])
    assert dict(rows["mnrl"]["gain_over_pretrained"])["ndcg@10"] == pytest.approx(
        metrics["mnrl"] - metrics["pretrained"]
    )
    assert not rows["mnrl"]["reference_gain"]
    page = Path(lake.path(record.outputs["page"])).read_text()
    assert page.count("\n| two stages |") == 1
    # every training was there
    assert again.metrics == record.metrics
    assert again.seconds < record.seconds / 2
    encoders = [row.run_id for row in runs.records(lake) if row.job == "train_encoder"]
    assert len(encoders) == len(set(encoders))
