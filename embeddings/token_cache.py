"""Texts as token ids, kept from step to step of a training.

A query comes once per epoch, a product with every query that it is graded for. On a graphics card a small encoder's
step takes less time than its tokenizer, for which the card would wait (benchmarks/results.md).
"""

# N texts, L tokens of the longest

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embeddings.encoder import Side, place_features, tokenize, transformers_of
from embeddings.packing import first_place, pack, pack_rows

IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
MAX_TEXTS: Final = 2_000_000
"""Texts kept by default: some 400 MB of product titles."""

_COUNTED: Final = 4_096
"""Texts tokenised at once where tokens are counted."""


class TokenCache:
    """Token tensors of texts, as `encoder.tokenize` gives them, every text tokenised once.

    Args:
        model: whose tokenizer, prefixes and token limits count; they are taken not to change.
        max_texts: how many are kept; further ones are tokenised whenever they come. A model that reads more than
            ids, mask and a single segment has none kept.

    Example:
        >>> tokens = TokenCache(model)
        >>> features = tokens(["red shoes"], "query")
    """

    def __init__(self, model: SentenceTransformer, max_texts: int = MAX_TEXTS) -> None:
        self.model, self.max_texts = model, max_texts
        self._ids: dict[tuple[Side, str], NDArray[np.int32]] = {}
        self._features: dict[Side, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """Padded token tensors [N, L] on the model's device."""
        if not self._keep(texts, side):
            return tokenize(self.model, texts, side)
        return self._padded([self._ids[side, text] for text in texts], side)

    def packed(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """The texts in one row without padding, for a model whose backbones `packing.pack_backbones` took."""
        if not self._keep(texts, side):
            return pack(self.model, tokenize(self.model, texts, side), side)
        found = pack_rows([self._ids[side, text] for text in texts], first_place(self.model, side))
        others = {name: value for name, value in self._features[side].items() if value is not None}
        return place_features(others | found, self.model.device)

    def lengths(self, texts: Sequence[str], side: Side) -> NDArray[np.int64]:
        """What texts are ordered by so that neighbours are about as long, [N]: tokens where they are kept."""
        if self._keep(texts, side):
            return np.array([len(self._ids[side, text]) for text in texts], dtype=np.int64)
        return np.array([len(text) for text in texts], dtype=np.int64)

    def counts(self, texts: Sequence[str], side: Side) -> NDArray[np.int64]:
        """Tokens of each text, [N], those that begin and end it with them."""
        found = []
        for start in range(0, len(texts), _COUNTED):
            some = texts[start : start + _COUNTED]
            if self._keep(some, side):
                found += [len(self._ids[side, text]) for text in some]
            else:
                found += tokenize(self.model, some, side, device="cpu")[MASK].sum(dim=1).tolist()
        return np.array(found, dtype=np.int64)

    def _keep(self, texts: Sequence[str], side: Side) -> bool:
        """Whether the ids of all these texts are kept now."""
        missing = [text for text in dict.fromkeys(texts) if (side, text) not in self._ids]
        if len(self._ids) + len(missing) > self.max_texts:
            return False
        if missing:
            found = tokenize(self.model, missing, side, device="cpu")
            if not _is_plain(found):
                self.max_texts = 0
                return False
            # the tensors' names, and what goes with every text of the side
            self._features[side] = {name: None if isinstance(value, Tensor) else value for name, value in found.items()}
            for text, ids, mask in zip(missing, found[IDS].numpy(), found[MASK].numpy(), strict=True):
                self._ids[side, text] = ids[mask > 0].astype(np.int32)
        return True

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


def _is_plain(features: Mapping[str, Any]) -> bool:
    """Whether ids and their number say all of these features."""
    tensors = {name for name, value in features.items() if isinstance(value, Tensor)}
    return {IDS, MASK} <= tensors <= {IDS, MASK, SEGMENTS} and not (
        SEGMENTS in tensors and bool(features[SEGMENTS].any())
    )
