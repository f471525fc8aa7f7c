"""Low-rank adapters of the encoder's backbone (LoRA): few weights are trained, and what is saved has none.

Cites: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer

from embeddings.encoder import backbones_of


def add_adapters(model: SentenceTransformer, rank: int, *, seed: int) -> None:
    """Freezes the backbone and puts an adapter beside each of its linear layers; heads stay trainable.

    An untrained adapter adds nothing, so that the vectors are as before. Its output is scaled by 2.

    Args:
        model: changed in place.
        rank: inner width of an adapter.
        seed: of their weights, the same on all workers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # a pooler is behind no vector of ours
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=r".*pooler.*")
        for transformer in backbones_of(model):
            inject_adapter_in_model(adapters, transformer.model)


def without_adapters(model: SentenceTransformer) -> SentenceTransformer:
    """A copy whose backbone's layers hold what their adapters add; of a model that has none, the model itself."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(merged.get_submodule(parent), own, module.get_base_layer())
    for transformer in backbones_of(merged):
        del transformer.model.peft_config
    return merged
