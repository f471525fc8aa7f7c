import copy
import json
from itertools import takewhile

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from conf.load import ConfigError
from embeddings.calibration import Calibration
from embeddings.guideline import SHARED_BLOCK_TOKENS, ProductFields, load_guideline
from embeddings.labeller import (
    LabellerRecipe,
    PairEncoder,
    export_labeller,
    load_labeller_card,
    save_labeller,
    violations,
)
from embeddings.labeller_metrics import labeller_metrics
from embeddings.labeller_model import (
    GradeModel,
    LabellerTrainer,
    build_labeller,
    load_labeller,
    plain_probabilities,
    read_first_token_alone,
    save_weights,
)
from tests.tiny_models import tiny_bert_folder, tiny_causal_lm_folder, tiny_evidence_head, tiny_guideline_file

QUERIES = ["red shoe", "blue lamp", "green sofa", "red lamp"] * 6
PRODUCTS = [
    ProductFields(title) for title in ("red shoe", "blue shoe", "knife", "a red lamp with a very long name")
] * 6
GRADES = [2, 1, 0, 2] * 6
SHARES = np.array(GRADES)[:, None] >= [1, 2]


def build(tmp_path, kind, **changes):
    tmp_path.mkdir(exist_ok=True)
    folder = tiny_bert_folder(tmp_path / "model") if kind == "classifier" else tiny_causal_lm_folder(tmp_path / "model")
    limit = 64 if kind == "classifier" else 512
    changes["guideline"] = str(tiny_guideline_file(tmp_path / "guideline.yaml"))
    values = {"learning_rate": 3e-3, "batch_size": 8, "deterministic": True, "max_tokens": limit} | changes
    recipe = LabellerRecipe(kind=kind, model=str(folder), **values)
    encoder = PairEncoder(recipe.model, recipe, load_guideline(recipe.guideline))
    return recipe, encoder, encoder.encode(QUERIES, PRODUCTS)


@pytest.fixture(autouse=True)
def _usual_kernels_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


def trainer_of(recipe, encoder, pairs):
    return LabellerTrainer(build_labeller(recipe, encoder, device="cpu"), pairs, SHARES, QUERIES, recipe)


def nll(model, pairs):
    probability_N3 = plain_probabilities(model, pairs)
    return labeller_metrics(probability_N3, probability_N3.argmax(axis=1), np.array(GRADES))["nll"]


@pytest.mark.parametrize("query", ["red", "red shoe", "a lamp with a very long name " * 5])
def test_pairs_of_a_query_share_whole_blocks_up_to_the_product(tmp_path, query):
    _, encoder, _ = build(tmp_path, "generative")

    one, other = encoder.encode([query] * 2, [ProductFields("knife"), ProductFields("shoe")])

    shared = len(list(takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))))
    assert shared % SHARED_BLOCK_TOKENS == 0
    assert max(len(one), len(other)) - shared < 40


def test_without_room_for_blank_lines_the_product_keeps_its_own(tmp_path):
    _, wide, _ = build(tmp_path / "wide", "generative")
    fixed = sum(map(len, wide._fixed))
    _, narrow, _ = build(tmp_path / "narrow", "generative", max_tokens=fixed + 32)
    query, product = "red " * 15, ProductFields("shoe " * 40)

    (pair,) = narrow.encode([query], [product])

    assert len(pair) <= fixed + 32
    assert narrow._to_whole_blocks(15) in (0, 1)


def test_a_long_product_is_cut_and_the_query_and_the_prompts_end_are_not(tmp_path):
    for kind in ("classifier", "generative"):
        _, encoder, _ = build(tmp_path / kind, kind)
        short, long = encoder.encode(["red shoe"] * 2, [ProductFields("shoe"), ProductFields("shoe " * 500)])
        assert len(short) < len(long) == encoder.max_tokens
        assert long[-1] == short[-1]
        assert encoder.tokenizer.decode(long).replace(" ", "").find("redshoe") >= 0


def test_a_backbone_s_head_of_three_classes_is_drawn_anew(tmp_path):
    recipe = LabellerRecipe(model=str(tiny_bert_folder(tmp_path / "model", 3)), max_tokens=64)
    encoder = PairEncoder(recipe.model, recipe, load_guideline("v1"))
    model = build_labeller(recipe, encoder, device="cpu")
    trained = AutoModelForSequenceClassification.from_pretrained(recipe.model)
    assert not torch.equal(model.backbone.classifier.weight, trained.classifier.weight)
    assert torch.equal(
        model.backbone.bert.embeddings.word_embeddings.weight, trained.bert.embeddings.word_embeddings.weight
    )


def test_a_reranker_s_order_is_where_tuning_starts(tmp_path):
    recipe = LabellerRecipe(model=str(tiny_bert_folder(tmp_path / "model", 1)), max_tokens=64, dropout=0.0)
    encoder = PairEncoder(recipe.model, recipe, load_guideline("v1"))
    pairs = encoder.encode(QUERIES[:4], PRODUCTS[:4])
    model = build_labeller(recipe, encoder, device="cpu")
    reranker = GradeModel(AutoModelForSequenceClassification.from_pretrained(recipe.model), encoder)

    with torch.no_grad():
        relevance_N = reranker(pairs)[:, 0]
        # without dropout a model in training answers what it answers otherwise
        logits_N3 = model.train()(pairs)

    torch.testing.assert_close(logits_N3, torch.stack([-relevance_N / 4, 0 * relevance_N, relevance_N / 4], dim=1))
    save_weights(model, encoder, tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())
    # without it engines would take the activation that a cross-encoder's folder names
    assert kept["problem_type"] == "single_label_classification"


def test_the_generative_kind_gives_the_masked_softmax_of_the_model_itself(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "generative")
    model = build_labeller(recipe, encoder, device="cpu")

    given = plain_probabilities(model, pairs[:4])

    plain = AutoModelForCausalLM.from_pretrained(recipe.model).eval()
    for pair, row in zip(pairs[:4], given, strict=True):
        logits = plain(torch.tensor([pair])).logits[0, -1, list(encoder.grade_token_ids)]
        np.testing.assert_allclose(row, logits.softmax(-1).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one_and_learns(tmp_path, kind):
    changes = {"epochs": 4} if kind == "classifier" else {"epochs": 1, "batch_size": 12, "learning_rate": 1e-4}
    recipe, encoder, pairs = build(tmp_path, kind, **changes)
    whole = trainer_of(recipe, encoder, pairs)
    untrained = nll(whole.model, pairs)
    while whole.step < whole.num_steps:
        whole.train_step()
    broken = trainer_of(recipe, encoder, pairs)
    for _ in range(whole.num_steps // 2):
        broken.train_step()
    resumed = trainer_of(recipe, encoder, pairs)
    resumed.load_state_dict(broken.state_dict())
    while resumed.step < resumed.num_steps:
        resumed.train_step()

    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    assert nll(whole.model, pairs) < untrained
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_a_step_in_bf16_keeps_bf16_between_layers_and_needs_no_flash_attention(tmp_path, dropout):
    recipe, encoder, pairs = build(tmp_path, "classifier", deterministic=False, precision="bf16", dropout=dropout)
    trainer = trainer_of(recipe, encoder, pairs)
    given = []
    last = [module for module in trainer.model.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    last.register_forward_hook(lambda norm, taken, found: given.append(found.dtype))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        trainer.train_step()
    plain_probabilities(trainer.model, pairs)

    assert given[0] == torch.bfloat16
    assert set(given[1:]) == {torch.float32}
    assert not [event.key for event in watched.key_averages() if "flash" in event.key]


def test_preferences_put_products_in_peoples_order_and_workers_sum_to_one(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "classifier", preference_weight=5.0, dropout=0.0, batch_size=24)
    # one query whose products people graded 2, 1 and 0
    queries = ["shoe"] * len(pairs)
    trainers = [
        LabellerTrainer(
            build_labeller(recipe, encoder, device="cpu"), pairs, SHARES, named, recipe, rank=rank, world_size=size
        )
        for named, rank, size in ((queries, 0, 1), (QUERIES, 0, 1), (QUERIES, 0, 2), (QUERIES, 1, 2))
    ]

    losses = [trainer.train_step() for trainer in trainers]
    for _ in range(20):
        trainers[0].train_step()

    assert losses[2] + losses[3] == pytest.approx(losses[1], abs=1e-3)
    # all pairs of a query have one grade here, so that nothing is preferred
    assert losses[0] > losses[1] + 10
    expected_N = plain_probabilities(trainers[0].model, pairs) @ [0, 1, 2]
    assert expected_N[2] < expected_N[1] < expected_N[0]


@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_weights_are_copies_that_can_be_put_back(tmp_path, kind):
    recipe, encoder, pairs = build(tmp_path, kind)
    trainer = trainer_of(recipe, encoder, pairs)
    kept, before = trainer.weights(), plain_probabilities(trainer.model, pairs)

    trainer.train_step()
    after = plain_probabilities(trainer.model, pairs)
    trainer.set_weights(kept)

    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_array_equal(plain_probabilities(trainer.model, pairs), before)


def test_a_checkpoint_of_other_pairs_is_refused(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "classifier")
    other = LabellerTrainer(build_labeller(recipe, encoder, device="cpu"), pairs[:8], SHARES[:8], QUERIES[:8], recipe)

    with pytest.raises(ValueError, match="another recipe or other pairs"):
        trainer_of(recipe, encoder, pairs).load_state_dict(other.state_dict())


def test_adapters_are_merged_into_a_plain_folder(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "classifier", tuning="lora", epochs=1)
    trainer = trainer_of(recipe, encoder, pairs)
    while trainer.step < trainer.num_steps:
        trainer.train_step()
    expected = plain_probabilities(trainer.model, pairs)
    save_weights(trainer.model, encoder, tmp_path / "merged")

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    again = GradeModel(merged, encoder)

    np.testing.assert_allclose(plain_probabilities(again, pairs), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_last_layer_of_one_token_gives_the_values_and_gradients_of_all(family):
    kinds = {
        "bert": (BertConfig, BertForSequenceClassification),
        "electra": (ElectraConfig, ElectraForSequenceClassification),
    }
    config_of, model_of = kinds[family]
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    whole = model_of(config_of(vocab_size=50, num_labels=3, **shape)).eval()
    alone = read_first_token_alone(copy.deepcopy(whole))
    widths = []
    alone.base_model.encoder.layer[-1].intermediate.register_forward_hook(lambda *told: widths.append(told[2].shape[1]))
    inputs = {"input_ids": torch.randint(50, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    inputs["attention_mask"][1:, 5:] = 0

    logits = [model(**inputs).logits for model in (whole, alone)]
    for found in logits:
        found.square().sum().backward()

    assert widths == [1]
    torch.testing.assert_close(*logits)
    for (name, one), (_, other) in zip(whole.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_a_saved_labeller_is_itself_again_and_its_fingerprint_follows_what_it_answers(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "classifier")
    model: GradeModel = build_labeller(recipe, encoder, device="cpu")
    save_weights(model, encoder, tmp_path / "weights")
    cards = [
        save_labeller(
            tmp_path / "weights",
            str(tmp_path / name),
            recipe,
            grade_token_ids=(),
            calibrations={"": Calibration(temperature=t), "shop": Calibration(bias=(0.5, 0.0, 0.0))},
            metrics={"ece": 0.1},
            head=tiny_evidence_head(seen) if seen else None,
        )
        for name, t, seen in (("a", 1.5, 0), ("b", 1.5, 0), ("c", 2.0, 0), ("d", 1.5, 3), ("e", 1.5, 4))
    ]

    assert cards[0] == cards[1] == load_labeller_card(tmp_path / "a")
    assert len({card.fingerprint for card in cards}) == 4
    assert cards[0].address("q", "p") != cards[2].address("q", "p")
    assert cards[0].calibrations["shop"].bias == (0.5, 0.0, 0.0)
    loaded, its_encoder = load_labeller(str(tmp_path / "a"))
    assert its_encoder.encode(QUERIES, PRODUCTS) == pairs
    np.testing.assert_allclose(plain_probabilities(loaded, pairs), plain_probabilities(model, pairs), atol=1e-6)

    export_labeller(str(tmp_path / "a"), str(tmp_path / "out"))
    assert "`calibrations`" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/guideline.md").is_file()
    with pytest.raises(ConfigError, match="is there already"):
        export_labeller(str(tmp_path / "a"), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"no assay_labeller.json there"):
        load_labeller_card(tmp_path / "weights")


def test_answers_that_are_no_distribution_are_marked():
    answers_N3 = np.array([[0.2, 0.3, 0.5], [np.nan, 0.5, 0.5], [0.5, 0.6, 0.2], [-0.1, 0.6, 0.5], [1.0, 0.0, 0.0]])

    assert violations(answers_N3).tolist() == [False, True, True, True, False]


def test_a_tokenizer_without_single_digits_and_a_prompt_without_room_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="leaves"):
        build(tmp_path, "generative", max_tokens=128)
    with pytest.raises(ConfigError, match="reads 128"):
        build(tmp_path / "b", "classifier", max_tokens=512)
