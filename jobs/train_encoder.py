"""Trains the encoder on instances: stage 1 orders the grades, stage 2 gives each its band of cosines."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from conf.load import ConfigError, describe, meaning, settings, validate
from embeddings.batches import UNGRADED, Instance
from embeddings.lexical import CatalogText, sample_catalog
from embeddings.mining import at_share
from embeddings.recipes import CARD_FILE, EncoderRecipe, TrainRecipe, read_card
from embeddings.synthetic_queries import QueryWriter, write_queries
from embeddings.text import FIELDS, TextRecipe, normal_form, normalise_query, product_texts
from jobs import job, labelling
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, CATALOG_PRODUCT, JUDGES, MINED_PAIR, QUERY, SOURCES, Grade
from lake.storage import Lake
from ray_apps.cluster import RayPlacement, connect
from ray_apps.placements import Sharding
from ray_apps.tracking import Kind, Tracking

log = logging.getLogger(__name__)

Products = Mapping[tuple[str, str], CatalogText]
Graded = tuple[int, float, float]
"""A grade, and the shares of raters, or probabilities, at or above grades 1 and 2."""


@settings
class Inputs:
    """Instances, what their ids stand for, and the encoder that stage 2 goes on from."""

    training_instance: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    mined_pair: Annotated[job.TableVersion, meaning("only recipe.filtered_negatives reads it")] = ""
    model: Annotated[str, meaning("folder of the stage 1 encoder; empty builds recipe.encoder.model")] = ""
    mixed_with: Annotated[
        str, meaning("folder of the encoder of recipe.train.mixed_share, built alike; empty: the pretrained one")
    ] = ""


@settings
class FilteredNegatives:
    """Mined products without a grade, as peers use them: the nearest that are not too near.

    They stand beside a query as its `contrasts`: in-batch losses take them for irrelevant, while a loss over graded
    pairs does not see them, since near the top a guess of 0 is often wrong.

    Cites: Moreira et al. 2024 (arXiv 2407.15831), TopK-PercPos.
    """

    per_query: Annotated[
        int,
        meaning(
            "most of them that a query brings; train.batch.contrasts_per_query are drawn; 0: none", "products", ge=0
        ),
    ] = 0
    ceiling: Annotated[
        float,
        meaning(
            "up to this share of the lowest cosine of the query's products of its best grade, by the mining encoder",
            gt=0,
            le=1,
        ),
    ] = 0.95


ALL_SOURCES = (*JUDGES, *SOURCES)
"""Who graded a pair of people's, or where a labeller's pair came from."""

LeftOut = Annotated[
    tuple[str, ...],
    meaning(
        "sources whose grades are not learned from, or one grade of a source as mined:2; nor are such pairs in-batch "
        f"negatives. Sources: {', '.join(ALL_SOURCES)}"
    ),
]


Soft = Annotated[
    tuple[str, ...],
    meaning(
        "sources of whose pairs the probabilities alone are learned from, by listwise_kl, margin_mse and ordinal_kl: "
        "they have no grade for any other loss; train.batch.soft_per_query of them are drawn"
    ),
]


SyntheticQueries = Annotated[
    int,
    meaning(
        "queries written from titles of the catalogue by what people's queries take from theirs, beside the graded "
        "ones; each has its product alone, presumed to be of the best grade",
        "queries",
        ge=0,
    ),
]


def _check_soft(soft: Sequence[str], train: TrainRecipe) -> None:
    """Raises ValueError for what is no source, or what no loss would read."""
    if unknown := [entry for entry in soft if entry not in ALL_SOURCES]:
        raise ValueError(f"soft={unknown[0]!r}: expected one of {', '.join(ALL_SOURCES)}")
    if bool(soft) != bool(train.batch.soft_per_query):
        raise ValueError(
            "soft and train.batch.soft_per_query: expected both, since the one says whose probabilities are learned "
            "from and the other how many of them are drawn, or neither"
        )
    if soft and not any(term.reads_shares for term in train.terms):
        raise ValueError("soft: expected a loss that reads probabilities; add listwise_kl, margin_mse or ordinal_kl")


def _check_in_batch(recipe: LearnedFrom) -> None:
    """Raises ValueError for what in-batch losses alone could learn from where there is none."""
    wanted = {"filtered_negatives": recipe.filtered_negatives.per_query, "synthetic_queries": recipe.synthetic_queries}
    if any(term.in_batch for term in recipe.train.terms):
        return
    for name, number in wanted.items():
        if number:
            raise ValueError(f"{name}: expected a loss that reads them; give a term of train.loss in_batch=true")


def _check_left_out(leave_out: Sequence[str]) -> None:
    """Raises ValueError for what is neither a source nor a source and a grade."""
    for entry in leave_out:
        source, _, grade = entry.partition(":")
        if source not in ALL_SOURCES or (":" in entry and grade not in ("0", "1", "2")):
            raise ValueError(
                f"leave_out={entry!r}: expected one of {', '.join(ALL_SOURCES)}, or with a grade, as mined:2"
            )


@settings
class LearnedFrom:
    """One training, and what of the lake it learns from."""

    train: TrainRecipe = TrainRecipe()
    leave_out: LeftOut = ()
    soft: Soft = ()
    filtered_negatives: Annotated[FilteredNegatives, meaning("ungraded products beside the graded")] = (
        FilteredNegatives()
    )
    synthetic_queries: SyntheticQueries = 0

    def __post_init__(self) -> None:
        _check_left_out(self.leave_out)
        _check_soft(self.soft, self.train)
        _check_in_batch(self)


@settings
class EncoderTrainingRecipe(LearnedFrom):
    """What is trained and how. A run that goes on from a model takes texts and limits from that model's card."""

    encoder: EncoderRecipe = EncoderRecipe()
    text: TextRecipe = TextRecipe()


@settings
class Placement:
    """Where training runs."""

    ray: RayPlacement = RayPlacement()
    num_workers: Annotated[int, meaning("DDP workers", ge=1)] = 1
    threads_per_worker: Annotated[int, meaning("CPUs and threads of each", "CPUs", ge=1)] = 2
    use_gpu: Annotated[bool, meaning("one GPU per worker")] = False
    compiled: Annotated[
        bool, meaning("compile the backbone for training: a minute or two at the start, then steps are faster")
    ] = False
    sharding: Sharding = "none"
    gradient_checkpointing: Annotated[
        bool, meaning("compute layers again for the gradient: less memory, about a third more time")
    ] = False
    max_failures: Annotated[int, meaning("restarts after a worker died", ge=0)] = 0
    least_workers: Annotated[
        int | None, meaning("workers to start and go on with while the cluster has no more nodes; null: all", ge=1)
    ] = None
    resize_every_sec: Annotated[
        float, meaning("between looks for more nodes; a run then goes on from its newest checkpoint", "s", gt=0)
    ] = 60.0
    trackers: Annotated[
        tuple[Kind, ...],
        meaning("who is told metrics of every step: tensorboard files in the lake, mlflow's server"),
    ] = ()


@settings
class Config:
    """Settings of train_encoder."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: EncoderTrainingRecipe = EncoderTrainingRecipe()
    placement: Placement = Placement()

    def __post_init__(self) -> None:
        if self.inputs.mixed_with and not self.recipe.train.mixed_share:
            raise ValueError("inputs.mixed_with: nothing of it would be mixed in; give recipe.train.mixed_share")


def run(config: Config) -> RunRecord:
    """The encoder of one stage, and in stage 1 the pretrained baseline beside it."""
    from ray_apps import train as app

    current = job.begin(config, "train_encoder")
    lake, stage = current.lake, config.recipe.train.stage
    start, other = (_folder(lake, config.inputs, name) for name in ("model", "mixed_with"))
    encoder, text = _recipes(config.recipe, start)
    products = _products(current, text)
    rows, validation = labelling.train_instances(current, stage), _validation(current, products)
    instances = [_train_instance(row, products, config.recipe.leave_out, config.recipe.soft) for row in rows]
    if config.recipe.filtered_negatives.per_query:
        instances = _with_negatives(instances, current, products, config.recipe.filtered_negatives)
    if config.recipe.synthetic_queries:
        instances += _synthetic_instances(rows, current, products, config.recipe)
    if encoder.length_percentile:
        # sentence-transformers takes seconds to load
        from embeddings.encoder import fit_lengths

        queries = [instance.query for instance in (*instances, *validation)]
        encoder = fit_lengths(encoder, queries, [product.text for product in products.values()])
        limits = encoder.max_query_tokens, encoder.max_document_tokens
        log.info("train_encoder: queries are cut at %d tokens, products at %d", *limits)
    encoder = app.absolute_model(encoder)
    # as cards hold them: with fitted lengths and an absolute path
    if other and (encoder, text) != _recipes(config.recipe, other):
        raise ConfigError(
            f"inputs.mixed_with={config.inputs.mixed_with!r}: expected an encoder of the same settings and texts as "
            "the one that is trained; give one of its recipes, or leave it empty"
        )
    log.info("train_encoder: stage %d, %d instances, %d validation queries", stage, len(instances), len(validation))
    encoder_path, pretrained_path = f"models/encoder/{current.fingerprint}", f"models/pretrained/{current.fingerprint}"
    task = app.TrainTask(
        instances=instances,
        validation=validation,
        recipe=config.recipe.train,
        encoder=encoder,
        text=text,
        start=start or "",
        mixed_with=other or "",
        pretrained="" if start else lake.path(pretrained_path),
        fingerprint=current.fingerprint,
        catalog=_lexical_sample(products, config.recipe.train),
        compiled=config.placement.compiled,
        recomputed=config.placement.gradient_checkpointing,
        sharding=config.placement.sharding,
        tracking=Tracking(
            config.placement.trackers,
            folder=lake.path("tensorboard", current.fingerprint),
            name=current.fingerprint,
            settings={item.key: item.default for item in describe(EncoderTrainingRecipe, config.recipe)}
            | {f"inputs.{name}": version for name, version in current.inputs.items()},
        ).here(),
    )
    connect(config.placement.ray)
    metrics = app.train(
        task,
        lake.path(encoder_path),
        storage=lake.path("runs"),
        num_workers=config.placement.num_workers,
        threads_per_worker=config.placement.threads_per_worker,
        use_gpu=config.placement.use_gpu,
        max_failures=config.placement.max_failures,
        least_workers=config.placement.least_workers,
        resize_every_sec=config.placement.resize_every_sec,
    )
    record = current.finish(
        rows=len(instances),
        outputs={"encoder": encoder_path} | ({} if start else {"pretrained": pretrained_path}),
        counts={"instances": len(instances), "validation_queries": len(validation)},
        metrics=metrics,
    )
    app.drop_checkpoints(lake.path("runs"), current.fingerprint)
    return record


def _folder(lake: Lake, inputs: Inputs, name: str) -> str | None:
    """The folder that an input names; None where it names none."""
    value = getattr(inputs, name)
    folder = job.find_path(lake, value) if value else None
    if value and folder is None:
        raise ConfigError(f"inputs.{name}={value!r}: no such folder in the lake or elsewhere")
    return folder


def _recipes(recipe: EncoderTrainingRecipe, start: str | None) -> tuple[EncoderRecipe, TextRecipe]:
    """Encoder and text recipe: those of the model's card where the run goes on from a model."""
    if start is None:
        return recipe.encoder, recipe.text
    source, card = f"{start}/{CARD_FILE}", read_card(start)
    return (
        validate(EncoderRecipe, card.get("encoder", {}), source=source),
        validate(TextRecipe, card.get("text", {}), source=source),
    )


def _products(current: Run, recipe: TextRecipe) -> Products:
    names = ["dataset", "product_id", *FIELDS]
    version = int(current.inputs["catalog_product"])
    rows = tables.rows(current.lake, CATALOG_PRODUCT, version=version, columns=names)
    keys = (rows[name].to_pylist() for name in ("dataset", "product_id", "title"))
    return {
        (dataset, product_id): CatalogText(text, title or "")
        for dataset, product_id, title, text in zip(*keys, product_texts(rows, recipe), strict=True)
    }


def _with_negatives(
    instances: Sequence[Instance], current: Run, products: Products, recipe: FilteredNegatives
) -> list[Instance]:
    """The instances with their nearest mined products that have no grade and stay below the ceiling, as contrasts."""
    names = ["dataset", "query_id", "product_id", "rank", "score", "lowest_positive"]
    version = int(current.inputs["mined_pair"])
    mined = tables.rows(current.lake, MINED_PAIR, version=version, columns=names).sort_by("rank").to_pylist()
    nearest: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair in mined:
        product, lowest = products.get((pair["dataset"], pair["product_id"])), pair["lowest_positive"]
        if product and lowest is not None and pair["score"] <= at_share(lowest, recipe.ceiling):
            nearest[pair["dataset"], pair["query_id"]].append(product.text)
    found = []
    for instance in instances:
        pairs = zip(instance.products, instance.grades, strict=True)
        graded = {*instance.left_out, *(text for text, grade in pairs if grade != UNGRADED)}
        fresh = dict.fromkeys(text for text in nearest[instance.key] if text not in graded)
        found.append(dataclasses.replace(instance, contrasts=list(fresh)[: recipe.per_query]))
    with_any = sum(bool(instance.contrasts) for instance in found)
    log.info("train_encoder: mined negatives beside %d of %d instances", with_any, len(found))
    return found


def _synthetic_instances(
    rows: Sequence[Mapping[str, Any]], current: Run, products: Products, recipe: EncoderTrainingRecipe
) -> list[Instance]:
    """Written queries, each with its product; none that people asked, whatever its split."""
    pairs = [
        (row["query"], product.title)
        for row in rows
        for product_id, source, grade in zip(row["product_ids"], row["sources"], row["grades"], strict=True)
        if source in JUDGES and grade == Grade.EXACT and (product := products.get((row["dataset"], product_id)))
    ]
    asked = {normal_form(text) for text in labelling.read(current, QUERY, ["text"])["text"].to_pylist()}
    titles = sorted((key, product.title) for key, product in products.items() if product.text)
    written = write_queries(QueryWriter(pairs), titles, recipe.synthetic_queries, recipe.train.seed)
    fresh = [(key, query) for key, query in written if query not in asked]
    log.info("train_encoder: %d queries written from %d titles, as of %d pairs", len(fresh), len(titles), len(pairs))
    grade_P = np.array([Grade.EXACT], dtype=np.int8)
    return [
        Instance((dataset, f"written:{product_id}:{query}"), query, [products[dataset, product_id].text], grade_P)
        for (dataset, product_id), query in fresh
    ]


def _lexical_sample(products: Products, recipe: TrainRecipe) -> list[CatalogText]:
    """What the lexical steps learn from; drawn before the workers start, since each of them holds all it is given."""
    if not recipe.lexical.steps:
        return []
    return sample_catalog(products.values(), recipe.lexical.max_products, recipe.seed)


def _validation(current: Run, products: Products) -> list[Instance]:
    """Validation queries with their human grades."""
    lake, pinned = current.lake, current.inputs
    queries = tables.rows(
        lake,
        QUERY,
        version=int(pinned["query"]),
        columns=["dataset", "query_id", "text"],
        where=[("split", "=", "validation")],
    ).to_pylist()
    grades: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    names = ["dataset", "query_id", "product_id", "grade"]
    consensus = tables.rows(lake, ANNOTATION_CONSENSUS, version=int(pinned["annotation_consensus"]), columns=names)
    for dataset, query_id, product_id, grade in zip(*(consensus[name].to_pylist() for name in names), strict=True):
        grades[dataset, query_id][product_id] = grade
    judged = [(row, grades[row["dataset"], row["query_id"]]) for row in queries]
    return [
        _instance(row, row["text"], {product: _clean(own[product]) for product in sorted(own)}, products)
        for row, own in sorted(judged, key=lambda item: (item[0]["dataset"], item[0]["query_id"]))
        if own
    ]


def _train_instance(
    row: Mapping[str, Any], products: Products, leave_out: Sequence[str], soft: Sequence[str] = ()
) -> Instance:
    """The instance of a row without the pairs that `leave_out` names, whose texts it keeps as graded all the same.

    Pairs of a source in `soft` have shares and no grade.
    """
    learned: dict[str, Graded] = {}
    skipped: dict[str, Graded] = {}
    shares = [row[name] or [None] * len(row["grades"]) for name in ("at_least_1", "at_least_2")]
    for product_id, source, *graded in zip(row["product_ids"], row["sources"], row["grades"], *shares, strict=True):
        is_left_out = source in leave_out or f"{source}:{graded[0]}" in leave_out
        grade, at_least_1, at_least_2 = _clean(*graded)
        grade = UNGRADED if source in soft else grade
        (skipped if is_left_out else learned)[product_id] = grade, at_least_1, at_least_2
    instance = _instance(row, row["query"], learned, products)
    return dataclasses.replace(instance, left_out=_instance(row, row["query"], skipped, products).products)


def _clean(grade: int, at_least_1: float | None = None, at_least_2: float | None = None) -> Graded:
    """A grade and its shares; those of a clean grade where none are known, as in tables before there were any."""
    if at_least_1 is None or at_least_2 is None:
        return grade, float(grade >= 1), float(grade >= 2)
    return grade, at_least_1, at_least_2


def _instance(row: Mapping[str, Any], text: str, grades: Mapping[str, Graded], products: Products) -> Instance:
    key = (row["dataset"], row["query_id"])
    known: dict[str, Graded] = {}
    for product_id, graded in grades.items():
        product = products.get((row["dataset"], product_id))
        if product is not None:
            # products of one text are one vector, which two grades would tear at: the higher one counts
            known[product.text] = max(graded, known.get(product.text, graded))
    grade_P3 = np.array(list(known.values()), dtype=np.float32).reshape(-1, 3)
    return Instance(key, normalise_query(text), list(known), grade_P3[:, 0].astype(np.int8), grade_P3[:, 1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("train_encoder", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
