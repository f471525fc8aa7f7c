"""A small shop and a tiny labeller for the jobs that grade."""

import pytest

from embeddings.calibration import Calibration
from embeddings.guideline import load_guideline
from embeddings.labeller import LabellerRecipe, PairEncoder, save_labeller
from embeddings.labeller_model import build_labeller, save_weights
from lake.schemas import ANNOTATION_CONSENSUS, CANDIDATE_PAIR, CATALOG_PRODUCT, HUMAN_ANNOTATION, QUERY
from tests.fakes import SHOP_SPLITS, hash_of, put, shares
from tests.tiny_models import tiny_bert_folder


@pytest.fixture
def shop(lake):
    """12 queries, 10 products of which two share their texts, 48 human grades and 60 candidates."""
    colours, kinds = ("red", "blue", "green", "black"), ("shoe", "lamp", "knife")
    queries = [f"{colour} {kind}" for colour in colours for kind in kinds]
    titles = [*(f"{colour} {kind} x" for colour, kind in zip(colours * 3, kinds * 4, strict=True)), "red shoe x"][-10:]
    put(
        lake,
        QUERY,
        [
            {"dataset": "s", "query_id": f"q{n}", "text": text, "normalised": text, "query_hash": hash_of(text)}
            | {"split": SHOP_SPLITS[n % 6]}
            for n, text in enumerate(queries)
        ],
    )
    titles[0] = titles[1]
    products = [
        {"dataset": "s", "product_id": f"p{n}", "title": title, "product_hash": title} for n, title in enumerate(titles)
    ]
    put(lake, CATALOG_PRODUCT, products)
    marks = [
        {"dataset": "s", "query_id": f"q{q}", "product_id": f"p{p}", "num_marks": 1, "agreement": 1.0, "judge": "human"}
        | {"grade": sum(word in titles[p] for word in queries[q].split())}
        for q in range(12)
        for p in range(4)
    ]
    put(lake, ANNOTATION_CONSENSUS, [row | shares(row["grade"]) for row in marks])
    given = {"mark_number": 1, "mark": "m", "scale": "s"}
    put(lake, HUMAN_ANNOTATION, [row | given | {"grade_value": float(row["grade"])} for row in marks])
    candidates = [
        {"dataset": "s", "query_id": f"q{q}", "product_id": f"p{p}", "source": "sampled"}
        for q in range(6)
        for p in range(10)
    ]
    put(lake, CANDIDATE_PAIR, [*candidates, candidates[0] | {"source": "mined"}])
    return lake


@pytest.fixture
def labeller(tmp_path):
    recipe = LabellerRecipe(model=str(tiny_bert_folder(tmp_path / "model")), max_tokens=32)
    encoder = PairEncoder(recipe.model, recipe, load_guideline("v1"))
    save_weights(build_labeller(recipe, encoder, device="cpu"), encoder, tmp_path / "weights")
    folder = str(tmp_path / "labeller")
    save_labeller(
        tmp_path / "weights",
        folder,
        recipe,
        grade_token_ids=(),
        calibrations={"": Calibration(temperature=1.2)},
        metrics={},
    )
    return folder
