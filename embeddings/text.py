"""What the encoder and the labeller read: the sentence of a product and the normal form of a query."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from typing import TYPE_CHECKING, Annotated

from conf.load import meaning, settings

if TYPE_CHECKING:
    import pyarrow as pa

CATEGORY_SEPARATOR = " > "
"""Between the levels of a category path, from the widest to the narrowest."""

_WORD = re.compile(r"[^\W_]+")
_DOTTED_I = str.maketrans("I\u0130", "\u0131i")
_INSIDE_WORDS = re.compile(r"['\u2019]|(?<=[0-9]),(?=[0-9]{3})")
_NO_MEANING = re.compile(r"""(?<![0-9])[./'"\u2019]|[./](?![0-9])""")
_KEPT_SIGNS = frozenset("%+#&$°./'\"\u2019")
FIELDS = ("title", "brand", "category", "description")
"""Columns of catalog_product that a sentence may name, in the order of the arguments of `product_text`."""


@settings
class TextRecipe:
    """How a product's fields become one sentence.

    The paper's item text is the name and a two-level taxonomy path in a natural-language template (its Table
    4: two levels beat none and four). The brand is added because many catalogues keep it out of the title.
    """

    clauses: Annotated[
        tuple[str, ...],
        meaning("clauses of {title} {brand} {category} {description}, each left out when a field is empty"),
    ] = ("{title}", "by {brand}", "in {category}")
    joint: Annotated[str, meaning("what stands between two clauses")] = ", "
    category_levels: Annotated[int, meaning("levels kept of the category path; 0 leaves it out", "levels", ge=0)] = 2
    max_description_chars: Annotated[int, meaning("longest description, cut at a word", "characters", ge=0)] = 300

    def __post_init__(self) -> None:
        if not self.clauses:
            raise ValueError("at least one clause is needed, for example '{title}'")
        for clause in self.clauses:
            if unknown := clause_fields(clause) - set(FIELDS):
                raise ValueError(f"clause {clause!r} names {sorted(unknown)}; use {', '.join(FIELDS)}")


def clause_fields(clause: str) -> set[str]:
    """Names of the fields that a clause refers to.

    Raises:
        ValueError: the braces of the clause do not match.
    """
    return {name for _, name, _, _ in string.Formatter().parse(clause) if name is not None}


def product_text(
    title: str | None, brand: str | None, category: str | None, description: str | None, recipe: TextRecipe
) -> str:
    """The sentence of a product, without the clauses that lack a field; empty where none is left."""
    levels = [level for part in (category or "").split(CATEGORY_SEPARATOR.strip()) if (level := _squeeze(part))]
    values = {
        "title": _squeeze(title),
        "brand": _squeeze(brand),
        "category": CATEGORY_SEPARATOR.join(levels[: recipe.category_levels]),
        "description": _cut(_squeeze(description), recipe.max_description_chars),
    }
    kept = [clause for clause in recipe.clauses if all(values[name] for name in clause_fields(clause))]
    return recipe.joint.join(clause.format_map(values) for clause in kept)


def product_texts(products: pa.Table, recipe: TextRecipe) -> list[str]:
    """The sentence of every row of a table that has the columns `FIELDS`."""
    columns = [products[name].to_pylist() for name in FIELDS]
    return [
        product_text(title, brand, category, description, recipe)
        for title, brand, category, description in zip(*columns, strict=True)
    ]


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case, in their order."""
    return _WORD.findall(text.lower())


def rarity(num_texts: int, num_holding: int) -> float:
    """Weight of a word that so many of the texts hold: log((N + 1) / (n + 1/2)), at least 0."""
    return max(0.0, math.log((num_texts + 1) / (num_holding + 0.5)))


def normalise_query(text: str) -> str:
    """The query in NFKC, lower case, with single spaces; the same text on every engine."""
    return _squeeze(unicodedata.normalize("NFKC", text).lower())


def normal_form(text: str, locale: str = "") -> str:
    """What queries are the same by: NFKC, lower case, signs without meaning and repeated blanks removed.

    The same as `spark_etl.queries.normal_form`, by which queries are split and logged queries are found again.

    Args:
        locale: language tag, for the case of letters (Turkish and Azeri); empty: as in most languages.
    """
    composed = unicodedata.normalize("NFKC", text)
    if locale.replace("_", "-").partition("-")[0].lower() in ("tr", "az"):
        composed = composed.translate(_DOTTED_I)
    lower = unicodedata.normalize("NFKC", composed.lower()).replace("\u2044", "/")
    signs = "".join(map(_sign, _INSIDE_WORDS.sub(_joined, lower)))
    return " ".join(_NO_MEANING.sub(" ", signs).split()) or lower


def _joined(found: re.Match[str]) -> str:
    """An apostrophe between letters is dropped, a comma too where the pattern takes one."""
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    return "" if found[0] == "," or (before.isalpha() and after.isalpha()) else found[0]


def _sign(char: str) -> str:
    """A letter, mark, number or sign with a meaning as it is, all else as a blank."""
    return char if char in _KEPT_SIGNS or unicodedata.category(char)[0] in "LMN" else " "


def _squeeze(text: str | None) -> str:
    return " ".join(text.split()) if text else ""


def _cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters, ending with a whole word where there is a space to cut at."""
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return head if space else text[:max_chars]
