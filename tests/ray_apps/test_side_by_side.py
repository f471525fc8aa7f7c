import os
import time

import pytest

from conf.load import ConfigError
from ray_apps.cluster import RayPlacement
from ray_apps.side_by_side import side_by_side

HERE = RayPlacement(address="local")


def place(delay):
    time.sleep(delay)
    return delay, os.getpid()


def wait_or_fail(what):
    note, waits = what
    if waits:
        note.with_suffix(".part").write_text(str(os.getpid()))
        os.replace(note.with_suffix(".part"), note)
        time.sleep(600)
    while not note.is_file():
        time.sleep(0.1)
    raise ConfigError("no such thing")


def test_one_at_a_time_runs_in_this_process():
    assert side_by_side(place, [0.0, 0.1], at_once=1, ray_placement=HERE) == [(0.0, os.getpid()), (0.1, os.getpid())]


def test_several_run_elsewhere_and_come_back_in_order(ray_cluster):
    found = side_by_side(place, [1.0, 0.0, 0.1], at_once=2, ray_placement=HERE)

    assert [delay for delay, _ in found] == [1.0, 0.0, 0.1]
    assert os.getpid() not in {process for _, process in found}


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_follows_goes_before_what_waits(ray_cluster, at_once):
    told = []

    def then(given, found):
        told.append(found[0])
        return [given + 0.1] if given in (0.0, 0.1) else []

    found = side_by_side(place, [0.0, 3.0, 0.02], at_once=at_once, ray_placement=HERE, then=then)

    assert [delay for delay, _ in found] == [0.0, 3.0, 0.02]
    assert told == ([0.0, 0.1, 0.2, 3.0, 0.02] if at_once == 1 else [0.0, 0.1, 0.2, 0.02, 3.0])


def test_a_failure_is_raised_as_itself_and_ends_the_others(ray_cluster, tmp_path):
    note = tmp_path / "pid"

    with pytest.raises(ConfigError, match="no such thing"):
        side_by_side(wait_or_fail, [(note, True), (note, False)], at_once=2, ray_placement=HERE)

    process = int(note.read_text())
    while os.path.exists(f"/proc/{process}"):
        time.sleep(0.1)
