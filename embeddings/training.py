"""Stage 1 and stage 2 training of the encoder, one step at a time.

The steps of `recipe.lexical` come first, where there are any, then the graded ones; each phase has its own rise and
fall of the learning rate and starts its optimiser afresh.

What a step does follows from (recipe, step) alone: its instances, its learning rate and the random numbers of
its dropout. So a checkpoint holds weights and optimiser state only, a resumed run repeats the unbroken one
bit for bit (recipe.deterministic), and several workers compute what one would, but
for the draws of dropout.

Q queries, P products of a query (padded), U distinct texts, D width of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn

from conf.load import fingerprint
from embeddings.adapters import add_adapters, without_adapters
from embeddings.backbone import compile_layers, has_fast_bf16, set_dropout, trainable_attention
from embeddings.batches import Instance, InstanceSampler, StepBatch, collate, collate_part, stable_seed
from embeddings.encoder import Side, backbones_of, encode, forward, tokenize
from embeddings.full_state import is_sharded, optimizer_state_of, set_optimizer_state, set_weights, weights_of, whole
from embeddings.gather import gather_vectors
from embeddings.graded_loss import GradedLoss, OtherPairs, StepTargets
from embeddings.gradient_cache import backward_in_passes
from embeddings.lexical import CatalogText
from embeddings.lexical_teacher import LexicalTeacher
from embeddings.losses import lexical_loss
from embeddings.packing import pack_backbones
from embeddings.ranking_losses import loss_by_grades
from embeddings.recipes import TrainRecipe as TrainRecipe
from embeddings.token_cache import TokenCache

TEXTS_PER_GROUP = {"padded": 128, "packed": 256, "cuda": 1024}
"""Documents of one forward pass. On a processor a step's texts padded to the longest of them all cost time and memory
for padding, and groups of 48 and 24 were slower; a card wants few, large passes (benchmarks/results.md)."""


def plan_steps(recipe: TrainRecipe, sampler: InstanceSampler) -> int:
    """Graded steps of a run: `max_steps`, or as many as `epochs` over the instances take; fewer under `max_texts`.

    Texts are counted as one worker has them; several have a few more, since what two of them draw is encoded twice.
    """
    num_steps, num_texts = recipe.max_steps or sampler.num_steps(recipe.epochs), 0
    for step in range(num_steps if recipe.max_texts else 0):
        batch = collate(sampler.step_instances(step, 0, 1))
        num_texts += len(batch.query_texts) + len(batch.document_texts)
        if num_texts > recipe.max_texts:
            return max(1, step)
    return num_steps


def use_bf16(recipe: TrainRecipe, device: str) -> bool:
    """Whether the encoder runs in bfloat16 on this device."""
    if recipe.precision == "auto":
        return not recipe.deterministic and has_fast_bf16(device)
    return recipe.precision == "bf16"


class TwoTower(nn.Module):
    """Encoder and what the losses learn as one module, so that DDP reduces all gradients of a step together."""

    def __init__(self, encoder: SentenceTransformer, recipe: TrainRecipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = GradedLoss(recipe.loss, recipe.terms).to(encoder.device)
        self._width = encoder.get_embedding_dimension()
        for name, parameter in encoder.named_parameters():
            # BERT's pooler is behind no vector of ours; DDP waits forever for gradients that never come
            if ".pooler." in name:
                parameter.requires_grad_(False)

    def forward(
        self, query_groups: Sequence[Mapping[str, Any]], document_groups: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        """The groups' query vectors [U, D] and document vectors [U, D], float32 and normalised."""
        return self._side(query_groups, "query"), self._side(document_groups, "document")

    def _side(self, groups: Sequence[Mapping[str, Any]], side: Side) -> Tensor:
        vectors = [forward(self.encoder, features, side) for features in groups]
        return torch.cat(vectors) if vectors else torch.empty(0, self._width, device=self.encoder.device)


class ContrastiveTrainer:
    """Weights, optimiser and position of one training run on one worker.

    Args:
        model: trained in place.
        instances: the whole training set, the same on every worker.
        recipe: what to do.
        rank: of this worker.
        world_size: number of workers.
        wrap: puts the module into DistributedDataParallel, or spreads its encoder's weights over the workers (FSDP2);
            the module as it is for a single worker. Where weights are spread, all workers call each method together.
        catalog: products for the lexical steps, as `lexical.sample_catalog` gives them; not used without any.
        compiled: fuses the backbone's small operations (torch.compile): a minute or two at the first step, then fast.
        recomputed: keeps what goes into a layer alone and computes the rest again for the gradient (gradient
            checkpointing): less memory, about a third more time, the same gradient.
        packs: has no products' texts padded where the backbone allows it; None: on processors, not compiled.
        tokens: shards of the texts' tokens, of `token_cache.token_shard` by the same encoder.

    Raises:
        ValueError: no instance has a contrast, or there are lexical steps and hardly any products.

    Attributes:
        step: the next one.
        num_texts: texts through the encoder so far, on all workers, as if each had as many as this one.
        tokens: gives texts as tokens, and keeps them.
        is_sharded: whether this worker holds a part of the encoder's weights.

    Example:
        >>> trainer = ContrastiveTrainer(build_encoder(EncoderRecipe()), instances, TrainRecipe())
        >>> for step in range(trainer.step, trainer.num_steps):
        ...     metrics = trainer.train_step(step)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        instances: Sequence[Instance],
        recipe: TrainRecipe,
        *,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[TwoTower], nn.Module] = lambda tower: tower,
        catalog: Sequence[CatalogText] = (),
        compiled: bool = False,
        recomputed: bool = False,
        packs: bool | None = None,
        tokens: Sequence[pa.Table] = (),
    ) -> None:
        self.model, self.recipe, self.rank, self.world_size = model, recipe, rank, world_size
        if recipe.lora_rank:
            add_adapters(model, recipe.lora_rank, seed=recipe.seed)
        if recomputed:
            # what is computed again must be computed by the same kernel
            again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), trainable_attention(model.device))}
            model.gradient_checkpointing_enable(again)
        if recipe.dropout is not None:
            set_dropout(model, recipe.dropout)
        if compiled:
            compile_layers(model)
        self.bf16 = use_bf16(recipe, model.device.type)
        self.tokens = TokenCache(model, shards=tokens)
        self.packs = (model.device.type == "cpu" and not compiled if packs is None else packs) and pack_backbones(model)
        self._kind_of_group = "cuda" if model.device.type == "cuda" else "packed" if self.packs else "padded"
        self.sampler = InstanceSampler(
            instances,
            recipe.batch,
            recipe.seed,
            needs_contrast=recipe.needs_contrast,
            encode=self._encode_queries,
            count=self.tokens.counts,
        )
        self.num_lexical = recipe.lexical.steps
        self.num_graded = plan_steps(recipe, self.sampler)
        self.num_steps = self.num_lexical + self.num_graded
        self._teacher = (
            LexicalTeacher(model, catalog, recipe, world_size=world_size, bf16=self.bf16) if self.num_lexical else None
        )
        self.step, self.num_texts = 0, 0.0
        self.tower = TwoTower(model, recipe)
        self._parallel = wrap(self.tower)
        reads_others = any(term.reads_others for term in recipe.terms)
        self.is_sharded = is_sharded(self.tower)
        is_parallel = self.is_sharded or isinstance(self._parallel, nn.parallel.DistributedDataParallel)
        self._gathers = reads_others and is_parallel
        self.optimizer = self._new_optimizer()

    def train_step(self, step: int) -> dict[str, float]:
        """Updates the weights once.

        Returns:
            This worker's `loss` (mean per query), `num_texts` and in graded steps `similarity_grade_0..2`
            (mean cosine of the grades present) and `order_loss_2v1` and the like (logistic loss of the order of each
            two grades under a query, whatever is minimised), and the common `gradient_norm`, `temperature` and
            `learning_rate`.

        Raises:
            ValueError: not the step that comes next.
            FloatingPointError: the gradient is not finite; the weights are as before.
        """
        if step != self.step:
            raise ValueError(f"train_step: expected step {self.step}, got {step}; load the checkpoint of that step")
        with _deterministic(self.recipe.deterministic):
            # seeded per step, so that a checkpoint needs no generator state
            torch.manual_seed(stable_seed(self.recipe.seed, step, self.rank))
            self.tower.train()
            if self.num_lexical and step == self.num_lexical:
                self.optimizer, self._teacher = self._new_optimizer(), None
            rate = self._set_learning_rate(step)
            self.optimizer.zero_grad(set_to_none=True)
            metrics = self._backward(step)
            norm = self._clip_gradient()
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: the gradient is {norm}; lower learning_rate or set precision=fp32"
                )
            self.optimizer.step()
            self.tower.loss.clamp()
        self.step = step + 1
        self.num_texts += metrics["num_texts"] * self.world_size
        return {**metrics, "gradient_norm": norm, "learning_rate": rate}

    def step_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """This worker's loss, scaled so that the mean over workers is the mean over a graded step's queries."""
        if step < self.num_lexical:
            return self._lexical_step(step)
        batch = self._batch(step)
        vectors = self._vectors(self.tokens(batch.query_texts, "query"), batch.document_texts)
        return self._graded_loss(batch, *vectors)

    def published(self, blank: Callable[[], SentenceTransformer]) -> SentenceTransformer | None:
        """The encoder as it is validated and saved: whole and without adapters.

        Where weights are spread all workers ask, and the first one alone gets it.

        Args:
            blank: builds an encoder like the trainer's own was before training; asked where weights are spread.
        """
        if not self.is_sharded:
            return without_adapters(self.model)
        weights = weights_of(self.model)
        if self.rank:
            return None
        model = blank()
        if self.recipe.lora_rank:
            add_adapters(model, self.recipe.lora_rank, seed=self.recipe.seed)
        model.load_state_dict(weights)
        return without_adapters(model)

    def _encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the untrained encoder, the first worker's on all: in another's last digits orders could differ."""
        # compiling again for one pass would take longer than the pass
        with torch.compiler.set_stance("force_eager"):
            vectors = encode(self.model, texts, "query", bf16=self.bf16)
        if not torch.distributed.is_initialized():
            return vectors
        shared = torch.from_numpy(vectors).to(self.model.device)
        torch.distributed.broadcast(shared, src=0)
        return shared.cpu().numpy()

    def _batch(self, step: int) -> StepBatch:
        """This worker's part of a graded step; where losses read other queries' products, also what others hold."""
        place = step - self.num_lexical
        if not self._gathers:
            return collate(self.sampler.step_instances(place, self.rank, self.world_size))
        # every worker knows the whole step, so that vectors alone have to travel
        parts = [self.sampler.step_instances(place, rank, self.world_size) for rank in range(self.world_size)]
        return collate_part(parts, self.rank)

    def _graded_loss(self, batch: StepBatch, query_UD: Tensor, document_UD: Tensor) -> tuple[Tensor, dict[str, float]]:
        place, others = query_UD.device, None
        if (elsewhere := batch.elsewhere) is not None:
            document_WUD = gather_vectors(document_UD, elsewhere.most)
            rank_V, row_V = (torch.from_numpy(part).to(place) for part in elsewhere[:2])
            document_UD = torch.cat([document_UD, document_WUD[rank_V, row_V]])
            if any(term.loss == "pooled_logistic" for term in self.recipe.terms):
                query_WUD = gather_vectors(query_UD, elsewhere.most_queries)
                rank_M, query_M, product_M = torch.from_numpy(elsewhere.pair_M3.T).to(place)
                grade_M = torch.from_numpy(elsewhere.grade_M).to(place)
                others = OtherPairs(query_WUD[rank_M, query_M], document_WUD[rank_M, product_M], grade_M)
        targets = StepTargets(
            *(
                torch.from_numpy(part).to(place)
                for part in (batch.document_index, batch.grades, batch.shares, batch.is_foreign)
            )
        )
        query_QD = query_UD[torch.from_numpy(batch.query_index).to(place)]
        loss, cosine_QP, parts = self.tower.loss(query_QD, document_UD, targets, others)
        # the paper sums over queries; AdamW does not see the constant factor, the clipping does
        scaled = loss * (self.world_size / self.recipe.batch.queries_per_step)
        # a card waits at every number that is asked of it: all of them at once
        values = (loss, *parts.values(), self.tower.loss.temperature)
        sums = torch.stack([value.detach().float() for value in values]).tolist()
        per_query = [value / len(batch.grades) for value in sums[:-1]]
        return scaled, {
            "loss": per_query[0],
            **(dict(zip((f"loss_{name}" for name in parts), per_query[1:], strict=True)) if len(parts) > 1 else {}),
            "temperature": sums[-1],
            "num_texts": float(len(batch.query_texts) + len(batch.document_texts)),
            **_by_grade(cosine_QP.detach().float().cpu(), torch.from_numpy(batch.grades)),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer of the same recipe needs to go on; `torch.load(weights_only=True)` reads it."""
        return {
            "recipe": fingerprint(self.recipe),
            "step": self.step,
            "num_texts": self.num_texts,
            "tower": weights_of(self.tower),
            "optimizer": optimizer_state_of(self.tower, self.optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the position of another trainer.

        Raises:
            ValueError: it was trained by another recipe.
        """
        if state["recipe"] != (own := fingerprint(self.recipe)):
            raise ValueError(
                f"checkpoint: expected one of recipe {own}, got one of {state['recipe']}; "
                "start this run in another folder"
            )
        set_weights(self.tower, state["tower"])
        set_optimizer_state(self.tower, self.optimizer, state["optimizer"])
        self.step, self.num_texts = state["step"], state["num_texts"]

    def _backward(self, step: int) -> dict[str, float]:
        """Leaves the step's gradient in the weights, in passes if the recipe wants it; returns what is measured."""
        if not self.recipe.texts_per_pass or step < self.num_lexical:
            loss, metrics = self.step_loss(step)
            loss.backward()  # type: ignore[no-untyped-call]
            return metrics
        batch = self._batch(step)
        size = self.recipe.texts_per_pass
        queries = self._groups(batch.query_texts, "query", size)
        documents = self._groups(batch.document_texts, "document", size)
        # the last pass holds both kinds, so that it touches both heads
        parts: list[tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]] = [
            *((group, None) for group in queries[1:]),
            *((None, group) for group in documents[1:]),
            (queries[0], documents[0]),
        ]
        measured: dict[str, float] = {}

        def loss_of(query_UD: Tensor, document_UD: Tensor) -> Tensor:
            orders = ([*groups[1:], groups[0]] for groups in (queries, documents))
            back = [_places(order).to(query_UD.device) for order in orders]
            loss, metrics = self._graded_loss(batch, query_UD[back[0]], document_UD[back[1]])
            measured.update(metrics)
            return loss

        backward_in_passes(
            [partial(self._pass, batch, stable_seed(step, place), *part) for place, part in enumerate(parts)],
            loss_of,
            [parameter for parameter in self.tower.loss.parameters() if parameter.requires_grad],
            self._alone,
        )
        return measured

    def _pass(
        self, batch: StepBatch, seed: int, queries: NDArray[np.int64] | None, documents: NDArray[np.int64] | None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of some queries and products of a step, with the same dropout every time."""
        torch.manual_seed(stable_seed(self.recipe.seed, seed, self.rank))
        query_groups = [] if queries is None else [self.tokens(_at(batch.query_texts, queries), "query")]
        document_groups = [] if documents is None else [self._product_tokens(batch.document_texts, documents)]
        with self._computing():
            vectors: tuple[Tensor, Tensor] = self._parallel(query_groups, document_groups)
        return vectors

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Precision and kernels of a forward pass that is to be differentiated."""
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16), trainable_attention(device):
            yield

    def _alone(self) -> AbstractContextManager[None]:
        """Gradients stay with this worker inside."""
        if isinstance(self._parallel, nn.parallel.DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()

    def _lexical_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        assert self._teacher is not None
        batch = self._teacher.sampler.step_batch(step, self.rank, self.world_size)
        query_features = tokenize(self.model, batch.queries, "query")
        query_QD, document_UD = self._vectors(query_features, batch.texts)
        coverage_QU = torch.from_numpy(batch.coverage).to(query_QD.device)
        cosine_QU = self._teacher.cosines(query_features, batch.rows)
        loss = lexical_loss(query_QD @ document_UD.T, cosine_QU + self.recipe.lexical.word_weight * coverage_QU)
        # DDP waits for the gradient of every weight, also of those that the graded losses learn
        unused = [0.0 * parameter.sum() for parameter in self.tower.loss.parameters() if parameter.requires_grad]
        return loss + sum(unused), {
            "loss": loss.item(),
            "temperature": self.tower.loss.temperature.item(),
            "num_texts": float(len(batch.queries) + len(batch.texts)),
        }

    def _vectors(self, query_features: Mapping[str, Any], document_texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors of the queries and of the documents, in their order."""
        groups = self._groups(document_texts, "document", TEXTS_PER_GROUP[self._kind_of_group])
        with self._computing():
            query_UD, grouped_UD = self._parallel(
                [query_features],
                [self._product_tokens(document_texts, group) for group in groups],
            )
        return query_UD, grouped_UD[_places(groups).to(query_UD.device)]

    def _product_tokens(self, texts: Sequence[str], places: NDArray[np.int64]) -> dict[str, Any]:
        """Token tensors of some products' texts, padded or packed."""
        read = self.tokens.packed if self.packs else self.tokens
        return read(_at(texts, places), "document")

    def _groups(self, texts: Sequence[str], side: Side, size: int) -> list[NDArray[np.int64]]:
        """The texts' places by length, at most `size` in a group.

        Where weights are spread, as many groups as the worker with most has: each takes part in every pass of another.
        """
        groups = by_length(self.tokens.lengths(texts, side), size)
        if not self.is_sharded:
            return groups
        most = torch.tensor(len(groups), device=self.model.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        if len(texts) >= int(most):
            return np.array_split(np.concatenate(groups), int(most))
        # a text more than once: its first vector counts
        return [*(np.array([place]) for place in np.concatenate(groups)), *[groups[0][:1]] * (int(most) - len(texts))]

    def _clip_gradient(self) -> float:
        """Shortens the step's gradient to the recipe's length; returns the length before."""
        learned, spread = list(self.tower.loss.parameters()), list(self.model.parameters())
        if not self.is_sharded:
            return float(nn.utils.clip_grad_norm_([*spread, *learned], self.recipe.gradient_clip))
        # what the losses learn is whole on every worker, and nobody else has taken its mean
        gradients = _gradients(learned)
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= self.world_size
        norms = [nn.utils.get_total_norm(gradients), nn.utils.get_total_norm(_gradients(spread))]
        norm = torch.stack([whole(part) for part in norms]).norm()
        for parameters in (learned, spread):
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.gradient_clip, norm)
        return float(norm)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(_parameter_groups(self.tower, self.recipe), fused=True)

    def _set_learning_rate(self, step: int) -> float:
        """The rate of the pretrained weights: linear rise, then linear fall, in each phase; the last may end above 0.

        Computed from the step, so there is no scheduler to save. Lexical steps have one rate for all weights.
        """
        is_lexical = step < self.num_lexical
        place, count = (step, self.num_lexical) if is_lexical else (step - self.num_lexical, self.num_graded)
        warmup = self.recipe.warmup_share * count
        rising = (place + 1) / max(warmup, 1)
        falling = (count - place) / max(count - warmup, 1)
        least = 0.0 if is_lexical else self.recipe.final_rate_share
        factor = max(0.0, min(1.0, rising, least + (1 - least) * falling))
        peak = self.recipe.lexical.learning_rate if is_lexical else self.recipe.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = factor * (peak if is_lexical else group["peak"])
        return factor * peak


def by_length(length_N: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Positions of texts in groups of at most `size`, shortest first, so that little of a group is padding."""
    order = np.argsort(length_N, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def _places(groups: Sequence[NDArray[np.int64]]) -> Tensor:
    """Where each text's vector is found among those of the groups, first ones first."""
    return torch.from_numpy(np.unique(np.concatenate(groups), return_index=True)[1])


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _at(texts: Sequence[str], places: NDArray[np.int64]) -> list[str]:
    return [texts[place] for place in places]


def _parameter_groups(tower: TwoTower, recipe: TrainRecipe) -> list[dict[str, Any]]:
    heads = {id(p) for module in tower.encoder.children() if isinstance(module, Router) for p in module.parameters()}
    # untied backbones are in the router as well
    heads -= {id(parameter) for backbone in backbones_of(tower.encoder) for parameter in backbone.parameters()}
    heads |= {id(parameter) for parameter in tower.loss.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in tower.parameters():
        if parameter.requires_grad:
            peak = recipe.head_learning_rate if id(parameter) in heads else recipe.learning_rate
            # biases, norms and what the losses learn have no reason to shrink
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((peak, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), parameters in groups.items()
    ]


def _by_grade(similarity_QP: Tensor, grade_QP: Tensor) -> dict[str, float]:
    """Mean cosine of each grade, and how well each two are in order."""
    means = {
        f"similarity_grade_{grade}": similarity_QP[grade_QP == grade].mean().item()
        for grade in range(3)
        if (grade_QP == grade).any()
    }
    losses = loss_by_grades(similarity_QP, grade_QP)
    return means | {f"order_loss_{high}v{low}": loss for (high, low), loss in losses.items()}


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels inside, the former choice after; CUDA needs CUBLAS_WORKSPACE_CONFIG as well."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
