"""Vectors of all data-parallel workers, with gradients back to the worker that computed each."""

# W workers, U vectors, D their width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All workers' tensors of one shape, stacked; a gradient is summed over the workers that used the tensor."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        whole = gradient.contiguous()
        torch.distributed.all_reduce(whole)
        return whole[torch.distributed.get_rank()]


def gather_vectors(own_UD: Tensor, most: int) -> Tensor:
    """Vectors of all workers by rank, [W, most, D], zeros behind those of a worker that has fewer.

    Args:
        own_UD: of this worker.
        most: the largest number of them on any worker, known to all.

    Cites: method of sentence-transformers and of torch.distributed.nn, whose gradients these are.
    """
    filled_UD = torch.nn.functional.pad(own_UD, (0, 0, 0, most - len(own_UD)))
    found: Tensor = _Gather.apply(filled_UD)  # type: ignore[no-untyped-call]
    return found
