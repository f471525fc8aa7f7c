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
    waiting = deque(enumerate(given))
    num_given = len(waiting)
    found: dict[int, Found] = {}
    running: dict[Any, tuple[int, Given]] = {}
    num_started = num_ended = 0

    def end(place: int, one: Given, result: Found) -> None:
        nonlocal num_ended
        num_ended += 1
        log.info("%d of %d ended", num_ended, num_started + len(waiting))
        if place < num_given:
            found[place] = result
        waiting.extendleft((num_given, after) for after in reversed(list(then(one, result))))

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                place, one = waiting.popleft()
                num_started += 1
                if at_once == 1:
                    end(place, one, call(one))
                else:
                    remote = ray.remote(_call).options(num_cpus=0, max_retries=0)
                    running[remote.remote(call, one)] = (place, one)
            if running:
                (ended,), _ = ray.wait(list(running))
                end(*running.pop(ended), _result(ended))
    except BaseException:
        for call_under_way in running:
            ray.cancel(call_under_way, force=True)
        raise
    return [found[place] for place in range(num_given)]


def _call(call: Callable[[Any], Any], one: Any) -> Any:
    return call(one)


def _result(ended: Any) -> Any:
    """What a call returned, or the exception that it raised as itself, which says what to do."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
