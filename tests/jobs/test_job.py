import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from conf.load import ConfigError, meaning, settings
from jobs import job
from lake.storage import Lake, LakeError


@settings
class Inputs:
    query: job.TableVersion = ""
    model: Annotated[str, meaning("folder")] = ""
    raw: Annotated[tuple[str, ...], meaning("folders")] = ()


@settings
class Recipe:
    depth: Annotated[int, meaning("depth", unit="ranks", ge=1)] = 1


@settings
class Placement:
    num_workers: Annotated[int, meaning("workers")] = 1


@settings
class Config:
    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: Recipe = Recipe()
    placement: Placement = Placement()


def config(tmp_path, **changes):
    return Config(lake=str(tmp_path / "lake"), **changes)


def test_identity_is_recipe_and_inputs_never_placement(tmp_path):
    plain = job.begin(config(tmp_path), "mine").fingerprint
    assert job.begin(config(tmp_path, placement=Placement(num_workers=8)), "mine").fingerprint == plain
    assert job.begin(config(tmp_path, setting="nightly"), "mine").fingerprint == plain
    assert job.begin(config(tmp_path, recipe=Recipe(depth=2)), "mine").fingerprint != plain
    assert job.begin(config(tmp_path), "label").fingerprint != plain


def test_an_artifact_enters_by_content_not_by_place(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "lake" / "models" / name
        folder.mkdir(parents=True)
        (folder / "weights").write_text("same")
    one, two = (
        job.begin(config(tmp_path, inputs=Inputs(model=f"models/{name}")), "mine").fingerprint for name in ("a", "b")
    )
    assert one == two
    (tmp_path / "lake" / "models" / "a" / "weights").write_text("other")
    assert job.begin(config(tmp_path, inputs=Inputs(model="models/a")), "mine").fingerprint != two


def test_every_item_of_a_list_of_artifacts_counts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "lake" / "raw" / name).mkdir(parents=True)
    run = job.begin(config(tmp_path, inputs=Inputs(raw=("raw/a", "raw/b"))), "mine")
    assert set(run.inputs) == {"raw:raw/a", "raw:raw/b"}


def test_a_missing_table_stops_before_anything_runs(tmp_path):
    with pytest.raises(LakeError, match=r"query: no such table"):
        job.begin(config(tmp_path, inputs=Inputs(query="newest")), "mine")


def test_content_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("x")
    first = job.content_hash(str(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    second = job.content_hash(str(tmp_path))
    (tmp_path / "b").write_text("y")
    assert len({first, second, job.content_hash(str(tmp_path))}) == 3


def test_setting_and_overrides_come_in_any_order():
    from jobs import simulate

    found = job.parse("simulate", simulate.Config, ["recipe.seed=3", "dev", "lake=/tmp/x"])
    assert (found.recipe.seed, found.lake, found.setting) == (3, "/tmp/x", "dev")


@pytest.mark.parametrize("words", [[], ["dev", "nightly"], ["recipe.seed=1"]])
def test_exactly_one_setting_is_needed(words):
    from jobs import simulate

    with pytest.raises(ConfigError, match=r"simulate: expected one SETTING .* settings: dev, nightly"):
        job.parse("simulate", simulate.Config, words)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), job.BAD_USAGE),
        (job.GateError("x"), job.GATE_SAID_NO),
        (LakeError("x"), job.FAILED),
        (ValueError("x"), job.FAILED),
        (PermissionError("x"), job.FAILED),
    ],
)
def test_what_goes_wrong_ends_in_a_sentence_and_a_code(error, code, capsys):
    def action():
        raise error

    assert job.guarded(action) == code
    assert capsys.readouterr().err == "assay: x\n"


def test_main_prints_the_record_as_its_last_line(tmp_path, capsys):
    from jobs import simulate

    words = ["dev", f"lake={tmp_path}/lake", "recipe.num_products=60", "recipe.num_queries=5", "recipe.num_sessions=20"]
    assert simulate.main(words) == job.DONE
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["job"], record["rows"], record["counts"]["queries"]) == ("simulate", 60, 5)
    assert (Path(tmp_path) / "lake" / record["outputs"]["raw/market"] / "catalog").is_dir()


def test_help_lists_every_setting_with_unit_and_default(capsys):
    from jobs import simulate

    assert simulate.main(["dev", "--help"]) == job.DONE
    shown = capsys.readouterr().out
    assert "recipe.num_products=2000\n      integer: products in the catalogue [rows]" in shown


def test_what_an_engine_raises_is_one_sentence_too(capsys):
    class EngineError(Exception):
        pass

    def action():
        raise EngineError("[NO_TABLE] there is no such table\n  at org.apache.Spark.run\n  at java.lang.Thread")

    assert job.guarded(action) == job.FAILED
    assert capsys.readouterr().err == "assay: [NO_TABLE] there is no such table\n"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError("Generic LocalFileSystem error\n  No space left on device")],
)
def test_a_full_disk_names_the_remedy(capsys, error):
    def action():
        raise error

    assert job.guarded(action) == job.FAILED
    assert "the disk is full" in (said := capsys.readouterr().err)
    assert "make room" in said


def test_a_missing_package_names_the_remedy(capsys):
    def action():
        raise ModuleNotFoundError("No module named 'faiss'", name="faiss")

    assert job.guarded(action) == job.FAILED
    assert "faiss is not installed; install the extra" in capsys.readouterr().err


def test_a_folder_outside_the_lake_is_not_mistaken_for_one_inside(tmp_path, monkeypatch):
    @settings
    class Outside:
        root: Annotated[str, meaning("folder")] = ""

    monkeypatch.chdir(tmp_path)
    for folder, text in (("raw", "outside"), ("lake/raw", "inside")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "f").write_text(text)
    assert job._pinned(Lake("lake"), Outside(root="raw")) == {"root": job.content_hash("raw")}


def test_what_is_hidden_in_a_folder_and_a_lake_inside_it_are_no_content(tmp_path):
    (tmp_path / "data.csv").write_text("a")
    plain = job.content_hash(str(tmp_path))
    for name in (".venv", "lake"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("b")
    (tmp_path / ".run").write_text("c")
    assert job.content_hash(str(tmp_path), without=str(tmp_path / "lake")) == plain
    assert job.content_hash(str(tmp_path)) != plain


@settings
class ModelRecipe:
    model: Annotated[str, meaning("name or folder")] = "all-MiniLM-L6-v2"


def test_a_local_model_of_the_recipe_enters_by_its_content(tmp_path):
    (tmp_path / "bert").mkdir()
    prints = []
    for weights in ("one", "two"):
        (tmp_path / "bert" / "weights").write_text(weights)
        opened = job.begin(config(tmp_path, recipe=ModelRecipe(model=str(tmp_path / "bert"))), "tune")
        prints.append(opened.fingerprint)
        assert "recipe.model" in opened.inputs
    assert prints[0] != prints[1]
    assert not job.begin(config(tmp_path, recipe=ModelRecipe()), "tune").inputs


def test_an_input_that_was_left_out_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"inputs\.query is empty; give inputs\.query=newest"):
        job.begin(config(tmp_path), "mine").inputs["query"]


def test_a_broken_pipe_inside_a_job_is_a_failure(capsys):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    assert job.guarded(broken) == job.FAILED
    assert "Broken pipe" in capsys.readouterr().err


def test_the_log_holds_our_lines_and_the_warnings_of_libraries():
    lines = (
        "import logging; from jobs import job; job.set_up_logging(logging.INFO);"
        "logging.getLogger('lake.runs').info('ours');"
        "logging.info('a retried command'); logging.getLogger('ray').info('chat');"
        "logging.getLogger('ray').warning('careful')"
    )
    told = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stderr
    assert [line.split(": ")[-1] for line in told.splitlines()] == ["ours", "careful"]
