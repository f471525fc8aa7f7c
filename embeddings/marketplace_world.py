"""The simulated world behind the data: products, shoppers' intents and the true grade of every pair.

Every draw is a hash of (seed, stream, row), so a row is the same whatever the chunk, order or machine.
The world is held as small integer columns (about 20 bytes a product); text is made per chunk and not kept.
"""

# N products, A attribute slots, R rows, K draws per row, n products of one type

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embeddings.marketplace_words import ABBREVIATIONS, BRANDS, PRAISE, SENTENCES, TYPES, VALUE_SYNONYMS

OptionT = TypeVar("OptionT")

NUM_SLOTS = 3
NO_VALUE = -1
_BRAND_NAMES = tuple(brand for brands in BRANDS.values() for brand in brands)
_FIRST_BRAND = {department: _BRAND_NAMES.index(brands[0]) for department, brands in BRANDS.items()}
_TYPE_OF_LEAF = {kind.leaf: index for index, kind in enumerate(TYPES)}


def draw(seed: int, stream: str, row_R: NDArray[Any], num_draws: int = 1) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), shape [R, K]: the splitmix64 hash of seed, stream, row and column."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    hashed_R = _mix(row_R.astype(np.uint64) ^ np.uint64(int.from_bytes(digest, "little")))
    column_K = np.arange(1, num_draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(hashed_R[:, None] + column_K[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class Products:
    """The catalogue's true properties.

    Attributes:
        value_NA: index into the values of the type's attribute, -1 where the type has fewer attributes.
        line_N: index into the type's model lines, -1 for none.
        popularity_N: Pareto with exponent 1.25, at least 1; price_N in US dollars.
        order_N, start_T: products of type t are `order_N[start_T[t]:start_T[t + 1]]`.
    """

    type_N: NDArray[np.int16]
    brand_N: NDArray[np.int16]
    line_N: NDArray[np.int8]
    value_NA: NDArray[np.int8]
    price_N: NDArray[np.float32]
    popularity_N: NDArray[np.float32]
    order_N: NDArray[np.int64]
    start_T: NDArray[np.int64]

    def of_type(self, type_id: int) -> NDArray[np.int64]:
        """Rows of the products of a type, ascending."""
        return self.order_N[self.start_T[type_id] : self.start_T[type_id + 1]]


@dataclass(frozen=True)
class Intent:
    """What a shopper wants: a type, and values of `constraints` (attribute name -> value), brand or line."""

    type_id: int
    constraints: tuple[tuple[str, str], ...] = ()
    brand: int = NO_VALUE
    line: int = NO_VALUE


@dataclass(frozen=True)
class Query:
    """A query as typed, with the intent behind it."""

    text: str
    intent: Intent


def build_products(num_products: int, seed: int, near_duplicate_share: float) -> Products:
    """Draws the true properties; a near-duplicate shares those of an earlier product and has its own text."""
    row_N = np.arange(num_products)
    own_NK = draw(seed, "product", row_N, 4)
    is_copy_N = (own_NK[:, 0] < near_duplicate_share) & (row_N > 0)
    base_N = np.where(is_copy_N, (own_NK[:, 1] * row_N).astype(np.int64), row_N)
    base_NK = draw(seed, "properties", base_N, 4 + NUM_SLOTS)
    weight_T = 1.0 / (2 + np.arange(len(TYPES)) * 7 % len(TYPES)) ** 0.4  # 7: large and small types interleave
    type_N = np.searchsorted(np.cumsum(weight_T) / weight_T.sum(), base_NK[:, 0]).clip(0, len(TYPES) - 1)

    num_values_TA = np.array(
        [[len(a.values) for a in kind.attributes] + [0] * (NUM_SLOTS - len(kind.attributes)) for kind in TYPES]
    )
    value_NA = np.floor(base_NK[:, 4:] * num_values_TA[type_N]).astype(np.int8)
    value_NA[num_values_TA[type_N] == 0] = NO_VALUE
    num_lines_N = np.array([len(kind.lines) for kind in TYPES])[type_N]
    line_N = np.where(base_NK[:, 1] < 0.5, np.floor(base_NK[:, 1] * 2 * num_lines_N), NO_VALUE).astype(np.int8)
    first_brand_N = np.array([_FIRST_BRAND[kind.department] for kind in TYPES])[type_N]
    # A model line belongs to one brand; without a line, the squared draw makes the house brand common.
    brand_offset_N = np.where(line_N >= 0, (type_N + line_N) % 5, np.floor(base_NK[:, 2] ** 2 * 5))
    low_N, high_N = np.array([kind.price for kind in TYPES])[type_N].T
    price_N = low_N * (high_N / low_N) ** base_NK[:, 3] * (0.95 + 0.1 * own_NK[:, 2])
    return Products(
        type_N=type_N.astype(np.int16),
        brand_N=(first_brand_N + brand_offset_N).astype(np.int16),
        line_N=line_N,
        value_NA=value_NA,
        price_N=np.round(price_N, 2).astype(np.float32),
        popularity_N=((1 - own_NK[:, 3]) ** -0.8).astype(np.float32),
        order_N=np.argsort(type_N, kind="stable"),
        start_T=np.searchsorted(np.sort(type_N), np.arange(len(TYPES) + 1)),
    )


def related_types(type_id: int) -> tuple[int, ...]:
    """The substitutes (same family) and the complements of a type, in either direction, without itself."""
    kind = TYPES[type_id]
    return tuple(
        other_id
        for other_id, other in enumerate(TYPES)
        if other_id != type_id
        and (other.family == kind.family or other.leaf == kind.complement or other.complement == kind.leaf)
    )


def true_grade(intent: Intent, products: Products, row_n: NDArray[Any], type_id: int) -> NDArray[np.int8]:
    """Grades the products `row_n`, all of type `type_id`: 2 minus the departures from the intent, at least 0.

    A departure is a substitute or complement in place of the type, or a violated constraint on brand, line or
    an attribute; one that the product's type does not have cannot be violated. An unrelated type is grade 0.
    """
    if type_id != intent.type_id and type_id not in related_types(intent.type_id):
        return np.zeros(len(row_n), np.int8)
    departures_n = np.full(len(row_n), int(type_id != intent.type_id))
    if intent.brand != NO_VALUE:
        departures_n += products.brand_N[row_n] != intent.brand
    if intent.line != NO_VALUE:  # lines are of one type: another type never carries the line
        departures_n += (products.line_N[row_n] != intent.line) | (type_id != intent.type_id)
    wanted = dict(intent.constraints)
    for slot, attribute in enumerate(TYPES[type_id].attributes):
        if attribute.name in wanted:
            value = wanted[attribute.name]
            index = attribute.values.index(value) if value in attribute.values else len(attribute.values)
            departures_n += products.value_NA[row_n, slot] != index
    grade_n: NDArray[np.int8] = np.maximum(2 - departures_n, 0).astype(np.int8)
    return grade_n


def grade_catalog(intent: Intent, products: Products) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """All products that could have a grade above 0 and their true grades, ascending by row; the rest is 0."""
    kinds = (intent.type_id, *related_types(intent.type_id))
    rows = [products.of_type(kind) for kind in kinds]
    grades = [true_grade(intent, products, row_n, kind) for kind, row_n in zip(kinds, rows, strict=True)]
    row_R, grade_R = np.concatenate(rows), np.concatenate(grades)
    order_R = np.argsort(row_R)
    return row_R[order_R], grade_R[order_R]


def build_queries(products: Products, num_queries: int, seed: int, misspelled_share: float) -> list[Query]:
    """Distinct queries, each worded from what a drawn product is, so that each has an exact match.

    Raises:
        ValueError: the catalogue has fewer distinct queries than asked for.
    """
    queries: dict[str, Intent] = {}
    for attempt_R in np.array_split(np.arange(30 * num_queries), 30):
        for draw_K in draw(seed, "query", attempt_R, 24):
            query = _word_query(products, draw_K, misspelled_share)
            queries.setdefault(query.text, query.intent)
            if len(queries) == num_queries:
                return [Query(text, intent) for text, intent in queries.items()]
    raise ValueError(
        f"marketplace: expected {num_queries} distinct queries, got {len(queries)} from "
        f"{len(products.type_N)} products; lower num_queries or raise num_products"
    )


def _word_query(products: Products, draw_K: NDArray[np.float64], misspelled_share: float) -> Query:
    """One query: 30 % of shoppers name only the type, half use a word that the catalogue does not."""
    row = int(draw_K[0] * len(products.type_N))
    type_id, line = int(products.type_N[row]), int(products.line_N[row])
    kind, form = TYPES[type_id], draw_K[1]
    by_line = form < 0.15 and line != NO_VALUE
    words = (
        kind.lines[line : line + 1]
        if by_line
        else kind.slang
        if form < 0.35
        else kind.synonyms
        if form < 0.6
        else kind.nouns
    )
    noun = _pick(words, draw_K[2]).lower()
    num_constraints = int(np.searchsorted((0.3, 0.72, 0.94), draw_K[3]))
    slots = np.argsort(draw_K[4 : 5 + len(kind.attributes)])[:num_constraints]  # the last slot is the brand
    before: list[str] = []
    after: list[str] = []
    constraints, brand = [], NO_VALUE
    for slot in slots.tolist():
        if slot == len(kind.attributes):
            brand = int(products.brand_N[row])
            before.insert(0, _BRAND_NAMES[brand].lower())
            continue
        attribute = kind.attributes[slot]
        value = attribute.values[products.value_NA[row, slot]]
        word = _pick((value, value, *VALUE_SYNONYMS.get(value, ())), draw_K[10 + slot])
        phrase = (attribute.phrase if word == value else attribute.phrase.removesuffix("'s")).format(word).lower()
        (after if attribute.after_noun else before).append(phrase)
        constraints.append((attribute.name, value))
    text = " ".join((*before, noun, *after))
    if draw_K[16] < misspelled_share:
        text = _misspell(text, draw_K[17:20])
    return Query(text, Intent(type_id, tuple(sorted(constraints)), brand, line if by_line else NO_VALUE))


def _misspell(text: str, draw_K: NDArray[np.float64]) -> str:
    """Swaps, drops or doubles a letter inside one of the longer words."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 4] or [0]
    index = _pick(tuple(long), draw_K[0])
    word = words[index]
    at = 1 + int(draw_K[1] * max(len(word) - 2, 1))
    edits = (
        word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at : at + 1] + word[at:],
    )
    words[index] = _pick(edits, draw_K[2])
    return " ".join(words)


def product_rows(
    products: Products, row_R: NDArray[Any], seed: int, incomplete_share: float
) -> Iterator[dict[str, Any]]:
    """The catalogue rows that a seller would upload: noisy titles, each field at times left out."""
    draw_RK = draw(seed, "text", row_R, 24)
    for row, draw_K in zip(row_R.tolist(), draw_RK, strict=True):
        yield _write_product(products, row, draw_K, incomplete_share)


def _write_product(
    products: Products, row: int, draw_K: NDArray[np.float64], incomplete_share: float
) -> dict[str, Any]:
    kind = TYPES[int(products.type_N[row])]
    brand, line = _BRAND_NAMES[int(products.brand_N[row])], int(products.line_N[row])
    noun = _pick(kind.nouns, draw_K[0]).title()
    named = [
        (attribute, attribute.values[products.value_NA[row, slot]]) for slot, attribute in enumerate(kind.attributes)
    ]
    missing_K = draw_K[20:] < incomplete_share
    shown = [
        ABBREVIATIONS.get(value, value) if draw_K[4 + slot] < 0.12 else attribute.phrase.format(value)
        for slot, (attribute, value) in enumerate(named)
        if draw_K[8 + slot] > incomplete_share * 0.5
    ]
    if draw_K[1] < 0.5:
        shown.reverse()
    # Sellers of a known model line sometimes leave the noun out: only the category still tells the type.
    core = [kind.lines[line], *([] if draw_K[2] < 0.2 else [noun])] if line != NO_VALUE else [noun]
    praise = [_pick(PRAISE, draw_K[3] / 0.25)] if draw_K[3] < 0.25 else []
    parts = [*praise, *([] if missing_K[0] else [brand]), *core, *shown]
    if draw_K[12] < 0.3:  # some sellers put the attributes first
        parts = [*shown, *praise, *([] if missing_K[0] else [brand]), *core]
    facts = "; ".join(f"{attribute.name}: {value}" for attribute, value in named)
    told = ", ".join(attribute.phrase.format(value) for attribute, value in named)
    return {
        "product_id": product_id(row),
        "title": (", " if draw_K[13] < 0.15 else " ").join(parts),
        "description": None if missing_K[1] else f"{noun} by {brand}, {told}. {_pick(SENTENCES, draw_K[14])}",
        "brand": None if missing_K[2] else brand,
        "category": f"{kind.department} > {kind.family} > {kind.leaf}",
        "attributes": None if missing_K[3] else facts,
        "price": None if draw_K[15] < 0.02 else round(float(products.price_N[row]), 2),
    }


def product_id(row: int) -> str:
    """The id of a product by its row in the world."""
    return f"P{row:08d}"


def _pick(options: tuple[OptionT, ...], uniform: float) -> OptionT:
    return options[min(int(uniform * len(options)), len(options) - 1)]
