"""What the lexical steps of a training learn from: the untrained encoder's cosines, and words."""

# Q queries, U distinct texts, D width of a vector

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embeddings.encoder import encode, forward
from embeddings.lexical import CatalogText, LexicalSampler
from embeddings.recipes import TrainRecipe


class LexicalTeacher:
    """The encoder before training, with the catalogue's vectors by it.

    Args:
        model: copied as it is.
        catalog: products that the steps draw from.
        recipe: of the training.
        world_size: number of workers, each of which has products of its own.
        bf16: whether vectors are computed in bfloat16.

    Raises:
        ValueError: hardly any products.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        catalog: Sequence[CatalogText],
        recipe: TrainRecipe,
        *,
        world_size: int,
        bf16: bool,
    ) -> None:
        least = max(2, world_size)
        if len(catalog) < least:
            raise ValueError(
                f"lexical.steps={recipe.lexical.steps}: expected at least {least} products with distinct texts and "
                f"words in their titles, got {len(catalog)}; give a larger catalogue, or set it to 0"
            )
        self.model, self.catalog, self.recipe, self.bf16 = copy.deepcopy(model), catalog, recipe, bf16

    @cached_property
    def sampler(self) -> LexicalSampler:
        """Made at the first lexical step: a run that resumes after the last one needs no vectors."""
        texts = [product.text for product in self.catalog]
        vectors = encode(self.model, texts, "document", bf16=self.bf16)
        return LexicalSampler(self.catalog, vectors, self.recipe.lexical, self.recipe.seed)

    def cosines(self, query_features: Mapping[str, Any], rows: NDArray[np.int64]) -> Tensor:
        """Of the queries with the catalogue's products, [Q, U], without gradient."""
        device = self.model.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            query_QD = forward(self.model, query_features, "query")
        return query_QD @ torch.from_numpy(self.sampler.vectors[rows]).to(device).T
