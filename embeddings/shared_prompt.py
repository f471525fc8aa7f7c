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
    first, last, most = min(map(tuple, prompts)), max(map(tuple, prompts)), min(map(len, prompts)) - 1
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
        narrow_q, narrow_k = query.to(value.dtype), key.to(value.dtype)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        begun = functional.scaled_dot_product_attention(
            narrow_q[:, :, :shared_prompt],
            narrow_k[:, :, :shared_prompt],
            value[:, :, :shared_prompt],
            is_causal=True,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        rest_HTD = _attend_rests(narrow_q[0] * scale, narrow_k[0], value[0], shared_prompt, num_prompts, dropout)
        return torch.cat([begun, rest_HTD[None]], dim=2).transpose(1, 2), None


def _attend_rests(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, shared: int, num_prompts: int, dropout: float
) -> Tensor:
    """What the prompts' own tokens find in the beginning and in their own prompt, [H, N L, D]; queries are scaled."""
    heads, own_length = len(query_HTD), (query_HTD.shape[1] - shared) // num_prompts
    # heads that share keys stand together, so that keys are never repeated
    groups = (len(key_KTD), heads // len(key_KTD), num_prompts, own_length)
    query_KGNLD = query_HTD[:, shared:].reshape(*groups, -1)
    own_key_KNLD, own_value_KNLD = (
        part[:, shared:].reshape(len(part), num_prompts, own_length, -1) for part in (key_KTD, value_KTD)
    )
    begun_KGNLS = (query_KGNLD.flatten(1, 3) @ key_KTD[:, :shared].mT).reshape(*groups, shared)
    own_KGNLL = _by_prompt(query_KGNLD, own_key_KNLD.mT)
    later_LL = torch.ones(own_length, own_length, dtype=torch.bool, device=own_KGNLL.device).triu(1)
    score = torch.cat([begun_KGNLS, own_KGNLL.masked_fill(later_LL, float("-inf"))], dim=-1)
    share = functional.dropout(functional.softmax(score, dim=-1), dropout)
    found_KGNLD = (share[..., :shared].flatten(1, 3) @ value_KTD[:, :shared]).reshape(*groups, -1)
    found_KGNLD = found_KGNLD + _by_prompt(share[..., shared:], own_value_KNLD)
    return found_KGNLD.reshape(heads, num_prompts * own_length, -1)


def _by_prompt(left_KGNLX: Tensor, right_KNXY: Tensor) -> Tensor:
    """Products prompt by prompt, [K, G, N, L, Y]."""
    kinds, groups, prompts, length, _ = left_KGNLX.shape
    product = left_KGNLX.transpose(1, 2).flatten(2, 3) @ right_KNXY
    return product.reshape(kinds, prompts, groups, length, -1).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
