"""States of a training run as of one worker, whether each holds all weights or a part of them (DDP, FSDP2).

Everything is on the processor and named by parameter, so that any number of workers goes on from it. The first worker
alone gets what is asked for; where weights are spread, all have to ask together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_WHOLE: dict[str, Any] = {"full_state_dict": True, "cpu_offload": True}


def is_sharded(module: nn.Module) -> bool:
    """Whether each worker holds a part of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def weights_of(module: nn.Module, *, without_frozen: bool = False) -> dict[str, Tensor]:
    """Copies of the weights; `without_frozen`: of those alone that are trained."""
    options = StateDictOptions(ignore_frozen_params=without_frozen, **_WHOLE)
    found: dict[str, Any] = get_model_state_dict(module, options=options)
    return {name: weight.clone() for name, weight in found.items()}


def set_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Puts weights back that `weights_of` gave.

    Args:
        module: changed in place.
        weights: of the whole; where they are spread, those of the first worker count.
        strict: whether all of the module's have to be among them.
    """
    options = StateDictOptions(broadcast_from_rank0=is_sharded(module), strict=strict, **_WHOLE)
    set_model_state_dict(module, dict(weights), options=options)


def optimizer_state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of an optimiser of the module's weights; empty before its first step."""
    # torch would take a step without gradients to have a state, which bias correction counts
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(module, optimizer, options=StateDictOptions(**_WHOLE))


def set_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts a state back that `optimizer_state_of` gave."""
    if not state:
        return
    options = StateDictOptions(broadcast_from_rank0=is_sharded(module), **_WHOLE)
    set_optimizer_state_dict(module, optimizer, dict(state), options=options)
