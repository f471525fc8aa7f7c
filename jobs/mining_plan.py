"""What mining will take, before anything runs: vectors, bytes, inner products and hours, from rates of this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from jobs.embed_catalog import Catalog, EmbedRecipe, SearchPlacement
from lake.runs import Run

_TIMED_QUERIES, _TIMED_ROWS, _TIMED_TEXTS = 512, 65_536, 256
"""What is computed to learn how fast this machine is."""
_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class MiningPlan:
    """What mining will take.

    Attributes:
        queries: to be looked up.
        products: of the catalogues.
        to_encode: texts without a vector of the encoder, queries among them.
        width: of a vector.
        vector_bytes: of the catalogues' vectors on disk.
        actor_bytes: memory of a search actor at most, beside the mapped files.
        actors: that search at once; 0 where the job does it itself.
        scores: inner products.
        scores_per_sec: of all actors together, as measured on a sample.
        texts_per_sec: of all workers together, as measured on a sample.
        hours: of encoding and searching, one after the other.
    """

    queries: int
    products: int
    to_encode: int
    width: int
    vector_bytes: int
    actor_bytes: int
    actors: int
    scores: int
    scores_per_sec: float
    texts_per_sec: float
    hours: float

    def render(self) -> str:
        """As lines for people."""
        where = f"{self.actors} actors of {self.actor_bytes / 1e6:,.0f} MB" if self.actors else "the job itself"
        return "\n".join(
            [
                f"queries         {self.queries:,}",
                f"products        {self.products:,}, {self.vector_bytes / 1e6:,.0f} MB at width {self.width}",
                f"to encode       {self.to_encode:,} texts, at {self.texts_per_sec:,.0f}/s",
                f"inner products  {self.scores:,}, at {self.scores_per_sec:,.0f}/s, by {where}",
                f"time            {self.hours:.3f} hours",
            ]
        )


def plan_mining(
    current: Run,
    folder: str,
    work: Sequence[tuple[Catalog, int]],
    depth: int,
    recipe: EmbedRecipe,
    placement: SearchPlacement,
) -> MiningPlan:
    """Counts the work, and measures rates of this process on a sample: rates of graphics cards it does not know.

    Args:
        current: the run that would do it.
        folder: of the encoder.
        work: catalogues with the number of queries for each.
        depth: products per query.
        recipe: what is kept of vectors.
        placement: where it would run.
    """
    from embeddings.encoder import encode, load_encoder
    from ray_apps.mine import actor_bytes

    encoder, _ = load_encoder(folder)
    width = int(encoder.get_embedding_dimension())
    stores = [catalog.store(current.lake, current.inputs["model"], recipe) for catalog, _ in work]
    missing = [store.missing(one.products["product_hash"]) for store, (one, _) in zip(stores, work, strict=True)]
    queries, products = sum(count for _, count in work), sum(len(one.products) for one, _ in work)
    scores = sum(count * len(one.products) for one, count in work)
    titles = [title for one, _ in work for title in one.products["title"].slice(0, _TIMED_TEXTS).to_pylist()]
    encode(encoder, titles[:16], "document")
    started = time.monotonic()
    encode(encoder, titles[:_TIMED_TEXTS], "document")
    texts_per_sec = len(titles[:_TIMED_TEXTS]) / (time.monotonic() - started) * placement.embed.num_workers
    by_actors = placement.search_on_gpu or scores > placement.own_scores
    scores_per_sec = _search_rate(width, depth) * placement.num_search_actors * placement.threads_per_search_actor
    to_encode = sum(len(texts) for texts in missing) + queries
    return MiningPlan(
        queries=queries,
        products=products,
        to_encode=to_encode,
        width=width,
        vector_bytes=products * width * _BYTES[recipe.kind],
        actor_bytes=actor_bytes(max((count for _, count in work), default=0), products, width, depth),
        actors=placement.num_search_actors if by_actors else 0,
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
