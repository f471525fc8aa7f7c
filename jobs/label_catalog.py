"""Grades the catalogue: every product beside the queries it may answer, the most valuable pairs first, within a budget.

A night's work is what is new: products whose texts changed and queries that came get new candidates, all others keep
theirs, and only pairs that the ledger does not hold are asked. What the budget leaves over waits for the next night.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import fingerprint, meaning, settings
from embeddings.candidates import CandidateRecipe, Pairs, RelevancePrior, WordMatcher, fit_prior, nearest, union
from embeddings.labeller import load_labeller_card
from embeddings.text import FIELDS, TextRecipe, product_texts
from jobs import cost, job, labelling, models
from jobs.catalog_report import catalog_page
from jobs.cost import CostPlan
from jobs.embed_catalog import Catalog, Embedded, EmbedPlacement, EmbedRecipe, embed, read_catalogs
from jobs.grading import GradingRecipe, addressed, grade_with_stronger, waiting_pairs
from lake import tables
from lake.ledger import graded_by_people
from lake.runs import Run, RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, CATALOG_CANDIDATE, ENGAGEMENT, PAIR_GRADE, QUERY
from lake.storage import Lake, replace_text
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

_PRODUCTS_AT_ONCE = 16_384
"""New products whose vectors are compared with those of all queries at once: 25 MB at width 384."""
PRIOR_PAIRS = 20_000
"""Judged pairs that the chance of relevance is fitted on, at most."""


@settings
class Inputs:
    """Catalogue, queries, what shoppers did, the encoder that finds candidates and the judge."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    engagement: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    model: Annotated[str, meaning("encoder that finds candidates: stage2, stage1, pretrained or a folder")] = "stage2"
    labeller: Annotated[str, meaning("folder of the labeller, below the lake or anywhere; empty: the newest")] = ""
    stronger: Annotated[str, meaning("folder of the labeller that abstentions go to; empty: none")] = ""


@settings
class Budget:
    """What a night may take; 0 sets no bound."""

    max_pairs: Annotated[int, meaning("pairs graded", "pairs", ge=0)] = 0
    max_hours: Annotated[float, meaning("engine-hours by the plan, of all engines together", "hours", ge=0)] = 0.0
    max_cost: Annotated[float, meaning("money by the plan, in placement.label.currency", ge=0)] = 0.0


@settings
class CatalogRecipe:
    """Which pairs are tried, how many are graded, what is refused."""

    candidates: CandidateRecipe = CandidateRecipe()
    budget: Budget = Budget()
    grading: GradingRecipe = GradingRecipe()
    embedding: EmbedRecipe = EmbedRecipe()


@settings
class Placement:
    """Where products are encoded and pairs are graded."""

    embed: EmbedPlacement = EmbedPlacement()
    label: LabelPlacement = LabelPlacement(engine="auto")


@settings
class Config:
    """Settings of label_catalog."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: CatalogRecipe = CatalogRecipe()
    placement: Placement = Placement()


@dataclasses.dataclass(frozen=True)
class Night:
    """What a run has before it.

    Attributes:
        candidates: rows of catalog_candidate, all of them.
        counts: products, queries, what of them is new, candidates by source.
        keys: of the candidates that have texts and that no human row of the ledger is about, with their addresses, the
            most valuable first.
        waiting: those of them that the ledger does not hold, each text once.
        plan: what grading as many of them as the budget allows would take.
    """

    candidates: pa.Table
    counts: dict[str, int]
    keys: pa.Table
    waiting: pa.Table
    plan: CostPlan


def run(config: Config) -> RunRecord:
    """Candidates of the whole catalogue, and the most valuable of those without a grade into the ledger."""
    config = with_models(config)
    current = job.begin(config, "label_catalog")
    texts = labelling.PairTexts(current)
    night = prepare(current, texts, config)
    written = tables.replace(current.lake, CATALOG_CANDIDATE, night.candidates, run_id=current.run_id)
    log.info("label_catalog: the plan\n%s", night.plan.render())
    folders, recipe = labelling.labeller_folders(current.lake, config.inputs), config.recipe.grading
    asked = night.waiting.slice(0, night.plan.pairs).select(night.keys.column_names)
    graded = grade_with_stronger(current, asked, texts, folders, recipe, config.placement.label)
    counts = night.counts | graded.counts() | {"reused": len(night.keys) - len(night.waiting)}
    counts["over_budget"] = len(night.waiting) - night.plan.pairs
    metrics = graded.metrics(config.placement.label) | night.plan.metrics()
    page = f"reports/catalog-{current.run_id}.html"
    subtitle = f"run {current.run_id}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    html = catalog_page(
        subtitle, current.lake, current.run_id, load_labeller_card(folders[0]), night.waiting, counts, metrics
    )
    replace_text(current.lake.path(page), html)
    return current.finish(
        rows=graded.labelled,
        outputs={
            CATALOG_CANDIDATE.name: written,
            PAIR_GRADE.name: tables.version(current.lake, PAIR_GRADE) or 0,
            "report": page,
        },
        counts=counts,
        metrics=metrics,
    )


def plan(config: Config) -> CostPlan:
    """What `run` would take now. Encodes products that have no vectors yet, and writes nothing else."""
    config = with_models(config)
    current = job.begin(config, "label_catalog")
    return prepare(current, labelling.PairTexts(current), config).plan


def prepare(current: Run, texts: labelling.PairTexts, config: Config) -> Night:
    """Finds the candidates, sorts out what the ledger holds, and plans the rest."""
    candidates, counts = find_candidates(current, config)
    folders = labelling.labeller_folders(current.lake, config.inputs)
    keys = texts.keys(candidates.select([*labelling.PAIR, "relevance", "demand", "value", "sources"]))
    keys = addressed(keys, load_labeller_card(folders[0])).sort_by([("value", "descending"), ("address", "ascending")])
    by_people = graded_by_people(current.lake, keys["query_hash"], keys["product_hash"])
    counts["graded_by_people"] = int(by_people.sum())
    keys = keys.filter(pa.array(~by_people, pa.bool_()))
    waiting = waiting_pairs(current.lake, keys)
    whole = cost.plan_cost(current, waiting, texts, folders, config.recipe.grading, config.placement.label)
    budget = config.recipe.budget
    chosen = cost.affordable(
        whole,
        config.placement.label,
        max_pairs=budget.max_pairs,
        max_hours=budget.max_hours,
        max_cost=budget.max_cost,
    )
    return Night(candidates, counts, keys, waiting, cost.scaled(whole, chosen, config.placement.label))


def find_candidates(current: Run, config: Config) -> tuple[pa.Table, dict[str, int]]:
    """Rows of catalog_candidate: kept ones, and new ones of products and queries that are new or changed."""
    catalogs = read_catalogs(current.lake, int(current.inputs["catalog_product"]), columns=FIELDS)
    queries = labelling.read(current, QUERY, ["dataset", "query_id", "text", "query_hash"])
    queries = queries.sort_by([("dataset", "ascending"), ("query_id", "ascending")])
    of_dataset = {
        catalog.dataset: queries.filter(pc.equal(queries["dataset"], catalog.dataset)) for catalog in catalogs
    }
    catalogs = [catalog for catalog in catalogs if len(of_dataset[catalog.dataset])]
    model = current.inputs["model"]
    folder = job.find_path(current.lake, config.inputs.model) or config.inputs.model
    texts = {name: own["text"].to_pylist() for name, own in of_dataset.items()}
    embedded = embed(current, catalogs, {model: folder}, texts, config.recipe.embedding, config.placement.embed)
    origin = fingerprint(config.recipe.candidates, model)
    kept = _kept(current, origin)
    found, counts = [], {"products": 0, "new_products": 0, "queries": 0, "new_queries": 0}
    for catalog in catalogs:
        own = _DatasetCandidates(
            current,
            catalog,
            of_dataset[catalog.dataset],
            embedded[model, catalog.dataset],
            config.recipe.candidates,
        )
        found.append(own.rows(kept.filter(pc.equal(kept["dataset"], catalog.dataset)), origin))
        for name, value in own.counts.items():
            counts[name] += value
    table = pa.concat_tables([CATALOG_CANDIDATE.schema.empty_table(), *found])
    counts["candidates"] = len(table)
    by_source = pc.value_counts(pc.list_flatten(table["sources"])).to_pylist()
    return table, counts | {f"candidates/{row['values']}": row["counts"] for row in by_source}


def _kept(current: Run, origin: str) -> pa.Table:
    """Candidates of earlier nights that the same encoder and recipe found."""
    if not tables.exists(current.lake, CATALOG_CANDIDATE):
        return CATALOG_CANDIDATE.schema.empty_table()
    return tables.rows(current.lake, CATALOG_CANDIDATE, where=[("origin", "=", origin)])


class _DatasetCandidates:
    """Candidates of one data set.

    Args:
        current: the run.
        catalog: its products, in id order.
        queries: its queries, in id order.
        embedded: vectors of both.
        recipe: what is tried.
    """

    def __init__(
        self,
        current: Run,
        catalog: Catalog,
        queries: pa.Table,
        embedded: Embedded,
        recipe: CandidateRecipe,
    ) -> None:
        self.current, self.catalog, self.queries, self.recipe = current, catalog, queries, recipe
        self.vectors, self.query_QD = embedded
        self.words = WordMatcher(queries["text"].to_pylist(), product_texts(catalog.products, TextRecipe()))
        self.counts: dict[str, int] = {}

    def rows(self, kept: pa.Table, origin: str) -> pa.Table:
        """Kept rows whose texts are as they were, and the candidates of what is new, all with today's value."""
        (query_N, product_N), is_valid = self._rows_of(kept)
        kept = kept.filter(pa.array(is_valid))
        product_hash, query_hash = self.catalog.products["product_hash"], self.queries["query_hash"]
        is_same = pc.and_(
            pc.equal(kept["query_hash"], query_hash.take(pa.array(query_N))),
            pc.equal(kept["product_hash"], product_hash.take(pa.array(product_N))),
        ).to_numpy()
        kept, kept_pairs = kept.filter(pa.array(is_same)), (query_N[is_same], product_N[is_same])
        new_Q, new_P = (
            np.setdiff1d(np.arange(len(side)), known)
            for side, known in zip((self.queries, self.catalog.products), kept_pairs, strict=True)
        )
        self.counts = {
            "products": len(self.catalog.products),
            "new_products": len(new_P),
            "queries": len(self.queries),
            "new_queries": len(new_Q),
        }
        engaged, demand_Q = self._engagement()
        found = [*_by_source(kept, kept_pairs), ("engagement", engaged), *self._found(new_Q, new_P)]
        (query_N, product_N), sources = union(found, len(product_hash))
        cosine_N = self.vectors.pair_scores(self.query_QD, query_N, product_N).astype(np.float64)
        coverage_N = self.words.coverage(query_N, product_N)
        relevance_N = self._prior()(cosine_N, coverage_N)
        size = len(query_N)
        return pa.table(
            {
                "dataset": pa.array([self.catalog.dataset] * size, pa.string()),
                "query_id": self.queries["query_id"].take(pa.array(query_N)),
                "product_id": self.catalog.products["product_id"].take(pa.array(product_N)),
                "query_hash": query_hash.take(pa.array(query_N)),
                "product_hash": product_hash.take(pa.array(product_N)),
                "sources": pa.array(sources, pa.list_(pa.string())),
                "cosine": cosine_N,
                "coverage": coverage_N,
                "relevance": relevance_N,
                "demand": demand_Q[query_N],
                "value": demand_Q[query_N] * relevance_N,
                "origin": pa.array([origin] * size, pa.string()),
                "run_id": pa.array([self.current.run_id] * size, pa.string()),
            },
            schema=CATALOG_CANDIDATE.schema,
        )

    def _found(self, new_Q: NDArray[np.int64], new_P: NDArray[np.int64]) -> list[tuple[str, Pairs]]:
        """Queries of new products and products of new queries, by words and by cosine."""
        recipe, found = self.recipe, []
        # vectors of millions of products fill no memory
        for start in range(0, len(new_P), _PRODUCTS_AT_ONCE):
            own = new_P[start : start + _PRODUCTS_AT_ONCE]
            product_N, query_N = nearest(self.vectors.take(own), self.query_QD, recipe.embedding_per_product)
            found.append(("embedding", (query_N, own[product_N])))
        if recipe.products_per_new_query and len(new_Q):
            # a night without new queries needs no torch for this
            from embeddings.exact import ExactSearch

            search = ExactSearch(self.vectors, np.arange(len(self.vectors)))
            _, row_QK = search.search(self.query_QD[new_Q], recipe.products_per_new_query)
            found.append(("embedding", (np.repeat(new_Q, row_QK.shape[1]), row_QK.ravel())))
        return [
            ("lexical", self.words.queries_of(new_P, recipe.lexical_per_product, recipe.min_coverage)),
            ("lexical", self.words.products_of(new_Q, recipe.products_per_new_query, recipe.min_coverage)),
            *found,
        ]

    def _engagement(self) -> tuple[Pairs, NDArray[np.float64]]:
        """Pairs that shoppers saw, the most seen per product, and the demand of each query."""
        demand_Q = np.ones(len(self.queries))
        if ENGAGEMENT.name not in self.current.inputs:
            return (np.empty(0, np.int64), np.empty(0, np.int64)), demand_Q
        seen = tables.rows(
            self.current.lake,
            ENGAGEMENT,
            version=int(self.current.inputs[ENGAGEMENT.name]),
            columns=[*labelling.PAIR, "impressions"],
            where=[("dataset", "=", self.catalog.dataset), ("impressions", ">", 0)],
        )
        (query_N, product_N), is_valid = self._rows_of(seen)
        shown_N = seen["impressions"].to_numpy()[is_valid]
        np.maximum.at(demand_Q, query_N, shown_N + 1.0)
        order = np.lexsort((query_N, -shown_N, product_N))
        first = np.searchsorted(product_N[order], product_N[order], side="left")
        kept = order[np.arange(len(order)) - first < self.recipe.engaged_per_product]
        return (query_N[kept], product_N[kept]), demand_Q

    def _prior(self) -> RelevancePrior:
        """The chance of relevance as people's grades of train queries teach it."""
        if ANNOTATION_CONSENSUS.name not in self.current.inputs:
            return RelevancePrior()
        judged = labelling.read(self.current, ANNOTATION_CONSENSUS, [*labelling.PAIR, "grade"])
        judged = judged.filter(pc.equal(judged["dataset"], self.catalog.dataset))
        train = pa.array([query for dataset, query in labelling.train_queries(self.current)], pa.string())
        judged = judged.filter(pc.is_in(judged["query_id"], train)).sort_by("query_id")
        step = -(-len(judged) // PRIOR_PAIRS) or 1
        judged = judged.take(pa.array(np.arange(0, len(judged), step)))
        (query_J, product_J), is_valid = self._rows_of(judged)
        is_relevant_J = judged["grade"].to_numpy()[is_valid] >= 1
        cosine_J = self.vectors.pair_scores(self.query_QD, query_J, product_J)
        return fit_prior(cosine_J, self.words.coverage(query_J, product_J), is_relevant_J)

    def _rows_of(self, pairs: pa.Table) -> tuple[Pairs, NDArray[np.bool_]]:
        """Rows of the queries and products of those pairs that exist, and which do."""
        query_N, product_N = (
            labelling.places_of(pairs[name], side[name].combine_chunks())
            for name, side in (("query_id", self.queries), ("product_id", self.catalog.products))
        )
        is_valid = (query_N >= 0) & (product_N >= 0)
        return (query_N[is_valid], product_N[is_valid]), is_valid


def _by_source(kept: pa.Table, pairs: Pairs) -> list[tuple[str, Pairs]]:
    """Kept pairs by what found them, but engagement, which is looked up anew."""
    sources = kept["sources"].to_pylist()
    found = []
    for name in ("lexical", "embedding"):
        own = np.array([name in row for row in sources], dtype=bool)
        found.append((name, (pairs[0][own], pairs[1][own])))
    return found


def with_models(config: Config) -> Config:
    """The config with the folders of labeller and encoder, relative to the lake where they lie in it."""
    config = labelling.with_newest_labeller(config)
    lake = Lake(config.lake)
    if job.find_path(lake, config.inputs.model):
        return config
    folder = lake.relative(models.encoder_folder(lake, config.inputs.model))
    return dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, model=folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("label_catalog", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
