"""What tuning, labelling and training read of the lake: train queries, their instances, the texts of pairs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import ConfigError
from embeddings.calibration import probabilities_of
from embeddings.labeller import load_labeller_card
from embeddings.text import FIELDS, normal_form
from jobs import job, models
from lake import tables
from lake.runs import Run
from lake.schemas import CATALOG_PRODUCT, QUERY, TRAINING_INSTANCE, TableSpec
from lake.storage import Lake
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

PAIR = ["dataset", "query_id", "product_id"]
GRADED = ["grade", "at_least_1", "at_least_2"]
"""What people said of a pair."""
TEXTS = [*FIELDS, "attributes"]


def read(current: Run, spec: TableSpec, columns: list[str]) -> pa.Table:
    """Columns of a table at the version that the run is pinned to."""
    return tables.rows(current.lake, spec, version=int(current.inputs[spec.name]), columns=columns)


class PairTexts:
    """Queries and products at the versions that a run is pinned to; pairs refer to them by row.

    So a million pairs are ids and row numbers, and their texts are put together when they are needed.

    Args:
        current: the run.
    """

    def __init__(self, current: Run) -> None:
        queries = read(current, QUERY, ["dataset", "query_id", "text", "query_hash", "split"])
        self.queries = queries.rename_columns(["dataset", "query_id", "query", "query_hash", "split"])
        self.products = read(current, CATALOG_PRODUCT, ["dataset", "product_id", *TEXTS, "product_hash"])

    def keys(self, pairs: pa.Table) -> pa.Table:
        """The pairs with query_row, product_row, query_hash and product_hash, in key order.

        Pairs whose query or product is not in the pinned tables are left out.
        """
        # by number, since joins carry no lists
        joined = pairs.select(PAIR).append_column("place", pa.array(np.arange(len(pairs))))
        for side, name in ((self.queries, "query"), (self.products, "product")):
            numbered = side.select(["dataset", f"{name}_id"])
            numbered = numbered.append_column(f"{name}_row", pa.array(np.arange(len(side))))
            joined = joined.join(numbered, ["dataset", f"{name}_id"], join_type="inner")
        joined = joined.sort_by([(key, "ascending") for key in PAIR])
        keys = pairs.take(joined["place"])
        for side, name in ((self.queries, "query"), (self.products, "product")):
            row = joined[f"{name}_row"]
            keys = keys.append_column(f"{name}_row", row).append_column(f"{name}_hash", side[f"{name}_hash"].take(row))
        return keys

    def take(self, keys: pa.Table, names: Sequence[str] = ("query", *TEXTS)) -> pa.Table:
        """Columns of the queries and products that the keys refer to."""
        found = {}
        for name in names:
            side, row = (self.queries, "query_row") if name in ("query", "split") else (self.products, "product_row")
            found[name] = side[name].take(keys[row])
        return pa.table(found)


def with_texts(current: Run, pairs: pa.Table) -> pa.Table:
    """The pairs with query, query_hash, split, the product's texts and product_hash, in key order.

    Pairs whose query or product is not in the pinned tables are left out.
    """
    texts = PairTexts(current)
    keys = texts.keys(pairs)
    found = texts.take(keys, ("query", "split", *TEXTS))
    columns = {name: keys[name] for name in keys.column_names if not name.endswith("_row")}
    return pa.table(columns | {name: found[name] for name in found.column_names})


def train_queries(current: Run) -> set[tuple[str, str]]:
    """Train queries, but those of the same normal form as some query of another split: (dataset, query_id).

    `ingest` leaves none; a table that was split before NFKC was part of the normal form may hold some.
    """
    names = ["dataset", "query_id", "text", "split"]
    queries = read(current, QUERY, names)
    rows = list(zip(*(queries[name].to_pylist() for name in names), strict=True))
    held_out = {normal_form(text) for _, _, text, split in rows if split != "train"}
    return {
        (dataset, query_id)
        for dataset, query_id, text, split in rows
        if split == "train" and normal_form(text) not in held_out
    }


def train_instances(current: Run, stage: int) -> list[dict[str, Any]]:
    """Instances of a stage whose queries are train queries now, by key, however the table was written.

    The splits may have changed since the instances were built.
    """
    version = int(current.inputs[TRAINING_INSTANCE.name])
    rows = tables.rows(current.lake, TRAINING_INSTANCE, version=version, where=[("stage", "=", stage)])
    ordered = rows.sort_by([("dataset", "ascending"), ("query_id", "ascending")]).to_pylist()
    is_train = train_queries(current)
    kept = [row for row in ordered if (row["dataset"], row["query_id"]) in is_train]
    if len(kept) < len(ordered):
        log.warning(
            "%s: %d instances left out: no train queries now, or the same text as a query of another split",
            current.job,
            len(ordered) - len(kept),
        )
    return kept


def places_of(values: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """First places of the values among others, of which there may be many times as many; -1 where they are not."""
    values = values.cast(among.type)
    wanted = pc.unique(values)
    number_A = np.asarray(pc.fill_null(pc.index_in(among, value_set=wanted), -1), dtype=np.int32)
    place_W = np.full(len(wanted), -1, dtype=np.int64)
    # of what is written to one place the last stays
    found = np.flatnonzero(number_A >= 0)[::-1]
    place_W[number_A[found]] = found
    return place_W[np.asarray(pc.index_in(values, value_set=wanted), dtype=np.int64)]


def graded_in_order(pairs: pa.Table, folder: str, placement: LabelPlacement) -> NDArray[np.float64]:
    """A labeller's calibrated probabilities of the pairs, in their order, [N, 3]; nan where it gave no distribution.

    Args:
        pairs: query, title and what else `ray_apps.label.label_pairs` reads.
        folder: of the labeller.
        placement: engine and portions.
    """
    from ray_apps.label import label_pairs

    names = pa.array([f"{row:012d}" for row in range(len(pairs))], pa.string())
    probability_N3 = np.full((len(pairs), 3), np.nan)
    for part in label_pairs(pairs.append_column("address", names), folder, placement):
        rows = [int(name) for name in part["address"].to_pylist()]
        probability_N3[rows] = probabilities_of(part)
    return probability_N3


def with_newest_labeller(config: Any) -> Any:
    """The config with inputs.labeller set to the lake's labeller where it is empty.

    Raises:
        LakeError: it is empty, and no labeller was tuned in this lake.
    """
    if config.inputs.labeller:
        return config
    lake = Lake(config.lake)
    newest = lake.relative(models.labeller_folder(lake))
    return dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, labeller=newest))


def labeller_folders(lake: Lake, inputs: Any) -> tuple[str, str]:
    """The folders that inputs.labeller and inputs.stronger name; the second is empty where that is.

    Raises:
        ConfigError: one of them names none.
    """
    stronger = labeller_folder(lake, inputs.stronger, "inputs.stronger") if inputs.stronger else ""
    return labeller_folder(lake, inputs.labeller), stronger


def labeller_fingerprint(lake: Lake, value: str, key: str = "inputs.labeller") -> str:
    """The fingerprint of the labeller in the folder that a setting names; empty for an empty setting.

    Raises:
        ConfigError: it names none.
    """
    return load_labeller_card(labeller_folder(lake, value, key)).fingerprint if value else ""


def labeller_folder(lake: Lake, value: str, key: str = "inputs.labeller") -> str:
    """The folder that a setting names, below the lake or anywhere.

    Raises:
        ConfigError: it names none.
    """
    folder = job.find_path(lake, value) if value else None
    if folder is None:
        raise ConfigError(f"{key}={value!r}: no such folder; give one of tune_labeller")
    return folder
