"""Assay's losses in a `SentenceTransformerTrainer`: a query and its graded products as one row of a dataset."""

# B rows, P products of a row, Q = B queries, U = B P products of the batch, D width of a vector

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn
from torch.nn.functional import normalize

from embeddings.graded_loss import GradedLoss, StepTargets
from embeddings.recipes import LossRecipe, LossTerm


class TrainerLoss(nn.Module):
    """A recipe's weighted sum of losses, mean over the queries of a batch.

    A row of the dataset holds the query, then as many product columns as its widest instance needs, and `label`: a
    list with a grade for each product, -1 where a row has fewer (its text may be empty), or with the shares of
    raters at or above grades 1 and 2 for each product, nan likewise. Terms with `in_batch` take products of other
    rows as grade 0; a product of two rows is then a false negative, which `BatchSamplers.NO_DUPLICATES` avoids.

    Args:
        model: trained by the trainer.
        recipe: terms and their scales; the paper's stage 1 loss where it names no term.

    Example:
        >>> rows = {"query": ["red shoe"], "first": ["shoe, red"], "second": ["hat"], "label": [[2, 0]]}
        >>> loss = TrainerLoss(model, LossRecipe(terms=(LossTerm(loss="circle"),)))
        >>> SentenceTransformerTrainer(model=model, train_dataset=Dataset.from_dict(rows), loss=loss).train()
    """

    def __init__(self, model: SentenceTransformer, recipe: LossRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.graded = GradedLoss(recipe, recipe.terms or (LossTerm(loss="supcon"),)).to(model.device)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Scalar loss of the batch's features, query column first."""
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Scalar loss of vectors [B, D], the query's first, then those of each product column.

        Raises:
            ValueError: labels are not one for each product column.
        """
        self.graded.clamp()
        query_QD, *columns = (normalize(vectors.float(), dim=1) for vectors in embeddings)
        rows, width = len(query_QD), len(columns)
        if labels.shape[:2] != (rows, width) or labels.ndim > 3:
            raise ValueError(
                f"TrainerLoss: expected labels of {rows} rows and {width} product columns, got {list(labels.shape)}; "
                "give each row a list with a grade, or two shares, for each product, -1 or nan where it has none"
            )
        if labels.ndim == 3:
            share_QPB = labels.float()
            is_padding_QP = share_QPB.isnan().any(dim=2)
            grade_QP = share_QPB.nan_to_num().sum(dim=2).round().to(torch.int8)
        else:
            is_padding_QP, grade_QP = labels < 0, labels.to(torch.int8)
            share_QPB = torch.stack([grade_QP >= 1, grade_QP >= 2], dim=2).float()
        place_QP = torch.arange(rows * width, device=query_QD.device).reshape(rows, width)
        # a padded product is nobody's, nor a negative of others
        is_foreign_QU = ~is_padding_QP.flatten()[None] & (place_QP.flatten() // width != place_QP[:, :1] // width)
        targets = StepTargets(
            place_QP.masked_fill(is_padding_QP, -1),
            grade_QP.masked_fill(is_padding_QP, -1),
            share_QPB.masked_fill(is_padding_QP[:, :, None], torch.nan),
            is_foreign_QU,
        )
        document_UD = torch.stack(columns, dim=1).flatten(0, 1)
        total: Tensor = self.graded(query_QD, document_UD, targets)[0]
        return total / rows

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {"terms": [f"{term.weight} {term.loss}" for term in self.graded.terms]}

    @property
    def citation(self) -> str:
        """For model cards."""
        return "Mine and Refine (arXiv 2602.17654); see embeddings.losses of Assay for each term's own source"
