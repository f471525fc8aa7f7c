import torch

from embeddings.adapters import add_adapters, without_adapters
from embeddings.encoder import EncoderRecipe, build_encoder, encode, load_encoder, save_encoder
from embeddings.text import TextRecipe
from tests.tiny_models import tiny_bert_folder

TEXTS = ["red lamp", "a blue hose 5"]


def test_adapters_change_nothing_until_trained_and_are_gone_in_what_is_saved(tmp_path):
    recipe = EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert", dropout=0.0)))
    plain, model = build_encoder(recipe), build_encoder(recipe)
    add_adapters(model, 4, seed=1)
    assert (encode(model, TEXTS, "query") == encode(plain, TEXTS, "query")).all()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "router" in name or "sub_modules" in name for name in trained)
    assert not any("pooler" in name for name in trained)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    expected = encode(model, TEXTS, "document")
    assert abs(expected - encode(plain, TEXTS, "document")).max() > 1e-3

    merged = without_adapters(model)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert abs(encode(merged, TEXTS, "document") - expected).max() < 1e-5
    # the trainer's own goes on as it was
    assert (encode(model, TEXTS, "document") == expected).all()
    save_encoder(merged, tmp_path / "saved", {"text": TextRecipe(), "encoder": recipe})
    assert abs(encode(load_encoder(tmp_path / "saved")[0], TEXTS, "document") - expected).max() < 1e-5


def test_adapters_are_the_same_on_all_workers_and_leave_the_generator_alone(tmp_path):
    recipe = EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert")), tied=False)
    models = [build_encoder(recipe) for _ in range(2)]
    for place, model in enumerate(models):
        torch.manual_seed(place)
        before = torch.random.get_rng_state()
        add_adapters(model, 2, seed=7)
        assert torch.equal(before, torch.random.get_rng_state())
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_adapters_is_itself(tmp_path):
    model = build_encoder(EncoderRecipe(model=str(tiny_bert_folder(tmp_path / "bert"))))
    assert without_adapters(model) is model
