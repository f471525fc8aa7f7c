"""Searches a catalogue with a trained encoder: the best products of a query, with score and grade band."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from conf.load import ConfigError, meaning, settings
from embeddings.text import normalise_query
from embeddings.vectors import CatalogVectors, StoreError
from jobs import embed_catalog, job
from jobs.embed_catalog import Catalog, EmbedPlacement, EmbedRecipe, read_catalogs
from jobs.models import encoder_folder
from lake import tables
from lake.mapped import take_rows
from lake.runs import RunRecord, pinned_version
from lake.schemas import EVALUATION
from lake.storage import Lake

MAX_QUERY_CHARS = 1000
PAPER_THRESHOLDS = (0.40, 0.75)
"""Boundaries of grades 1 and 2 in the paper's circle loss, for a model that was not evaluated yet."""


@settings
class Inputs:
    """The catalogue and the encoder."""

    catalog_product: job.TableVersion = "newest"
    model: Annotated[str, meaning("stage2, stage1, pretrained, or the folder of an encoder")] = "stage2"


@settings
class SearchRecipe:
    """What is shown."""

    num_products: Annotated[int, meaning("products shown", "products", ge=1)] = 10
    dataset: Annotated[str, meaning("data set searched; empty: all of the lake")] = ""
    embedding: EmbedRecipe = EmbedRecipe()


@settings
class Config:
    """Settings of search."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    query: Annotated[str, meaning("what to search for")] = ""
    inputs: Inputs = Inputs()
    recipe: SearchRecipe = SearchRecipe()
    placement: EmbedPlacement = EmbedPlacement()


def search(config: Config) -> list[dict[str, Any]]:
    """The best products, best first: dataset, product_id, title, brand, score (cosine) and grade (band of the score).

    Vectors of the catalogue are computed where the model has none yet.

    Raises:
        ValueError: the query is empty or too long.
        ConfigError: the lake has no products of the data set.
    """
    text = normalise_query(config.query)
    if not text or len(config.query) > MAX_QUERY_CHARS:
        raise ValueError(
            f"search: expected a query of 1 to {MAX_QUERY_CHARS} characters, got {len(config.query)}; shorten it"
            if text
            else "search: the query is empty; give some words"
        )
    from embeddings.encoder import encode, load_encoder

    lake = Lake(config.lake)
    folder = encoder_folder(lake, config.inputs.model)
    version = pinned_version(lake, "catalog_product", config.inputs.catalog_product)
    model, _ = load_encoder(folder)
    query_D = encode(model, [text], "query")[0]
    print_ = job.content_hash(folder)
    hits: list[dict[str, Any]] = []
    datasets = [config.recipe.dataset] if config.recipe.dataset else ()
    catalogs = read_catalogs(lake, version, datasets, ("title", "brand"))
    if not catalogs:
        raise ConfigError(f"recipe.dataset={config.recipe.dataset!r}: lake={lake.root} has no products of it")
    for catalog in catalogs:
        vectors = _vectors(config, lake, catalog, folder, print_)
        hits += _best(catalog, vectors, query_D, config.recipe.num_products, _thresholds(lake, catalog.dataset, print_))
    return sorted(hits, key=lambda hit: (-hit["score"], hit["dataset"], hit["product_id"]))[
        : config.recipe.num_products
    ]


def run(config: Config) -> RunRecord:
    """Searches and records that it did; the products are printed by `assay search`."""
    current = job.begin(config, "search")
    return current.finish(rows=len(search(config)), outputs={})


def _vectors(config: Config, lake: Lake, catalog: Catalog, folder: str, model: str) -> CatalogVectors:
    try:
        return catalog.vectors(lake, model, config.recipe.embedding)
    except StoreError:
        embed_catalog.run(
            embed_catalog.Config(
                lake=config.lake,
                setting=config.setting,
                inputs=embed_catalog.Inputs(catalog_product=config.inputs.catalog_product, model=folder),
                recipe=config.recipe.embedding,
                placement=config.placement,
            )
        )
    return catalog.vectors(lake, model, config.recipe.embedding)


def _best(
    catalog: Catalog, vectors: CatalogVectors, query_D: np.ndarray[Any, Any], count: int, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    from embeddings.exact import ExactSearch

    score_1K, row_1K = ExactSearch(vectors, np.arange(len(vectors))).search(query_D[None], count)
    return [
        {
            "dataset": catalog.dataset,
            "product_id": product["product_id"],
            "title": product["title"],
            "brand": product["brand"],
            "score": float(score),
            "grade": sum(float(score) >= threshold for threshold in thresholds),
        }
        for product, score in zip(take_rows(catalog.products, row_1K[0]).to_pylist(), score_1K[0], strict=True)
    ]


def _thresholds(lake: Lake, dataset: str, model: str) -> tuple[float, float]:
    """Least cosines of grades 1 and 2 from the newest evaluation of this very encoder."""
    if tables.exists(lake, EVALUATION):
        where = [("dataset", "=", dataset), ("fingerprint", "=", model)]
        rows = tables.rows(lake, EVALUATION, columns=["metrics", "created_at"], where=where).to_pylist()
        for row in sorted(rows, key=lambda row: row["created_at"], reverse=True):
            metrics = dict(row["metrics"])
            if "threshold_1" in metrics:
                return metrics["threshold_1"], metrics["threshold_2"]
    return PAPER_THRESHOLDS


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("search", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
