"""The gradient of a large step in the memory of a small one."""

# U vectors, D their width

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

Pass = Callable[[], tuple[Tensor, ...]]
"""Computes some of a step's vectors, one tensor [U, D] for each kind; the same ones every time that it is called."""


def backward_in_passes(
    passes: Sequence[Pass],
    loss_of: Callable[..., Tensor],
    learned: Sequence[nn.Parameter],
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Leaves the gradient of a loss over all passes' vectors in the weights, with one pass's activations at a time.

    All vectors are computed without a graph; the loss gives the gradient of each; then each pass is computed again and
    carries its vectors' gradients on. About a third more time than a step at once.

    Args:
        passes: the last one has to touch every weight, since data-parallel workers wait for all gradients there.
        loss_of: of the vectors, each kind's joined in the order of the passes.
        learned: parameters of the loss itself.
        alone: context in which gradients stay with this worker, `DistributedDataParallel.no_sync`.

    Cites: Gao et al. 2021 (arXiv 2101.06983).
    """
    with torch.no_grad():
        found = [one() for one in passes]
    leaves = [[vectors_UD.requires_grad_() for vectors_UD in kinds] for kinds in found]
    with alone():
        loss_of(*(torch.cat(kind) for kind in zip(*leaves, strict=True))).backward()  # type: ignore[no-untyped-call]
    for place, (one, kinds) in enumerate(zip(passes, leaves, strict=True)):
        is_last = place == len(passes) - 1
        with nullcontext() if is_last else alone():
            carried = [
                (vectors_UD * leaf.grad).sum()
                for vectors_UD, leaf in zip(one(), kinds, strict=True)
                if leaf.grad is not None
            ]
            # what the loss learns has its gradient by now, and is waited for as well
            carried += [0.0 * parameter.sum() for parameter in learned if is_last]
            torch.stack(carried).sum().backward()  # type: ignore[no-untyped-call]
