"""What keeps a processor busy with a transformer: batches without padding, and one of them per thread.

N texts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SMALLEST_SHARE = 8

Item = TypeVar("Item")


def split_by_length(
    features: Mapping[str, Any], *, batch_tokens: int
) -> Iterator[tuple[NDArray[np.intp], dict[str, Any]]]:
    """Batches of many tokenised texts, longest first, of one length where that fills an eighth of a batch.

    Characters tell little of tokens where a catalogue holds several scripts, so texts are sorted by tokens. Without
    padding attention needs no mask and takes its fastest kernel.

    Args:
        features: padded tensors [N, L], `attention_mask` among them; anything else goes into each batch as it is.
        batch_tokens: of one batch, padding included, unless a single text has more.

    Yields:
        Rows of the texts, each text once; their features, cut to the longest.
    """
    mask_NL: Tensor = features["attention_mask"]
    length_N = mask_NL.sum(dim=1).clamp(min=1).numpy()
    num_columns = mask_NL.shape[1]
    is_right = torch.arange(num_columns) < torch.from_numpy(length_N)[:, None]
    pads_right = bool((mask_NL.bool() == is_right).all())
    if not pads_right and not bool((mask_NL.bool() == is_right.flip(1)).all()):
        length_N = np.full_like(length_N, num_columns)
    order_N, start = np.argsort(-length_N, kind="stable"), 0
    # rows at which a length ends
    end_G = np.append(np.flatnonzero(np.diff(length_N[order_N])) + 1, len(order_N))
    while start < len(order_N):
        width = int(length_N[order_N[start]])
        most = start + max(1, batch_tokens // width)
        enough = start + max(1, batch_tokens // _SMALLEST_SHARE // width)
        stop = min(most, int(end_G[np.searchsorted(end_G, min(enough, len(order_N)))]))
        rows = order_N[start:stop]
        columns = slice(0, width) if pads_right else slice(num_columns - width, num_columns)
        yield (
            rows,
            {
                name: value[rows, columns] if isinstance(value, Tensor) and value.shape == mask_NL.shape else value
                for name, value in features.items()
            },
        )
        start = stop


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Computes with so many of torch's threads; those of before come back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_in_lanes(items: Iterator[Item], work: Callable[[Iterator[Item]], None], num_lanes: int) -> None:
    """Shares the items out among threads that compute with one torch thread each; one lane is the caller's own thread.

    An item per thread spares the wait, at the end of each operation, for the slowest of the threads that share it.

    Args:
        items: are drawn by one thread at a time.
        work: gets the items that fall to a lane; what it raises is raised here when all lanes are done.
        num_lanes: threads.
    """
    if num_lanes == 1:
        return work(items)
    before, drawing = torch.get_num_threads(), Lock()

    def drawn() -> Iterator[Item]:
        while True:
            with drawing:
                item = next(items, None)
            if item is None:
                return
            yield item

    try:
        with ThreadPoolExecutor(num_lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            lanes = [pool.submit(work, drawn()) for _ in range(num_lanes)]
        for lane in lanes:
            lane.result()
    finally:
        # holds for the thread that sets it and for threads to come
        torch.set_num_threads(before)
    return None
