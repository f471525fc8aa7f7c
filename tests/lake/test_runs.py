import json
from pathlib import Path
from typing import Annotated

import pytest

from conf.load import meaning, settings
from lake import runs, tables
from lake.schemas import QUARANTINE, RUN_RECORD
from lake.storage import Lake, LakeError


@settings
class Recipe:
    depth: Annotated[int, meaning("depth")] = 1


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"))


def finished(lake, job="mine", fingerprint="f", **outputs):
    run = runs.Run(lake, job, "dev", fingerprint, {"query": "3"}, Recipe(depth=5))
    return run.finish(rows=7, outputs=outputs, counts={"kept": 6}, metrics={"recall": 0.5})


def test_a_record_comes_back_as_it_was_written(lake):
    record = finished(lake)
    assert runs.records(lake) == [record]
    assert json.loads(record.to_json())["recipe"] == {"depth": 5}
    assert json.loads(record.to_json())["inputs"] == {"query": "3"}


def test_only_the_same_job_and_fingerprint_is_current(lake):
    record = finished(lake)
    assert runs.current(lake, "mine", "f") == record
    assert runs.current(lake, "mine", "g") is None
    assert runs.current(lake, "label", "f") is None


def test_a_run_whose_output_is_gone_is_not_current(lake):
    finished(lake, model="models/m")
    assert runs.current(lake, "mine", "f") is None
    Path(lake.path("models", "m")).mkdir(parents=True)
    assert runs.current(lake, "mine", "f") is not None
    finished(lake, fingerprint="t", quarantine=0)
    assert runs.current(lake, "mine", "t") is None


def test_a_run_whose_artifact_was_written_over_is_not_current(lake):
    Path(lake.path("raw", "market")).mkdir(parents=True)
    finished(lake, fingerprint="small", raw="raw/market")
    finished(lake, fingerprint="large", raw="raw/market")
    assert runs.current(lake, "mine", "large") is not None
    assert runs.current(lake, "mine", "small") is None


def test_newest_is_the_last_of_a_job(lake):
    finished(lake)
    second = finished(lake, fingerprint="g")
    finished(lake, job="other")
    assert runs.newest(lake, "mine") == second


def test_pinned_version_refuses_what_is_not_there(lake):
    with pytest.raises(LakeError, match="quarantine: no such table"):
        runs.pinned_version(lake, "quarantine", "newest")
    tables.create(lake, QUARANTINE)
    assert runs.pinned_version(lake, "quarantine", "newest") == tables.version(lake, QUARANTINE)
    with pytest.raises(LakeError, match=r"quarantine@99: .* holds versions 0 to 0"):
        runs.pinned_version(lake, "quarantine", "99")


def test_records_of_an_empty_lake_are_none(lake):
    assert runs.records(lake) == []
    tables.create(lake, RUN_RECORD)
    assert runs.records(lake) == []


def test_a_raw_folder_that_a_killed_run_replaced_makes_no_run_current(lake):
    folder = Path(lake.path("raw", "market"))
    folder.mkdir(parents=True)
    run = runs.Run(lake, "import", "dev", "one", runs.Inputs(), Recipe())
    run.claim("raw/market")
    run.finish(rows=1, outputs={"raw/market": "raw/market"})
    assert runs.current(lake, "import", "one") is not None
    (folder / runs.OWNER_FILE).unlink()  # a fresh folder was put there, and its run died before it claimed it
    assert runs.current(lake, "import", "one") is None
    runs.Run(lake, "import", "dev", "two", runs.Inputs(), Recipe()).claim("raw/market")
    assert runs.current(lake, "import", "one") is None
