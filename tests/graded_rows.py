"""Rows of random similarities and grades for tests of losses."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_rows(
    formats: Sequence[Sequence[int]], seed: int, num_queries: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Padded similarities and grades; each query holds every grade of one format once or several times."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_queries):
        present = formats[index % len(formats)]
        grades = generator.permutation(np.repeat(present, generator.integers(1, 5, size=len(present))))
        rows.append((generator.uniform(-1, 1, size=len(grades)), grades))
    width = max(len(grades) for _, grades in rows) + 2
    similarity = np.full((num_queries, width), 0.0)
    grade = np.full((num_queries, width), -1)
    for row, (scores, grades) in enumerate(rows):
        places = np.sort(generator.permutation(width)[: len(grades)])
        similarity[row, places], grade[row, places] = scores, grades
    return torch.tensor(similarity, dtype=dtype), torch.tensor(grade, dtype=torch.int8)


def unpadded(similarity: Tensor, grade: Tensor) -> list[tuple[list[float], list[int]]]:
    """Each row's similarities and grades without padding."""
    return [
        (scores[grades >= 0].tolist(), grades[grades >= 0].tolist())
        for scores, grades in zip(similarity, grade, strict=True)
    ]
