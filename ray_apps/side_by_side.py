"""Calls that each start and wait for work of their own on the cluster, several at a time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import ray

from ray_apps.cluster import RayPlacement, connect

log = logging.getLogger(__name__)

Given = TypeVar("Given")
Found = TypeVar("Found")


def side_by_side(
    call: Callable[[Given], Found],
    given: Sequence[Given],
    *,
    at_once: int,
    ray_placement: RayPlacement,
    then: Callable[[Given, Found], Iterable[Given]] = lambda given, found: (),
) -> list[Found]:
    """What the call returns for each of what is given, in their order.

    One at a time they run in this process; more run in processes of the cluster that wait beside the work that they
    start and so take no CPU of it. The first that fails ends all others.

    Args:
        call: importable on the workers, as what it is given and returns.
        given: what to call it with.
        at_once: calls under way at any time.
        ray_placement: which Ray; not connected to for one at a time.
        then: told here what a call was given and returned; what it gives is called with next, before what still waits.
    """
    if at_once > 1:
        connect(ray_placement)
    remote = ray.remote(_call).options(num_cpus=0, max_retries=0)
    # what follows another has no place in the answer
    waiting: deque[tuple[int | None, Given]] = deque(enumerate(given))
    running: dict[Any, tuple[int | None, Given]] = {}
    found: dict[int | None, Found] = {}
    num_ended = 0

    def end(place: int | None, one: Given, result: Found) -> None:
        nonlocal num_ended
        num_ended += 1
        log.info("%d of %d ended", num_ended, num_ended + len(running) + len(waiting))
        found[place] = result
        waiting.extendleft((None, after) for after in reversed(list(then(one, result))))

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                place, one = waiting.popleft()
                if at_once == 1:
                    end(place, one, call(one))
                else:
                    running[remote.remote(call, one)] = (place, one)
            if running:
                (ended,), _ = ray.wait(list(running))
                end(*running.pop(ended), _result(ended))
    except BaseException:
        for call_under_way in running:
            ray.cancel(call_under_way, force=True)
        raise
    return [found[place] for place in range(len(given))]


def _call(call: Callable[[Any], Any], one: Any) -> Any:
    return call(one)


def _result(ended: Any) -> Any:
    """What a call returned, or the exception that it raised as itself, which says what to do."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
