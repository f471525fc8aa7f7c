"""Texts side by side in one row instead of padded below each other.

Half of what a step of product titles computes is padding: a group of 128 is as long as its longest title. Packed, a
backbone sees the group as one row of tokens, and all but attention is computed for each token by itself anyway.
Attention is that of each text within itself: texts of equal length, which stand beside each other, make a batch
without a mask. So gradients and vectors are those of padded texts, but for the order of sums.

Only a backbone that takes its attention from transformers' interface and its places from `position_ids`, and looks both
ways, can be packed; `pack_backbones` tries it.

N texts, T tokens of all, H heads, C width of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embeddings.encoder import SIDES, Side, backbones_of, forward, place_features, tokenize, transformers_of

logger = logging.getLogger(__name__)

ATTENTION: Final = "assay_packed"
BOUNDS: Final = "cu_seq_lens_q"
"""Where texts begin in the row, and its end: the name that transformers and sentence-transformers have for it."""
_PARTIAL: Final = ("sliding_window", "position_bias", "softcap", "s_aux")
"""What transformers' backbones ask of an attention besides."""
_PROBES: Final = ("shoes", "a red cotton t-shirt for men, large", "blue shirt")
_TOLERANCE: Final = 1e-4
"""Between coordinates of unit vectors in float32; a token at a wrong place or of another text moves them by .01."""


def pack_rows(rows: Sequence[NDArray[np.integer]], offset: int = 0) -> dict[str, Any]:
    """Features of texts in one row; attention is fastest where texts of equal length stand side by side.

    Args:
        rows: token ids of each text.
        offset: place of a text's first token, as the backbone counts.
    """
    length_N = np.array([len(row) for row in rows])
    bounds = np.concatenate([[0], length_N.cumsum()])
    places = np.arange(bounds[-1]) - np.repeat(bounds[:-1], length_N) + offset
    return {
        "input_ids": torch.from_numpy(np.concatenate(rows).astype(np.int64))[None],
        "position_ids": torch.from_numpy(places)[None],
        BOUNDS: torch.from_numpy(bounds.astype(np.int32)),
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of texts in one row, [1, T, H, C], by the name and contract of transformers' interface.

    Features that are not packed have the attention that the backbone has without this.

    Raises:
        ValueError: the backbone wants packed tokens to see a part of their text alone, or some better than others.
    """
    if BOUNDS not in others:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return plain
    if partial := [name for name in _PARTIAL if others.get(name) is not None]:
        raise ValueError(f"packed_attention: expected attention to all of a text alike, got {', '.join(partial)}")
    shapes = list(runs(others[BOUNDS]))
    sizes = [num * length for num, length in shapes]

    def texts_of(whole: Tensor) -> list[Tensor]:
        """Texts of each run, [N, H, L, C]."""
        # split and not sliced: the gradient of every slice would be as large as the whole
        parts = zip(torch.split(whole[0], sizes, dim=1), shapes, strict=True)
        return [part.reshape(part.shape[0], *shape, part.shape[2]).transpose(0, 1) for part, shape in parts]

    attended = [
        functional.scaled_dot_product_attention(*texts, dropout_p=dropout, scale=scaling)
        for texts in zip(texts_of(query), texts_of(key), texts_of(value), strict=True)
    ]
    return torch.cat([texts.transpose(1, 2).flatten(0, 1) for texts in attended])[None], None


def pack_backbones(model: SentenceTransformer) -> bool:
    """Gives the backbones `packed_attention`, and tells whether packed texts have the vectors of padded ones.

    Where they do not, or a backbone takes no such features, all is left as it was. What is saved of the model, and what
    it makes of padded texts, is the same in any case.
    """
    backbones = backbones_of(model)
    before = [backbone.model.config._attn_implementation for backbone in backbones]
    if any(not _looks_both_ways(backbone.model) for backbone in backbones):
        return False
    was_training = model.training
    try:
        model.eval()
        for backbone in backbones:
            backbone.model.set_attn_implementation(ATTENTION)
        with torch.no_grad():
            is_same = all(_is_same(model, side) for side in SIDES)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        logger.info("texts are padded, since the backbone cannot be packed: %s", error)
        is_same = False
    finally:
        model.train(was_training)
    if not is_same:
        for backbone, attention in zip(backbones, before, strict=True):
            backbone.model.set_attn_implementation(attention)
    return is_same


def first_place(model: SentenceTransformer, side: Side) -> int:
    """Place of a text's first token, as the side's backbone counts: RoBERTa's count from behind the padding's."""
    for module in transformers_of(model)[side].model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return padding + 1
    return 0


def pack(model: SentenceTransformer, features: Mapping[str, Any], side: Side) -> dict[str, Any]:
    """Padded features, which have nothing but ids, mask and a single segment, packed."""
    found = pack_rows(rows_of(features), first_place(model, side))
    others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}
    return others | place_features(found, model.device)


def rows_of(features: Mapping[str, Any]) -> list[NDArray[np.int32]]:
    """Token ids of each text of padded features, without padding."""
    pairs = zip(features["input_ids"].cpu().numpy(), features["attention_mask"].cpu().numpy(), strict=True)
    return [ids[mask > 0].astype(np.int32) for ids, mask in pairs]


def _looks_both_ways(backbone: torch.nn.Module) -> bool:
    """Whether a backbone takes its attention from the interface, and each token sees all of its text."""
    takes = getattr(backbone, "is_backend_compatible", lambda: False)
    return bool(takes()) and not any(getattr(module, "is_causal", False) for module in backbone.modules())


def _is_same(model: SentenceTransformer, side: Side) -> bool:
    features = tokenize(model, _PROBES, side)
    own, other = forward(model, features, side), forward(model, pack(model, features, side), side)
    return bool(torch.allclose(own, other, atol=_TOLERANCE))


def runs(bounds: Tensor) -> Iterator[tuple[int, int]]:
    """Number and length of the texts of equal length that stand side by side."""
    for length, texts in groupby(bounds.diff().tolist()):
        yield sum(1 for _ in texts), length


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
