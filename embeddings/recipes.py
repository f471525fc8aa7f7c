"""Recipes of the encoder and its training, apart from the code that computes with them.

Jobs build their settings from these on machines without torch, where `assay jobs` and `--help` must work too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from conf.load import meaning, settings
from embeddings.batches import BatchRecipe

CARD_FILE = "assay_encoder.json"
"""Beside the model: text recipe, encoder recipe, stage and fingerprint of what made it."""
TEMPERATURE_BOUNDS = (0.01, 1.0)
"""Below, one product takes the whole softmax; above, all weigh alike and nothing is learned."""


@settings
class EncoderRecipe:
    """Which pretrained encoder, and how texts enter and vectors leave it."""

    model: Annotated[str, meaning("Hugging Face name or local folder of the pretrained encoder")] = "all-MiniLM-L6-v2"
    query_prefix: Annotated[str, meaning("put before every query, for example 'query: '")] = ""
    document_prefix: Annotated[str, meaning("put before every product text, for example 'passage: '")] = ""
    pooling: Annotated[
        Literal["auto", "mean", "cls", "lasttoken"],
        meaning("tokens to vector; auto takes the model's own, else mean"),
    ] = "auto"
    projection_width: Annotated[int, meaning("width of a vector; 0 keeps the model's", "dimensions", ge=0)] = 0
    max_query_tokens: Annotated[int, meaning("longer queries are cut", "tokens", ge=4)] = 32
    max_document_tokens: Annotated[int, meaning("longer product texts are cut", "tokens", ge=4)] = 96


@settings
class GradeMargins:
    """Where stage 2 wants the cosines of each grade; a letter says in which role: p positive, n negative.

    A pair pushes harder the further it is from its optimum, and its loss balances around its boundary. Grade
    1 is the positive beside grade 0 and the negative beside grade 2, hence two boundaries and two optima.
    """

    gamma: Annotated[float, meaning("scale of the loss; larger looks at fewer, harder pairs", gt=0, le=512)] = 32.0
    boundary_2p: Annotated[float, meaning("D_2p: grade 2 should lie above", "cosine", ge=-1, le=1)] = 0.75
    boundary_1n: Annotated[float, meaning("D_1n: grade 1 should lie below", "cosine", ge=-1, le=1)] = 0.60
    boundary_1p: Annotated[float, meaning("D_1p: grade 1 should lie above", "cosine", ge=-1, le=1)] = 0.40
    boundary_0n: Annotated[float, meaning("D_0n: grade 0 should lie below", "cosine", ge=-1, le=1)] = 0.25
    optimum_2p: Annotated[float, meaning("O_2p: no pull on grade 2 above", "cosine", ge=-2, le=2)] = 1.25
    optimum_1n: Annotated[float, meaning("O_1n: no push on grade 1 below", "cosine", ge=-2, le=2)] = 0.30
    optimum_1p: Annotated[float, meaning("O_1p: no pull on grade 1 above", "cosine", ge=-2, le=2)] = 0.60
    optimum_0n: Annotated[float, meaning("O_0n: no push on grade 0 below", "cosine", ge=-2, le=2)] = -0.25


@settings
class LexicalRecipe:
    """How the encoder learns the catalogue's words before the first graded step (embeddings.lexical)."""

    steps: Annotated[int, meaning("steps before the graded ones; 0 leaves it out", "steps", ge=0)] = 0
    word_weight: Annotated[
        float, meaning("what a product that holds all words of a query gains over the pretrained", "cosine", gt=0, le=1)
    ] = 0.3
    products_per_step: Annotated[int, meaning("products of a step, over all workers", "products", ge=2)] = 96
    products_per_seed: Annotated[
        int, meaning("products drawn together from one neighbourhood of the catalogue", "products", ge=2)
    ] = 8
    learning_rate: Annotated[float, meaning("peak rate of these steps", gt=0)] = 5e-5
    max_products: Annotated[int, meaning("products drawn of a larger catalogue", "products", ge=2)] = 10_000


@settings
class TrainRecipe:
    """How one stage is trained."""

    stage: Annotated[Literal[1, 2], meaning("1 orders the grades, 2 gives each its band of cosines")] = 1
    loss: Annotated[Literal["auto", "supcon", "circle"], meaning("auto is supcon in stage 1 and circle in stage 2")] = (
        "auto"
    )
    ranking_weight: Annotated[
        float, meaning("weight of supcon beside the circle loss; 0 is the paper's stage 2", ge=0)
    ] = 0.0
    epochs: Annotated[float, meaning("passes over the instances", "epochs", gt=0)] = 2.0
    max_steps: Annotated[int, meaning("steps instead of epochs; 0 leaves it to epochs", "steps", ge=0)] = 0
    learning_rate: Annotated[float, meaning("peak rate of the pretrained weights", gt=0)] = 5e-5
    head_learning_rate: Annotated[float, meaning("peak rate of heads and temperature", gt=0)] = 2e-4
    warmup_share: Annotated[float, meaning("share of the steps with a rising rate; then it falls to 0", ge=0, le=1)] = (
        0.1
    )
    weight_decay: Annotated[float, meaning("AdamW's decay of matrices", ge=0)] = 0.01
    pretrained_share: Annotated[
        float, meaning("share of the pretrained weights in the encoder that is validated and published", ge=0, lt=1)
    ] = 0.0
    gradient_clip: Annotated[float, meaning("longest gradient", "L2 norm", gt=0)] = 1.0
    temperature: Annotated[
        float, meaning("of supcon at the start; learned", ge=TEMPERATURE_BOUNDS[0], le=TEMPERATURE_BOUNDS[1])
    ] = 0.2
    """Below 0.1 the softmax inside an instance pulls all its products up together (docs/decisions/005)."""
    in_batch_ceiling: Annotated[
        float,
        meaning(
            "products of a step's other queries count as grade 0 in supcon up to this share of the cosine of the "
            "query's best own positive; 0 leaves them out, as the paper does",
            ge=0,
            le=1,
        ),
    ] = 0.0
    margins: Annotated[GradeMargins, meaning("bands of the circle loss")] = GradeMargins()
    batch: Annotated[BatchRecipe, meaning("size and make-up of a step")] = BatchRecipe()
    lexical: Annotated[LexicalRecipe, meaning("steps that learn the catalogue's words first")] = LexicalRecipe()
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        meaning("auto is bf16 where hardware computes it, unless deterministic"),
    ] = "auto"
    deterministic: Annotated[bool, meaning("bit-equal reruns on equal machines, threads and workers")] = False
    seed: Annotated[int, meaning("of order, draws and dropout", ge=0)] = 0
    publish_best: Annotated[
        bool,
        meaning("the step of the highest validation NDCG@10 is published; false: the last, where queries are few"),
    ] = True
    validate_every_steps: Annotated[int, meaning("steps between two validations", "steps", ge=1)] = 50
    checkpoint_every_steps: Annotated[int, meaning("steps between two checkpoints", "steps", ge=1)] = 50

    def __post_init__(self) -> None:
        if self.ranking_weight and self.chosen_loss == "supcon":
            raise ValueError("ranking_weight stands beside the circle loss only; set it to 0 or loss to 'circle'")
        if self.in_batch_ceiling and not self.learns_temperature:
            raise ValueError(
                "in_batch_ceiling adds negatives to supcon, which is no part of this loss; set ranking_weight above 0 "
                "or in_batch_ceiling to 0"
            )

    @property
    def chosen_loss(self) -> Literal["supcon", "circle"]:
        """The loss that `auto` stands for."""
        if self.loss == "auto":
            return "supcon" if self.stage == 1 else "circle"
        return self.loss

    @property
    def learns_temperature(self) -> bool:
        """Whether supcon is part of the loss."""
        return self.chosen_loss == "supcon" or self.ranking_weight > 0


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card that `save_encoder` wrote; empty for a folder from elsewhere."""
    path = Path(folder, CARD_FILE)
    if not path.is_file():
        return {}
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
