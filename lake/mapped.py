"""Tables whose rows lie in a mapped file: the ids and hashes of a catalogue of millions would fill a process.

The system reads pages of the file where they are looked at and drops them where memory is short. The file has no name
any more once it is mapped, so that it goes with the table; it takes the disk of `tempfile.gettempdir()` (TMPDIR).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lake.storage import LakeError

BLOCK_ROWS: Final = 250_000
"""Rows sorted into place at once; their texts must fit 2 GiB a column."""


def mapped(parts: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """The rows of all parts, in a mapped file.

    Raises:
        LakeError: the disk is full.
    """
    number, path = tempfile.mkstemp(prefix="assay-", suffix=".arrow")
    try:
        with os.fdopen(number, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for part in parts:
                writer.write_table(part)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LakeError(
            f"{tempfile.gettempdir()} is full: rows of a table are sorted there, 200 bytes each and their texts; make "
            "room, or set TMPDIR to a folder of a disk that has some"
        ) from error
    finally:
        os.unlink(path)


def in_order(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The rows by ascending columns, in a mapped file of its own."""
    order = np.asarray(pc.sort_indices(table, [(name, "ascending") for name in names])).view(np.int64)
    starts = range(0, len(table), BLOCK_ROWS)
    return mapped((take_rows(table, order[at : at + BLOCK_ROWS]) for at in starts), table.schema)


def take_rows(table: pa.Table, row_N: NDArray[np.int64]) -> pa.Table:
    """These rows in their order, in memory; Arrow's own take would copy whole columns for them.

    Args:
        table: whose columns have the same blocks, as those of `mapped` have.
        row_N: numbers of rows.
    """
    blocks = table.to_batches()
    first_B = np.cumsum([0, *map(len, blocks)])
    block_N = np.searchsorted(first_B, row_N, side="right") - 1
    order_N = np.argsort(block_N, kind="stable")
    start_B = np.searchsorted(block_N[order_N], np.arange(len(blocks) + 1))
    parts = [
        block.take(pa.array(row_N[order_N[start:end]] - first))
        for block, first, start, end in zip(blocks, first_B[:-1], start_B[:-1], start_B[1:], strict=True)
        if start < end
    ]
    return pa.Table.from_batches(parts, table.schema).take(pa.array(np.argsort(order_N)))
