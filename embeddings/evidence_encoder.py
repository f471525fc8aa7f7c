"""What a pretrained encoder says of a pair: token by token, and of its place among the titles of the shop.

A tuned labeller reads a pair alone. Whether a shop has much that is closer to the query, and whether the product is of
the kind that the query's nearest titles are of, it cannot see; both tell what is irrelevant from what is partial. The
titles are a fixed set that lies in the labeller's folder, so that the numbers of a pair hang on its two texts alone.

N pairs, Q queries, T titles, D width of a vector, K neighbours.

Cites: token by token, Khattab and Zaharia 2020 (ColBERT, arXiv 2004.12832); the mean of what is found first as a second
query, Rocchio 1971.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional

from embeddings.backbone import has_fast_bf16
from embeddings.encoder import Side, distinct, encode, load_encoder, save_encoder, token_batches

ENCODER_NUMBERS: Final = (
    "mean over the query's tokens of the largest cosine with a token of the title",
    "smallest of these cosines",
    "that of the query's last token",
    "mean over the title's tokens of the largest cosine with a token of the query",
    "cosine of query and title",
    "cosine of the query with the other title most like it",
    "the same with the tenth",
    "the same with the fiftieth",
    "cosine of the title with the mean of the ten other titles most like the query",
    "length of this mean",
    "largest cosine of the title with one of the twenty other titles most like the query",
    "mean of these twenty cosines",
)
"""Meaning of each number; 0 without tokens, and without other titles."""
TITLES_FILE: Final = "titles.npy"
MAX_TITLES: Final = 50_000
"""A vector of MiniLM's is 768 bytes; a query is compared with all of them in 4 ms."""
_NUM_NEIGHBOURS: Final = 50
_SPARE: Final = 22
"""Neighbours looked up besides, since the title's own vector, and its equals', is left out."""
_SAME: Final = 0.999
"""Cosine from which two titles are the same."""
_BATCH_PAIRS: Final = 256


def write_evidence_encoder(folder: str | Path, model: SentenceTransformer, titles: Sequence[str]) -> None:
    """Writes the encoder with the vectors of the titles, of at most MAX_TITLES of them, drawn by hash."""
    drawn = sorted(set(titles), key=lambda title: hashlib.sha256(title.encode()).digest())[:MAX_TITLES]
    vector_TD = encode(model, drawn, "document", bf16=has_fast_bf16()).astype(np.float16)
    save_encoder(model, folder, {})
    np.save(Path(folder, TITLES_FILE), vector_TD)


class EncoderNumbers:
    """Computes ENCODER_NUMBERS by an encoder and titles' vectors.

    Args:
        folder: of `write_evidence_encoder`.
    """

    def __init__(self, folder: str | Path) -> None:
        self._model, _ = load_encoder(folder)
        self._model.eval()
        self._title_TD = np.load(Path(folder, TITLES_FILE)).astype(np.float32)
        self._specials = torch.tensor(sorted(self._model.tokenizer.all_special_ids))

    def __call__(self, queries: Sequence[str], titles: Sequence[str]) -> NDArray[np.float64]:
        """Numbers of each pair, [N, 12]; computed fastest where equal queries stand side by side."""
        parts = [
            self._batch(queries[start : start + _BATCH_PAIRS], titles[start : start + _BATCH_PAIRS])
            for start in range(0, len(queries), _BATCH_PAIRS)
        ]
        return np.concatenate([np.empty((0, len(ENCODER_NUMBERS))), *parts])

    def _batch(self, queries: Sequence[str], titles: Sequence[str]) -> NDArray[np.float64]:
        query_N, query_QD, query_tokens = self._read(queries, "query")
        title_N, title_TD, title_tokens = self._read(titles, "document")
        likeness_N4 = [_token_likeness(query_tokens[q], title_tokens[t]) for q, t in zip(query_N, title_N, strict=True)]
        place_N8 = np.empty((len(queries), len(ENCODER_NUMBERS) - 4))
        for row, query_D in enumerate(query_QD):
            own = np.flatnonzero(query_N == row)
            place_N8[own] = self._place(query_D, title_TD[title_N[own]])
        return np.concatenate([np.array(likeness_N4), place_N8], axis=1)

    def _read(self, texts: Sequence[str], side: Side) -> tuple[NDArray[np.intp], NDArray[np.float32], list[Tensor]]:
        """Of each text its place among the different ones, and of these the vectors and the tokens' vectors."""
        order, row_N = distinct(texts)
        vectors, tokens = [], []
        for features in token_batches(self._model, order, side):
            is_word = features["attention_mask"].bool() & ~torch.isin(features["input_ids"], self._specials)
            with torch.inference_mode():
                read: dict[str, Any] = self._model(dict(features), task=side)
            vectors.append(functional.normalize(read["sentence_embedding"], dim=-1).numpy())
            unit = functional.normalize(read["token_embeddings"], dim=-1)
            tokens += [unit[row, kept] for row, kept in enumerate(is_word)]
        return row_N, np.concatenate(vectors), tokens

    def _place(self, query_D: NDArray[np.float32], title_ND: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of titles under one query, the numbers after the tokens', [N, 8]."""
        number_N8 = np.zeros((len(title_ND), 8))
        number_N8[:, 0] = title_ND @ query_D
        cosine_T = self._title_TD @ query_D
        kept = min(_NUM_NEIGHBOURS + _SPARE, len(cosine_T))
        near_K = np.argpartition(-cosine_T, kept - 1)[:kept]
        near_K = near_K[np.argsort(-cosine_T[near_K], kind="stable")]
        near_KD = self._title_TD[near_K]
        for row, like_K in enumerate(title_ND @ near_KD.T):
            other_K = np.flatnonzero(like_K < _SAME)[:_NUM_NEIGHBOURS]
            if len(other_K) == 0:
                continue
            ranked_K, like_K = cosine_T[near_K[other_K]], like_K[other_K]
            mean_D = near_KD[other_K[:10]].mean(axis=0)
            length = float(np.linalg.norm(mean_D))
            number_N8[row, 1:4] = [ranked_K[min(rank, len(ranked_K)) - 1] for rank in (1, 10, 50)]
            number_N8[row, 4:] = like_K[:10].mean() / max(length, 1e-6), length, like_K[:20].max(), like_K[:20].mean()
        return number_N8


def _token_likeness(query: Tensor, title: Tensor) -> list[float]:
    """The first four numbers, of the tokens' unit vectors."""
    if not len(query) or not len(title):
        return [0.0] * 4
    cosine = query @ title.T
    nearest = cosine.amax(dim=1)
    return [float(nearest.mean()), float(nearest.min()), float(nearest[-1]), float(cosine.amax(dim=0).mean())]
