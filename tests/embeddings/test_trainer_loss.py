from typing import get_args

import numpy as np
import pytest
import torch

from embeddings.batches import BatchRecipe, Instance
from embeddings.encoder import EncoderRecipe, build_encoder
from embeddings.recipes import LossName, LossRecipe, LossTerm, TrainRecipe
from embeddings.trainer_loss import TrainerLoss
from embeddings.training import ContrastiveTrainer
from tests.tiny_models import tiny_bert_folder

ROWS = {
    "query": ["red lamp", "blue hose", "green rug", "old sofa"],
    "first": ["lamp red", "hose blue", "rug green", "sofa old"],
    "second": ["lamp 7", "hose 9", "", "sofa 3"],
    "third": ["kettle", "paint", "drill", "shoe"],
    "label": [[2, 1, 0], [2, 1, 0], [2, -1, 0], [1, 2, 0]],
}
BOTH = LossRecipe(
    terms=(LossTerm(loss="circle"), LossTerm(loss="supcon", weight=0.5, in_batch=True), LossTerm(loss="ordinal_kl"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_bert_folder(tmp_path_factory.mktemp("model") / "bert", dropout=0.0))


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("name", get_args(LossName))
def test_a_sentence_transformers_trainer_runs_every_loss(folder, tmp_path, name):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = build_encoder(EncoderRecipe(model=folder))
    loss = TrainerLoss(model, LossRecipe(terms=(LossTerm(loss=name),)))
    before = {key: value.clone() for key, value in loss.named_parameters()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        router_mapping={"query": "query"} | dict.fromkeys(("first", "second", "third"), "document"),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(ROWS), loss=loss)
    trainer.train()

    moved = {key for key, value in loss.named_parameters() if not torch.equal(value, before[key])}
    assert any("word_embeddings" in key for key in moved)
    assert {key for key in before if key.startswith("graded.")} - {"graded.log_temperature"} <= moved
    assert ("graded.log_temperature" in moved) is loss.graded.log_temperature.requires_grad


def test_it_is_the_mean_over_queries_of_what_our_own_trainer_minimises(folder):
    model = build_encoder(EncoderRecipe(model=folder)).eval()
    columns = ("first", "second", "third")
    products = [[ROWS[name][row] for name in columns] for row in range(4)]
    instances = [
        Instance(
            ("toy", str(row)),
            ROWS["query"][row],
            [text for text, grade in zip(products[row], ROWS["label"][row], strict=True) if grade >= 0],
            np.array([grade for grade in ROWS["label"][row] if grade >= 0], dtype=np.int8),
        )
        for row in range(4)
    ]
    recipe = TrainRecipe(loss=BOTH, batch=BatchRecipe(queries_per_step=4), max_steps=1, precision="fp32")
    ours = ContrastiveTrainer(model, instances, recipe)
    ours.tower.eval()

    with torch.no_grad():
        expected = ours.step_loss(0)[0].item()
        embedded = [
            torch.from_numpy(encode(ROWS[name]))
            for name, encode in (("query", model.encode_query), *((name, model.encode_document) for name in columns))
        ]
        found = TrainerLoss(model, BOTH).compute_loss_from_embeddings(embedded, torch.tensor(ROWS["label"]))

    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_shares_of_raters_take_the_place_of_grades():
    label = torch.tensor(ROWS["label"])
    clean = torch.stack([label >= 1, label >= 2], dim=2).float().masked_fill((label < 0)[:, :, None], torch.nan)
    soft = clean.clone()
    soft[0, 1] = torch.tensor([0.9, 0.3])
    loss = loss_without_model(BOTH)

    hard = loss.compute_loss_from_embeddings(vectors(), label).item()

    assert loss.compute_loss_from_embeddings(vectors(), clean).item() == pytest.approx(hard)
    assert loss.compute_loss_from_embeddings(vectors(), soft).item() != pytest.approx(hard, rel=1e-4)


def test_a_padded_product_moves_nothing():
    loss = loss_without_model(BOTH)
    found = []
    for seed in (1, 2):
        embedded = vectors()
        embedded[2][2] = vectors(seed)[0][0]
        found.append(loss.compute_loss_from_embeddings(embedded, torch.tensor(ROWS["label"])).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"4 rows and 3 product columns, got \[4, 2\]; give each row a list"):
        loss_without_model(BOTH).compute_loss_from_embeddings(vectors(), torch.zeros(4, 2))


def loss_without_model(recipe):
    class Place(torch.nn.Module):
        device = torch.device("cpu")

    return TrainerLoss(Place(), recipe)
