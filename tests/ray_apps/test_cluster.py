import logging

import pytest

from conf.load import ConfigError
from ray_apps.cluster import RayPlacement, check_resources, connect, quiet_data


def test_connecting_again_is_free(ray_cluster):
    connect(RayPlacement(address="local"))


def test_work_that_could_never_be_placed_is_refused(ray_cluster):
    check_resources(2)
    with pytest.raises(ConfigError, match=r"placement: 1 GPU asked for, the cluster has 0; ask for less"):
        check_resources(1, 1)
    with pytest.raises(ConfigError, match=r"placement: 64 CPU asked for, the cluster has 2"):
        check_resources(64)


def test_ray_data_tells_the_terminal_of_warnings_only():
    quiet_data()
    shown = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    assert shown
    assert all(handler.level == logging.WARNING for handler in shown)
