"""Measures encoders on judged queries over the full catalogue, with paired gains over the pretrained one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import ConfigError, fingerprint, meaning, settings
from embeddings.evaluation import DEPTH, Measured, fit_thresholds, gains, judged_pairs, measure
from embeddings.recipes import EncoderRecipe
from embeddings.text import TextRecipe
from embeddings.vectors import CatalogVectors
from jobs import job
from jobs.embed_catalog import EmbedRecipe, SearchPlacement, embed, encoder_folder, search
from jobs.judged_queries import READ, Judged, import_mapped, read_judged
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import EVALUATION, EVALUATION_PAIR, EVALUATION_QUERY, TableSpec
from lake.storage import Lake, LakeError
from ray_apps.cluster import connect

HEADLINES = ("ndcg@10", "recall@100", "auc_2v1", "auc_1v0", "auc_2v0")


@settings
class Inputs:
    """The lake's judged queries and its encoders; or one encoder and any judged data set that a mapping describes."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    pretrained: Annotated[str, meaning("folder of the pretrained encoder; empty leaves it out")] = ""
    stage1: Annotated[str, meaning("folder of the stage 1 encoder; empty leaves it out")] = ""
    stage2: Annotated[str, meaning("folder of the stage 2 encoder; empty leaves it out")] = ""
    model: Annotated[str, meaning("folder of one more encoder; empty leaves it out")] = ""
    root: Annotated[str, meaning("folder with the data set that mapping describes")] = ""
    mapping: Annotated[str, meaning("YAML file that describes a data set to measure on, in place of the lake's")] = ""


@settings
class EvaluationRecipe:
    """Which queries are judged, and how intervals are drawn."""

    split: Annotated[Literal["test", "all"], meaning("queries measured")] = "test"
    seed: Annotated[int, meaning("seed of the bootstrap", ge=0)] = 0
    embedding: EmbedRecipe = EmbedRecipe()
    encoder: Annotated[EncoderRecipe, meaning("pretrained encoder built for comparison when none is given")] = (
        EncoderRecipe()
    )


@settings
class Config:
    """Settings of evaluate_retrieval."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    model: Annotated[str, meaning("the same as inputs.model")] = ""
    inputs: Inputs = Inputs()
    recipe: EvaluationRecipe = EvaluationRecipe()
    placement: SearchPlacement = SearchPlacement()

    def __post_init__(self) -> None:
        if self.model:
            object.__setattr__(self, "inputs", dataclasses.replace(self.inputs, model=self.model))


def run(config: Config) -> RunRecord:
    """A row per model and data set in evaluation, with its queries and pairs behind it."""
    _check_inputs(config.inputs)
    current = job.begin(config, "evaluate_retrieval")
    source, versions = current.lake, {name: int(current.inputs[name]) for name in READ if name in current.inputs}
    if config.inputs.mapping:
        source, versions = import_mapped(
            current.lake, {"root": config.inputs.root, "mapping": config.inputs.mapping}, current.inputs
        )
    judged = read_judged(source, versions, config.recipe.split)
    folders = _folders(config, current)
    found = measure_encoders(current, judged, folders, config.recipe.embedding, config.placement)
    metrics = _write(config, current, judged, found, folders)
    outputs = {
        spec.name: tables.version(current.lake, spec) or 0 for spec in (EVALUATION, EVALUATION_QUERY, EVALUATION_PAIR)
    }
    return current.finish(
        rows=sum(len(own.measured) for own in judged),
        outputs=outputs,
        counts={f"queries/{own.catalog.dataset}": len(own.measured) for own in judged},
        metrics=metrics,
    )


def _check_inputs(inputs: Inputs) -> None:
    """Refuses half a description of what to measure on."""
    has_tables = all((inputs.query, inputs.catalog_product, inputs.annotation_consensus))
    if bool(inputs.root) != bool(inputs.mapping) or not (inputs.mapping or has_tables):
        raise ConfigError("evaluate_retrieval: give model=DIR inputs.root=DIR inputs.mapping=FILE.yaml, all three")
    if inputs.root and not Path(inputs.root).is_dir():
        raise ConfigError(f"inputs.root={inputs.root!r}: no such folder; give inputs.root=DIR with the data set")


def _folders(config: Config, current: Run) -> dict[str, str]:
    """Name -> folder of every encoder that is measured; pretrained first."""
    named = {name: getattr(config.inputs, name) for name in ("pretrained", "stage1", "stage2")}
    folders = {name: encoder_folder(current.lake, value, f"inputs.{name}") for name, value in named.items() if value}
    if config.inputs.model:
        folder = encoder_folder(current.lake, config.inputs.model, "inputs.model")
        if "pretrained" not in folders:
            folders = {"pretrained": _pretrained(config, current.lake)} | folders
        name = Path(folder).resolve().name
        folders[f"{name} (model)" if name in named else name] = folder
    if not folders:
        raise LakeError("evaluate_retrieval: no encoder to measure; give inputs.stage2=FOLDER, or model=FOLDER")
    return folders


def _pretrained(config: Config, lake: Lake) -> str:
    """The folder of the recipe's pretrained encoder, built where it is missing."""
    from ray_apps import train as app

    text = TextRecipe()
    encoder = config.recipe.encoder
    weights = job.content_hash(encoder.model) if Path(encoder.model).is_dir() else ""
    folder = lake.path("models", "pretrained", fingerprint(encoder, text, weights))
    if not Path(folder).is_dir():
        connect(config.placement.embed.ray)
        app.build_pretrained(app.absolute_model(encoder), text, folder)
    return folder


def measure_encoders(
    current: Run,
    judged: Sequence[Judged],
    folders: Mapping[str, str],
    embedding: EmbedRecipe,
    placement: SearchPlacement,
) -> dict[tuple[str, str], Measured]:
    """What every encoder did on every data set, by (name, data set).

    Args:
        current: the run whose lake keeps the vectors.
        judged: queries and catalogues.
        folders: of the encoders by name.
        embedding: how texts become vectors.
        placement: where.
    """
    from ray_apps import mine as app

    prints = {name: job.content_hash(folder) for name, folder in folders.items()}
    texts = {own.catalog.dataset: own.texts for own in judged}
    models = {prints[name]: folder for name, folder in folders.items()}
    embedded = embed(current, [own.catalog for own in judged], models, texts, embedding, placement.embed)
    work = [(name, own, embedded[prints[name], own.catalog.dataset]) for name in folders for own in judged]
    rankings = search(
        [app.Search(vectors, query_QD[: len(own.measured)]) for _, own, (vectors, query_QD) in work], DEPTH, placement
    )
    return {
        (name, own.catalog.dataset): _measure_one(own, *pair, ranking.row_QK)
        for (name, own, pair), ranking in zip(work, rankings, strict=True)
    }


def _measure_one(
    own: Judged, vectors: CatalogVectors, query_QD: NDArray[np.float32], row_QK: NDArray[np.int64]
) -> Measured:
    """One encoder on one data set, with the thresholds of its grade bands where there are calibration queries."""
    ids = own.catalog.products["product_id"].to_pylist()
    titles = dict(zip(ids, own.catalog.products["title"].to_pylist(), strict=True))
    row_of = {product_id: row for row, product_id in enumerate(ids)}
    pairs = judged_pairs((*own.measured, *own.calibration))
    query_N = np.array([place for place, _, _ in pairs], dtype=np.int64)
    row_N = np.array([row_of[product] for _, product, _ in pairs], dtype=np.int64)
    grade_N = np.array([grade for _, _, grade in pairs], dtype=np.int8)
    score_N = vectors.pair_scores(query_QD, query_N, row_N)
    is_measured_N = query_N < len(own.measured)
    ranked = [[ids[row] for row in rows] for rows in row_QK.tolist()]
    measured = measure(own.measured, ranked, score_N[is_measured_N], titles)
    fitted = fit_thresholds(score_N[~is_measured_N], grade_N[~is_measured_N])
    bands = dict(zip(("threshold_1", "threshold_2"), fitted, strict=True)) if fitted else {}
    return dataclasses.replace(measured, metrics=measured.metrics | bands)


def _write(
    config: Config,
    current: Run,
    judged: Sequence[Judged],
    found: Mapping[tuple[str, str], Measured],
    folders: Mapping[str, str],
) -> dict[str, float]:
    """Rows in the three tables; returns the headline metrics by data set and model.

    The summaries come last and in one commit: whoever finds them finds all that is behind them.
    """
    rows: dict[TableSpec, list[dict[str, Any]]] = {EVALUATION_PAIR: [], EVALUATION_QUERY: [], EVALUATION: []}
    for own in judged:
        models = {name: found[name, own.catalog.dataset] for name in folders}
        for spec, more in _rows(config, current, own, models, folders).items():
            rows[spec] += more
    for spec, of_spec in rows.items():
        data = pa.Table.from_pylist(of_spec, schema=spec.schema)
        tables.append_once(current.lake, spec, data, run_id=current.run_id, part="0")
    return {
        f"{dataset}/{name}/{metric}": measured.metrics[metric]
        for (name, dataset), measured in found.items()
        for metric in HEADLINES
        if metric in measured.metrics
    }


def _rows(
    config: Config, current: Run, own: Judged, models: Mapping[str, Measured], folders: Mapping[str, str]
) -> dict[TableSpec, list[dict[str, Any]]]:
    """Rows of one data set, by table."""
    dataset = own.catalog.dataset
    summaries, queries, pairs = [], [], []
    for name, measured in models.items():
        key = {"run_id": current.run_id, "dataset": dataset, "model": name}
        gained = {}
        if name != "pretrained" and "pretrained" in models:
            gained = gains([measured], [models["pretrained"]], seed=config.recipe.seed)
        metrics = measured.metrics | _over_stage1(name, models, config.recipe.seed)
        summaries.append(
            key
            | {
                "fingerprint": job.content_hash(folders[name]),
                "split": config.recipe.split,
                "num_queries": measured.num_queries,
                "num_queries_left_out": len(own.measured) - measured.num_queries,
                "num_pairs": len(measured.score_N),
                "num_products": len(own.catalog.products),
                "metrics": list(metrics.items()),
                "gain_over_pretrained": [(metric, gain.mean) for metric, gain in gained.items()],
                "gain_low": [(metric, gain.low) for metric, gain in gained.items()],
                "gain_high": [(metric, gain.high) for metric, gain in gained.items()],
                "created_at": datetime.now(UTC),
            }
        )
        queries += [key | row for row in _query_rows(own, measured)]
        pairs += [key | row for row in _pair_rows(own, measured)]
    return {EVALUATION_PAIR: pairs, EVALUATION_QUERY: queries, EVALUATION: summaries}


def _over_stage1(name: str, models: Mapping[str, Measured], seed: int) -> dict[str, float]:
    """What stage 2 gains over stage 1, as metrics with their intervals."""
    if name != "stage2" or "stage1" not in models:
        return {}
    gained = gains([models[name]], [models["stage1"]], seed=seed)
    return {
        f"{metric}_over_stage1{suffix}": value
        for metric in HEADLINES
        if metric in gained
        for suffix, value in zip(("", "_low", "_high"), gained[metric], strict=True)
    }


def _query_rows(own: Judged, measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "query_id": query.query_id,
            "query": query.text,
            "metrics": list(metrics.items()),
            "top_product_ids": list(ranking[:10]),
        }
        for query, metrics, ranking in zip(own.measured, measured.per_query, measured.rankings, strict=True)
        if metrics is not None
    ]


def _pair_rows(own: Judged, measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "query_id": own.measured[place].query_id,
            "product_id": product_id,
            "grade": grade,
            "score": float(score),
        }
        for (place, product_id, grade), score in zip(judged_pairs(own.measured), measured.score_N, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("evaluate_retrieval", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
