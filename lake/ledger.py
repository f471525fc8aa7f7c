"""The ledger's protocol: every address once, whoever writes at the same time, and files that stay few.

Writers agree through one application transaction that all of them carry: of two that commit at once Delta refuses one,
which then looks at what has arrived, drops what is there, and tries again. So a run that was killed, a part that is
replayed and a second nightly run leave each address once, without any lock that a dead run could hold.

Reading is by scans in batches: what is kept in memory grows with the pairs asked for, not with the ledger.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError
from numpy.typing import NDArray
from pyarrow import dataset

from lake import tables
from lake.schemas import PAIR_GRADE
from lake.storage import Lake, LakeError, patient

log = logging.getLogger(__name__)

TURN = "ledger"
"""The transaction that every append carries."""
MAX_TRIES = 200
SCAN_ROWS = 1_000_000
COMPACT_FROM_FILES = 64
COMPACTED_BYTES = 512 * 2**20


class Ledger:
    """The ledger as one run sees it.

    Args:
        lake: that holds it; the table is made where it does not exist.
        wanted: addresses that this run may write; only these are looked for.
    """

    def __init__(self, lake: Lake, wanted: pa.Array | pa.ChunkedArray) -> None:
        self.lake = lake
        tables.create(lake, PAIR_GRADE)
        self._wanted = pa.array(wanted.to_numpy(zero_copy_only=False), pa.string())
        self._seen: set[str] = set()
        self._held: set[str] = set()
        self.doubles = 0
        """Rows that another writer had put there between the question and the answer."""
        self._look(patient(tables.open_table)(lake, PAIR_GRADE))

    def holds(self, addresses: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which of the wanted addresses the ledger holds as far as it was seen."""
        return np.fromiter((address in self._held for address in addresses.to_pylist()), bool, len(addresses))

    def append(self, rows: pa.Table, *, run_id: str) -> int:
        """Writes the rows whose address is not there yet, all or none; returns how many.

        Raises:
            ValueError: the rows do not fit the table's specification.
            LakeError: other writers were always faster.
        """
        rows = tables.conform(PAIR_GRADE, rows)
        for attempt in range(MAX_TRIES):
            try:
                return self._append(rows, run_id)
            except CommitFailedError:
                time.sleep(random.uniform(0, 0.05 * min(attempt + 1, 20)))
        raise LakeError(f"{PAIR_GRADE.name}: other runs wrote at every of {MAX_TRIES} tries; run again")

    @patient
    def _append(self, rows: pa.Table, run_id: str) -> int:
        table = tables.open_table(self.lake, PAIR_GRADE)
        self._look(table)
        fresh = rows.filter(pa.array(~self.holds(rows["address"])))
        if not len(fresh):
            self.doubles += len(rows)
            return 0
        turn = (table.transaction_version(TURN) or 0) + 1
        write_deltalake(
            table,
            fresh,
            mode="append",
            commit_properties=CommitProperties(
                custom_metadata={"run_id": run_id}, app_transactions=[Transaction(TURN, turn)], max_commit_retries=0
            ),
        )
        self.doubles += len(rows) - len(fresh)
        self._held.update(fresh["address"].to_pylist())
        self._seen = set(table.file_uris())
        return len(fresh)

    def _look(self, table: DeltaTable) -> None:
        """Takes in the files that have come since the last look."""
        files = set(table.file_uris())
        if files == self._seen:
            return
        for batch in scan(table, ["address"], files - self._seen):
            self._held.update(batch["address"].filter(pc.is_in(batch["address"], self._wanted)).to_pylist())
        self._seen = files


def scan(table: DeltaTable, columns: Sequence[str], files: set[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Rows of a Delta table in batches, of some of its files where they are named by their addresses."""
    whole = table.to_pyarrow_dataset()
    if files is not None:
        names = {file.rsplit("/", 1)[-1] for file in files}
        kept = [fragment for fragment in whole.get_fragments() if fragment.path.rsplit("/", 1)[-1] in names]
        whole = dataset.FileSystemDataset(kept, whole.schema, whole.format, whole.filesystem)
    for batch in whole.to_batches(columns=list(columns), batch_size=SCAN_ROWS):
        if len(batch):
            plain = tables.plain(pa.Table.from_batches([batch]))
            yield plain.combine_chunks().to_batches()[0]


def rows_at(lake: Lake, addresses: pa.Array | pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
    """Columns of the ledger's rows at some addresses, with their (first) `row` in the addresses, in that order."""
    wanted = pa.array(addresses.to_numpy(zero_copy_only=False), pa.string())
    kinds = {column.name: column.type for column in PAIR_GRADE.columns}
    found = [pa.table({"row": pa.array([], pa.int32())} | {name: pa.array([], kinds[name]) for name in columns})]
    if tables.exists(lake, PAIR_GRADE):
        for batch in scan(tables.open_table(lake, PAIR_GRADE), list(dict.fromkeys(["address", *columns]))):
            row = pc.index_in(batch["address"], value_set=wanted)
            own = pa.table({"row": row} | {name: batch[name] for name in columns})
            found.append(own.filter(pc.is_valid(row)))
    return pa.concat_tables(found).sort_by("row")


def newest_of_pairs(lake: Lake, query_hashes: pa.ChunkedArray, product_hashes: pa.ChunkedArray) -> list[str | None]:
    """Address of the newest row of each pair of texts, whatever judge wrote it; None where there is none.

    Args:
        lake: that holds the ledger.
        query_hashes: of the pairs.
        product_hashes: of the same pairs.
    """
    keys = list(zip(query_hashes.to_pylist(), product_hashes.to_pylist(), strict=True))
    if not keys or not tables.exists(lake, PAIR_GRADE):
        return [None] * len(keys)
    wanted = set(keys)
    queries, products = pc.unique(query_hashes), pc.unique(product_hashes)
    names = ["query_hash", "product_hash", "created_at", "address"]
    newest: dict[tuple[str, str], tuple[datetime, str]] = {}
    for batch in scan(tables.open_table(lake, PAIR_GRADE), names):
        is_near = pc.and_(pc.is_in(batch["query_hash"], queries), pc.is_in(batch["product_hash"], products))
        for row in batch.filter(is_near).to_pylist():
            key, age = (row["query_hash"], row["product_hash"]), (row["created_at"], row["address"])
            if key in wanted and (key not in newest or age > newest[key]):
                newest[key] = age
    return [newest[key][1] if key in newest else None for key in keys]


def graded_by_people(lake: Lake, query_hashes: pa.ChunkedArray, product_hashes: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which pairs of texts have a human row."""
    keys = list(zip(query_hashes.to_pylist(), product_hashes.to_pylist(), strict=True))
    if not tables.exists(lake, PAIR_GRADE):
        return np.zeros(len(keys), dtype=bool)
    names = ["query_hash", "product_hash"]
    human = tables.rows(lake, PAIR_GRADE, columns=names, where=[("judge", "=", "human")])
    held = set(zip(*(human[name].to_pylist() for name in names), strict=True))
    return np.fromiter((key in held for key in keys), bool, len(keys))


def compact(lake: Lake, from_files: int = COMPACT_FROM_FILES) -> int:
    """Joins the ledger's small files where there are many; rows, addresses and history stay. Returns files removed.

    A nightly run appends hundreds of parts, and every later scan opens each of them.
    """
    table = patient(tables.open_table)(lake, PAIR_GRADE)
    sizes = table.get_add_actions(flatten=True)["size_bytes"].to_pylist()
    if sum(size < COMPACTED_BYTES // 2 for size in sizes) < from_files:
        return 0
    try:
        told = table.optimize.compact(target_size=COMPACTED_BYTES)
    except CommitFailedError as error:
        log.info("%s: another run compacts as well (%s)", PAIR_GRADE.name, str(error).splitlines()[0])
        return 0
    return int(told["numFilesRemoved"])
