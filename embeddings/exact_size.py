"""What an exact search holds at once, known without torch: a process that hands out work need not load it."""

from __future__ import annotations

from typing import Final

TILE_ROWS: Final = 8_192
"""Products read and multiplied at once: 13 MB of float32 at width 384, which the allocator hands out again as it is."""
BLOCK_QUERIES: Final = 1_024
"""Queries multiplied at once: with the former 16 MB of bfloat16 scores, which caches hold."""
SPARE: Final = 4
"""A block's candidates have room for so many times k, but at least for MIN_ROOM."""
MIN_ROOM: Final = 1_024


def exact_search_bytes(width: int, num_queries: int, k: int) -> int:
    """Bytes that a search holds at most beside the mapped files, ties apart: tiles, queries and candidates."""
    tile = TILE_ROWS * width * 4 * 3
    candidates = num_queries * max(MIN_ROOM, SPARE * k) * 8
    return tile + num_queries * width * 16 + candidates + BLOCK_QUERIES * TILE_ROWS * 6
