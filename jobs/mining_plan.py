"""What mining will take, before anything runs: vectors, bytes, inner products and hours, from rates of this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.index_recipe import IndexRecipe
from jobs.embed_catalog import Catalog, EmbedRecipe, SearchPlacement
from lake.runs import Run

_TIMED_QUERIES, _TIMED_ROWS, _TIMED_TEXTS = 512, 65_536, 256
"""What is computed to learn how fast this machine is."""
_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class CatalogWork(NamedTuple):
    """A catalogue, its queries, and how many of its products may be found: of equal texts one."""

    catalog: Catalog
    queries: int
    products: int


@dataclasses.dataclass(frozen=True)
class MiningPlan:
    """What mining will take.

    Attributes:
        queries: to be looked up.
        products: of the catalogues that may be found.
        to_encode: texts without a vector of the encoder, queries among them.
        width: of a vector.
        vector_bytes: of the catalogues' vectors on disk.
        disk_bytes: still to be written: vectors, index files and neighbours of finished queries.
        actor_bytes: memory of a search actor at most, an index with it, beside the mapped files.
        node_bytes: memory of the busiest node at most, beside the mapped files, actors being spread over nodes.
        actors: that search at once; 0 where the job does it itself.
        scores: inner products.
        scores_per_sec: of all actors together, as measured on a sample.
        texts_per_sec: of all workers together, as measured on a sample.
        hours: of encoding and of an exact search, one after the other; an index is sooner searched.
    """

    queries: int
    products: int
    to_encode: int
    width: int
    vector_bytes: int
    disk_bytes: int
    actor_bytes: int
    node_bytes: int
    actors: int
    scores: int
    scores_per_sec: float
    texts_per_sec: float
    hours: float

    def render(self) -> str:
        """As lines for people."""
        where = f"{self.actors} actors" if self.actors else "the job itself"
        return "\n".join(
            [
                f"queries         {self.queries:,}",
                f"products        {self.products:,}, {self.vector_bytes / 1e6:,.0f} MB at width {self.width}",
                f"to encode       {self.to_encode:,} texts, at {self.texts_per_sec:,.0f}/s",
                f"inner products  {self.scores:,}, at {self.scores_per_sec:,.0f}/s, by {where}",
                f"memory          {self.actor_bytes / 1e6:,.0f} MB per actor, {self.node_bytes / 1e6:,.0f} MB per node",
                f"disk            {self.disk_bytes / 1e6:,.0f} MB more",
                f"time            {self.hours:.3f} hours",
            ]
        )


def plan_mining(
    current: Run,
    folder: str,
    work: Sequence[CatalogWork],
    depth: int,
    index: IndexRecipe,
    recipe: EmbedRecipe,
    placement: SearchPlacement,
) -> MiningPlan:
    """Counts the work, and measures rates of this process on a sample: rates of graphics cards it does not know.

    Args:
        current: the run that would do it.
        folder: of the encoder.
        work: catalogues and what is asked of each.
        depth: products per query.
        index: how they are looked up.
        recipe: what is kept of vectors.
        placement: where it would run.
    """
    from embeddings.encoder import encode, load_encoder
    from ray_apps.cluster import count_nodes
    from ray_apps.mine import actor_bytes, found_bytes

    encoder, _ = load_encoder(folder)
    width = int(encoder.get_embedding_dimension())
    stores = [one.catalog.store(current.lake, current.inputs["model"], recipe) for one in work]
    missing = [store.missing(one.catalog.products["product_hash"]) for store, one in zip(stores, work, strict=True)]
    queries, products = sum(one.queries for one in work), sum(one.products for one in work)
    scores = sum(one.queries * one.products for one in work)
    samples = [
        one.catalog.texts(current.lake, pc.unique(one.catalog.products["product_hash"].slice(0, _TIMED_TEXTS)))
        for one in work
    ]
    titles = [title for sample in samples for title in sample["title"].to_pylist()]
    encode(encoder, titles[:16], "document")
    started = time.monotonic()
    encode(encoder, titles[:_TIMED_TEXTS], "document")
    texts_per_sec = len(titles[:_TIMED_TEXTS]) / (time.monotonic() - started) * placement.embed.num_workers
    uses_index = index.kind != "exact"
    by_actors = uses_index or placement.search_on_gpu or scores > placement.own_scores
    actors = placement.num_search_actors if by_actors else 0
    scores_per_sec = _search_rate(width, depth) * placement.num_search_actors * placement.threads_per_search_actor
    to_encode = sum(len(texts) for texts in missing) + queries
    of_actor = max(
        actor_bytes(one.queries, len(one.catalog.products), one.products, width, depth, index) for one in work
    )
    of_vector = width * _BYTES[recipe.kind]
    disk = sum(len(texts) for texts in missing) * of_vector + queries * width * _BYTES["float32"]
    if by_actors:
        disk += found_bytes(queries, depth) + sum(index.num_bytes(one.products, width) for one in work)
    return MiningPlan(
        queries=queries,
        products=products,
        to_encode=to_encode,
        width=width,
        vector_bytes=sum(len(one.catalog.products) for one in work) * of_vector,
        disk_bytes=disk,
        actor_bytes=of_actor,
        node_bytes=max(1, -(-actors // count_nodes(placement.embed.ray))) * of_actor,
        actors=actors,
        scores=scores,
        scores_per_sec=scores_per_sec,
        texts_per_sec=texts_per_sec,
        hours=(to_encode / texts_per_sec + scores / scores_per_sec) / 3600,
    )


def _search_rate(width: int, depth: int) -> float:
    """Inner products per second of one thread, over made-up vectors."""
    from embeddings.exact import ExactSearch
    from embeddings.lanes import torch_threads
    from embeddings.vectors import VectorStore, write_vectors

    generator = np.random.default_rng(0)
    vector_PD = generator.normal(size=(_TIMED_ROWS, width)).astype(np.float32)
    vector_PD /= np.linalg.norm(vector_PD, axis=1, keepdims=True)
    hashes = [str(row) for row in range(_TIMED_ROWS)]
    with torch_threads(1), tempfile.TemporaryDirectory() as place:
        store = VectorStore(place)
        write_vectors(store.path_of(hashes), vector_PD, hashes, kind="float16")
        search = ExactSearch(store.vectors(pa.array(hashes, pa.string())), np.arange(_TIMED_ROWS))
        search.search(vector_PD[:16], depth)
        started = time.monotonic()
        search.search(vector_PD[:_TIMED_QUERIES], depth)
        return _TIMED_QUERIES * _TIMED_ROWS / (time.monotonic() - started)
