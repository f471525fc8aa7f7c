"""Texts to vectors over a pool of Ray Data actors: one block of rows in, one file of vectors out.

Products whose texts the store of an encoder holds are not computed again, so that a killed run goes on where it was and
a night of few changes encodes those alone. Queries and products of several models are parts of one run: the actors
start once, and starting one (torch, weights) costs seconds.

P products, D width of a vector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from embeddings.sampling import evenly_spread
from embeddings.text import FIELDS, TextRecipe, normalise_query, product_texts
from embeddings.vectors import (
    FILE_ROWS,
    QUERIES,
    VectorStore,
    VectorType,
    file_bytes,
    has_rows,
    texts_print,
    write_vectors,
)
from lake.mapped import take_rows
from lake.progress import write_progress
from lake.storage import check_space
from ray_apps.cluster import check_resources, quiet_data

if TYPE_CHECKING:
    from embeddings.parity import ParityReport

log = logging.getLogger(__name__)

_CALIBRATING_TEXTS, _COMPARED_PRODUCTS = 300, 2_000
_TEXTS_AT_ONCE = 250_000
"""Texts that are read at once: of a product that has a description they are some kilobytes."""
_LEAST_ROWS = 1_000
"""Texts for which another worker is worth its start."""


@dataclass(frozen=True)
class Part:
    """Texts that become one file of vectors.

    Attributes:
        model: folder of the encoder.
        side: which of its heads.
        path: the file.
        kind: of number that it holds.
        quantised: folder of the int8 encoder that computes it, made where it is missing; empty: the encoder itself.
        hashes: of the texts, kept beside the vectors; a query's is its text.
        texts_of: hashes of this part, and of others that have the same function -> their `FIELDS`, row by row; a query
            is a title.
    """

    model: str
    side: Literal["query", "document"]
    path: str
    kind: VectorType
    hashes: pa.Array
    texts_of: Callable[[pa.Array], pa.Table]
    quantised: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the file is there with all its rows."""
        return has_rows(self.path, len(self.hashes))


def plan_products(
    model: str,
    hashes: pa.ChunkedArray,
    texts_of: Callable[[pa.Array], pa.Table],
    store: VectorStore,
    kind: VectorType,
    num_workers: int,
    *,
    in_int8: bool = False,
) -> list[Part]:
    """Parts for the products whose texts the store lacks, each text once.

    Args:
        model: folder of the encoder.
        hashes: of the texts of a catalogue's products, in an order that does not change from run to run.
        texts_of: hashes that have no vector -> their `FIELDS`, row by row; called for some at a time.
        store: the encoder's vectors of that data set.
        kind: of number that is stored.
        num_workers: there are as many parts at least, where there are texts enough for them.
        in_int8: they are computed in int8, on processors.
    """
    quantised = str(store.folder / "int8") if in_int8 else ""
    missing = store.missing(hashes)
    if not missing:
        return []
    count = max(1, -(-len(missing) // FILE_ROWS), min(num_workers, len(missing) // _LEAST_ROWS))
    parts = []
    for number in range(count):
        start = len(missing) * number // count
        # a copy, since Arrow makes no plain strings of what lies beyond 2 GiB
        own = pa.concat_arrays([missing[start : len(missing) * (number + 1) // count]])
        parts.append(Part(model, "document", store.path_of(own), kind, own.cast(pa.string()), texts_of, quantised))
    return parts


def plan_queries(model: str, texts: Sequence[str], folder: str | Path) -> Part:
    """One part for queries, in normal form; its file is named by their hash."""
    normal = [normalise_query(text) for text in texts]
    nothing = pa.nulls(len(normal), pa.string())
    fields = pa.table(dict(zip(FIELDS, (pa.array(normal, pa.string()), nothing, nothing, nothing), strict=True)))
    path = Path(folder, f"{QUERIES}{texts_print(normal)}.npy")
    return Part(model, "query", str(path), "float32", pa.array(texts, pa.string()), lambda _: fields)


def embed(
    parts: Sequence[Part],
    *,
    num_workers: int,
    threads_per_worker: int,
    use_gpu: bool,
    batch_tokens: int,
    own_texts: int,
    run_folder: str,
) -> int:
    """Encodes the parts whose files are missing.

    Args:
        parts: in the order of work; keep those of a model together, since an actor holds one model at a time.
        num_workers: actors at most; never more than parts.
        threads_per_worker: CPUs and torch threads of an actor.
        use_gpu: gives each actor a GPU.
        batch_tokens: padded tokens of a forward pass.
        own_texts: up to so many are encoded in this process, unless a GPU is wanted: an actor takes longer to start.
        run_folder: where the run tells how far it is.

    Returns:
        Rows encoded now.
    """
    missing = [part for part in parts if not part.is_complete]
    log.info("embed: %d of %d files are there", len(parts) - len(missing), len(parts))
    if not missing:
        return 0
    total, encoded, started = sum(len(part.hashes) for part in missing), 0, time.monotonic()
    given = [
        _Job(part.model, part.side, part.path, part.kind, _int8_file(part, missing), len(part.hashes))
        for part in missing
    ]
    encode: Callable[[list[pa.Table]], Iterator[int]]
    arguments = given, threads_per_worker, use_gpu, batch_tokens
    if total <= own_texts and not use_gpu:
        encode = partial(_encode_here, _PartEncoder(*arguments))
    else:
        size = min(num_workers, len(missing))
        check_resources(size * threads_per_worker, size * int(use_gpu))
        quiet_data()
        encode = partial(_encode_there, arguments, size)
    for num_rows in chain.from_iterable(map(encode, _blocks(missing))):
        encoded += num_rows
        seconds = time.monotonic() - started
        write_progress(run_folder, done=encoded, total=total, note=f"texts encoded, {encoded / seconds:.0f}/s")
        log.info("embed: %d of %d texts, %.0f/s", encoded, total, encoded / seconds)
        if encoded == num_rows:
            # the first file tells how large the others will be
            _check_space(missing)
    return encoded


def _blocks(parts: Sequence[Part]) -> Iterator[list[pa.Table]]:
    """Of each part `FIELDS`, hash and the part's number, those of some parts at a time."""
    kinds, number = pa.schema([(name, pa.string()) for name in FIELDS]), 0
    for together in _portions(parts):
        blocks = []
        for texts_of, group in groupby(together, key=lambda part: part.texts_of):
            own = list(group)
            texts, start = texts_of(pa.concat_arrays([part.hashes for part in own])), 0
            for part in own:
                size = len(part.hashes)
                fields = texts.select(FIELDS).slice(start, size).cast(kinds).append_column("hash", part.hashes)
                blocks.append(fields.append_column("part", pa.array(np.full(size, number, dtype=np.int64))))
                start, number = start + size, number + 1
        yield blocks


def _portions(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts, as many together as hold _TEXTS_AT_ONCE texts, but at least one."""
    together: list[Part] = []
    for part in parts:
        if together and sum(len(other.hashes) for other in (*together, part)) > _TEXTS_AT_ONCE:
            yield together
            together = []
        together.append(part)
    if together:
        yield together


def _check_space(parts: Sequence[Part]) -> None:
    """Looks, by the size of the files that are there, whether the disk has room for those that are not.

    Raises:
        LakeError: it has less.
    """
    here = [part for part in parts if part.is_complete]
    size, rows = sum(file_bytes(part.path) for part in here), sum(len(part.hashes) for part in here)
    left = sum(len(part.hashes) for part in parts) - rows
    if left:
        check_space(Path(here[0].path).parent, left * size // max(1, rows), f"vectors of {left:,} more texts")


def _texts(fields: pa.Table, side: Literal["query", "document"], recipe: TextRecipe) -> list[str]:
    """What the encoder reads of rows of `FIELDS`."""
    return list(fields["title"].to_pylist()) if side == "query" else product_texts(fields, recipe)


def _int8_file(part: Part, missing: Sequence[Part]) -> str:
    """The graph that computes a part in int8; the store's, which its first products calibrate; empty for none."""
    if not part.quantised:
        return ""
    found = sorted(Path(part.quantised).glob("*/*.xml"))
    if not found:
        from embeddings.encoder import load_encoder
        from embeddings.quantised import build_quantised

        model, recipe = load_encoder(part.model)
        hashes = pa.concat_arrays([other.hashes for other in missing if other.quantised == part.quantised])
        sample = part.texts_of(hashes.take(pa.array(evenly_spread(len(hashes), _CALIBRATING_TEXTS))))
        texts = _texts(sample, part.side, recipe)
        found = [build_quantised(model, part.model, part.side, cache=part.quantised, calibration=texts)]
    return str(found[0])


def compared(hashes: pa.ChunkedArray) -> pa.Array:
    """Of a catalogue's hashes those on whose texts `parity` compares: 2,000 at most, evenly spread, each once."""
    rows = evenly_spread(len(hashes), _COMPARED_PRODUCTS)
    return pc.unique(take_rows(pa.table({"hash": hashes}), rows)["hash"])


def parity(model_folder: str, store: VectorStore, sample: pa.Table, *, batch_tokens: int) -> ParityReport:
    """How near stored vectors are to those of the encoder in float32, on a sample of the catalogue.

    Titles stand for queries, which are the encoder's own on both sides.

    Args:
        model_folder: of the encoder.
        store: its vectors, of the sample at least.
        sample: product_hash and `FIELDS` of products.
        batch_tokens: padded tokens of a forward pass.
    """
    from embeddings.encoder import encode, load_encoder
    from embeddings.parity import compare_vectors

    model, recipe = load_encoder(model_folder)
    exact_PD = encode(model, product_texts(sample, recipe), "document", batch_tokens=batch_tokens)
    titles = [normalise_query(title) for title in sample["title"].to_pylist()[:: _COMPARED_PRODUCTS // 100]]
    query_QD = encode(model, titles, "query", batch_tokens=batch_tokens)
    stored_PD = store.vectors(sample["product_hash"]).take(np.arange(len(sample)))
    return compare_vectors(query_QD, exact_PD, query_QD, stored_PD)


def _encode_here(encoder: _PartEncoder, blocks: Sequence[pa.Table]) -> Iterator[int]:
    """Rows of each block, encoded in this process, whose number of threads stays."""
    from embeddings.lanes import torch_threads

    with torch_threads(encoder.threads):
        for block in blocks:
            yield encoder(block)["num_rows"][0].as_py()


def _encode_there(arguments: tuple[Sequence[_Job], int, bool, int], size: int, blocks: list[pa.Table]) -> Iterator[int]:
    """The same by a pool of at most so many actors, each of them a `_PartEncoder` of these arguments."""
    _, threads, use_gpu, _ = arguments
    pool = ray.data.from_arrow(blocks).map_batches(
        _PartEncoder,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(size, len(blocks))),
        num_cpus=threads,
        num_gpus=int(use_gpu),
    )
    for row in pool.iter_rows():
        yield row["num_rows"]


class _Job(NamedTuple):
    """What an actor must know of a part beside its texts."""

    model: str
    side: Literal["query", "document"]
    path: str
    kind: VectorType
    int8_file: str
    num_rows: int


class _PartEncoder:
    """Holds one encoder in one process and writes the files of its parts."""

    def __init__(self, parts: Sequence[_Job], threads: int, use_gpu: bool, tokens: int) -> None:
        self._parts, self.threads, self._tokens = parts, threads, tokens
        self._device = "cuda" if use_gpu else "cpu"
        self._loaded: tuple[str, Any, Any] | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        from embeddings.backbone import has_fast_bf16
        from embeddings.encoder import encode

        torch.set_num_threads(self.threads)
        part = self._parts[block["part"][0].as_py()]
        if block.num_rows != part.num_rows:
            raise ValueError(f"{part.path}: expected {part.num_rows} texts in one block, got {block.num_rows}")
        model, recipe = self._load(part.model)
        texts = _texts(block, part.side, recipe)
        if part.int8_file:
            from embeddings.quantised import QuantisedEncoder

            vector_PD = QuantisedEncoder(model, part.side, part.int8_file).encode(texts, batch_tokens=self._tokens)
        else:
            vector_PD = encode(model, texts, part.side, batch_tokens=self._tokens, bf16=has_fast_bf16(self._device))
        write_vectors(part.path, vector_PD, block["hash"].to_pylist(), kind=part.kind)
        return pa.table({"num_rows": [part.num_rows]})

    def _load(self, folder: str) -> tuple[Any, Any]:
        from embeddings.encoder import load_encoder

        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = (folder, *load_encoder(folder, device=self._device))
        return self._loaded[1:]
