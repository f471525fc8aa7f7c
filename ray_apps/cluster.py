"""Connecting to Ray: a local cluster by default, the submitted job's cluster under `ray job submit`.

Imports Ray only when it connects: jobs name their placement on machines without it, for `assay jobs` and `--help`.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Annotated

from conf.load import ConfigError, meaning, settings

log = logging.getLogger(__name__)


@settings
class RayPlacement:
    """Which Ray runs the work; never part of a run's identity."""

    address: Annotated[
        str,
        meaning(
            'Ray address; empty: $RAY_ADDRESS where set, else a cluster of this process; "local" forces the latter'
        ),
    ] = ""
    num_cpus: Annotated[int, meaning("CPUs of a local cluster; 0: all of the machine", unit="CPUs", ge=0)] = 0


def connect(placement: RayPlacement) -> None:
    """Connects this process to Ray once; later calls are free.

    Raises:
        ConfigError: the address does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    # An ancestor `uv run` would make Ray start its workers through uv and drop the extras.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = _address(placement)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if address == "local":
                # Ray warns that it switches token authentication on, which is its default and what we want.
                logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
                ray.init(
                    address="local",
                    num_cpus=placement.num_cpus or None,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    log_to_driver=bool(os.environ.get("ASSAY_RAY_LOG")),
                )
            else:
                ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"placement.ray.address={address}: Ray does not answer ({error}); give another"
            ) from error
    log.info("Ray: %s", {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")})


def _address(placement: RayPlacement) -> str:
    return placement.address or os.environ.get("RAY_ADDRESS", "") or "local"


def count_nodes(placement: RayPlacement) -> int:
    """Machines of the cluster that the placement names; of one that it would start here, one."""
    if _address(placement) == "local":
        return 1
    import ray

    connect(placement)
    return sum(node["Alive"] for node in ray.nodes())


def check_resources(num_cpus: float, num_gpus: float = 0) -> None:
    """Refuses work that this cluster could never place, instead of waiting for ever.

    Raises:
        ConfigError: more CPUs or GPUs are asked for than the cluster has.
    """
    import ray

    have = ray.cluster_resources()
    for name, wanted in (("CPU", num_cpus), ("GPU", num_gpus)):
        if wanted > have.get(name, 0):
            raise ConfigError(
                f"placement: {wanted:g} {name} asked for, the cluster has {have.get(name, 0):g}; ask for less"
            )


def check_memory(num_bytes: int, what: str) -> None:
    """Refuses work that fits into the memory of no node.

    Args:
        num_bytes: of one process.
        what: names that process.

    Raises:
        ConfigError: no node has so much.
    """
    import ray

    most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if num_bytes > most:
        raise ConfigError(
            f"placement: {what} takes about {num_bytes / 1e6:,.0f} MB, the largest node has {most / 1e6:,.0f} MB for "
            "all its work; take fewer queries at once or a larger node"
        )


def quiet_data() -> None:
    """Keeps Ray Data's plans and summaries in its log files; warnings still reach the terminal."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
