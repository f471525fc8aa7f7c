import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conf.load import ConfigError
from embeddings.calibration import Calibration
from embeddings.guideline import PROMPT_BLOCK, ProductFields, load_guideline, prompt_segments
from embeddings.labeller import (
    CARD_FILE,
    LabellerRecipe,
    PairEncoder,
    export_labeller,
    load_labeller_card,
    load_pair_encoder,
    save_labeller,
    violations,
)
from embeddings.labeller_metrics import labeller_metrics
from embeddings.labeller_model import (
    GradeModel,
    LabellerTrainer,
    build_labeller,
    epoch_batches,
    load_labeller,
    plain_probabilities,
    save_weights,
)
from tests.tiny_models import tiny_bert_folder, tiny_causal_lm_folder, tiny_guideline_file

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
    return LabellerTrainer(build_labeller(recipe, encoder, device="cpu"), pairs, SHARES, recipe)


def test_a_long_product_is_cut_and_the_query_and_the_prompts_end_are_not(tmp_path):
    for kind in ("classifier", "generative"):
        _, encoder, _ = build(tmp_path / kind, kind)
        short, long = encoder.encode(["red shoe"] * 2, [ProductFields("shoe"), ProductFields("shoe " * 500)])
        assert len(short) < len(long) == encoder.max_tokens
        assert long[-1] == short[-1]
        assert encoder.tokenizer.decode(long).replace(" ", "").find("redshoe") >= 0


def test_what_the_pairs_of_a_query_share_ends_with_a_block_of_an_engine_s_cache(tmp_path):
    _, encoder, _ = build(tmp_path, "generative")
    for query in ("a", "red shoe", "a rather long query"):
        short, other = encoder.encode([query] * 2, [ProductFields("shoe"), ProductFields("boot")])
        shared = next(at for at, (one, two) in enumerate(zip(short, other, strict=True)) if one != two)
        assert shared % PROMPT_BLOCK == 0
        assert f"<query>{query}</query>" in encoder.tokenizer.decode(short).replace("\n", "")

    # a product that needs the room gets it
    full = encoder.tokenizer.decode(encoder.encode(["red shoe"], [ProductFields("x" * 260)])[0])
    assert f"<query>red shoe</query>\n<product>{'x' * 260}</product>" in full


def test_a_folder_from_before_blocks_reads_what_it_was_trained_on(tmp_path):
    recipe, encoder, _ = build(tmp_path, "generative")
    save_weights(build_labeller(recipe, encoder, device="cpu"), encoder, tmp_path / "weights")
    ids, folder = encoder.grade_token_ids, tmp_path / "labeller"
    save_labeller(tmp_path / "weights", str(folder), recipe, grade_token_ids=ids, calibrations={}, metrics={})
    assert load_pair_encoder(folder).encode(QUERIES, PRODUCTS) == encoder.encode(QUERIES, PRODUCTS)

    card = json.loads((folder / CARD_FILE).read_text())
    assert card.pop("prompt_block") == PROMPT_BLOCK
    (folder / CARD_FILE).write_text(json.dumps(card))
    before, between, after = prompt_segments(load_guideline(recipe.guideline))
    (tokens,) = load_pair_encoder(folder).encode(["red shoe"], [ProductFields("shoe")])
    assert encoder.tokenizer.decode(tokens) == f"{before}red shoe{between}shoe{after}"


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
    untrained = labeller_metrics(plain_probabilities(whole.model, pairs), np.array(GRADES))["nll"]
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
    assert labeller_metrics(plain_probabilities(whole.model, pairs), np.array(GRADES))["nll"] < untrained
    torch.use_deterministic_algorithms(False)


def test_a_checkpoint_of_other_pairs_is_refused(tmp_path):
    recipe, encoder, pairs = build(tmp_path, "classifier")
    other = LabellerTrainer(build_labeller(recipe, encoder, device="cpu"), pairs[:8], SHARES[:8], recipe)

    with pytest.raises(ValueError, match="another recipe or other pairs"):
        trainer_of(recipe, encoder, pairs).load_state_dict(other.state_dict())


def test_an_epoch_holds_every_pair_once_and_depends_on_seed_and_epoch_alone():
    recipe = LabellerRecipe(batch_size=7)
    lengths = [3 + row % 11 for row in range(100)]

    batches = epoch_batches(lengths, recipe, 3)

    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert len(batches) == 15
    assert batches == epoch_batches(lengths, recipe, 3) != epoch_batches(lengths, recipe, 4)


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


def test_a_saved_labeller_is_itself_again_and_its_fingerprint_follows_weights_and_temperature(tmp_path):
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
        )
        for name, t in (("a", 1.5), ("b", 1.5), ("c", 2.0))
    ]

    assert cards[0] == cards[1] == load_labeller_card(tmp_path / "a")
    assert cards[0].fingerprint != cards[2].fingerprint
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
