"""Home Depot's judgements as the benchmarks read them, without a lake."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv as pc


def judged_titles(root: Path) -> dict[str, dict[str, int]]:
    """Grade of every judged title by query, in the order of `train.csv`: means of raters up to 1.5 are 0, below 2.5 1.

    Args:
        root: folder of the files.
    """
    options = pc.ReadOptions(encoding="latin-1")
    rows = pc.read_csv(root / "train.csv", read_options=options).select(["search_term", "product_title", "relevance"])
    judged: dict[str, dict[str, int]] = {}
    for query, title, mean in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        judged.setdefault(query, {})[title] = 0 if mean <= 1.5 else 1 if mean < 2.5 else 2
    return judged
