"""Finds pairs that may be hard: the stage 1 encoder's neighbours of every train query, by rank band."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.mining import MiningRecipe, select_candidates
from jobs import job, labelling
from jobs.embed_catalog import Catalog, EmbedRecipe, SearchPlacement, embed, encoder_folder, read_catalogs, search
from lake import tables
from lake.runs import RunRecord
from lake.schemas import MINED_PAIR
from lake.storage import Lake, LakeError

if TYPE_CHECKING:
    from ray_apps.mine import Neighbours, Search

ROUND = 1
"""The paper mines once; further rounds would go on from here."""


@settings
class Inputs:
    """Train queries, the catalogue and the stage 1 encoder."""

    training_instance: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    model: Annotated[str, meaning("folder of the stage 1 encoder, in the lake or elsewhere")] = ""


@settings
class HardPairRecipe:
    """Among which products, how deep, and how many pairs to grade."""

    scope: Annotated[
        Literal["catalog", "training_items"],
        meaning("products searched: the full catalogue, or as in the paper only those of the training instances"),
    ] = "catalog"
    mining: MiningRecipe = MiningRecipe()
    embedding: EmbedRecipe = EmbedRecipe()


@settings
class Config:
    """Settings of mine_hard_pairs."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: HardPairRecipe = HardPairRecipe()
    placement: SearchPlacement = SearchPlacement()


def run(config: Config) -> RunRecord:
    """Ungraded neighbours of every train query, drawn by rank band; pairs already in an instance are known."""
    from ray_apps import mine as app

    folder = encoder_folder(Lake(config.lake), config.inputs.model, "inputs.model")
    current = job.begin(config, "mine_hard_pairs")
    model, recipe = current.inputs["model"], config.recipe
    instances: dict[str, list[dict[str, Any]]] = {}
    for row in labelling.train_instances(current, stage=1):
        instances.setdefault(row["dataset"], []).append(row)
    if not instances:
        raise LakeError(f"training_instance: lake={config.lake} has no stage 1 instances; run build_instances first")
    catalogs = read_catalogs(current.lake, int(current.inputs["catalog_product"]), sorted(instances))
    texts = {dataset: [row["query"] for row in rows] for dataset, rows in instances.items()}
    files = embed(current, catalogs, {model: folder}, texts, recipe.embedding, config.placement.embed)
    searches = [
        app.Search(
            catalog.vectors(current.lake, model, recipe.embedding),
            np.load(files[model, catalog.dataset], allow_pickle=False),
            _searched(catalog, instances[catalog.dataset], recipe.scope),
        )
        for catalog in catalogs
    ]
    run_folder = current.lake.path("runs", current.fingerprint)
    found = search(searches, recipe.mining.depth, config.placement, run_folder)
    rows = [
        row | {"model": model, "round": ROUND, "run_id": current.run_id}
        for catalog, one, neighbours in zip(catalogs, searches, found, strict=True)
        for row in _mined_rows(catalog, instances[catalog.dataset], one, neighbours, recipe.mining)
    ]
    data = pa.Table.from_pylist(rows, schema=MINED_PAIR.schema)
    version = tables.replace(current.lake, MINED_PAIR, data, run_id=current.run_id)
    app.drop_kept(run_folder)
    counts = {f"{band}_pairs": sum(row["band"] == band for row in rows) for band in ("top", "tail")}
    counts["queries"] = sum(len(own) for own in instances.values())
    return current.finish(rows=len(rows), outputs={"mined_pair": version}, counts=counts)


def _searched(catalog: Catalog, instances: Sequence[Mapping[str, Any]], scope: str) -> NDArray[np.bool_]:
    """Which rows of the catalogue may be found: of equal texts the first in scope, so that none fills the ranks."""
    ids = catalog.products["product_id"].to_pylist()
    trained = {product for row in instances for product in row["product_ids"]}
    in_scope = np.array([scope == "catalog" or product in trained for product in ids], dtype=bool)
    hashes = np.array(catalog.products["product_hash"].to_pylist())
    _, first = np.unique(hashes[in_scope], return_index=True)
    is_kept = np.zeros(len(ids), dtype=bool)
    is_kept[np.flatnonzero(in_scope)[first]] = True
    return is_kept


def _mined_rows(
    catalog: Catalog,
    instances: Sequence[Mapping[str, Any]],
    searched: Search,
    found: Neighbours,
    recipe: MiningRecipe,
) -> list[dict[str, Any]]:
    ids = catalog.products["product_id"].to_pylist()
    lowest = _lowest_positives(ids, instances, searched)
    rows = []
    for place, instance in enumerate(instances):
        retrieved = [ids[row] for row in found.row_QK[place].tolist()]
        judged = set(instance["product_ids"])
        key = (catalog.dataset, instance["query_id"])
        rows += [
            {
                "dataset": catalog.dataset,
                "query_id": instance["query_id"],
                "product_id": candidate.product_id,
                "rank": candidate.rank,
                "score": float(found.score_QK[place, candidate.rank - 1]),
                "band": candidate.band,
                "shard": int(searched.vectors.file_P[found.row_QK[place, candidate.rank - 1]]),
                "lowest_positive": lowest.get(place),
            }
            for candidate in select_candidates(key, retrieved, judged, recipe=recipe)
        ]
    return rows


def _lowest_positives(ids: Sequence[str], instances: Sequence[Mapping[str, Any]], searched: Search) -> dict[int, float]:
    """Lowest cosine of each query's products of its best grade, by the query's place; none where that is 0."""
    row_of = {product: row for row, product in enumerate(ids)}
    best = [max(instance["grades"]) for instance in instances]
    positives = [
        (place, row_of[product])
        for place, instance in enumerate(instances)
        for product, grade in zip(instance["product_ids"], instance["grades"], strict=True)
        if grade == best[place] > 0 and product in row_of
    ]
    place_N, row_N = np.array(positives, dtype=np.int64).reshape(-1, 2).T
    found: dict[int, float] = {}
    score_N = searched.vectors.pair_scores(searched.query_QD, place_N, row_N)
    for place, score in zip(place_N.tolist(), score_N, strict=True):
        found[place] = min(float(score), found.get(place, float(score)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("mine_hard_pairs", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
