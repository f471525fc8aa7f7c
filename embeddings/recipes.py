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
    tied: Annotated[
        bool, meaning("one backbone for queries and products; false: one each, which start from the same weights")
    ] = True
    projection_width: Annotated[int, meaning("width of a vector; 0 keeps the model's", "dimensions", ge=0)] = 0
    max_query_tokens: Annotated[int, meaning("longer queries are cut", "tokens", ge=4)] = 32
    max_document_tokens: Annotated[int, meaning("longer product texts are cut", "tokens", ge=4)] = 96
    length_percentile: Annotated[
        float,
        meaning(
            "cut queries and products at this percentile of their own lengths instead, rounded up to eights, within "
            "the two limits; 0: at the limits",
            "%",
            ge=0,
            le=100,
        ),
    ] = 0.0


@settings
class GradeBand:
    """Where the circle loss wants the cosines of one grade, beside lower grades and beside higher ones."""

    boundary_p: Annotated[float, meaning("beside a lower grade it should lie above", "cosine", ge=-1, le=1)]
    optimum_p: Annotated[float, meaning("no pull above", "cosine", ge=-2, le=2)]
    boundary_n: Annotated[float, meaning("beside a higher grade it should lie below", "cosine", ge=-1, le=1)]
    optimum_n: Annotated[float, meaning("no push below", "cosine", ge=-2, le=2)]


@settings
class GradeBands:
    """Bands of any number of grades, from 0 up."""

    gamma: Annotated[float, meaning("scale of the loss; larger looks at fewer, harder pairs", gt=0, le=512)] = 32.0
    bands: Annotated[tuple[GradeBand, ...], meaning("of each grade, from 0 up")] = ()


def even_bands(num_grades: int, *, gamma: float = 32.0, highest: float = 0.75, lowest: float = 0.25) -> GradeBands:
    """Bands of equal distance: cosines above `highest` for the best grade, below `lowest` for 0.

    A boundary's optimum lies as far beyond it as the paper's do for two grades, 2 m for the boundaries 1 - m and m.

    Raises:
        ValueError: fewer than two grades.
    """
    if num_grades < 2:
        raise ValueError(f"even_bands: expected at least 2 grades, got {num_grades}")
    step = (highest - lowest) / (2 * (num_grades - 1) - 1)
    # from 0 up: its upper boundary, then lower and upper of each grade between, then the best one's lower
    bound = [lowest + place * step for place in range(2 * (num_grades - 1))]
    reach = 2 * (1 - highest)
    bands = []
    for grade in range(num_grades):
        low, high = bound[max(2 * grade - 1, 0)], bound[min(2 * grade, len(bound) - 1)]
        bands.append(GradeBand(boundary_p=low, optimum_p=low + reach, boundary_n=high, optimum_n=high - reach))
    return GradeBands(gamma=gamma, bands=tuple(bands))


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

    @property
    def bands(self) -> tuple[GradeBand, ...]:
        """The same by grade; grade 0 is never a positive, nor grade 2 a negative."""
        return (
            GradeBand(boundary_p=-1.0, optimum_p=-2.0, boundary_n=self.boundary_0n, optimum_n=self.optimum_0n),
            GradeBand(
                boundary_p=self.boundary_1p,
                optimum_p=self.optimum_1p,
                boundary_n=self.boundary_1n,
                optimum_n=self.optimum_1n,
            ),
            GradeBand(boundary_p=self.boundary_2p, optimum_p=self.optimum_2p, boundary_n=1.0, optimum_n=2.0),
        )


LossName = Literal[
    "supcon",
    "circle",
    "infonce",
    "cosent",
    "triplet",
    "pairwise_logistic",
    "pooled_logistic",
    "rg2",
    "rgx",
    "margin_mse",
    "listwise_kl",
    "ordinal_kl",
    "background",
]
_OF_SHARES: tuple[LossName, ...] = ("margin_mse", "listwise_kl", "ordinal_kl")
_WITHOUT_IN_BATCH: tuple[LossName, ...] = (*_OF_SHARES, "background", "pooled_logistic")


Teacher = Literal["shares", "logits"]
"""What `listwise_kl` ranks a row's products by; see soft_losses."""


@settings
class LossTerm:
    """One loss of a weighted sum."""

    loss: Annotated[LossName, meaning("see embeddings.losses, ranking_losses, soft_losses and graded_loss")]
    weight: Annotated[float, meaning("factor of its sum over queries", gt=0)] = 1.0
    in_batch: Annotated[
        bool, meaning("products of the step's other queries stand as grade 0 beside the query's own")
    ] = False

    def __post_init__(self) -> None:
        if self.in_batch and self.loss in _WITHOUT_IN_BATCH:
            raise ValueError(f"in_batch adds products of grade 0, which {self.loss} does not read; set it to false")

    @property
    def reads_shares(self) -> bool:
        """Whether it learns from shares of raters or probabilities rather than grades."""
        return self.loss in _OF_SHARES

    @property
    def reads_others(self) -> bool:
        """Whether products of the step's other queries count in it."""
        return self.in_batch or self.loss in ("background", "pooled_logistic")


@settings
class LossRecipe:
    """What is minimised: terms, and the scales of those that have one."""

    terms: Annotated[
        tuple[LossTerm, ...], meaning("losses that are summed; none: supcon in stage 1, circle in stage 2")
    ] = ()
    temperature: Annotated[
        float,
        meaning(
            "of supcon, infonce and listwise_kl at the start; learned",
            ge=TEMPERATURE_BOUNDS[0],
            le=TEMPERATURE_BOUNDS[1],
        ),
    ] = 0.2
    """Below 0.1 the softmax inside an instance pulls all its products up together (docs/decisions/005)."""
    in_batch_ceiling: Annotated[
        float | None,
        meaning(
            "in-batch products count as grade 0 up to this share of the cosine of the query's best own positive; null: "
            "all of them",
            gt=0,
            le=1,
        ),
    ] = 0.95
    margins: Annotated[GradeMargins, meaning("bands of circle")] = GradeMargins()
    order_scale: Annotated[
        float, meaning("of cosent, pairwise_logistic and pooled_logistic, inverse temperature", gt=0)
    ] = 20.0
    order_focus: Annotated[
        float,
        meaning("of pairwise_logistic and pooled_logistic: above 0 pairs far in order weigh less; 0: all alike", ge=0),
    ] = 0.0
    triplet_margin: Annotated[float, meaning("lead for one grade", "cosine", ge=0, le=1)] = 0.1
    rg_temperature: Annotated[float, meaning("of rg2 and rgx, fixed", gt=0)] = 0.2
    teacher_spread: Annotated[float, meaning("margin_mse: between a sure 2 and a sure 0", "cosine", gt=0, le=2)] = 0.5
    teacher: Annotated[
        Teacher,
        meaning("listwise_kl: what ranks its products, the mean share at or above a grade, or the log odds of it"),
    ] = "shares"
    teacher_temperature: Annotated[
        float,
        meaning(
            "listwise_kl: of the teacher's scores, shares from 0 for a sure 0 to 1 for a sure 2, or log odds", gt=0
        ),
    ] = 0.2
    ordinal_steepness: Annotated[float, meaning("ordinal_kl: logits for a cosine of 1 at the start; learned", gt=0)] = (
        10.0
    )
    ordinal_boundaries: Annotated[
        tuple[float, float],
        meaning("ordinal_kl: cosine of even odds of grades 1 and 2 at the start; learned", "cosine"),
    ] = (0.325, 0.675)
    """Midway between the paper's boundaries of neighbouring grades."""
    background_cosine: Annotated[
        float, meaning("background: mean to the step's other products", "cosine", ge=-1, le=1)
    ] = 0.1
    matryoshka: Annotated[
        tuple[int, ...], meaning("shorter widths whose first dimensions are trained as vectors too", "dimensions")
    ] = ()


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
    loss: Annotated[LossRecipe, meaning("what is minimised")] = LossRecipe()
    epochs: Annotated[float, meaning("passes over the instances", "epochs", gt=0)] = 2.0
    max_steps: Annotated[int, meaning("steps instead of epochs; 0 leaves it to epochs", "steps", ge=0)] = 0
    max_texts: Annotated[
        int,
        meaning(
            "distinct texts through the encoder in all graded steps, at which they end; 0: no limit", "texts", ge=0
        ),
    ] = 0
    learning_rate: Annotated[float, meaning("peak rate of the pretrained weights", gt=0)] = 5e-5
    head_learning_rate: Annotated[float, meaning("peak rate of heads and temperature", gt=0)] = 2e-4
    warmup_share: Annotated[float, meaning("share of the steps with a rising rate; then it falls", ge=0, le=1)] = 0.1
    final_rate_share: Annotated[
        float, meaning("share of the peak rate that it falls to; above 0 where another stage goes on", ge=0, le=1)
    ] = 0.0
    weight_decay: Annotated[float, meaning("AdamW's decay of matrices", ge=0)] = 0.01
    lora_rank: Annotated[
        int,
        meaning(
            "inner width of low-rank adapters that are trained instead of the backbone, which wants a learning rate "
            "some ten times higher; what is published has them merged; 0: all weights are trained",
            ge=0,
        ),
    ] = 0
    mixed_share: Annotated[
        float,
        meaning(
            "share of another encoder's weights in the one that is validated and published: the pretrained one's, or "
            "those of inputs.mixed_with",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    gradient_clip: Annotated[float, meaning("longest gradient", "L2 norm", gt=0)] = 1.0
    batch: Annotated[BatchRecipe, meaning("size and make-up of a step")] = BatchRecipe()
    lexical: Annotated[LexicalRecipe, meaning("steps that learn the catalogue's words first")] = LexicalRecipe()
    dropout: Annotated[
        float | None, meaning("of the backbone while it is trained; null takes the backbone's own", ge=0, lt=1)
    ] = None
    texts_per_pass: Annotated[
        int,
        meaning(
            "texts computed at a time, in two passes; memory is theirs, the gradient the step's; 0: all at once", ge=0
        ),
    ] = 0
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

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The losses that are summed: the recipe's, or the paper's of the stage."""
        return self.loss.terms or (LossTerm(loss="supcon" if self.stage == 1 else "circle"),)

    @property
    def needs_contrast(self) -> bool:
        """Whether a query without products of two grades teaches nothing: no loss brings others beside its own."""
        return not any(term.reads_others for term in self.terms)


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card that `save_encoder` wrote; empty for a folder from elsewhere."""
    path = Path(folder, CARD_FILE)
    if not path.is_file():
        return {}
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
