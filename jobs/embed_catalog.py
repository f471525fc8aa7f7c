"""Encodes the catalogue into files of vectors; a text that has a vector of the encoder is not encoded again."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import ConfigError, meaning, settings
from embeddings.text import FIELDS
from embeddings.vectors import CatalogVectors, VectorStore, VectorType, texts_print
from jobs import job
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import CATALOG_PRODUCT, EMBEDDING_MANIFEST
from lake.storage import Lake
from ray_apps.cluster import RayPlacement, connect

if TYPE_CHECKING:
    from ray_apps.mine import Neighbours, Search


@settings
class Inputs:
    """The catalogue and the encoder."""

    catalog_product: job.TableVersion = "newest"
    model: Annotated[str, meaning("folder of the encoder, in the lake or elsewhere")] = ""


@settings
class EmbedRecipe:
    """What is kept of vectors."""

    kind: Annotated[
        VectorType, meaning("numbers of product vectors; int8 takes a quarter of the disk and errs by up to .01 cosine")
    ] = "float16"
    computed: Annotated[
        Literal["float", "int8"],
        meaning(
            "int8: product vectors by an int8 graph of the encoder, several times as fast on a processor (extra int8); "
            "kept apart from the others, queries stay float"
        ),
    ] = "float"


@settings
class EmbedPlacement:
    """Where encoding runs."""

    ray: RayPlacement = RayPlacement()
    num_workers: Annotated[int, meaning("actors that hold the encoder", ge=1)] = 1
    threads_per_worker: Annotated[int, meaning("CPUs and threads of each", "CPUs", ge=1)] = 2
    use_gpu: Annotated[bool, meaning("one GPU per actor")] = False
    batch_tokens: Annotated[int, meaning("padded tokens of a forward pass", "tokens", ge=128)] = 4096
    own_texts: Annotated[
        int,
        meaning(
            "up to so many texts the job encodes itself, without a GPU: sooner done than an actor starts", "texts", ge=0
        ),
    ] = 500


@settings
class SearchPlacement:
    """Where encoding and search run, for jobs that do both."""

    embed: EmbedPlacement = EmbedPlacement()
    num_search_actors: Annotated[int, meaning("actors that search, at most", ge=1)] = 2
    threads_per_search_actor: Annotated[int, meaning("CPUs and threads of each", "CPUs", ge=1)] = 1
    search_on_gpu: Annotated[bool, meaning("one GPU per search actor")] = False
    own_scores: Annotated[
        float,
        meaning(
            "queries times products up to which the job searches itself, without a GPU: sooner done than actors start",
            "inner products",
            ge=0,
        ),
    ] = 2e9


@settings
class Config:
    """Settings of embed_catalog."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: EmbedRecipe = EmbedRecipe()
    placement: EmbedPlacement = EmbedPlacement()


@dataclass(frozen=True)
class Catalog:
    """The products of one data set.

    Attributes:
        dataset: its name.
        products: in id order, in a mapped file: product_id, product_hash and the columns asked for.
        print: fingerprint of their texts.
        version: of the table that they were read from.
    """

    dataset: str
    products: pa.Table
    print: str
    version: int

    def store(self, lake: Lake, model: str, recipe: EmbedRecipe) -> VectorStore:
        """Where vectors of an encoder are kept, by its fingerprint."""
        name = recipe.kind if recipe.computed == "float" else f"{recipe.kind}-by-{recipe.computed}"
        return VectorStore(lake.path("vectors", model, self.dataset, name))

    def vectors(self, lake: Lake, model: str, recipe: EmbedRecipe) -> CatalogVectors:
        """The vectors of an encoder, whose rows are those of `products`.

        Raises:
            StoreError: some products have none yet.
        """
        return self.store(lake, model, recipe).vectors(self.products["product_hash"])

    def texts(self, lake: Lake, hashes: pa.Array) -> pa.Table:
        """product_hash and the fields that encoders read of these texts, in their order, as large_string.

        Raises:
            ValueError: the catalogue has not all of them.
        """
        # Arrow takes no row of a string column of 2 GiB and more, which descriptions of millions of products are
        wanted, columns = hashes.cast(pa.large_string()), ["product_hash", *FIELDS]
        is_wanted = pc.field("product_hash").cast(pa.large_string()).isin(wanted)
        where = (pc.field("dataset") == self.dataset) & is_wanted
        found = tables.rows(lake, CATALOG_PRODUCT, version=self.version, columns=columns, where=where)
        found = found.cast(pa.schema([(name, pa.large_string()) for name in columns]))
        row_N = pc.index_in(wanted, value_set=found["product_hash"].combine_chunks())
        if row_N.null_count:
            raise ValueError(f"{row_N.null_count} of {len(row_N)} texts are not in catalog_product@{self.version}")
        return found.take(row_N)


def read_catalogs(lake: Lake, version: int, datasets: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Catalog]:
    """The catalogues of the lake, or of some data sets, by name.

    Args:
        lake: where they are.
        version: of catalog_product.
        datasets: wanted; empty takes all.
        columns: to be held beside ids and hashes.
    """
    where = pc.field("dataset").isin(list(datasets)) if datasets else None
    names, by = ["dataset", "product_id", "product_hash", *columns], ["dataset", "product_id"]
    products = tables.sorted_rows(lake, CATALOG_PRODUCT, version=version, columns=names, by=by, where=where)
    catalogs, start = [], 0
    # as they are sorted, products of a data set follow one another
    for counted in pc.value_counts(products["dataset"]).to_pylist():
        own = products.slice(start, counted["counts"])
        start += len(own)
        catalog_print = texts_print(own["product_id"], own["product_hash"])
        catalogs.append(Catalog(counted["values"], own, catalog_print, version))
    return catalogs


class Embedded(NamedTuple):
    """What an encoder made of one data set.

    Attributes:
        vectors: of the catalogue's products.
        query_QD: of the queries asked for, in their order; none of them where no query was.
    """

    vectors: CatalogVectors
    query_QD: NDArray[np.float32]


def embed(
    current: Run,
    catalogs: Sequence[Catalog],
    models: Mapping[str, str],
    queries: Mapping[str, Sequence[str]],
    recipe: EmbedRecipe,
    placement: EmbedPlacement,
) -> dict[tuple[str, str], Embedded]:
    """Encodes what has no vectors yet, with every model, and lists the files of vectors in embedding_manifest.

    Args:
        current: the run on whose behalf.
        catalogs: of the data sets wanted.
        models: fingerprint -> folder.
        queries: data set -> texts.
        recipe: what is kept.
        placement: where it runs.

    Returns:
        The vectors by (model, data set).
    """
    from ray_apps import embed as app

    connect(placement.ray)
    parts, query_files = [], {}
    for model, folder in models.items():
        for catalog in catalogs:
            store = catalog.store(current.lake, model, recipe)
            parts += app.plan_products(
                folder,
                catalog.products["product_hash"],
                partial(catalog.texts, current.lake),
                store,
                recipe.kind,
                placement.num_workers,
                in_int8=recipe.computed == "int8",
            )
            if queries.get(catalog.dataset):
                part = app.plan_queries(folder, queries[catalog.dataset], store.folder)
                query_files[model, catalog.dataset] = part.path
                parts.append(part)
    app.embed(
        parts,
        num_workers=placement.num_workers,
        threads_per_worker=placement.threads_per_worker,
        use_gpu=placement.use_gpu,
        batch_tokens=placement.batch_tokens,
        own_texts=placement.own_texts,
        run_folder=current.lake.path("runs", current.fingerprint),
    )
    found = {}
    for model in models:
        for catalog in catalogs:
            vectors = catalog.vectors(current.lake, model, recipe)
            _write_manifest(current, model, catalog, vectors, recipe)
            path = query_files.get((model, catalog.dataset))
            query_QD = np.load(path, allow_pickle=False) if path else np.empty((0, vectors.width), np.float32)
            found[model, catalog.dataset] = Embedded(vectors, query_QD)
    return found


def search(searches: Sequence[Search], k: int, placement: SearchPlacement, run_folder: str = "") -> list[Neighbours]:
    """The k nearest products of every query, where the placement says; see `ray_apps.mine.mine`."""
    from ray_apps import mine as app

    connect(placement.embed.ray)
    return app.mine(
        searches,
        k,
        num_actors=placement.num_search_actors,
        threads_per_actor=placement.threads_per_search_actor,
        use_gpu=placement.search_on_gpu,
        own_scores=placement.own_scores,
        run_folder=run_folder,
    )


def _write_manifest(current: Run, model: str, catalog: Catalog, vectors: CatalogVectors, recipe: EmbedRecipe) -> None:
    names = ["path", "sha256"]
    where = [("model", "=", model), ("dataset", "=", catalog.dataset)]
    # files never change: one that was hashed once is not read for it again
    known = {}
    if tables.exists(current.lake, EMBEDDING_MANIFEST):
        held = tables.rows(current.lake, EMBEDDING_MANIFEST, columns=names, where=where)
        known = dict(zip(*(held[name].to_pylist() for name in names), strict=True))
    rows = []
    for number, (path, used) in enumerate(zip(vectors.paths, np.bincount(vectors.file_P).tolist(), strict=True)):
        relative = current.lake.relative(path)
        rows.append(
            {
                "run_id": current.run_id,
                "dataset": catalog.dataset,
                "model": model,
                "catalog": catalog.print,
                "shard": number,
                "path": relative,
                "num_rows": vectors.rows_of(number),
                "width": vectors.width,
                "sha256": known.get(relative) or _sha256(path),
                "kind": recipe.kind,
                "num_used": used,
            }
        )
    key = {"model": model, "dataset": catalog.dataset, "catalog": catalog.print}
    data = pa.Table.from_pylist(rows, schema=EMBEDDING_MANIFEST.schema)
    tables.replace(current.lake, EMBEDDING_MANIFEST, data, run_id=current.run_id, where=tables.equal_to(key))


def _sha256(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def encoder_folder(lake: Lake, value: str, key: str) -> str:
    """The folder that an input names.

    Raises:
        ConfigError: it names none.
    """
    folder = job.find_path(lake, value) if value else None
    if folder is None:
        raise ConfigError(f"{key}={value!r}: expected the folder of an encoder; train one or give its path")
    return folder


def run(config: Config) -> RunRecord:
    """Vectors of every data set's products, and their rows in embedding_manifest.

    Metrics are those of a `ParityReport` for vectors that were computed in int8: `parity/<dataset>/mean_cosine`.
    """
    folder = encoder_folder(Lake(config.lake), config.inputs.model, "inputs.model")
    current = job.begin(config, "embed_catalog")
    catalogs = read_catalogs(current.lake, int(current.inputs["catalog_product"]))
    model = current.inputs["model"]
    embed(current, catalogs, {model: folder}, {}, config.recipe, config.placement)
    return current.finish(
        rows=sum(len(catalog.products) for catalog in catalogs),
        outputs={"embedding_manifest": tables.version(current.lake, EMBEDDING_MANIFEST) or 0},
        counts={f"products/{catalog.dataset}": len(catalog.products) for catalog in catalogs},
        metrics=_parity(current, catalogs, folder, config),
    )


def _parity(current: Run, catalogs: Sequence[Catalog], folder: str, config: Config) -> dict[str, float]:
    """How near the vectors that were computed in int8 are to the encoder's own; of others nothing."""
    if config.recipe.computed == "float":
        return {}
    from ray_apps import embed as app

    found: dict[str, float] = {}
    for catalog in catalogs:
        store = catalog.store(current.lake, current.inputs["model"], config.recipe)
        sample = catalog.texts(current.lake, app.compared(catalog.products["product_hash"]))
        report = app.parity(folder, store, sample, batch_tokens=config.placement.batch_tokens)
        found |= {
            f"parity/{catalog.dataset}/{name}": float(value)
            for name, value in dataclasses.asdict(report).items()
            if value is not None
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("embed_catalog", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
