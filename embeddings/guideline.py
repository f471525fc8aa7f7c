"""The guideline as data: loading, the page that people read, and what a labeller reads of a pair.

Texts of shops are data. Before they enter a prompt or a token sequence, whatever a tokenizer or a template
could take for a control token or a tag is rewritten, so that no title can end its field or answer the question.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from importlib import resources
from typing import Annotated, Literal, NamedTuple

import pyarrow as pa

from conf.load import ConfigError, fingerprint, meaning, read_yaml, read_yaml_file, settings, validate
from embeddings.text import TextRecipe, product_text

LabellerKind = Literal["classifier", "generative"]
GradeValue = Literal[0, 1, 2]

PLACEHOLDERS = frozenset({"title", "purpose", "grades", "edge_cases", "query", "product"})
OPTIONAL_PLACEHOLDERS = frozenset({"facets", "examples"})

SHARED_BLOCK_TOKENS = 32
"""What pairs of a query share is filled up to whole blocks of so many tokens, since engines keep whole blocks only: 32
are the fewest that vLLM's attention takes on a processor, and two of its blocks on a graphics card."""
NEUTRALISER = 2
"""Version of `neutralise`, part of every prompt's fingerprint; a change of what it gives is a new one."""
_SIGNS = frozenset("<>[]|/")
_TAG = re.compile(r"<(?=\s*[|/!?A-Za-z_])")
_BRACKETED = re.compile(r"\[(\s*[|/]?\s*\w{2,16}\s*\|?\s*)\]")


@settings
class GradeRule:
    """One grade and how to recognise it."""

    grade: Annotated[GradeValue, meaning("the grade")]
    name: Annotated[str, meaning("its name", min_length=1)]
    definition: Annotated[str, meaning("what it means", min_length=1)]
    tests: Annotated[tuple[str, ...], meaning("signs by which it is told", min_length=1)]


@settings
class Example:
    """A graded pair that shows a rule."""

    query: Annotated[str, meaning("query", min_length=1)]
    product: Annotated[str, meaning("product", min_length=1)]
    grade: Annotated[GradeValue, meaning("grade under the rule")]


@settings
class EdgeCase:
    """A situation in which people disagree unless it is settled."""

    case: Annotated[str, meaning("the situation", min_length=1)]
    rule: Annotated[str, meaning("how it is graded", min_length=1)]
    example: Annotated[Example, meaning("a graded pair")]


@settings
class Facet:
    """A side of a product that a query may ask something of."""

    facet: Annotated[str, meaning("its name", min_length=1)]
    rule: Annotated[str, meaning("what matching means on this side", min_length=1)]


@settings
class Guideline:
    """A version of the rules by which pairs are graded."""

    version: Annotated[str, meaning("name of the version", pattern=r"^[\w.-]+$")]
    title: Annotated[str, meaning("the question that a grade answers", min_length=1)]
    purpose: Annotated[str, meaning("what counts and what does not", min_length=1)]
    grades: Annotated[tuple[GradeRule, ...], meaning("the three grades")]
    edge_cases: Annotated[tuple[EdgeCase, ...], meaning("settled situations")]
    template: Annotated[str, meaning("instruction of the generative labeller, with placeholders")]
    facets: Annotated[tuple[Facet, ...], meaning("sides of a product that are looked at one by one")] = ()
    examples: Annotated[tuple[Example, ...], meaning("pairs that people graded, shown in the prompt")] = ()

    def __post_init__(self) -> None:
        if sorted(rule.grade for rule in self.grades) != [0, 1, 2]:
            raise ValueError("grades must define 0, 1 and 2, each once")
        found = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        wanted = PLACEHOLDERS | {name for name in OPTIONAL_PLACEHOLDERS if getattr(self, name)}
        if sorted(found) != sorted(wanted | (OPTIONAL_PLACEHOLDERS & set(found))):
            raise ValueError(f"template must hold each of {', '.join(sorted(wanted))} once")
        if not self.template.index("{query}") < self.template.index("{product}"):
            raise ValueError("template must name {query} before {product}, which alone is cut when long")


class ProductFields(NamedTuple):
    """What a labeller may read of a product."""

    title: str
    brand: str | None = None
    category: str | None = None
    description: str | None = None
    attributes: str | None = None


def products_of(rows: pa.Table) -> list[ProductFields]:
    """The products of rows that have a column title and any of the other texts."""
    columns = [
        rows[name].to_pylist() if name in rows.column_names else [None] * len(rows) for name in ProductFields._fields
    ]
    return [ProductFields(*values) for values in zip(*columns, strict=True)]


def load_guideline(version: str) -> Guideline:
    """A guideline that ships with Assay, or that of a YAML file when `version` is a path.

    Raises:
        ConfigError: there is none of that name, it is not a valid guideline, or it names another version.
    """
    if version.endswith(".yaml"):
        return validate(Guideline, read_yaml_file(version), source=version)
    source = f"conf/guideline/{version}.yaml"
    guideline = validate(Guideline, read_yaml("guideline", version), source=source)
    if guideline.version != version:
        raise ConfigError(f"{source}: version: expected {version!r}, as the file is named, got {guideline.version!r}")
    return guideline


def guideline_source(version: str) -> str:
    """The YAML text of a guideline that ships with Assay, or of a file; a labeller's folder keeps a copy."""
    if version.endswith(".yaml"):
        with open(version, encoding="utf-8") as stream:
            return stream.read()
    return resources.files("conf").joinpath("guideline", f"{version}.yaml").read_text(encoding="utf-8")


def render_markdown(guideline: Guideline) -> str:
    """The guideline as the page that annotators read."""
    lines = [f"# {guideline.title}", "", f"Guideline {guideline.version}.", "", guideline.purpose, ""]
    for rule in _descending(guideline):
        lines += [f"## {rule.grade} {rule.name}", "", rule.definition, "", *(f"- {test}" for test in rule.tests), ""]
    if guideline.facets:
        lines += ["## What is looked at", "", *(f"- **{one.facet}**: {one.rule}" for one in guideline.facets), ""]
    lines += ["## Edge cases", "", "| case | rule | query | product | grade |", "|---|---|---|---|---|"]
    for edge in guideline.edge_cases:
        example = edge.example
        cells = (edge.case, edge.rule, example.query, example.product, str(example.grade))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def neutralise(text: str) -> str:
    """The text on one line, without invisible characters and without anything that reads as a control token.

    `<|im_end|>`, `</product>` and `[SEP]` become `< |im_end|>`, `< /product>` and `(SEP)`, whether their signs are
    plain, full-width or of another form of the same sign; people read the same.
    """
    visible = "".join(
        " " if char.isspace() else _plain_sign(char)
        for char in text
        if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co")
    )
    return " ".join(_BRACKETED.sub(r"(\1)", _TAG.sub("< ", visible)).split())


def _plain_sign(char: str) -> str:
    """The sign that another form of it stands for, where tags and control tokens are made of it."""
    plain = char if char.isascii() else unicodedata.normalize("NFKC", char)
    return plain if plain in _SIGNS else char


def labeller_product_text(product: ProductFields, recipe: TextRecipe) -> str:
    """The product as the labeller reads it; attributes stand before the description, which is cut first."""
    description = ". ".join(part for part in (product.attributes, product.description) if part)
    return neutralise(product_text(product.title, product.brand, product.category, description, recipe))


def prompt_segments(guideline: Guideline) -> tuple[str, str, str]:
    """What stands before the query, between query and product, and after the product."""
    rules = "\n".join(
        f"{rule.grade} {rule.name}: {rule.definition} {' '.join(rule.tests)}" for rule in _descending(guideline)
    )
    cases = "\n".join(f"{edge.case}: {edge.rule} {_shown(edge.example)}" for edge in guideline.edge_cases)
    fixed = guideline.template.format_map(
        {
            "title": guideline.title,
            "purpose": guideline.purpose,
            "grades": rules,
            "facets": "\n".join(f"{one.facet}: {one.rule}" for one in guideline.facets),
            "edge_cases": cases,
            "examples": "\n".join(map(_shown, guideline.examples)),
            "query": "\0",
            "product": "\0",
        }
    )
    # without the empty lines that facets and examples leave where there are none
    before, between, after = "\n".join(line for line in fixed.split("\n") if line).split("\0")
    return before, between, after


def _shown(example: Example) -> str:
    """A graded pair in the prompt's own form; its texts may be a shop's."""
    query, product = neutralise(example.query), neutralise(example.product)
    return f"<query>{query}</query> <product>{product}</product> grade: {example.grade}"


def build_prompt(guideline: Guideline, query: str, product: ProductFields, recipe: TextRecipe) -> str:
    """The generative labeller's prompt for a pair, uncut."""
    before, between, after = prompt_segments(guideline)
    return f"{before}{neutralise(query)}{between}{labeller_product_text(product, recipe)}{after}"


def prompt_fingerprint(guideline: Guideline, kind: LabellerKind, recipe: TextRecipe, max_tokens: int) -> str:
    """Hash of all that decides which tokens a pair becomes, apart from the tokenizer, which goes with the weights."""
    asked = (*prompt_segments(guideline), SHARED_BLOCK_TOKENS) if kind == "generative" else ("query", "product")
    return fingerprint("prompt", NEUTRALISER, kind, asked, recipe, max_tokens)


def _descending(guideline: Guideline) -> list[GradeRule]:
    return sorted(guideline.grades, key=lambda rule: -rule.grade)


if __name__ == "__main__":
    sys.stdout.write(render_markdown(load_guideline("v1")))
