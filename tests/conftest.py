"""What tests share: one Spark session for a worker's whole run, a fresh lake for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lake.storage import Lake

# Before torch is loaded: threads that spin while they wait made a test of 0.8 s take 15 s on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps tests of a file in one worker, for its fixtures; those of e2e/ all, which read one finished loop.

    Every other worker takes files from the end, so that of two one has the tests of Spark and one those of Ray: a Spark
    that has worked takes a third of the time of a fresh one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc,unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            if self.nodes.index(node) % 2:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need Spark first, files that need Ray alone last."""
    fixtures: dict[str, set[str]] = {}
    for item in items:
        fixtures.setdefault(_scope(item.nodeid), set()).update(getattr(item, "fixturenames", ()))
    places = {scope: 0 if "spark" in used else 2 if "ray_cluster" in used else 1 for scope, used in fixtures.items()}
    items.sort(key=lambda item: places[_scope(item.nodeid)])


def _scope(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0]
    return file.rpartition("/")[0] if "/e2e/" in file else file


@pytest.fixture(scope="session")
def spark() -> Iterator[object]:
    """Local Spark with Delta on two cores; starting one takes seconds, so all tests share it."""
    from lake.spark import SparkPlacement, session

    running = session(SparkPlacement(num_cores=2, driver_memory_gib=2))
    yield running
    running.stop()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake."""
    return Lake(str(tmp_path / "lake"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of two cores in this process, shared by all tests."""
    import ray

    from ray_apps.cluster import RayPlacement, connect

    connect(RayPlacement(address="local", num_cpus=2))
    yield
    ray.shutdown()
