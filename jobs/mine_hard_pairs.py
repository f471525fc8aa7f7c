"""Finds pairs that may be hard: an encoder's neighbours of every train query, by rank band."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.index_recipe import IndexRecipe
from embeddings.mining import TAIL, TOP, MiningRecipe, assign_bands, open_places, select_candidates, without_copies
from embeddings.vectors import CatalogVectors
from jobs import job, labelling
from jobs.embed_catalog import Catalog, EmbedRecipe, SearchPlacement, embed, encoder_folder, read_catalogs, search
from jobs.mining_plan import CatalogWork, MiningPlan, plan_mining
from lake import tables
from lake.mapped import take_rows
from lake.runs import Run, RunRecord
from lake.schemas import MINED_PAIR
from lake.storage import Lake, LakeError

if TYPE_CHECKING:
    from ray_apps.mine import Neighbours, Search

_PAGE_QUERIES = 1_024
"""Queries whose pairs are drawn at once."""
Rows = Sequence[Mapping[str, Any]]


@settings
class Inputs:
    """Train queries, the catalogue and the encoder."""

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
    round: Annotated[
        int,
        meaning(
            "mining round; from 2 on pairs of earlier rounds are known, and what this and later rounds found is "
            "replaced",
            "rounds",
            ge=1,
        ),
    ] = 1
    mining: MiningRecipe = MiningRecipe()
    index: Annotated[IndexRecipe, meaning("how neighbours are looked up")] = IndexRecipe()
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
    instances, catalogs = _work(current, recipe.mining)
    texts = {dataset: [row["query"] for row in rows] for dataset, rows in instances.items()}
    embedded = embed(current, catalogs, {model: folder}, texts, recipe.embedding, config.placement.embed)
    searches = [
        app.Search(
            *embedded[model, catalog.dataset],
            _searched(catalog, embedded[model, catalog.dataset].vectors, instances[catalog.dataset], recipe.scope),
            recipe.index,
            str(catalog.store(current.lake, model, recipe.embedding).folder / "indexes"),
        )
        for catalog in catalogs
    ]
    run_folder = current.lake.path("runs", current.fingerprint)
    found = search(searches, recipe.mining.depth, config.placement, run_folder)
    stamps = {"model": model, "round": recipe.round, "run_id": current.run_id}
    earlier, pages = _earlier(current.lake, recipe.round), [MINED_PAIR.schema.empty_table()]
    for catalog, searched, neighbours in zip(catalogs, searches, found, strict=True):
        own = _Mined(catalog, instances[catalog.dataset], earlier, searched, recipe.mining)
        pages += [own.rows(neighbours, start, stamps) for start in range(0, len(neighbours.row_QK), _PAGE_QUERIES)]
    data = pa.concat_tables(pages)
    where = f"round >= {recipe.round}" if recipe.round > 1 else None
    version = tables.replace(current.lake, MINED_PAIR, data, run_id=current.run_id, where=where)
    app.drop_kept(run_folder)
    counts = {f"{band}_pairs": pc.sum(pc.equal(data["band"], band)).as_py() or 0 for band in (TOP, TAIL)}
    counts["queries"] = sum(len(own) for own in instances.values())
    metrics = {f"recall/{catalog.dataset}": own.recall for catalog, own in zip(catalogs, found, strict=True)}
    return current.finish(rows=len(data), outputs={"mined_pair": version}, counts=counts, metrics=metrics)


def _work(current: Run, mining: MiningRecipe) -> tuple[dict[str, list[dict[str, Any]]], list[Catalog]]:
    """Stage 1 instances by data set, and the catalogues of those."""
    instances: dict[str, list[dict[str, Any]]] = {}
    for row in labelling.train_instances(current, stage=1):
        instances.setdefault(row["dataset"], []).append(row)
    if not instances:
        raise LakeError(
            f"training_instance: lake={current.lake.root} has no stage 1 instances; run build_instances first"
        )
    columns = ["category"] if mining.category_levels else []
    return instances, read_catalogs(current.lake, int(current.inputs["catalog_product"]), sorted(instances), columns)


def _searched(catalog: Catalog, vectors: CatalogVectors, instances: Rows, scope: str) -> NDArray[np.bool_]:
    """Which rows of the catalogue may be found: of equal texts the first in scope, so that none fills the ranks."""
    is_kept = np.zeros(len(catalog.products), dtype=bool)
    is_kept[vectors.distinct(_in_scope(catalog, instances, scope))] = True
    return is_kept


def _in_scope(catalog: Catalog, instances: Rows, scope: str) -> NDArray[np.int64]:
    """Rows of the catalogue that the scope takes in."""
    if scope == "catalog":
        return np.arange(len(catalog.products))
    trained = pa.array(sorted({product for row in instances for product in row["product_ids"]}), pa.string())
    return np.flatnonzero(pc.is_in(catalog.products["product_id"], value_set=trained).to_numpy())


def _earlier(lake: Lake, this_round: int) -> pa.Table:
    """Pairs that earlier rounds found."""
    if this_round == 1 or not tables.exists(lake, MINED_PAIR):
        return pa.table({name: pa.array([], pa.string()) for name in labelling.PAIR})
    return tables.rows(lake, MINED_PAIR, columns=list(labelling.PAIR), where=[("round", "<", this_round)])


class _Mined:
    """Draws of one data set.

    Args:
        catalog: its products.
        instances: its queries with their judged products, in the order of the search's queries.
        earlier: pairs that earlier rounds found, of any data set.
        searched: vectors of both sides.
        recipe: what is drawn.
    """

    def __init__(
        self, catalog: Catalog, instances: Rows, earlier: pa.Table, searched: Search, recipe: MiningRecipe
    ) -> None:
        self.catalog, self.instances, self.searched, self.recipe = catalog, instances, searched, recipe
        self._ids = catalog.products.select(["product_id"])
        self._queries = pa.array([row["query_id"] for row in instances], pa.string())
        place_N = np.repeat(np.arange(len(instances)), [len(row["product_ids"]) for row in instances])
        grade_N = np.array([grade for row in instances for grade in row["grades"]], dtype=np.int64)
        row_N = labelling.places_of(
            pa.array([product for row in instances for product in row["product_ids"]]), self._ids["product_id"]
        )
        is_known = row_N >= 0
        place_N, grade_N, self._judged_N = place_N[is_known], grade_N[is_known], row_N[is_known]
        self._bounds = np.searchsorted(place_N, np.arange(len(instances) + 1))
        best_Q = np.zeros(len(instances), dtype=np.int64)
        np.maximum.at(best_Q, place_N, grade_N)
        self._is_best_N = (grade_N == best_Q[place_N]) & (grade_N > 0)
        self._lowest_Q = np.full(len(instances), np.inf)
        positives = place_N[self._is_best_N], self._judged_N[self._is_best_N]
        np.minimum.at(self._lowest_Q, positives[0], searched.vectors.pair_scores(searched.query_QD, *positives))
        self._lowest_Q[np.isinf(self._lowest_Q)] = np.nan
        own = earlier.filter(pc.equal(earlier["dataset"], catalog.dataset))
        mined = [
            labelling.places_of(own[name], among)
            for name, among in (("query_id", self._queries), ("product_id", self._ids["product_id"]))
        ]
        is_held = (mined[0] >= 0) & (mined[1] >= 0)
        self._known = np.concatenate(
            [self._keys(place_N, self._judged_N), self._keys(mined[0][is_held], mined[1][is_held])]
        )
        self._category_P = _categories(catalog, recipe.category_levels) if recipe.category_levels else None

    def rows(self, found: Neighbours, start: int, stamps: Mapping[str, Any]) -> pa.Table:
        """Rows of mined_pair for the queries from `start` on, a page of them."""
        page = slice(start, start + _PAGE_QUERIES)
        score_QK, row_QK, lowest_Q = found.score_QK[page], found.row_QK[page], self._lowest_Q[page]
        place_Q = np.arange(start, start + len(row_QK))
        is_open_QK = open_places(score_QK, lowest_Q, self.recipe)
        is_open_QK &= ~np.isin(self._keys(place_Q[:, None], row_QK), self._known)
        chosen = [
            select_candidates(
                (self.catalog.dataset, self.instances[place]["query_id"]),
                self._distinct(place, is_open_QK[at], row_QK[at]),
                self.recipe,
            )
            for at, place in enumerate(place_Q.tolist())
        ]
        at_N = np.repeat(np.arange(len(chosen)), [len(own) for own in chosen])
        rank_N = np.concatenate([np.zeros(0, dtype=np.int64), *chosen])
        row_N = row_QK[at_N, rank_N]
        columns = {
            "dataset": pa.repeat(pa.scalar(self.catalog.dataset), len(row_N)),
            "query_id": self._queries.take(pa.array(place_Q[at_N])),
            "product_id": take_rows(self._ids, row_N)["product_id"],
            "rank": pa.array(rank_N + 1, pa.int32()),
            "score": pa.array(score_QK[at_N, rank_N].astype(np.float64)),
            "band": pa.array(assign_bands(rank_N + 1, self.recipe.depth).tolist(), pa.string()),
            "shard": pa.array(self.searched.vectors.file_P[row_N], pa.int32()),
            "lowest_positive": pa.array(lowest_Q[at_N], from_pandas=True),
        }
        for name, value in stamps.items():
            columns[name] = pa.repeat(pa.scalar(value, MINED_PAIR.schema.field(name).type), len(row_N))
        return pa.table({name: columns[name] for name in MINED_PAIR.column_names}, schema=MINED_PAIR.schema)

    def _distinct(self, place: int, is_open_K: NDArray[np.bool_], row_K: NDArray[np.int64]) -> NDArray[np.bool_]:
        """What categories and copies leave open of one query's places."""
        own = slice(self._bounds[place], self._bounds[place + 1])
        if self._category_P is not None and self._is_best_N[own].any():
            wanted = self._category_P[self._judged_N[own][self._is_best_N[own]]]
            is_open_K = is_open_K & np.isin(self._category_P[row_K], wanted)
        if self.recipe.duplicate_cosine is None:
            return is_open_K
        vectors = self.searched.vectors
        return without_copies(
            is_open_K, vectors.take(row_K), vectors.take(self._judged_N[own]), self.recipe.duplicate_cosine
        )

    def _keys(self, place: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number per pair of a query's place and a catalogue row."""
        return place * np.int64(len(self._ids)) + row


def _categories(catalog: Catalog, levels: int) -> NDArray[np.int64]:
    """A number per product that those of the same first levels of the category share; without one, of its own."""
    parts = pc.list_slice(pc.split_pattern(catalog.products["category"].combine_chunks(), " > "), 0, levels)
    names = pc.fill_null(pc.binary_join(parts, " > "), "")
    code_P = np.asarray(names.dictionary_encode().indices.to_numpy(), dtype=np.int64)
    without = np.flatnonzero(pc.equal(names, "").to_numpy(zero_copy_only=False))
    code_P[without] = len(code_P) + without
    return code_P


def plan(config: Config) -> MiningPlan:
    """What `run` would take now, by a sample that is encoded and searched here; writes nothing."""
    folder = encoder_folder(Lake(config.lake), config.inputs.model, "inputs.model")
    current = job.pin(config, "mine_hard_pairs")
    recipe, work = config.recipe, []
    instances, catalogs = _work(current, recipe.mining)
    for catalog in catalogs:
        own = instances[catalog.dataset]
        texts = catalog.products.select(["product_hash"])
        if recipe.scope != "catalog":
            texts = take_rows(texts, _in_scope(catalog, own, recipe.scope))
        work.append(CatalogWork(catalog, len(own), pc.count_distinct(texts["product_hash"]).as_py()))
    return plan_mining(current, folder, work, recipe.mining.depth, recipe.index, recipe.embedding, config.placement)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("mine_hard_pairs", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
