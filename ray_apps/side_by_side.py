"""Calls that each start and wait for work of their own on the cluster, several at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from ray_apps.cluster import RayPlacement, connect

log = logging.getLogger(__name__)

Given = TypeVar("Given")
Found = TypeVar("Found")


def side_by_side(
    call: Callable[[Given], Found], given: Sequence[Given], *, at_once: int, ray_placement: RayPlacement
) -> list[Found]:
    """What the call returns for each, in their order.

    One at a time they run in this process; more run in processes of the cluster that wait beside the work that they
    start and so take no CPU of it. The first that fails ends all others.

    Args:
        call: importable on the workers, as what it is given and returns.
        given: what to call it with.
        at_once: calls under way at any time.
        ray_placement: which Ray; not connected to for one at a time.
    """
    if at_once == 1:
        return [call(one) for one in given]
    connect(ray_placement)
    remote = ray.remote(_call).options(num_cpus=0, max_retries=0)
    found: dict[int, Found] = {}
    places: dict[Any, int] = {}
    try:
        for place, one in enumerate(given):
            if len(places) == at_once:
                _collect(places, found, len(given))
            places[remote.remote(call, one)] = place
        while places:
            _collect(places, found, len(given))
    except BaseException:
        for running in places:
            ray.cancel(running, force=True)
        raise
    return [found[place] for place in range(len(given))]


def _call(call: Callable[[Any], Any], one: Any) -> Any:
    return call(one)


def _collect(places: dict[Any, int], found: dict[int, Any], count: int) -> None:
    """Waits for one call to end and keeps what it returned."""
    (ended,), _ = ray.wait(list(places))
    place = places.pop(ended)
    try:
        found[place] = ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        # the cause is what the call raised, which says what to do
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    log.info("%d of %d ended", len(found), count)
