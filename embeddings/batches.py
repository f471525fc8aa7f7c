"""Which products of which instances a training step sees, as a pure function of the recipe and the step.

Nothing here has state: a resumed run sees what the unbroken run would have seen, and workers take disjoint
parts of the same global step, so that their number does not change what is learned.

Q queries, P products of a query (padded), U distinct texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.alike import alike_order

log = logging.getLogger(__name__)

TokenCount = Callable[[Sequence[str], Literal["query", "document"]], NDArray[np.int64]]
"""Tokens of each of some texts of a side, [N]."""
PADDING = -1
"""Grade and index of a cell that holds no product."""
UNGRADED = -1
"""Grade of a product of which shares alone are known: no loss that reads grades sees it."""


@settings
class BatchRecipe:
    """Size and make-up of a training step."""

    queries_per_step: Annotated[int, meaning("queries of a step, over all workers", "queries", ge=1)] = 32
    tokens_per_step: Annotated[
        int,
        meaning(
            "tokens of a step at most, over all workers: as many whole instances as fit, queries_per_step of them at "
            "most; 0: no limit",
            "tokens",
            ge=0,
        ),
    ] = 0
    max_products_per_query: Annotated[
        int, meaning("products drawn of a larger instance; every grade it has is drawn", "products", ge=3)
    ] = 16
    share_irrelevant: Annotated[
        float, meaning("aimed share of grade 0 in a draw; other grades fill what is missing", ge=0, le=1)
    ] = 0.65
    max_per_grade: Annotated[
        tuple[int, int, int] | None,
        meaning("most products of grades 0, 1 and 2 in a draw; null: no limit of their own", "products"),
    ] = None
    share_with_irrelevant: Annotated[
        float,
        meaning(
            "least share of the instances that hold grade 0; others are left out by chance to reach it", ge=0, le=1
        ),
    ] = 0.0
    soft_per_query: Annotated[
        int,
        meaning(
            "products of which a labeller's probabilities alone are learned from that are drawn beside the graded "
            "ones; above 0 the losses that read probabilities read theirs alone",
            "products",
            ge=0,
        ),
    ] = 0
    contrasts_per_query: Annotated[
        int,
        meaning("ungraded products drawn of those that an instance brings, beside its graded ones", "products", ge=0),
    ] = 3
    curriculum_epochs: Annotated[
        float,
        meaning(
            "over which grade 1 comes in where a query has 2 and 0 as well: at first those two alone, ever more often "
            "all three; 0: all three from the start",
            "epochs",
            ge=0,
        ),
    ] = 0.0
    alike_queries: Annotated[
        int,
        meaning(
            "queries of a step that stand together because they are alike, so that in-batch products are near misses; "
            "1: all by chance",
            "queries",
            ge=1,
        ),
    ] = 1

    def __post_init__(self) -> None:
        if self.max_per_grade is not None and (min(self.max_per_grade) < 0 or not any(self.max_per_grade)):
            raise ValueError("max_per_grade: expected numbers of products, one of them above 0, or null")


@dataclass(frozen=True)
class Instance:
    """One query with its graded products.

    Attributes:
        key: (dataset, query_id).
        query: text.
        products: texts.
        grades: int8, one per product; -1 where shares alone are known.
        shares: of raters, or probabilities, at or above grades 1 and 2, [P, 2]; None for those of clean grades.
        left_out: texts that are graded too, but not to be learned from or not drawn for the step.
        contrasts: texts without a grade, some of which may be products of which shares alone are known: to the losses
            that read products of other queries (`LossTerm.in_batch` and `background`) such products, under their own
            query too; losses over grades do not see them.
    """

    key: tuple[str, str]
    query: str
    products: Sequence[str]
    grades: NDArray[np.int8]
    shares: NDArray[np.float32] | None = None
    left_out: Sequence[str] = ()
    contrasts: Sequence[str] = ()

    @property
    def known_shares(self) -> NDArray[np.float32]:
        """The shares, or those of clean grades, [P, 2]."""
        if self.shares is not None:
            return self.shares
        return (self.grades[:, None] >= np.array([1, 2])).astype(np.float32)

    @property
    def own_texts(self) -> list[str]:
        """Texts that are no negatives of the query, whichever query of a step they are there for."""
        contrasts = set(self.contrasts)
        return [text for text in (*self.products, *self.left_out) if text not in contrasts]


class Elsewhere(NamedTuple):
    """Where the other workers' products are found, and which pairs they hold.

    Attributes:
        rank_V: worker that encodes each.
        row_V: row among that worker's texts.
        most: the largest number of texts of any worker.
        pair_M3: of each of their pairs the worker, the row of its query and that of its product among that worker's.
        grade_M: int8, of each pair.
        most_queries: the largest number of queries of any worker.
    """

    rank_V: NDArray[np.int64]
    row_V: NDArray[np.int64]
    most: int
    pair_M3: NDArray[np.int64]
    grade_M: NDArray[np.int8]
    most_queries: int


@dataclass(frozen=True)
class StepBatch:
    """A worker's part of a step; each distinct text stands once.

    Attributes:
        query_texts: U distinct queries.
        document_texts: U distinct product texts.
        query_index: row in `query_texts` of each instance, [Q].
        document_index: row in `document_texts`, [Q, P]; -1 pads.
        grades: int8, [Q, P]; -1 pads.
        shares: at or above grades 1 and 2, float32, [Q, P, 2]; nan pads.
        is_foreign: [Q, U], whether a product has no grade under this query: it is there for others, or a contrast;
            with a column for each product elsewhere, behind those of its own.
        elsewhere: products that other workers encode and this one does not; None where they do not count.
    """

    query_texts: list[str]
    document_texts: list[str]
    query_index: NDArray[np.int64]
    document_index: NDArray[np.int64]
    grades: NDArray[np.int8]
    shares: NDArray[np.float32]
    is_foreign: NDArray[np.bool_]
    elsewhere: Elsewhere | None = None


class InstanceSampler:
    """The instances of a training set in the order of training.

    Args:
        instances: those without a contrast, and those past the recipe's shares, are left out and counted in the log.
        recipe: size and make-up of a step.
        seed: decides the order and the draws, together with epoch and key of the query.
        needs_contrast: False where a loss has products of other queries for a contrast: then an instance with any
            positive among what may be drawn counts.
        encode: normalised vectors of queries, asked for once, here, where the recipe wants steps of alike queries.
        count: tokens of texts of a side, asked for once, here, where the recipe limits them.

    Raises:
        ValueError: no instance has products of two grades; alike queries are wanted and nothing encodes them; tokens
            are limited and nothing counts them, or an instance has more than a step may have.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        recipe: BatchRecipe,
        seed: int,
        *,
        needs_contrast: bool = True,
        encode: Callable[[Sequence[str]], NDArray[np.float32]] | None = None,
        count: TokenCount | None = None,
    ) -> None:
        self.instances = [
            instance
            for instance in instances
            if (drawable := _drawable(instance.grades, recipe)).size
            and (np.unique(drawable).size > 1 if needs_contrast else drawable.max() > 0)
        ]
        if not self.instances:
            raise ValueError(
                f"training instances: expected products of two grades under a query, "
                f"found none in {len(instances)}; grade more pairs or sample more products per query"
            )
        if left_out := len(instances) - len(self.instances):
            reason = "all products of one grade" if needs_contrast else "no product above grade 0"
            log.info("%d of %d instances left out: %s", left_out, len(instances), reason)
        self.instances = _enough_with_irrelevant(self.instances, recipe.share_with_irrelevant, seed)
        self.recipe, self.seed, self._vectors = recipe, seed, None
        if recipe.alike_queries > 1:
            if encode is None:
                raise ValueError(f"alike_queries={recipe.alike_queries}: expected an encoder of the queries, got none")
            # not at the first step: a run that goes on from a checkpoint starts with another encoder by then
            self._vectors = encode([instance.query for instance in self.instances])
        # two epochs meet in a step
        self._order = lru_cache(maxsize=2)(self._new_order)
        self._tokens_N, self._starts = None, [0]
        if recipe.tokens_per_step:
            if count is None:
                raise ValueError(f"tokens_per_step={recipe.tokens_per_step}: expected a count of tokens, got none")
            self._tokens_N = _most_tokens(self.instances, recipe, count)
            if (most := int(self._tokens_N.max())) > recipe.tokens_per_step:
                raise ValueError(
                    f"tokens_per_step={recipe.tokens_per_step}: an instance may have {most} tokens; raise it, or lower "
                    "max_products_per_query"
                )

    def num_steps(self, epochs: float) -> int:
        """Steps in which so many epochs are seen."""
        num_samples = max(1, math.ceil(epochs * len(self.instances)))
        if self._tokens_N is None:
            return -(-num_samples // self.recipe.queries_per_step)
        step = 0
        while self._samples(step).stop < num_samples:
            step += 1
        return step + 1

    def step_instances(self, step: int, rank: int, world_size: int) -> list[Instance]:
        """The worker's instances of a step, drawn down to `max_products_per_query`.

        Over all steps every instance comes once per epoch, alike ones together where the recipe says so; a step may
        span two epochs. In a curriculum the first ones lack their grade 1. Worker `rank` takes every `world_size`-th
        instance of the step.

        Raises:
            ValueError: there are more workers than queries in a step.
        """
        samples, count = self._samples(step), len(self.instances)
        if world_size > len(samples):
            setting = "queries_per_step" if self._tokens_N is None else "queries_per_step and tokens_per_step"
            raise ValueError(
                f"{setting}: expected at least one query for each of {world_size} workers, got {len(samples)} in step "
                f"{step}"
            )
        drawn = []
        for sample in samples[rank::world_size]:
            epoch, place = divmod(sample, count)
            instance = self.instances[self._order(epoch)[place]]
            seed = stable_seed(self.seed, epoch, *instance.key)
            if sample < self.recipe.curriculum_epochs * count:
                is_easy = np.random.default_rng([seed, 1]).random() >= sample / (self.recipe.curriculum_epochs * count)
                instance = _without_middle(instance) if is_easy else instance
            drawn.append(_draw_contrasts(draw_products(instance, self.recipe, seed), self.recipe, seed))
        return drawn

    def _samples(self, step: int) -> range:
        """The samples of a step: instances in the order of training, one epoch after the other."""
        size, count = self.recipe.queries_per_step, len(self.instances)
        if self._tokens_N is None:
            return range(step * size, (step + 1) * size)
        while len(self._starts) < step + 2:
            end, left = self._starts[-1], self.recipe.tokens_per_step
            while end - self._starts[-1] < size:
                epoch, place = divmod(end, count)
                left -= int(self._tokens_N[self._order(epoch)[place]])
                if left < 0:
                    break
                end += 1
            self._starts.append(end)
        return range(self._starts[step], self._starts[step + 1])

    def _new_order(self, epoch: int) -> NDArray[np.int64]:
        """Places of the instances in the order of an epoch."""
        seed = stable_seed(self.seed, epoch, "order")
        if self._vectors is None:
            return np.random.default_rng(seed).permutation(len(self.instances))
        return alike_order(self._vectors, self.recipe.alike_queries, seed)


def _most_tokens(instances: Sequence[Instance], recipe: BatchRecipe, count: TokenCount) -> NDArray[np.int64]:
    """Tokens of each instance's query and of the longest products that may be drawn with it."""
    tokens_N = count([instance.query for instance in instances], "query")
    products = list(dict.fromkeys(text for one in instances for text in (*one.products, *one.contrasts)))
    tokens = dict(zip(products, count(products, "document").tolist(), strict=True))
    for number, instance in enumerate(instances):
        sides = (
            (instance.products, recipe.max_products_per_query + recipe.soft_per_query),
            (instance.contrasts, recipe.contrasts_per_query),
        )
        for texts, most in sides:
            tokens_N[number] += sum(sorted((tokens[text] for text in texts), reverse=True)[:most])
    return tokens_N


def _enough_with_irrelevant(instances: list[Instance], share: float, seed: int) -> list[Instance]:
    """The instances that hold grade 0, and by chance as many others as leave those their share; the order stays."""
    if not share:
        return instances
    holds_N = np.array([(instance.grades == 0).any() for instance in instances])
    if not holds_N.any():
        return instances
    limit = math.floor(holds_N.sum() * (1 - share) / share)
    others = np.random.default_rng(stable_seed(seed, "left out")).permutation(np.flatnonzero(~holds_N))
    if len(others) <= limit:
        return instances
    log.info("%d of %d instances left out: no grade 0 among their products", len(others) - limit, len(instances))
    holds_N[others[:limit]] = True
    return [instances[place] for place in np.flatnonzero(holds_N)]


def draw_products(instance: Instance, recipe: BatchRecipe, seed: int) -> Instance:
    """At most `max_products_per_query` graded products: one per grade present, the rest by `share_irrelevant`.

    Of a grade there are at most as many as `max_per_grade` says. Beside them stand at most `soft_per_query` of those
    without a grade.
    """
    graded, soft = np.flatnonzero(instance.grades >= 0), np.flatnonzero(instance.grades < 0)
    chosen = graded[_drawn(instance.grades[graded], recipe, seed)]
    if soft.size:
        some = np.random.default_rng([seed, 3]).permutation(soft)[: recipe.soft_per_query]
        chosen = np.sort(np.concatenate([chosen, some]))
    drawn = instance if len(chosen) == len(instance.products) else _part_of(instance, chosen)
    if not recipe.soft_per_query:
        return drawn
    shares = np.where(drawn.grades[:, None] < 0, drawn.known_shares, np.float32(np.nan))
    return dataclasses.replace(drawn, shares=shares)


def _drawn(grade_P: NDArray[np.int8], recipe: BatchRecipe, seed: int) -> NDArray[np.intp]:
    """Places of the graded products of a draw, in their order."""
    limit, most = recipe.max_products_per_query, recipe.max_per_grade
    is_full = most is not None and any(np.count_nonzero(grade_P == g) > most[g] for g in range(len(most)))
    if len(grade_P) <= limit and not is_full:
        return np.arange(len(grade_P))
    shuffled = np.random.default_rng(seed).permutation(len(grade_P))
    grades = grade_P[shuffled]
    rank_in_grade = np.empty(len(grades), dtype=np.int64)
    for grade in np.unique(grades):
        rank_in_grade[grades == grade] = np.arange(np.count_nonzero(grades == grade))
    irrelevant = grades == 0
    quota = np.where(irrelevant, round(limit * recipe.share_irrelevant), limit - round(limit * recipe.share_irrelevant))
    place = np.where(irrelevant, rank_in_grade, np.cumsum(~irrelevant) - 1)
    # first one of each grade, then what the quotas hold, then whatever fills the draw; each in shuffled order
    order = np.lexsort((np.arange(len(grades)), place >= quota, rank_in_grade > 0))
    if most is not None:
        order = order[rank_in_grade[order] < np.array(most)[grades[order]]]
    return np.sort(shuffled[order[:limit]])


def _draw_contrasts(instance: Instance, recipe: BatchRecipe, seed: int) -> Instance:
    """The instance with at most `contrasts_per_query` of its contrasts."""
    if len(instance.contrasts) <= recipe.contrasts_per_query:
        return instance
    order = np.random.default_rng([seed, 2]).permutation(len(instance.contrasts))[: recipe.contrasts_per_query]
    return dataclasses.replace(instance, contrasts=[instance.contrasts[place] for place in sorted(order)])


def _without_middle(instance: Instance) -> Instance:
    """The instance without its grade 1 where grades 2 and 0 are left, which are easier to tell apart."""
    if not {0, 1, 2} <= set(instance.grades.tolist()):
        return instance
    return _part_of(instance, np.flatnonzero(instance.grades != 1))


def _part_of(instance: Instance, chosen: NDArray[np.int64]) -> Instance:
    """The instance with the products of these places alone; the others count as left out."""
    rest, products = np.setdiff1d(np.arange(len(instance.products)), chosen), instance.products
    return dataclasses.replace(
        instance,
        products=[products[place] for place in chosen],
        grades=instance.grades[chosen],
        shares=None if instance.shares is None else instance.shares[chosen],
        left_out=[*instance.left_out, *(products[place] for place in rest)],
    )


def _drawable(grade_P: NDArray[np.int8], recipe: BatchRecipe) -> NDArray[np.int8]:
    """The grades of which a draw may hold a product."""
    grade_P = grade_P[grade_P >= 0]
    return grade_P if recipe.max_per_grade is None else grade_P[np.array(recipe.max_per_grade)[grade_P] > 0]


def collate(instances: Sequence[Instance]) -> StepBatch:
    """Instances of a step as distinct texts and index matrices, as wide as the largest instance."""
    width = max(len(instance.products) for instance in instances)
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    document_index_QP = np.full((len(instances), width), PADDING, dtype=np.int64)
    grade_QP = np.full((len(instances), width), PADDING, dtype=np.int8)
    share_QP2 = np.full((len(instances), width, 2), np.nan, dtype=np.float32)
    query_index_Q = np.empty(len(instances), dtype=np.int64)
    for row, instance in enumerate(instances):
        query_index_Q[row] = queries.setdefault(instance.query, len(queries))
        for column, text in enumerate(instance.products):
            document_index_QP[row, column] = documents.setdefault(text, len(documents))
        grade_QP[row, : len(instance.grades)] = instance.grades
        share_QP2[row, : len(instance.grades)] = instance.known_shares
    # foreign to every query, their own too
    for text in (text for instance in instances for text in instance.contrasts):
        documents.setdefault(text, len(documents))
    # a query of two data sets is one text, and what either grades under it is not foreign to the other
    is_foreign_UU = np.ones((len(queries), len(documents)), dtype=bool)
    for row, instance in enumerate(instances):
        own = [documents[text] for text in instance.own_texts if text in documents]
        is_foreign_UU[query_index_Q[row], own] = False
    is_foreign_QU = is_foreign_UU[query_index_Q]
    texts = list(queries), list(documents)
    return StepBatch(*texts, query_index_Q, document_index_QP, grade_QP, share_QP2, is_foreign_QU)


def collate_part(parts: Sequence[Sequence[Instance]], rank: int) -> StepBatch:
    """A worker's batch that knows the products of the other workers' parts of the step too.

    Args:
        parts: instances of each worker, by rank.
        rank: of this worker.
    """
    batches = [collate(part) for part in parts]
    own, places, added = batches[rank], [], []
    seen = set(own.document_texts)
    graded: list[set[str]] = [set() for _ in own.query_texts]
    for row, instance in enumerate(parts[rank]):
        graded[own.query_index[row]].update(instance.own_texts)
    for worker, batch in enumerate(batches):
        for row, text in enumerate(batch.document_texts):
            if text not in seen:
                seen.add(text)
                places.append((worker, row))
                added.append([text not in graded[query] for query in own.query_index])
    more_QV = np.array(added, dtype=bool).reshape(-1, len(parts[rank])).T
    rank_V, row_V = np.array(places, dtype=np.int64).reshape(-1, 2).T
    pairs, grades = [np.empty((0, 3), dtype=np.int64)], [np.empty(0, dtype=np.int8)]
    for worker, batch in enumerate(batches):
        if worker != rank:
            row_N, column_N = np.nonzero(batch.grades != PADDING)
            of_pair = (batch.query_index[row_N], batch.document_index[row_N, column_N])
            pairs.append(np.stack([np.full(len(row_N), worker), *of_pair], axis=1))
            grades.append(batch.grades[row_N, column_N])
    return dataclasses.replace(
        own,
        is_foreign=np.concatenate([own.is_foreign, more_QV], axis=1),
        elsewhere=Elsewhere(
            rank_V,
            row_V,
            max(len(batch.document_texts) for batch in batches),
            np.concatenate(pairs),
            np.concatenate(grades),
            max(len(batch.query_texts) for batch in batches),
        ),
    )


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that is the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
