"""The labeller's weights: both kinds as one module from token ids to grade logits, and their training by steps.

What a step does follows from (recipe, step) alone: its pairs, its learning rate, its dropout. A checkpoint holds
weights and optimiser state only, and a resumed run repeats the unbroken one.
"""

# N pairs, L tokens

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from conf.load import fingerprint
from embeddings.backbone import DROPOUT_NAMES, has_fast_bf16, resolve_model, trainable_attention
from embeddings.batches import stable_seed
from embeddings.full_state import is_sharded, optimizer_state_of, set_optimizer_state, set_weights, weights_of, whole
from embeddings.labeller import (
    LabellerRecipe,
    PairEncoder,
    load_labeller_card,
    load_pair_encoder,
)
from embeddings.labeller_batches import epoch_batches, groups_of, part_of, preferences_of
from embeddings.labeller_losses import grade_cross_entropy, ordinal_loss, preference_loss, rater_distribution
from embeddings.shared_prompt import can_share, let_share, shared_inputs, shared_length
from lake.schemas import Grade

FIRST_TOKEN_FAMILY = ("bert", "roberta", "xlm-roberta", "electra")
"""Model types whose sequence classifiers read the first token, and call their parts alike."""

MAX_BATCH_TOKENS = {False: 4096, True: 65536}
"""Tokens of a batch without and with CUDA when only probabilities are wanted, padding included; what all begin with
counts once."""


def padded(pairs: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask of pairs, [N, L] each, filled up on one side."""
    length = max(map(len, pairs))
    ids_NL = torch.full((len(pairs), length), pad_id)
    mask_NL = torch.zeros((len(pairs), length), dtype=torch.long)
    for row, pair in enumerate(pairs):
        span = slice(length - len(pair), length) if left else slice(0, len(pair))
        ids_NL[row, span] = torch.tensor(pair)
        mask_NL[row, span] = 1
    return ids_NL, mask_NL


class GradeModel(nn.Module):
    """Token ids of pairs to three logits each, float32.

    Args:
        backbone: a sequence classifier, or a causal LM.
        encoder: says which kind it is, how to pad and which tokens are grades.
    """

    def __init__(self, backbone: Any, encoder: PairEncoder) -> None:
        super().__init__()
        self.backbone, self.pad_id, self.grade_token_ids = backbone, encoder.pad_id, encoder.grade_token_ids

    def forward(self, pairs: Sequence[Sequence[int]]) -> Tensor:
        """Logits [N, 3]; a generative labeller's are those of its grade tokens, as an engine's mask leaves them."""
        place = next(self.backbone.parameters()).device
        if shared := self.shared_length(pairs):
            logits_NV = self.backbone(**shared_inputs(pairs, shared, place)).logits[0]
            return logits_NV[:, list(self.grade_token_ids)].float()  # type: ignore[no-any-return]
        # a causal LM is read at its last place, which is everyone's with padding on the left
        left = bool(self.grade_token_ids)
        ids_NL, mask_NL = padded(pairs, self.pad_id, left=left)
        inputs = {"input_ids": ids_NL.to(place), "attention_mask": mask_NL.to(place)}
        if not left:
            return self.backbone(**inputs).logits.float()  # type: ignore[no-any-return]
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits_NV = self.backbone(**inputs, logits_to_keep=1).logits[:, -1]
        return logits_NV[:, list(self.grade_token_ids)].float()  # type: ignore[no-any-return]

    def shared_length(self, pairs: Sequence[Sequence[int]]) -> int:
        """Tokens that these pairs begin with and that are computed once for all of them."""
        return shared_length(pairs) if self.grade_token_ids and can_share(self.backbone) else 0


def build_labeller(recipe: LabellerRecipe, encoder: PairEncoder, *, device: str) -> GradeModel:
    """The backbone in float32; head and adapters are drawn from the recipe's seed, a reranker's head is kept."""
    source = resolve_model(recipe.model)
    torch.manual_seed(recipe.seed)
    backbone = _load_backbone(source, recipe)
    if recipe.tuning == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        task = TaskType.SEQ_CLS if recipe.kind == "classifier" else TaskType.CAUSAL_LM
        adapters = LoraConfig(
            r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", task_type=task
        )
        backbone = get_peft_model(backbone, adapters)
    return GradeModel(backbone, encoder).to(device)


def save_weights(model: GradeModel, encoder: PairEncoder, folder: Path) -> None:
    """Writes a plain Hugging Face folder in float32; adapters are merged into the weights."""
    backbone = model.backbone
    if hasattr(backbone, "merge_and_unload"):
        backbone = backbone.merge_and_unload()
    backbone.config.use_cache = True
    if not model.grade_token_ids:
        # engines take another activation than softmax where a cross-encoder's folder names one and no problem type
        backbone.config.problem_type = "single_label_classification"
    backbone.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


@lru_cache(maxsize=1)
def _load_labeller(folder: str, _fingerprint: str) -> tuple[GradeModel, PairEncoder]:
    encoder = load_pair_encoder(folder)
    return GradeModel(_load(folder, load_labeller_card(folder).kind), encoder).eval(), encoder


def load_labeller(folder: str) -> tuple[GradeModel, PairEncoder]:
    """A saved labeller for plain torch, ready to grade; loaded once as long as the folder holds the same one."""
    return _load_labeller(folder, load_labeller_card(folder).fingerprint)


def plain_probabilities(
    model: GradeModel, pairs: Sequence[Sequence[int]], *, bf16: bool = False
) -> NDArray[np.float32]:
    """Uncalibrated probabilities [N, 3] by torch alone, longest pairs first to pad little."""
    order = sorted(range(len(pairs)), key=lambda row: -len(pairs[row]))
    probability_N3 = np.empty((len(pairs), len(Grade)), dtype=np.float32)
    training, place = model.training, next(model.parameters()).device.type
    shared = model.shared_length(pairs)
    most = MAX_BATCH_TOKENS[place == "cuda"]
    room = max(most - shared, most // 2)
    model.eval()
    start = 0
    with torch.inference_mode(), torch.autocast(place, torch.bfloat16, enabled=bf16):
        while start < len(order):
            rows = order[start : start + max(1, room // (len(pairs[order[start]]) - shared))]
            logits_N3 = model([pairs[row] for row in rows])
            probability_N3[rows] = functional.softmax(logits_N3.float(), dim=-1).cpu().numpy()
            start += len(rows)
    model.train(training)
    return probability_N3


class LabellerTrainer:
    """Weights, optimiser and position of one fine-tuning run on one worker.

    Args:
        model: trained in place.
        pairs: token ids of the whole training set, the same on every worker.
        shares: shares of raters at or above grades 1 and 2 of each pair, [N, 2].
        queries: of each pair, any text that tells queries apart.
        recipe: what to do.
        rank: of this worker.
        world_size: number of workers.
        wrap: puts the module into DistributedDataParallel, or spreads its weights over the workers (FSDP2); the module
            as it is for a single worker. Where weights are spread, all workers have to call each method together.
    """

    def __init__(
        self,
        model: GradeModel,
        pairs: Sequence[Sequence[int]],
        shares: NDArray[np.floating],
        queries: Sequence[str],
        recipe: LabellerRecipe,
        *,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        if not pairs:
            raise ValueError("labeller: expected graded pairs of train queries, got none; check query.split")
        self.model, self.pairs, self.recipe, self.rank, self.world_size = model, pairs, recipe, rank, world_size
        self.lengths = [len(pair) for pair in pairs]
        self.share_N2 = torch.from_numpy(np.asarray(shares, dtype=np.float32))
        self.value_N, self.group_N = self.share_N2.sum(dim=1).numpy(), groups_of(queries, recipe)
        self.steps_per_epoch = math.ceil(len(pairs) / recipe.batch_size)
        self.num_steps = math.ceil(self.steps_per_epoch * recipe.epochs)
        self._parallel = wrap(model)
        self.device = next(model.parameters()).device
        self.bf16 = recipe.precision == "bf16" or (
            recipe.precision == "auto" and not recipe.deterministic and has_fast_bf16(self.device.type)
        )
        self.step = 0
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.weight_N = pair_weights(self.share_N2, recipe)
        if self.bf16:
            keep_bf16_between_layers(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.learning_rate, fused=True
        )

    def train_step(self) -> float:
        """Updates the weights once; returns this worker's share of the loss, summed over its pairs.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before.
        """
        torch.use_deterministic_algorithms(self.recipe.deterministic)
        torch.manual_seed(stable_seed(self.recipe.seed, self.step, self.rank))
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        everyone = self._batch()
        # a worker left without a pair in the last step takes the first one at weight 0: DDP waits for all
        rows = part_of(everyone, self.group_N, self.rank, self.world_size)
        share, rows = (1.0, rows) if rows else (0.0, everyone[:1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), trainable_attention(self.device):
            logits_N3 = self._parallel([self.pairs[row] for row in rows])
        loss = ordinal_loss if self.recipe.loss == "ordinal" else grade_cross_entropy
        loss_N = loss(logits_N3.float(), self.share_N2[rows].to(self.device)) * self.weight_N[rows].to(self.device)
        total = loss_N.sum() * share
        if self.recipe.preference_weight:
            total = total + self._preference_loss(logits_N3.float(), everyone, rows) * share
        # DDP takes the mean over workers; this makes it the mean over the step's pairs
        (total * self.world_size / len(everyone)).backward()  # type: ignore[no-untyped-call]
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient is {norm}; lower learning_rate or use precision=fp32"
            )
        self.optimizer.step()
        self.step += 1
        return total.item()

    @property
    def is_sharded(self) -> bool:
        """Whether each worker holds a part of the weights."""
        return is_sharded(self.model)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the trained parameters on the processor; of spread ones on the first worker alone."""
        return weights_of(self.model, without_frozen=True)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Puts parameters back that `weights` gave."""
        set_weights(self.model, weights, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer of the same recipe and data needs to go on."""
        return {
            "identity": self._identity(),
            "step": self.step,
            "weights": self.weights(),
            "optimizer": optimizer_state_of(self.model, self.optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the position of another trainer.

        Raises:
            ValueError: it had another recipe or other pairs.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                "labeller: the checkpoint is of another recipe or other pairs; start the run under another name"
            )
        self.set_weights(state["weights"])
        set_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.step = state["step"]

    def _preference_loss(self, logits_N3: Tensor, everyone: list[int], rows: list[int]) -> Tensor:
        """Of this worker's rows, on the scale of a sum over the step's pairs."""
        whole = preferences_of(everyone, self.value_N, self.group_N, self.recipe.preference_wide_share)
        better_P, worse_P, weight_P = (torch.from_numpy(part).to(self.device) for part in whole.of(rows))
        loss_P = preference_loss(logits_N3, better_P, worse_P)
        return self.recipe.preference_weight * len(everyone) * (loss_P * weight_P).sum()

    def _batch(self) -> list[int]:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self.lengths, self.group_N, self.recipe, epoch))
        return self._epoch[1][place]

    def _identity(self) -> str:
        return fingerprint(
            self.recipe,
            len(self.pairs),
            [sum(pair) for pair in self.pairs],
            self.share_N2.tolist(),
            self.group_N.tolist(),
        )

    def _rate(self, step: int) -> float:
        warmup = self.recipe.warmup_share * self.num_steps
        rising, falling = (step + 1) / max(warmup, 1), (self.num_steps - step) / max(self.num_steps - warmup, 1)
        return max(0.0, min(1.0, rising, falling))


def keep_bf16_between_layers(model: nn.Module) -> None:
    """Lets what a layer norm gives stay bfloat16 under autocast, which else widens it for the next layer to narrow.

    On a processor such conversions are about an eighth of a step. Without autocast nothing changes.
    """

    def narrow(norm: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        is_mixed = torch.is_autocast_enabled(found.device.type)
        return found.to(torch.get_autocast_dtype(found.device.type)) if is_mixed else found

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(narrow)


def pair_weights(share_N2: Tensor, recipe: LabellerRecipe) -> Tensor:
    """Weight of each pair in the loss: 1, or the inverse frequency of the grades that its raters gave."""
    if recipe.class_weights == "none":
        return torch.ones(len(share_N2))
    given_N3 = rater_distribution(share_N2)
    return given_N3 @ (len(given_N3) / (len(Grade) * given_N3.sum(dim=0).clamp(min=1)))


def _load(source: str, kind: str) -> Any:
    with _quiet():
        if kind == "classifier":
            return read_first_token_alone(
                AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
            )
        return let_share(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))


def _load_backbone(source: str, recipe: LabellerRecipe) -> Any:
    """The pretrained model with a head of three classes, ready to be tuned."""
    with _quiet():
        config = AutoConfig.from_pretrained(source)
        for name in DROPOUT_NAMES if recipe.dropout is not None else ():
            if hasattr(config, name):
                setattr(config, name, recipe.dropout)
        if recipe.kind == "generative":
            return let_share(AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32))
        auto, is_ranker = AutoModelForSequenceClassification, config.num_labels == 1
        ranking = auto.from_pretrained(source, dtype=torch.float32) if is_ranker else None
        config.num_labels = len(Grade)
        model = auto.from_pretrained(source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    if ranking is None:
        _draw_head(model)
    else:
        _spread_head(model, ranking)
    return read_first_token_alone(model)


def read_first_token_alone(model: Any) -> Any:
    """The classifier, whose last layer gives the first token only: heads of BERT's family read no other.

    Its values are the same; the last layer's attention output and feed-forward, nine twelfths of a layer's work, are
    computed for one token of each pair. Other models stay as they are.
    """
    if model.config.model_type in FIRST_TOKEN_FAMILY:
        last = model.base_model.encoder.layer[-1].attention.output
        last.register_forward_pre_hook(lambda _, given: tuple(part[:, :1] for part in given))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """A fresh head is what we want, not news."""
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(shown)


def _draw_head(model: Any) -> None:
    """Draws the layer that gives the logits anew: a trained one of three classes would mean something else by them."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == len(Grade):
            nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def _spread_head(model: Any, ranking: Any) -> None:
    """Logits of the grades from a reranker's relevance z: -z/4, 0, z/4, so that tuning starts from its order.

    Rerankers that were trained with binary cross-entropy answer between about -11 and 11.
    """
    heads = {name: module for name, module in ranking.named_modules() if isinstance(module, nn.Linear)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == len(Grade) and heads[name].out_features == 1:
            place_3 = torch.tensor([-0.25, 0.0, 0.25])
            module.weight.copy_(place_3[:, None] * heads[name].weight)
            if module.bias is not None:
                module.bias.copy_(place_3 * heads[name].bias)
