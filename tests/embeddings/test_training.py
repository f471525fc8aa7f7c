import dataclasses
import io
import math
from typing import get_args

import numpy as np
import pytest
import torch

from conf.load import ConfigError, load
from embeddings.batches import BatchRecipe, Instance, InstanceSampler, collate
from embeddings.encoder import EncoderRecipe, build_encoder, encode, interpolate
from embeddings.lexical import CatalogText
from embeddings.recipes import LexicalRecipe, LossName, LossRecipe, LossTerm
from embeddings.training import ContrastiveTrainer, TrainRecipe, by_length, plan_steps, use_bf16
from embeddings.validation import build_validation, validation_ndcg
from ray_apps.sharding import shard
from tests.tiny_models import tiny_bert_folder

WORDS = ["lamp", "hose", "shoe", "drill", "sofa", "kettle", "paint", "rug"]
SIDES = ("query", "document")
BATCH = BatchRecipe(queries_per_step=4, max_products_per_query=4)
CATALOG = [CatalogText(f"{word} {number}", f"{word} {number}") for word in WORDS for number in range(4)]
LEXICAL = LexicalRecipe(steps=3, products_per_step=12, products_per_seed=4, learning_rate=1e-3)
IN_BATCH = LossTerm(loss="supcon", in_batch=True)
EVERY_LOSS = LossRecipe(
    terms=(
        *(LossTerm(loss=name, weight=0.5 + place) for place, name in enumerate(get_args(LossName))),
        IN_BATCH,
        LossTerm(loss="infonce", in_batch=True),
    ),
    matryoshka=(16, 32),
)
QUERIES = [f"red {word}" for word in WORDS]
EXACT = [f"{word} red" for word in WORDS]


def toy_instances():
    """Grade 2 repeats the word of the query, grade 1 its first letters, grade 0 is another word."""
    return [
        Instance(
            ("toy", str(number)),
            f"{colour} {word}",
            [
                f"{word} {colour}",
                f"{word[:2]} {colour}",
                f"{WORDS[number - 1]} 7",
                f"{WORDS[number - 3]} 9",
                "misc 5",
            ],
            np.array([2, 1, 0, 0, 0], dtype=np.int8),
        )
        for colour in ("red", "blue")
        for number, word in enumerate(WORDS)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {dropout: str(tiny_bert_folder(place / f"bert{dropout}", dropout=dropout)) for dropout in (0.0, 0.1)}


@pytest.fixture
def build(folders):
    def trainer(recipe, dropout=0.1, **placement):
        model = build_encoder(EncoderRecipe(model=folders[dropout]))
        return ContrastiveTrainer(model, toy_instances(), recipe, catalog=CATALOG, **placement)

    return trainer


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(trainer, steps):
    return [trainer.train_step(step) for step in range(trainer.step, trainer.step + steps)]


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.tower.state_dict().items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_training_is_bit_equal_to_an_unbroken_run(build, stage):
    recipe = TrainRecipe(stage=stage, max_steps=6, batch=BATCH, deterministic=True, learning_rate=1e-3)
    unbroken = build(recipe)
    run(unbroken, 6)
    broken = build(recipe)
    run(broken, 3)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    torch.manual_seed(12345)
    resumed = build(recipe)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 3
    run(resumed, 3)
    expected = parameters(unbroken)
    for name, value in parameters(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(
        parameters(broken)["encoder.0.model.embeddings.word_embeddings.weight"],
        expected["encoder.0.model.embeddings.word_embeddings.weight"],
    )


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["in the lexical steps", "between", "in the graded steps"])
def test_training_with_lexical_steps_resumes_bit_equal(build, stop):
    recipe = TrainRecipe(max_steps=2, batch=BATCH, deterministic=True, learning_rate=1e-3, lexical=LEXICAL)
    unbroken, broken, resumed = (build(recipe) for _ in range(3))
    assert unbroken.num_steps == 5
    run(unbroken, 5)
    run(broken, stop)
    resumed.load_state_dict(broken.state_dict())
    run(resumed, 5 - stop)
    expected = parameters(unbroken)
    for name, value in parameters(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_lexical_steps_teach_the_words_of_the_catalogue(build):
    """Which product holds the word of the query, before and after; no grade takes part."""
    recipe = TrainRecipe(
        max_steps=1, batch=BATCH, lexical=LexicalRecipe(steps=80, products_per_step=16, learning_rate=2e-3)
    )
    trainer = build(recipe, dropout=0.0)
    queries, own = WORDS, np.repeat(np.eye(len(WORDS), dtype=bool), 4, axis=1)

    def gap():
        cosine = (
            encode(trainer.model, queries, "query")
            @ encode(trainer.model, [product.text for product in CATALOG], "document").T
        )
        return float(cosine[own].mean() - cosine[~own].mean())

    before = gap()
    losses = [metrics["loss"] for metrics in run(trainer, 80)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert gap() > before + 0.2


def test_lexical_steps_have_their_own_rate_and_a_fresh_optimiser_follows(build):
    recipe = TrainRecipe(max_steps=4, batch=BATCH, warmup_share=0.0, learning_rate=4e-5, lexical=LEXICAL)
    trainer = build(recipe)
    metrics = run(trainer, 3)
    assert [of["learning_rate"] for of in metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert "similarity_grade_2" not in metrics[0]
    graded = run(trainer, 1)[0]
    assert graded["learning_rate"] == pytest.approx(4e-5)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def test_lexical_steps_without_products_are_refused(folders):
    model = build_encoder(EncoderRecipe(model=folders[0.0]))
    with pytest.raises(ValueError, match=r"lexical\.steps=3: expected at least 2 products .* got 1; give"):
        ContrastiveTrainer(model, toy_instances(), TrainRecipe(lexical=LEXICAL), catalog=CATALOG[:1])


@pytest.mark.parametrize(
    "recipe",
    [
        TrainRecipe(stage=1, max_steps=120, batch=BATCH, learning_rate=1e-3, head_learning_rate=1e-3),
        TrainRecipe(stage=2, max_steps=120, batch=BATCH, learning_rate=1e-3, head_learning_rate=1e-3),
        TrainRecipe(
            loss=LossRecipe(terms=(LossTerm(loss="circle"), LossTerm(loss="supcon", weight=0.5))),
            max_steps=120,
            batch=BATCH,
            learning_rate=1e-3,
            precision="bf16",
        ),
        *(
            TrainRecipe(loss=LossRecipe(terms=(LossTerm(loss=name),)), max_steps=120, batch=BATCH, learning_rate=1e-3)
            for name in get_args(LossName)
            if name not in ("supcon", "circle", "background", "rg2", "rgx")
        ),
    ],
    ids=lambda recipe: " and ".join(term.loss for term in recipe.terms),
)
def test_loss_falls_and_grades_come_apart_on_a_toy(build, recipe):
    history = run(build(recipe), recipe.max_steps)
    losses = [metrics["loss"] for metrics in history]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    exact, partial, irrelevant = (
        np.mean([metrics[f"similarity_grade_{grade}"] for metrics in history[-4:]]) for grade in (2, 1, 0)
    )
    assert exact > partial > irrelevant


def test_in_batch_negatives_hold_the_scale_down(build):
    """Contrasts inside the instance alone let products of other queries rise with its own."""

    def other_queries(**settings):
        trainer = build(TrainRecipe(max_steps=60, batch=BATCH, learning_rate=1e-3, **settings))
        history = run(trainer, 60)
        assert history[-1]["similarity_grade_2"] > history[-1]["similarity_grade_0"]
        vectors = [encode(trainer.model, texts, side) for texts, side in ((QUERIES, "query"), (EXACT, "document"))]
        return (vectors[0] @ vectors[1].T)[~np.eye(len(QUERIES), dtype=bool)].mean()

    alone = other_queries()
    assert other_queries(loss=LossRecipe(terms=(IN_BATCH,))) < alone - 0.05
    anchored = (LossTerm(loss="supcon"), LossTerm(loss="background", weight=10.0))
    assert abs(other_queries(loss=LossRecipe(terms=anchored, background_cosine=0.0))) < alone - 0.05


@pytest.mark.parametrize(
    ("terms", "needed"),
    [
        ([], True),
        ([LossTerm(loss="circle"), LossTerm(loss="listwise_kl")], True),
        ([IN_BATCH], False),
        ([LossTerm(loss="pooled_logistic")], False),
        # the one loss learns from a query of one grade, the other passes it over
        ([LossTerm(loss="circle"), IN_BATCH], False),
    ],
)
def test_a_query_of_one_grade_is_drawn_where_any_loss_brings_other_queries_products(terms, needed):
    assert TrainRecipe(loss=LossRecipe(terms=tuple(terms))).needs_contrast == needed


# what reads other queries' products sees those of its own worker alone
OWN_ONLY = LossRecipe(terms=tuple(term for term in EVERY_LOSS.terms if not term.reads_others))


@pytest.mark.parametrize("loss", [LossRecipe(), LossRecipe(terms=(LossTerm(loss="circle"),)), OWN_ONLY])
@pytest.mark.parametrize("world_size", [2, 3])
def test_mean_gradient_over_workers_equals_that_of_one_worker(build, loss, world_size):
    recipe = TrainRecipe(loss=loss, max_steps=4, batch=BATCH, precision="fp32")

    def gradients(rank, workers):
        # in float64: padding differs between workers, and float32 sums differ with it
        trainer = build(recipe, dropout=0.0, rank=rank, world_size=workers, wrap=torch.nn.Module.double)
        loss, _ = trainer.step_loss(1)
        loss.backward()
        return {name: each.grad for name, each in trainer.tower.named_parameters() if each.requires_grad}

    alone = gradients(0, 1)
    parts = [gradients(rank, world_size) for rank in range(world_size)]
    assert all(gradient is not None for gradient in alone.values())
    for name, expected in alone.items():
        mean = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("texts_per_pass", [1, 3, 100])
def test_a_step_in_passes_has_the_gradient_of_the_whole_step(build, texts_per_pass):
    def gradients(**settings):
        recipe = TrainRecipe(loss=EVERY_LOSS, max_steps=4, batch=BATCH, precision="fp32", **settings)
        trainer = build(recipe, dropout=0.0, wrap=torch.nn.Module.double)
        metrics = trainer._backward(1)
        return metrics, {name: each.grad for name, each in trainer.tower.named_parameters() if each.requires_grad}

    metrics, expected = gradients()
    same_metrics, found = gradients(texts_per_pass=texts_per_pass)

    assert same_metrics == pytest.approx(metrics, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_step_in_passes_sees_one_dropout_and_repeats_itself(build):
    recipe = TrainRecipe(max_steps=4, batch=BATCH, precision="fp32", texts_per_pass=3)
    one, other = build(recipe), build(recipe)
    run(one, 3)
    run(other, 3)
    first = parameters(one)
    assert all(torch.equal(value, first[name]) for name, value in parameters(other).items())
    # what is computed twice is the same, or the gradient would be of other vectors
    batch, places = collate(one.sampler.step_instances(0, 0, 1)), np.array([0, 2])
    same, again, other_seed = (one._pass(batch, seed, None, places)[1] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other_seed)


@pytest.mark.parametrize("texts_per_pass", [0, 3])
@pytest.mark.usefixtures("one_process_group")
def test_ddp_finds_a_gradient_for_every_weight(build, texts_per_pass):
    """A weight that no gradient reaches makes DDP raise at the next step."""
    recipe = TrainRecipe(loss=EVERY_LOSS, max_steps=2, batch=BATCH, lexical=LEXICAL, texts_per_pass=texts_per_pass)
    trainer = build(recipe, wrap=torch.nn.parallel.DistributedDataParallel)
    assert all(metrics["learning_rate"] > 0 for metrics in run(trainer, 5))


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


DDP_RECIPES = {
    "paper": TrainRecipe(stage=1, max_steps=20, batch=BATCH, precision="fp32"),
    "every loss, in passes": TrainRecipe(
        loss=EVERY_LOSS,
        max_steps=20,
        batch=dataclasses.replace(BATCH, alike_queries=2),
        precision="fp32",
        texts_per_pass=3,
    ),
    "untied, adapters": TrainRecipe(
        loss=LossRecipe(terms=(IN_BATCH,)),
        max_steps=20,
        batch=BATCH,
        lora_rank=4,
        learning_rate=1e-3,
        precision="fp32",
    ),
}


def spread(tower):
    shard(tower.encoder, "cpu")
    return tower


PARALLEL = {"ddp": torch.nn.parallel.DistributedDataParallel, "fsdp": spread}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", DDP_RECIPES)
def test_two_processes_train_like_one(folders, tmp_path, name, parallel):
    """Two gloo processes, 20 steps in fp32; losses and weights equal those of one process. 20 to 60 s."""
    torch.multiprocessing.spawn(_ddp_worker, args=(folders[0.0], str(tmp_path), name, parallel), nprocs=2)
    model = build_encoder(EncoderRecipe(model=folders[0.0], tied="untied" not in name))
    alone = ContrastiveTrainer(model, toy_instances(), DDP_RECIPES[name], catalog=CATALOG)
    history = run(alone, 20)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for step, metrics in enumerate(history):
        both = np.mean([rank["losses"][step] for rank in (first, second)])
        assert both == pytest.approx(metrics["loss"], rel=1e-5), step
    for key, expected in parameters(alone).items():
        if parallel == "ddp":
            assert torch.equal(first["own"][key], second["own"][key]), key
        # a softmax is blind to a bias of its keys: that gradient is rounding alone, which Adam scales to whole steps
        if not key.endswith("key.bias"):
            torch.testing.assert_close(first["tower"][key], expected, atol=1e-5, rtol=0, msg=key)


def _ddp_worker(rank, model, place, name, parallel):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    trainer = ContrastiveTrainer(
        build_encoder(EncoderRecipe(model=model, tied="untied" not in name)),
        toy_instances(),
        DDP_RECIPES[name],
        rank=rank,
        world_size=2,
        catalog=CATALOG,
        wrap=PARALLEL[parallel],
    )
    losses = [metrics["loss"] for metrics in run(trainer, 20)]
    own = parameters(trainer) if parallel == "ddp" else {}
    torch.save({**trainer.state_dict(), "losses": losses, "own": own}, f"{place}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_of_a_step_are_those_of_the_drawn_texts(build):
    trainer = build(TrainRecipe(max_steps=10, batch=BATCH, warmup_share=0.5))
    metrics = trainer.train_step(0)
    assert metrics["temperature"] == pytest.approx(0.2)
    assert metrics["learning_rate"] == pytest.approx(5e-5 / 5)
    assert 4 + 4 < metrics["num_texts"] <= 4 + 4 * 4
    assert all(-1 <= metrics[f"similarity_grade_{grade}"] <= 1 for grade in range(3))
    assert metrics["gradient_norm"] > 0


def test_the_rate_may_end_above_zero_where_another_stage_goes_on(build):
    recipe = TrainRecipe(max_steps=4, batch=BATCH, warmup_share=0.0, learning_rate=4e-5, final_rate_share=0.5)
    rates = [metrics["learning_rate"] for metrics in run(build(recipe), 4)]
    assert rates == pytest.approx([4e-5, 3.5e-5, 3e-5, 2.5e-5])


def test_temperature_is_learned_by_supcon_only_and_stays_in_bounds(build):
    cold = LossRecipe(temperature=0.01)
    supcon = build(TrainRecipe(max_steps=5, batch=BATCH, loss=cold, head_learning_rate=1.0, warmup_share=0.0))
    run(supcon, 5)
    assert 0.0099 < supcon.tower.loss.temperature.item() < 1.0001
    circle = build(TrainRecipe(stage=2, max_steps=5, batch=BATCH))
    assert not circle.tower.loss.log_temperature.requires_grad


def test_steps_out_of_order_and_foreign_checkpoints_are_refused(build):
    trainer = build(TrainRecipe(max_steps=5, batch=BATCH))
    with pytest.raises(ValueError, match="expected step 0, got 2"):
        trainer.train_step(2)
    with pytest.raises(ValueError, match="another folder"):
        trainer.load_state_dict(build(TrainRecipe(max_steps=6, batch=BATCH)).state_dict())


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(build):
    trainer = build(TrainRecipe(max_steps=5, batch=BATCH))
    before = parameters(trainer)
    hook = trainer.tower.loss.log_temperature.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trainer.train_step(0)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())


def test_steps_follow_from_epochs_unless_given():
    sampler = InstanceSampler(toy_instances()[:10], BATCH, seed=0)
    assert plan_steps(TrainRecipe(epochs=1.5, batch=BATCH), sampler) == 4
    assert plan_steps(TrainRecipe(epochs=1.5, max_steps=7, batch=BATCH), sampler) == 7


def test_a_step_of_limited_tokens_holds_what_fits(build):
    batch = BatchRecipe(tokens_per_step=60, max_products_per_query=4)
    trainer = build(TrainRecipe(epochs=1.0, batch=batch))
    sizes, seen = [], 0
    for step in range(trainer.num_steps):
        drawn = trainer.sampler.step_instances(step, 0, 1)
        texts = ([one.query for one in drawn], [text for one in drawn for text in one.products])
        sizes.append(sum(trainer.tokens.counts(own, side).sum() for own, side in zip(texts, SIDES, strict=True)))
        seen += len(drawn)
        assert math.isfinite(trainer.train_step(step)["loss"])
    assert 30 < max(sizes) <= 60
    assert len(trainer.sampler.instances) <= seen < len(trainer.sampler.instances) + len(drawn)


def test_a_budget_of_texts_ends_the_steps_before_it_is_exceeded(build):
    recipe = TrainRecipe(max_steps=50, max_texts=100, batch=BATCH)
    trainer = build(recipe)

    history = run(trainer, trainer.num_steps)

    spent = sum(metrics["num_texts"] for metrics in history)
    assert 100 - 4 * (1 + 4) <= spent <= 100
    assert history[-1]["learning_rate"] < history[len(history) // 2]["learning_rate"]
    assert plan_steps(TrainRecipe(max_steps=50, max_texts=1, batch=BATCH), trainer.sampler) == 1


def test_queries_of_one_grade_teach_where_every_loss_brings_other_products(build):
    only_exact = BatchRecipe(queries_per_step=4, max_per_grade=(0, 0, 1))
    mnrl = LossRecipe(terms=(LossTerm(loss="infonce", in_batch=True),))

    trainer = build(TrainRecipe(loss=mnrl, max_steps=3, batch=only_exact))
    metrics = run(trainer, 3)

    assert [of["num_texts"] for of in metrics] == [8, 8, 8]
    assert all(of["gradient_norm"] > 0 for of in metrics)
    with pytest.raises(ValueError, match="products of two grades"):
        build(TrainRecipe(max_steps=3, batch=only_exact))


def test_deterministic_runs_stay_in_fp32_unless_told_otherwise():
    assert not use_bf16(TrainRecipe(deterministic=True), "cpu")
    assert use_bf16(TrainRecipe(deterministic=True, precision="bf16"), "cpu")


def test_a_weight_that_would_be_ignored_is_refused():
    with pytest.raises(ConfigError, match="margin_mse does not read"):
        load(TrainRecipe, {}, ["loss.terms=[{loss: margin_mse, in_batch: true}]"])
    with pytest.raises(ConfigError, match=r"loss\.terms"):
        load(TrainRecipe, {}, ["loss.terms=[{loss: margin_mse, wieght: 2}]"])


def test_validation_ndcg_equals_the_value_by_hand(monkeypatch):
    instances = [
        Instance(("s", "1"), "q", ["a", "b", "c"], np.array([2, 1, 0], dtype=np.int8)),
        Instance(("s", "2"), "r", ["c"], np.array([0], dtype=np.int8)),
    ]
    validation = build_validation(instances)
    assert [one.queries for one in validation] == [["q"]]
    cosine = {"q": 1.0, "a": 0.8, "b": 0.9, "c": 0.1}
    monkeypatch.setattr(
        "embeddings.validation.encode",
        lambda model, texts, side, bf16: np.array([[cosine[text]] for text in texts], dtype=np.float32),
    )
    expected = (0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    assert validation_ndcg(None, validation) == pytest.approx(expected)
    assert build_validation(instances[1:]) == []


def test_validation_queries_search_the_products_of_their_own_data_set():
    grades = np.array([2, 0], dtype=np.int8)
    shops = [Instance((name, "1"), "q", [f"{name} lamp", f"{name} hose"], grades) for name in ("b", "a")]
    assert [one.catalogue for one in build_validation(shops)] == [["a hose", "a lamp"], ["b hose", "b lamp"]]


def test_texts_are_grouped_by_length_and_every_text_once():
    groups = by_length(np.array([3, 1, 4, 2, 1]), 2)
    assert [group.tolist() for group in groups] == [[1, 4], [3, 0], [2]]


def test_grouping_does_not_change_the_loss(build, monkeypatch):
    losses = []
    for size in (3, 1000):
        monkeypatch.setattr("embeddings.training.TEXTS_PER_GROUP", dict.fromkeys(("padded", "packed"), size))
        losses.append(build(TrainRecipe(precision="fp32", batch=BATCH), dropout=0.0).step_loss(0)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("texts_per_pass", [0, 5])
def test_packed_products_train_as_padded_ones(build, texts_per_pass):
    recipe = TrainRecipe(precision="fp32", batch=BATCH, max_steps=4, texts_per_pass=texts_per_pass)
    packed, padded = (build(recipe, dropout=0.0, packs=packs) for packs in (None, False))
    assert packed.packs
    assert not padded.packs
    for own, other in zip(run(packed, 4), run(padded, 4), strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-5)
    expected = parameters(padded)
    for name, value in parameters(packed).items():
        # softmax does not see the keys' bias: its gradient is rounding alone, which Adam makes as large as any
        assert "key.bias" in name or torch.allclose(value, expected[name], atol=1e-5), name


def test_a_recipes_dropout_takes_the_place_of_the_backbones(build):
    def losses(dropout):
        trainer = build(TrainRecipe(max_steps=2, batch=BATCH, dropout=dropout))
        trainer.tower.train()
        return {trainer.step_loss(0)[0].item() for _ in range(3)}

    assert len(losses(None)) == 3
    assert len(losses(0.0)) == 1


@pytest.mark.slow
# torch 2.13 warns of what it does itself while it compiles
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
def test_a_compiled_backbone_trains_alike_and_is_copied_as_the_plain_one(build):
    """Compiles the tiny backbone; about a minute."""
    recipe = TrainRecipe(max_steps=3, batch=BATCH, precision="fp32")
    plain, compiled = build(recipe, dropout=0.0), build(recipe, dropout=0.0, compiled=True)

    expected, found = run(plain, 2), run(compiled, 2)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    mixed = interpolate(compiled.model, plain.model, 0.5)
    assert set(mixed.state_dict()) == set(plain.model.state_dict())


@pytest.mark.parametrize(("texts_per_pass", "dropout"), [(0, 0.0), (0, 0.1), (5, 0.1)])
def test_layers_computed_again_have_the_same_gradient(build, texts_per_pass, dropout):
    recipe = TrainRecipe(max_steps=4, batch=BATCH, deterministic=True, texts_per_pass=texts_per_pass)
    plain, again = build(recipe, dropout), build(recipe, dropout, recomputed=True)
    assert run(plain, 4) == run(again, 4)
    left, right = parameters(plain), parameters(again)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_adapters_alone_are_trained_and_merged_in_what_is_published(build):
    trainer = build(TrainRecipe(max_steps=6, batch=BATCH, lora_rank=4, learning_rate=1e-2, head_learning_rate=1e-2))
    before = parameters(trainer)
    losses = [metrics["loss"] for metrics in run(trainer, 6)]
    assert losses[-1] < losses[0]
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}
    assert any("lora_A" in name for name in changed)
    assert not any("base_layer" in name or "embeddings" in name for name in changed)
    published = trainer.published(lambda: None)
    assert not any("lora" in name for name in published.state_dict())
    np.testing.assert_allclose(encode(published, QUERIES, "query"), encode(trainer.model, QUERIES, "query"), atol=1e-5)


def test_untied_sides_learn_apart_and_resume_bit_equal(folders):
    def untied():
        model = build_encoder(EncoderRecipe(model=folders[0.1], tied=False))
        return ContrastiveTrainer(model, toy_instances(), recipe, recomputed=True)

    recipe = TrainRecipe(max_steps=6, batch=BATCH, deterministic=True, head_learning_rate=5e-3, learning_rate=1e-3)
    whole, cut, resumed = untied(), untied(), untied()
    groups = {group["peak"]: group["params"] for group in whole.optimizer.param_groups if group["weight_decay"]}
    assert len(groups[5e-3]) == 2
    before = parameters(whole)
    expected = run(whole, 6)
    run(cut, 3)
    resumed.load_state_dict(cut.state_dict())
    assert run(resumed, 3) == expected[3:]
    after = parameters(whole)
    moved = {name: after[name] - before[name] for name in after if "word_embeddings" in name}
    (query, document) = (next(value for name, value in moved.items() if side in name) for side in ("query", "document"))
    assert query.abs().max() > 1e-4
    assert document.abs().max() > 1e-4
    assert not torch.equal(query, document)


def test_alike_queries_stand_where_they_stood_when_a_run_goes_on(build):
    recipe = TrainRecipe(
        max_steps=12,
        batch=dataclasses.replace(BATCH, alike_queries=4),
        deterministic=True,
        learning_rate=1e-2,
    )
    whole, cut, resumed = build(recipe), build(recipe), build(recipe)
    expected = run(whole, 12)
    run(cut, 6)
    resumed.load_state_dict(cut.state_dict())
    assert run(resumed, 6) == expected[6:]
