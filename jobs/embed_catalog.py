"""Encodes the catalogue into shard files of vectors; files that are complete are kept."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa

from conf.load import ConfigError, meaning, settings
from embeddings.shards import Shard, plan_shards, texts_print
from jobs import job
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import CATALOG_PRODUCT, EMBEDDING_MANIFEST
from lake.storage import Lake
from ray_apps.cluster import RayPlacement, connect


@settings
class Inputs:
    """The catalogue and the encoder."""

    catalog_product: job.TableVersion = "newest"
    model: Annotated[str, meaning("folder of the encoder, in the lake or elsewhere")] = ""


@settings
class EmbedRecipe:
    """How the catalogue is cut."""

    num_shards: Annotated[int, meaning("shard files per data set; 0: one per 5,000 products", "shards", ge=0)] = 0


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
    num_search_actors: Annotated[int, meaning("actors that hold FAISS shards; at most one per shard", ge=1)] = 2
    threads_per_search_actor: Annotated[int, meaning("CPUs and threads of each", "CPUs", ge=1)] = 1


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
    """The products of one data set in id order, and where an encoder's vectors of them lie."""

    dataset: str
    products: pa.Table
    print: str

    def folder(self, lake: Lake, model: str) -> str:
        """Folder of the shard files of an encoder, by its fingerprint."""
        return lake.path("vectors", model, self.dataset, self.print)

    def shards(self, lake: Lake, model: str, recipe: EmbedRecipe) -> list[Shard]:
        """The shards of an encoder, whether their files are there or not."""
        return plan_shards(self.folder(lake, model), len(self.products), recipe.num_shards)


def read_catalogs(lake: Lake, version: int, datasets: Sequence[str] = ()) -> list[Catalog]:
    """The catalogues of the lake, or of some data sets, by name."""
    where = [("dataset", "in", list(datasets))] if datasets else None
    products = tables.rows(lake, CATALOG_PRODUCT, version=version, where=where).sort_by(
        [("dataset", "ascending"), ("product_id", "ascending")]
    )
    names = products["dataset"].to_pylist()
    catalogs = []
    for name in dict.fromkeys(names):
        own = products.slice(names.index(name), names.count(name))
        ids, hashes = own["product_id"].to_pylist(), own["product_hash"].to_pylist()
        catalogs.append(Catalog(name, own, texts_print(ids, hashes)))
    return catalogs


def embed(
    current: Run,
    catalogs: Sequence[Catalog],
    models: Mapping[str, str],
    queries: Mapping[str, Sequence[str]],
    recipe: EmbedRecipe,
    placement: EmbedPlacement,
) -> dict[tuple[str, str], str]:
    """Encodes catalogues and queries with every model, and lists the shard files in embedding_manifest.

    Args:
        current: the run on whose behalf.
        catalogs: of the data sets wanted.
        models: fingerprint -> folder.
        queries: data set -> texts.
        recipe: number of shards.
        placement: where it runs.

    Returns:
        File of the query vectors by (model, data set), for data sets that have queries.
    """
    from ray_apps import embed as app

    connect(placement.ray)
    parts, query_files = [], {}
    for model, folder in models.items():
        for catalog in catalogs:
            parts += app.plan_products(folder, catalog.products, catalog.shards(current.lake, model, recipe))
            if queries.get(catalog.dataset):
                part = app.plan_queries(folder, queries[catalog.dataset], catalog.folder(current.lake, model))
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
    for model in models:
        for catalog in catalogs:
            _write_manifest(current, model, catalog, recipe)
    return query_files


def _write_manifest(current: Run, model: str, catalog: Catalog, recipe: EmbedRecipe) -> None:
    rows = []
    for shard in catalog.shards(current.lake, model, recipe):
        with Path(shard.path).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        rows.append(
            {
                "run_id": current.run_id,
                "dataset": catalog.dataset,
                "model": model,
                "catalog": catalog.print,
                "shard": shard.number,
                "path": current.lake.relative(shard.path),
                "num_rows": shard.num_rows,
                "width": shard.vectors().shape[1],
                "sha256": digest,
            }
        )
    key = {"model": model, "dataset": catalog.dataset, "catalog": catalog.print}
    data = pa.Table.from_pylist(rows, schema=EMBEDDING_MANIFEST.schema)
    tables.replace(current.lake, EMBEDDING_MANIFEST, data, run_id=current.run_id, where=tables.equal_to(key))


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
    """Vectors of every data set's products, and their rows in embedding_manifest."""
    folder = encoder_folder(Lake(config.lake), config.inputs.model, "inputs.model")
    current = job.begin(config, "embed_catalog")
    catalogs = read_catalogs(current.lake, int(current.inputs["catalog_product"]))
    embed(current, catalogs, {current.inputs["model"]: folder}, {}, config.recipe, config.placement)
    return current.finish(
        rows=sum(len(catalog.products) for catalog in catalogs),
        outputs={"embedding_manifest": tables.version(current.lake, EMBEDDING_MANIFEST) or 0},
        counts={f"products/{catalog.dataset}": len(catalog.products) for catalog in catalogs},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("embed_catalog", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
