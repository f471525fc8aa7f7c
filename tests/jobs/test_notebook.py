"""A lake as notebooks see it: settings, sessions and what is missing."""

import pytest

from jobs.notebook import WRITTEN_BY, OpenLake, open_lake
from lake.schemas import AUDIT_CONFLICT, CLICK_MODEL, QUERY, TABLES
from lake.storage import LakeError
from tests.fakes import put


class Widgets:
    """The widgets of a Databricks notebook: made once, then as the reader has set them."""

    def __init__(self, **values):
        self.values = values

    def text(self, name, default):
        self.values.setdefault(name, default)

    def get(self, name):
        return self.values[name]


class Utilities:
    """What a Databricks notebook calls dbutils."""

    def __init__(self, **values):
        self.widgets = Widgets(**values)


def query(name, text, dataset="d"):
    return {"dataset": dataset, "query_id": name, "text": text, "normalised": text, "query_hash": name} | {
        "split": "train"
    }


def conflict(name, priority):
    return {"dataset": "d", "query_id": name, "product_id": "p", "kind": "doubtful", "grade": 0} | {
        "impressions": 1,
        "clicks": 0,
        "purchases": 0,
        "corrected_rate": 1.0,
        "priority": priority,
    }


def test_settings_come_from_the_environment_and_on_databricks_from_widgets(monkeypatch, tmp_path):
    monkeypatch.setenv("ASSAY_LAKE", str(tmp_path))
    monkeypatch.delenv("ASSAY_QUERY", raising=False)
    assert open_lake({}).lake.root == str(tmp_path)
    assert open_lake({}).setting("query", "shoes") == "shoes"
    (tmp_path / "other").mkdir()
    utilities = Utilities(lake=f"{tmp_path}/other")
    opened = open_lake({"dbutils": utilities})
    assert opened.lake.root == f"{tmp_path}/other"
    assert opened.setting("query", "shoes") == "shoes"
    utilities.widgets.values["query"] = " boots "
    assert opened.setting("query", "shoes") == "boots"
    assert open_lake({"dbutils": Utilities()}).lake.root == str(tmp_path)


def test_the_notebook_s_own_session_goes_before_any_other(monkeypatch, tmp_path):
    monkeypatch.setenv("ASSAY_LAKE", str(tmp_path))
    given = object()
    assert open_lake({"spark": given}).spark is given


def test_a_lake_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("ASSAY_LAKE", str(tmp_path / "none"))
    with pytest.raises(LakeError, match="none: no such folder; name a lake in the widget lake"):
        open_lake({})


@pytest.mark.parametrize("table", WRITTEN_BY)
def test_a_missing_table_names_the_job_that_writes_it(monkeypatch, lake, capsys, table):
    monkeypatch.setenv("ASSAY_LAKE", lake.root)
    opened = OpenLake({})
    with pytest.raises(
        LakeError, match=rf"^{table}: no such table in lake=.*; {WRITTEN_BY[table]} writes it: assay run"
    ):
        opened.table(table)
    assert opened.table_if_there(table) is None
    assert f"{WRITTEN_BY[table]} writes it" in capsys.readouterr().out
    assert table in TABLES


def test_an_audit_that_has_not_run_is_named(monkeypatch, lake):
    monkeypatch.setenv("ASSAY_LAKE", lake.root)
    with pytest.raises(LakeError, match="build_audit writes it"):
        OpenLake({}).judged_pairs()


def test_a_table_is_read_at_its_newest_version(monkeypatch, lake, spark):
    place = {"dataset": "d", "examination": 1.0, "impressions": 9, "clicks": 1, "converged": True}
    put(lake, CLICK_MODEL, [place | {"first_position": 1}])
    put(lake, CLICK_MODEL, [place | {"first_position": 2}])
    monkeypatch.setenv("ASSAY_LAKE", lake.root)
    rows = OpenLake({"spark": spark}).table("click_model").collect()
    assert sorted(row["first_position"] for row in rows) == [1, 2]


def test_a_query_is_found_by_id_by_text_or_as_that_of_the_first_conflict(monkeypatch, lake, spark):
    put(lake, QUERY, [query("q1", "Red shoes"), query("q2", "boots"), query("q2", "caps", "e")])
    put(lake, AUDIT_CONFLICT, [conflict("q1", 0.5), conflict("q2", 0.7)])
    monkeypatch.setenv("ASSAY_LAKE", lake.root)
    opened = OpenLake({"spark": spark})
    found = {
        wanted: sorted(row["text"] for row in opened.find_query(wanted).collect()) for wanted in ("q2", "red SHOES", "")
    }
    assert found == {"q2": ["boots", "caps"], "red SHOES": ["Red shoes"], "": ["boots"]}
    with pytest.raises(LakeError, match=r"query='hats': no such query in lake=.*; give the id or the text of one"):
        opened.find_query("hats")
