"""Texts as token ids, kept from step to step of a training.

A query comes once per epoch, a product with every query that it is graded for. On a graphics card a small encoder's
step takes less time than its tokenizer, for which the card would wait (benchmarks/results.md). Where a training set is
large, its texts are tokenised beforehand into shards, Arrow tables that the workers of a node share: a shard is read
where it lies, by the texts' hashes.
"""

# N texts, L tokens of the longest, S texts of the shards

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embeddings.encoder import SIDES, Side, place_features, tokenize, transformers_of
from embeddings.packing import first_place, pack, pack_rows, rows_of

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
MAX_TEXTS: Final = 2_000_000
"""Texts kept by default: some 400 MB of product titles."""

_COUNTED: Final = 4_096
"""Texts tokenised at once where tokens are counted."""


def token_shard(model: SentenceTransformer, texts: Sequence[str], side: Side) -> pa.Table | None:
    """Columns `side`, `high` and `low`, the halves of a text's hash, and `ids`; None for a model as in `TokenCache`."""
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), _COUNTED):
        found = tokenize(model, texts[start : start + _COUNTED], side, device="cpu")
        if not _is_plain(found):
            return None
        ids += rows_of(found)
    high_N, low_N = _hashes(texts)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32)
    flat = np.concatenate([np.empty(0, np.int32), *ids])
    lists = pa.ListArray.from_arrays(pa.array(bounds), pa.array(flat))
    sides = pa.array(np.full(len(texts), SIDES.index(side), dtype=np.int8))
    return pa.table({"side": sides, "high": high_N, "low": low_N, "ids": lists})


class _Shards:
    """Finds the ids of texts in shards, which stay where they lie; 24 bytes a text are held beside them."""

    def __init__(self, shards: Sequence[pa.Table]) -> None:
        # chunk by chunk, without a copy
        chunks = [chunk for shard in shards for chunk in shard["ids"].chunks]
        self._ids = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._first_C = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks])])
        whole = pa.concat_tables(shard.drop_columns("ids") for shard in shards)
        high_S, side_S = whole["high"].to_numpy(), whole["side"].to_numpy()
        order_S = np.lexsort([high_S, side_S])
        self._bounds = np.searchsorted(side_S[order_S], range(len(SIDES) + 1))
        self._high_S, self._low_S, self._row_S = high_S[order_S], whole["low"].to_numpy()[order_S], order_S

    def __len__(self) -> int:
        return len(self._row_S)

    def __call__(self, texts: Sequence[str], side: Side) -> list[NDArray[np.int32] | None]:
        """Ids of each text; None where the shards have none."""
        if not len(self):
            return [None] * len(texts)
        start, end = self._bounds[SIDES.index(side) :][:2]
        high_N, low_N = _hashes(texts)
        place_N = start + np.searchsorted(self._high_S[start:end], high_N)
        is_there_N = place_N < end
        place_N = np.minimum(place_N, len(self) - 1)
        is_there_N &= (self._high_S[place_N] == high_N) & (self._low_S[place_N] == low_N)
        row_N = self._row_S[place_N]
        chunk_N = np.searchsorted(self._first_C, row_N, side="right") - 1
        found = zip(is_there_N, chunk_N, row_N - self._first_C[chunk_N], strict=True)
        return [self._at(chunk, row) if is_there else None for is_there, chunk, row in found]

    def _at(self, chunk: int, row: int) -> NDArray[np.int32]:
        offset_R, id_T = self._ids[chunk]
        ids: NDArray[np.int32] = id_T[offset_R[row] : offset_R[row + 1]]
        return ids


class TokenCache:
    """Token tensors of texts, as `encoder.tokenize` gives them, every text tokenised once.

    Args:
        model: whose tokenizer, prefixes and token limits count; they are taken not to change.
        max_texts: how many are kept; further ones are tokenised whenever they come. A model that reads more than
            ids, mask and a single segment has none kept.
        shards: of `token_shard`, by the same model; their texts are not tokenised, and do not count as kept.

    Example:
        >>> tokens = TokenCache(model)
        >>> features = tokens(["red shoes"], "query")
    """

    def __init__(self, model: SentenceTransformer, max_texts: int = MAX_TEXTS, shards: Sequence[pa.Table] = ()) -> None:
        self.model, self.max_texts = model, max_texts
        self._shards = _Shards(shards) if shards else None
        self._ids: dict[tuple[Side, str], NDArray[np.int32]] = {}
        self._features: dict[Side, dict[str, Any]] = {}
        self._first_places = {side: first_place(model, side) for side in SIDES}

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """Padded token tensors [N, L] on the model's device."""
        rows = self._rows(texts, side)
        return tokenize(self.model, texts, side) if rows is None else self._padded(rows, side)

    def packed(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """The texts in one row without padding, for a model whose backbones `packing.pack_backbones` took."""
        rows = self._rows(texts, side)
        if rows is None:
            return pack(self.model, tokenize(self.model, texts, side), side)
        others = {name: value for name, value in self._features[side].items() if value is not None}
        found = pack_rows(rows, self._first_places[side])
        return place_features(others | found, self.model.device)

    def lengths(self, texts: Sequence[str], side: Side) -> NDArray[np.int64]:
        """What texts are ordered by so that neighbours are about as long, [N]: tokens where they are kept."""
        return np.array([len(row) for row in self._rows(texts, side) or texts], dtype=np.int64)

    def counts(self, texts: Sequence[str], side: Side) -> NDArray[np.int64]:
        """Tokens of each text, [N], those that begin and end it with them."""
        found: list[int] = []
        for start in range(0, len(texts), _COUNTED):
            some = texts[start : start + _COUNTED]
            rows = self._rows(some, side)
            if rows is None:
                found += tokenize(self.model, some, side, device="cpu")[MASK].sum(dim=1).tolist()
            else:
                found += map(len, rows)
        return np.array(found, dtype=np.int64)

    def _rows(self, texts: Sequence[str], side: Side) -> list[NDArray[np.int32]] | None:
        """Ids of each text, which are kept now or in the shards; None where there are too many to keep."""
        known: dict[str, NDArray[np.int32]] = {}
        unkept = [text for text in dict.fromkeys(texts) if (side, text) not in self._ids]
        if self._shards and unkept:
            in_shards = zip(unkept, self._shards(unkept, side), strict=True)
            known = {text: ids for text, ids in in_shards if ids is not None}
        missing = [text for text in unkept if text not in known]
        if len(self._ids) + len(missing) > self.max_texts:
            return None
        if texts and (missing or side not in self._features):
            found = tokenize(self.model, missing or texts[:1], side, device="cpu")
            if not _is_plain(found):
                self.max_texts = 0
                return None
            # the tensors' names, and what goes with every text of the side
            self._features[side] = {name: None if isinstance(value, Tensor) else value for name, value in found.items()}
            self._ids |= {(side, text): ids for text, ids in zip(missing, rows_of(found), strict=False)}
        return [known[text] if text in known else self._ids[side, text] for text in texts]

    def _padded(self, rows: Sequence[NDArray[np.int32]], side: Side) -> dict[str, Any]:
        tokenizer = transformers_of(self.model)[side].tokenizer
        length_N = np.array([len(row) for row in rows])
        place_L = np.arange(length_N.max())
        if tokenizer.padding_side == "left":
            place_L = place_L[::-1]
        is_token_NL = place_L < length_N[:, None]
        id_NL = np.full(is_token_NL.shape, tokenizer.pad_token_id or 0, dtype=np.int64)
        id_NL[is_token_NL] = np.concatenate(rows)
        tensors = {IDS: torch.from_numpy(id_NL), MASK: torch.from_numpy(is_token_NL.astype(np.int64))}
        tensors[SEGMENTS] = torch.zeros_like(tensors[IDS])
        return {
            name: tensors[name].to(self.model.device) if name in tensors else value
            for name, value in self._features[side].items()
        }


def _hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Both halves of the texts' hashes of 128 bits, [N] each."""
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
    )
    both_N2 = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    return both_N2[:, 0].copy(), both_N2[:, 1].copy()


def _is_plain(features: Mapping[str, Any]) -> bool:
    """Whether ids and their number say all of these features."""
    tensors = {name for name, value in features.items() if isinstance(value, Tensor)}
    return {IDS, MASK} <= tensors <= {IDS, MASK, SEGMENTS} and not (
        SEGMENTS in tensors and bool(features[SEGMENTS].any())
    )
