"""Settings of the index that mining searches; apart from `ann`, since jobs name it without FAISS."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from conf.load import meaning, settings

TRAINED: Final = "trained.faiss"
"""Name of the empty index that all parts begin with."""


def part_file(number: int) -> str:
    """Name of the index of a part."""
    return f"part-{number:05d}.faiss"


@settings
class IndexRecipe:
    """Exact search, or an index that looks at a part of the catalogue for each query."""

    kind: Annotated[
        Literal["exact", "ivf_flat", "ivf_pq", "hnsw"],
        meaning(
            "exact: every product; ivf_flat and ivf_pq: the products of the lists nearest to the query, as float16 or "
            "as codes; hnsw: a graph of neighbours, held in memory"
        ),
    ] = "exact"
    lists: Annotated[int, meaning("ivf: lists of a part; 0: four times the root of its rows", "lists", ge=0)] = 0
    probes: Annotated[int, meaning("ivf: lists looked at per query", "lists", ge=1, le=2048)] = 32
    code_bytes: Annotated[int, meaning("ivf_pq: of a product's code; divides the vector's width", "bytes", ge=1)] = 48
    links: Annotated[int, meaning("hnsw: of a product", "products", ge=2, le=256)] = 32
    links_looked_at: Annotated[
        int, meaning("hnsw: products looked at per query and as the graph is built; at least the depth", ge=1)
    ] = 256
    spare: Annotated[
        int, meaning("candidates beyond the depth that are scored exactly; codes want more", "products", ge=0)
    ] = 100
    train_rows: Annotated[int, meaning("products that lists and codes are learned from", "products", ge=1)] = 200_000
    seed: Annotated[int, meaning("seed of their draw", ge=0)] = 0

    @property
    def has_lists(self) -> bool:
        """Whether it is an inverted file, whose lists are read from disk as they are probed."""
        return self.kind in ("ivf_flat", "ivf_pq")

    @property
    def built_by(self) -> tuple[object, ...]:
        """What the files of an index follow from, apart from the vectors; the rest is how it is searched."""
        common = (self.kind, self.seed, self.train_rows)
        if self.has_lists:
            return (*common, self.lists, self.code_bytes if self.kind == "ivf_pq" else 0)
        return (*common, self.links, self.links_looked_at)

    def factory(self, lists: int, width: int) -> str:
        """FAISS's name of the index.

        Raises:
            ValueError: `code_bytes` does not divide the width, or the kind has no index.
        """
        if self.kind == "ivf_flat":
            return f"IVF{lists},SQfp16"
        if self.kind == "ivf_pq":
            if width % self.code_bytes:
                raise ValueError(f"index.code_bytes={self.code_bytes}: expected a divisor of the width {width}")
            return f"IVF{lists},PQ{self.code_bytes}"
        if self.kind == "hnsw":
            return f"HNSW{self.links}_SQfp16"
        raise ValueError("index.kind=exact has no index")

    def num_bytes(self, rows: int, width: int) -> int:
        """Memory that the index of a part takes beside mapped files, roughly: while it is built, all of it."""
        per_row = {
            "exact": 0,
            "ivf_flat": 2 * width + 8,
            "ivf_pq": self.code_bytes + 8,
            "hnsw": 2 * width + 8 * self.links + 16,
        }[self.kind]
        return rows * per_row
