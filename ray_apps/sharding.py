"""Spreads a model over a job's training workers, so that one larger than a card can be tuned."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from embeddings.backbone import layers_of


def shard(model: nn.Module, device_type: str) -> nn.Module:
    """The model, whose weights, gradients and optimiser states each worker holds a part of (FSDP2); changed in place.

    A layer's weights are gathered while it computes. Every worker must run the same forward passes from here on.

    Args:
        model: the same on every worker of the process group, on the processor or a card.
        device_type: where the parts go, as "cuda".
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
