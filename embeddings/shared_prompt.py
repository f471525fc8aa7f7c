"""Many prompts with one beginning in one pass of a causal LM: the beginning is computed once, with its gradients.

A judge's prompts are its guideline, the same every time, and then some forty tokens of query and product. An engine
caches what the guideline gives; in training the weights change with every step, and a batch would compute it anew for
every pair. Here a batch is one sequence: the beginning, then the rest of each prompt, side by side. Positions go on
from the beginning for each of them, and each attends to the beginning and to itself alone. All else in a decoder works
token by token, so the logits are those of the prompts one by one.
"""

# N prompts, S tokens of their beginning, L of the longest rest, T = S + N L, H heads, K of keys, G = H / K, D per head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION: Final = "assay_shared_prompt"
"""Name under which transformers knows this attention; without a shared beginning it is the usual one."""
SHARING_FAMILY: Final = ("llama", "qwen2", "qwen3")
"""Model types whose layers attend to all earlier tokens, by a plain softmax."""
LEAST_SHARED_TOKENS: Final = 32
"""A shorter beginning is computed with every prompt."""


def let_share(model: Any) -> Any:
    """The causal LM, which from now on can be given `shared_inputs`; unchanged where its attention is another."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    if model.config.model_type in SHARING_FAMILY and set(kinds) == {"full_attention"}:
        model.set_attn_implementation(ATTENTION)
    return model


def can_share(model: Any) -> bool:
    """Whether `let_share` has changed the model."""
    return bool(model.config._attn_implementation == ATTENTION)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at most one less than the shortest has; 0 for few, or for a single prompt."""
    if len(prompts) < 2:
        return 0
    # in order, all prompts begin with what the first and the last have in common
    first, last, most = min(prompts), max(prompts), min(map(len, prompts)) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    return shared if shared >= LEAST_SHARED_TOKENS else 0


def shared_inputs(prompts: Sequence[Sequence[int]], shared: int, device: torch.device) -> dict[str, Any]:
    """What the model is called with, for logits [1, N, vocabulary] at the last token of each prompt."""
    rests = [list(prompt[shared:]) for prompt in prompts]
    length = max(map(len, rests))
    # filled up behind, where no real token looks
    filled = [rest + [0] * (length - len(rest)) for rest in rests]
    ids = list(prompts[0][:shared]) + [token for rest in filled for token in rest]
    places = [*range(shared), *(list(range(shared, shared + length)) * len(rests))]
    last = [shared + row * length + len(rest) - 1 for row, rest in enumerate(rests)]
    return {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([places], device=device),
        # four dimensions say that no mask shall be made
        "attention_mask": torch.zeros((1, 1, 1, 1), device=device),
        "logits_to_keep": torch.tensor(last, device=device),
        "use_cache": False,
        "shared_prompt": shared,
        "num_prompts": len(prompts),
    }


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prompt: int = 0,
    num_prompts: int = 1,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: queries [1, H, T, D], keys and values [1, K, T, D] to [1, T, H, D]."""
    if not shared_prompt:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    with torch.autocast(query.device.type, enabled=False):
        # rotated queries and keys are wider than values under autocast, and a softmax would be again
        narrow = (part.to(value.dtype) for part in (query, key))
        return _attend_shared(*narrow, value, shared_prompt, num_prompts, scaling, dropout), None


def _attend_shared(
    query: Tensor, key: Tensor, value: Tensor, shared: int, num_prompts: int, scaling: float | None, dropout: float
) -> Tensor:
    heads, width = query.shape[1], query.shape[-1]
    groups, own_length = heads // key.shape[1], (query.shape[2] - shared) // num_prompts
    begun_HSD = functional.scaled_dot_product_attention(
        query[:, :, :shared],
        key[:, :, :shared],
        value[:, :, :shared],
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=groups > 1,
    )[0]
    scale = width**-0.5 if scaling is None else scaling
    # heads that share keys stand together, so that keys are never repeated
    split = (-1, groups, num_prompts, own_length, width)
    query_KGNLD = (query[0, :, shared:] * scale).unflatten(0, (-1, groups)).reshape(split)
    key_KSD, key_KTD = key[0].split([shared, num_prompts * own_length], dim=1)
    value_KSD, value_KTD = value[0].split([shared, num_prompts * own_length], dim=1)
    key_KNLD, value_KNLD = (part.unflatten(1, (num_prompts, own_length)) for part in (key_KTD, value_KTD))
    begun = query_KGNLD.flatten(1, 3) @ key_KSD.mT
    own = query_KGNLD.transpose(1, 2).flatten(2, 3) @ key_KNLD.mT
    own_KNGLL = own.unflatten(2, (groups, own_length))
    later_LL = torch.ones(own_length, own_length, dtype=torch.bool, device=own.device).triu(1)
    own_KGNLL = own_KNGLL.masked_fill(later_LL, float("-inf")).transpose(1, 2)
    score = torch.cat([begun.unflatten(1, (groups, num_prompts, own_length)), own_KGNLL], dim=-1)
    share = functional.dropout(functional.softmax(score, dim=-1), dropout)
    begun_share, own_share = share.split([shared, own_length], dim=-1)
    found_KGNLD = (begun_share.flatten(1, 3) @ value_KSD).reshape(split)
    own_found = own_share.transpose(1, 2).flatten(2, 3) @ value_KNLD
    found_KGNLD = found_KGNLD + own_found.unflatten(2, (groups, own_length)).transpose(1, 2)
    rest_HTD = found_KGNLD.reshape(heads, num_prompts * own_length, width)
    return torch.cat([begun_HSD, rest_HTD], dim=1).transpose(0, 1)[None]


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
