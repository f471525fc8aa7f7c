"""Trains recipes at equal budget and measures them on test queries, each against pretrained and a reference recipe."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import pyarrow as pa

from conf.load import meaning, settings
from embeddings.evaluation import Measured, gains, mean_metrics
from embeddings.metrics import Interval
from embeddings.recipes import EncoderRecipe, TrainRecipe
from embeddings.text import TextRecipe
from jobs import job, train_encoder
from jobs.embed_catalog import EmbedRecipe, SearchPlacement
from jobs.evaluate_retrieval import HEADLINES, measure_encoders
from jobs.judged_queries import READ, Judged, read_judged
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import RECIPE_COMPARISON
from lake.storage import replace_text

log = logging.getLogger(__name__)

PRETRAINED = "pretrained"
SCORE = "validation_ndcg@10"
MOST_STEPS = 1_000_000


@settings
class Inputs:
    """Instances of both stages, what is judged, and mined pairs where a recipe takes negatives from them."""

    training_instance: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    mined_pair: job.TableVersion = "newest"


@settings
class ComparedStage(train_encoder.LearnedFrom):
    """One training of a recipe; a later one goes on from the encoder of the one before, or is mixed with it."""

    share: Annotated[float, meaning("of the budget; the shares of a recipe sum to 1", gt=0, le=1)] = 1.0
    begins: Annotated[
        Literal["before", "pretrained"], meaning("with the encoder of the stage before, or with the pretrained one")
    ] = "before"
    mixes: Annotated[
        Literal["before", "pretrained"], meaning("whose weights train.mixed_share takes; before: the stage before's")
    ] = "pretrained"
    train: Annotated[
        TrainRecipe, meaning("its stage says which instances it learns from; its seed is added to the comparison's")
    ] = TrainRecipe()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixes == "before" and not self.train.mixed_share:
            raise ValueError("mixes=before: nothing of it would be mixed in; give train.mixed_share")


@settings
class ComparedRecipe:
    """A way to train the encoder."""

    name: Annotated[str, meaning("in the table and the report")]
    stages: Annotated[tuple[ComparedStage, ...], meaning("in their order")] = (ComparedStage(),)
    encoder: Annotated[EncoderRecipe | None, meaning("in place of the comparison's own; for ablations")] = None
    text: Annotated[TextRecipe | None, meaning("in place of the comparison's own; for ablations")] = None

    def __post_init__(self) -> None:
        if not self.stages or abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"recipe {self.name!r}: expected stages whose shares of the budget sum to 1")
        if self.stages[0].mixes == "before":
            raise ValueError(f"recipe {self.name!r}: no stage is before the first one, whose weights it could mix")
        if self.name == PRETRAINED:
            raise ValueError(f"a recipe may not be named {PRETRAINED!r}: that row is there anyway")


@settings
class ComparisonRecipe:
    """What all recipes have in common, and the recipes."""

    encoder: EncoderRecipe = EncoderRecipe()
    text: TextRecipe = TextRecipe()
    max_texts: Annotated[
        int, meaning("budget of a training: distinct texts of its steps, forward and backward", "texts", ge=1)
    ] = 54_000
    dropout: Annotated[
        float | None, meaning("of the backbone in all trainings; null leaves it to each recipe", ge=0, lt=1)
    ] = None
    rate_factors: Annotated[
        tuple[float, ...],
        meaning("of a recipe's learning rates, tried with the first seed; the best by validation NDCG@10 is taken"),
    ] = (1.0,)
    seeds: Annotated[tuple[int, ...], meaning("trainings per recipe; the first one chooses the factor")] = (0,)
    recipes: Annotated[tuple[ComparedRecipe, ...], meaning("compared with each other")] = ()
    reference: Annotated[str, meaning("name of the recipe that the others are held against; empty: the first")] = ""
    embedding: EmbedRecipe = EmbedRecipe()
    seed: Annotated[int, meaning("seed of the bootstrap", ge=0)] = 0

    def __post_init__(self) -> None:
        names = [recipe.name for recipe in self.recipes]
        if not names or len(set(names)) < len(names):
            raise ValueError("recipes: expected at least one recipe, each with a name of its own")
        if self.reference and self.reference not in names:
            raise ValueError(f"reference={self.reference!r}: expected one of {', '.join(names)}, or nothing")
        if not self.rate_factors or min(self.rate_factors) <= 0 or not self.seeds:
            raise ValueError("expected rate_factors above 0 and seeds, at least one of each")

    @property
    def held_against(self) -> str:
        """Name of the reference."""
        return self.reference or self.recipes[0].name


@settings
class Placement:
    """Where trainings run and where encoders are measured."""

    train: train_encoder.Placement = train_encoder.Placement()
    trainings_at_once: Annotated[
        int, meaning("trainings side by side; two of one thread do more than one of two threads", "trainings", ge=1)
    ] = 1
    search: SearchPlacement = SearchPlacement()


@settings
class Config:
    """Settings of compare_recipes."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ComparisonRecipe = dataclasses.field(
        default_factory=lambda: ComparisonRecipe(recipes=(ComparedRecipe(name="paper stage 1"),))
    )
    placement: Placement = Placement()


@dataclasses.dataclass(frozen=True)
class Trained:
    """One training of a recipe, all its stages.

    Attributes:
        encoder: folder in the lake.
        pretrained: folder of the encoder that it started from.
        score: validation NDCG@10 of what was published; None without validation queries.
        texts: through the encoder.
        seconds: of all stages.
    """

    encoder: str
    pretrained: str
    score: float | None
    texts: float
    seconds: float


def run(config: Config) -> RunRecord:
    """Rows in recipe_comparison and a page under reports/; trainings that the lake has are not repeated."""
    current, recipe = job.begin(config, "compare_recipes"), config.recipe
    first = [(one, factor, recipe.seeds[0]) for one in recipe.recipes for factor in recipe.rate_factors]
    tried = dict(zip(((one.name, factor) for one, factor, _ in first), _train(config, current, first), strict=True))
    factors = {one.name: _best_factor(recipe, one.name, tried) for one in recipe.recipes}
    others = [(one, factors[one.name], seed) for one in recipe.recipes for seed in recipe.seeds[1:]]
    more = dict(zip(((one.name, seed) for one, _, seed in others), _train(config, current, others), strict=True))
    chosen = {
        name: (factor, [tried[name, factor], *(more[name, seed] for seed in recipe.seeds[1:])])
        for name, factor in factors.items()
    }
    judged = read_judged(current.lake, {name: int(current.inputs[name]) for name in READ}, "test")
    folders = {PRETRAINED: current.lake.path(chosen[recipe.held_against][1][0].pretrained)}
    for name, (_, trained) in chosen.items():
        folders |= {f"{name}/{place}": current.lake.path(one.encoder) for place, one in enumerate(trained)}
    found = measure_encoders(current, judged, folders, recipe.embedding, config.placement.search)
    rows = [row for own in judged for row in _rows(current, recipe, own, chosen, found)]
    data = pa.Table.from_pylist(rows, schema=RECIPE_COMPARISON.schema)
    tables.append_once(current.lake, RECIPE_COMPARISON, data, run_id=current.run_id, part="0")
    page = f"reports/recipes-{current.run_id}.md"
    replace_text(current.lake.path(page), _page(rows, recipe))
    return current.finish(
        rows=len(rows),
        outputs={RECIPE_COMPARISON.name: tables.version(current.lake, RECIPE_COMPARISON) or 0, "page": page},
        counts={"trainings": len(recipe.recipes) * (len(recipe.rate_factors) + len(recipe.seeds) - 1)},
        metrics={
            f"{row['dataset']}/{row['recipe']}/{metric}": dict(row["metrics"])[metric]
            for row in rows
            for metric in HEADLINES
            if metric in dict(row["metrics"])
        },
    )


def _best_factor(recipe: ComparisonRecipe, name: str, tried: Mapping[tuple[str, float], Trained]) -> float:
    """The factor of the best validation NDCG@10; the first one of equals."""
    best = max(recipe.rate_factors, key=lambda factor: tried[name, factor].score or 0.0)
    log.info("compare_recipes: %s: rates x %g, validation NDCG@10 %s", name, best, tried[name, best].score)
    return best


def _train(config: Config, current: Run, work: Sequence[tuple[ComparedRecipe, float, int]]) -> list[Trained]:
    """All stages of each (recipe, factor, seed), in their order; a stage that several have in common once."""
    from ray_apps.side_by_side import side_by_side

    records: list[list[RunRecord]] = [[] for _ in work]
    wanted_by: dict[train_encoder.Config, list[int]] = defaultdict(list)

    def next_stages(places: Iterable[int]) -> list[train_encoder.Config]:
        found = []
        for place in places:
            (recipe, factor, seed), done = work[place], records[place]
            if len(done) < len(recipe.stages):
                stage = recipe.stages[len(done)]
                found.append(_stage_config(config, current, recipe, stage, factor, seed, _encoder(done)))
                wanted_by[found[-1]].append(place)
        return list(dict.fromkeys(found))

    def then(training: train_encoder.Config, record: RunRecord) -> list[train_encoder.Config]:
        for place in wanted_by[training]:
            records[place].append(record)
        return next_stages(wanted_by[training])

    side_by_side(
        partial(job.run_once, job="train_encoder", run=train_encoder.run),
        next_stages(range(len(work))),
        at_once=config.placement.trainings_at_once,
        ray_placement=config.placement.train.ray,
        then=then,
    )
    return [_trained(done) for done in records]


def _encoder(stages: Sequence[RunRecord]) -> str:
    """Folder of the encoder that the last stage left; empty before the first."""
    return stages[-1].outputs["encoder"] if stages else ""


def _trained(stages: Sequence[RunRecord]) -> Trained:
    """What the records of a recipe's stages say together."""
    return Trained(
        encoder=_encoder(stages),
        pretrained=next(record.outputs["pretrained"] for record in stages if "pretrained" in record.outputs),
        score=stages[-1].metrics.get(SCORE),
        texts=sum(record.metrics["texts"] for record in stages),
        seconds=sum(record.seconds for record in stages),
    )


def _stage_config(
    config: Config,
    current: Run,
    recipe: ComparedRecipe,
    stage: ComparedStage,
    factor: float,
    seed: int,
    before: str,
) -> train_encoder.Config:
    train = dataclasses.replace(
        stage.train,
        # of two branches of one loss each has draws of its own
        seed=stage.train.seed + seed,
        learning_rate=stage.train.learning_rate * factor,
        head_learning_rate=stage.train.head_learning_rate * factor,
        dropout=stage.train.dropout if config.recipe.dropout is None else config.recipe.dropout,
        # the budget ends it, however many passes that is
        max_steps=MOST_STEPS,
        max_texts=round(config.recipe.max_texts * stage.share),
    )
    names = ("training_instance", "query", "catalog_product", "annotation_consensus")
    pinned = {name: current.inputs[name] for name in names}
    learned = {field.name: getattr(stage, field.name) for field in dataclasses.fields(train_encoder.LearnedFrom)}
    if stage.filtered_negatives.per_query:
        pinned["mined_pair"] = current.inputs["mined_pair"]
    return train_encoder.Config(
        lake=config.lake,
        setting=config.setting,
        inputs=train_encoder.Inputs(
            **pinned,
            model=before if stage.begins == "before" else "",
            mixed_with=before if stage.mixes == "before" else "",
        ),
        recipe=train_encoder.EncoderTrainingRecipe(
            encoder=recipe.encoder or config.recipe.encoder,
            text=recipe.text or config.recipe.text,
            **learned | {"train": train},
        ),
        placement=config.placement.train,
    )


def _rows(
    current: Run,
    recipe: ComparisonRecipe,
    own: Judged,
    chosen: Mapping[str, tuple[float, Sequence[Trained]]],
    found: Mapping[tuple[str, str], Measured],
) -> list[dict[str, Any]]:
    """A data set's rows, pretrained first, then the recipes in the order of the settings."""
    dataset = own.catalog.dataset
    measured = {
        name: [found[f"{name}/{place}", dataset] for place in range(len(trained))]
        for name, (_, trained) in chosen.items()
    }
    pretrained, reference = [found[PRETRAINED, dataset]], measured[recipe.held_against]
    rows = []
    for name, encoders in {PRETRAINED: pretrained, **measured}.items():
        factor, trained = chosen.get(name, (1.0, ()))
        over_pretrained = {} if name == PRETRAINED else gains(encoders, pretrained, seed=recipe.seed)
        is_reference = name == recipe.held_against
        of_reference = {} if is_reference else gains(reference, encoders, seed=recipe.seed)
        rows.append(
            {
                "run_id": current.run_id,
                "dataset": dataset,
                "recipe": name,
                "rate_factor": factor,
                "seeds": list(recipe.seeds) if trained else [],
                "texts": sum(one.texts for one in trained) / max(len(trained), 1),
                "train_sec": sum(one.seconds for one in trained) / max(len(trained), 1),
                "validation_ndcg_10": trained[0].score if trained else None,
                "num_queries": encoders[0].num_queries,
                "metrics": list(mean_metrics(encoders).items()),
                **_intervals(("gain_over_pretrained", "gain_low", "gain_high"), over_pretrained),
                **_intervals(("reference_gain", "reference_low", "reference_high"), of_reference),
                "created_at": datetime.now(UTC),
            }
        )
    return rows


def _intervals(names: Sequence[str], found: Mapping[str, Interval]) -> dict[str, list[tuple[str, float]]]:
    return {name: [(metric, interval[place]) for metric, interval in found.items()] for place, name in enumerate(names)}


def _page(rows: Sequence[Mapping[str, Any]], recipe: ComparisonRecipe) -> str:
    """The table as Markdown, a data set after the other."""
    told = (
        f"Means over seeds {', '.join(map(str, recipe.seeds))}. In brackets the 95 % interval of what "
        f"{recipe.held_against} gains over the row (paired bootstrap over test queries). Rates chosen on validation."
    )
    lines = [f"# Recipes at {recipe.max_texts} texts", "", told]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        lines += ["", f"## {dataset}, {own[0]['num_queries']} test queries", ""]
        lines += [f"| recipe | rates | texts | s | {' | '.join(HEADLINES)} |", "|---" * (4 + len(HEADLINES)) + "|"]
        for row in own:
            metrics, low, high = (dict(row[name]) for name in ("metrics", "reference_low", "reference_high"))
            cells = [
                f"{metrics[metric]:.4f}" + (f" [{low[metric]:+.3f} {high[metric]:+.3f}]" if metric in low else "")
                if metric in metrics
                else ""
                for metric in HEADLINES
            ]
            costs = f"{row['rate_factor']:g} | {row['texts']:.0f} | {row['train_sec']:.0f}"
            lines.append(f"| {row['recipe']} | {costs} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("compare_recipes", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
