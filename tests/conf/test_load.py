from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.load import (
    ConfigError,
    describe,
    fingerprint,
    list_settings,
    load,
    load_job,
    meaning,
    read_yaml,
    read_yaml_file,
    settings,
)


@settings
class Recipe:
    epochs: Annotated[int, meaning("passes", unit="epochs", ge=1)] = 2
    loss: Annotated[Literal["supcon", "circle"], meaning("loss")] = "supcon"
    learning_rate: Annotated[float, meaning("rate", gt=0)] = 1e-3
    sources: Annotated[tuple[str, ...], meaning("sources")] = ("sampled",)


@settings
class Config:
    lake: Annotated[str, meaning("folder")] = ".assay"
    recipe: Recipe = Recipe()


def test_overrides_win_over_values_and_values_over_defaults():
    config = load(Config, {"recipe": {"epochs": 3, "loss": "circle"}}, ["recipe.epochs=5", "lake=/x=y"])
    assert config == Config(lake="/x=y", recipe=Recipe(epochs=5, loss="circle"))


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1.0e-05", "1E-5"])
def test_a_number_in_exponent_form_is_a_number(text):
    assert load(Config, {}, [f"recipe.learning_rate={text}"]).recipe.learning_rate == 1e-5


def test_a_list_becomes_a_tuple():
    assert load(Config, {}, ["recipe.sources=[mined, sampled]"]).recipe.sources == ("mined", "sampled")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("recipe.epoch=3", "command line: unknown key 'recipe.epoch'; did you mean 'recipe.epochs'?"),
        ("epochs=3", "command line: unknown key 'epochs'; did you mean 'recipe.epochs'?"),
        ("recipe.epochs=many", "command line: recipe.epochs: input should be a valid integer, got 'many'"),
        ("recipe.epochs=0", "command line: recipe.epochs: input should be greater than or equal to 1, got 0"),
        ("recipe.loss=triplet", "command line: recipe.loss: input should be 'supcon' or 'circle', got 'triplet'"),
        ("recipe", "command line: expected key=value, got 'recipe'"),
    ],
)
def test_a_bad_override_is_one_sentence_with_place_key_and_remedy(override, sentence):
    with pytest.raises(ConfigError) as caught:
        load(Config, {}, [override])
    assert str(caught.value) == sentence


def test_an_unknown_yaml_key_names_the_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("recipe: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"own\.yaml: unknown key 'recipe\.epoch'; did you mean 'recipe\.epochs'"):
        load(Config, read_yaml_file(str(path)), source=str(path))


def test_broken_yaml_and_a_missing_file_are_one_sentence(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        read_yaml_file(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml_file(str(tmp_path / "absent.yaml"))


def test_an_unknown_setting_names_those_there_are():
    with pytest.raises(ConfigError, match=r"conf/simulate: no setting 'nightley'; did you mean 'nightly'\?"):
        read_yaml("simulate", "nightley")


def test_a_config_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        Config().lake = "x"
    with pytest.raises(TypeError):
        Config("x")


def test_describe_gives_every_leaf_with_value_unit_and_meaning():
    shown = {item.key: item for item in describe(Config, Config(recipe=Recipe(epochs=7)))}
    assert list(shown) == ["lake", "recipe.epochs", "recipe.loss", "recipe.learning_rate", "recipe.sources"]
    assert (shown["recipe.epochs"].default, shown["recipe.epochs"].unit) == ("7", "epochs")
    assert shown["recipe.loss"].type == "supcon|circle"
    assert shown["recipe.loss"].meaning == "loss"


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=5))
def test_fingerprint_does_not_depend_on_key_order(values):
    assert fingerprint(values) == fingerprint(dict(reversed(values.items())))


def test_fingerprint_changes_with_any_value_and_not_with_identity():
    assert fingerprint(Recipe()) == fingerprint(Recipe())
    assert fingerprint(Recipe()) != fingerprint(Recipe(epochs=3))
    assert len(fingerprint(Recipe())) == 16


def test_a_section_that_bears_no_identity_is_no_part_of_the_fingerprint():
    @settings
    class Gate:
        BEARS_IDENTITY: ClassVar[bool] = False
        strict: Annotated[bool, meaning("whether")] = False

    @settings
    class Gated:
        epochs: Annotated[int, meaning("passes")] = 2
        gate: Gate = Gate()

    assert fingerprint(Gated()) == fingerprint(Gated(gate=Gate(strict=True))) == fingerprint({"epochs": 2})
    assert [item.key for item in describe(Gate)] == ["strict"]


def test_every_job_has_the_settings_dev_and_nightly_and_they_load():
    import importlib

    from jobs.cli import JOBS

    for name in JOBS:
        module = importlib.import_module(f"jobs.{name}")
        assert {"dev", "nightly"} <= set(list_settings(name)), name
        for setting in list_settings(name):
            load_job(module.Config, name, setting)


def test_every_setting_of_every_job_says_what_it_means():
    import importlib

    from jobs.cli import JOBS

    for name in JOBS:
        for item in describe(importlib.import_module(f"jobs.{name}").Config):
            assert item.meaning, f"{name}: {item.key} has no meaning"


def test_a_text_is_taken_as_typed_and_never_interpolated():
    for path in ("/data/a #2", "pairs: a.csv", "${x}", "007"):
        assert load(Config, {}, [f"lake={path}"]).lake == path
    assert load(Config, {}, ["lake='007'"]).lake == load(Config, {}, ['lake="007"']).lake == "007"
