"""A trained encoder as a folder that others can read, with a card that says how to use it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from embeddings.encoder import SIDES, load_encoder, max_tokens, read_card
from embeddings.text import CATEGORY_SEPARATOR, TextRecipe


def export_encoder(
    source_folder: str | Path, out_folder: str | Path, metrics: Mapping[str, float] | None = None
) -> None:
    """Copies the folder of an encoder and adds a README.

    Args:
        source_folder: what `save_encoder` wrote, or any sentence-transformers folder.
        out_folder: missing or empty; appears complete or not at all.
        metrics: results to print on the card; by default those of the source's own card.

    Raises:
        ValueError: `out_folder` holds something.
        ConfigError: `source_folder` is no encoder.
    """
    source, out = Path(source_folder), Path(out_folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: expected a new or empty folder, got {out}; choose another or empty it first")
    model, text = load_encoder(source)
    card = read_card(source)
    shown = metrics if metrics is not None else card.get("metrics", {})
    limits: dict[str, int] = {side: max_tokens(model, side) for side in SIDES}
    readme = _readme(
        text,
        stage=str(card.get("stage", "pretrained")),
        print_=str(card.get("fingerprint", "")),
        width=model.get_embedding_dimension(),
        prompts=model.prompts,
        limits=limits,
        metrics=shown,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        fresh = Path(place, "fresh")
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(".*", "README.md"))
        (fresh / "README.md").write_text(readme, encoding="utf-8")
        os.replace(fresh, out)


def _readme(
    text: TextRecipe,
    *,
    stage: str,
    print_: str,
    width: int,
    prompts: Mapping[str, str],
    limits: Mapping[str, int],
    metrics: Mapping[str, float],
) -> str:
    clauses = " ".join(f"`{clause}`" for clause in text.clauses)
    prefixes = ", ".join(f"{side} {prompts.get(side, '')!r}" for side in ("query", "document"))
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in metrics.items())
    table = f"\n## Results\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# Product search encoder ({stage})

Maps queries and products to {width} dimensions; the cosine of the two says how relevant the product is.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS_FOLDER")
queries = model.encode_query(["red running shoes"])
products = model.encode_document(["Trail Runner 5, by Acme, in Shoes{CATEGORY_SEPARATOR}Running"])
similarity = model.similarity(queries, products)
```

Written by and tested with sentence-transformers 6.2, which keeps a token limit per side.

- Stage: {stage}{f", recipe and inputs {print_}" if print_ else ""}.
- Queries: NFKC, lower case, single spaces; cut after {limits["query"]} tokens.
- Products: the clauses {clauses} joined with {text.joint!r}, each left out when its field is empty.
- Of a category path the first {text.category_levels} levels, of a description the first {text.max_description_chars}
  characters; a product is cut after {limits["document"]} tokens.
- Prefixes, added by the model: {prefixes}.
- Vectors have length 1, so dot product and cosine are the same.
{table}"""
