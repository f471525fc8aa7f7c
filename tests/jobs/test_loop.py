import dataclasses

import pytest

from conf.load import ConfigError, list_settings
from jobs import loop, models
from lake.storage import Lake, LakeError


def test_the_settings_of_the_loop_are_those_promised_and_their_steps_exist(tmp_path):
    assert list_settings("loop") == ["demo", "esci", "esci_home_depot", "home_depot", "mapped"]
    for name in list_settings("loop"):
        config = loop.load_config(name, ["inputs.root=.", "inputs.mapping=m.yaml", f"lake={tmp_path}"])
        for step in loop.plan_steps(config):
            loop._step_config(config, step)


def test_both_data_sets_are_imported_from_their_folders():
    steps = loop.plan_steps(loop.load_config("esci_home_depot", ["inputs.root=/data"]))
    roots = {step.name: step.fixed["inputs"]["root"] for step in steps if step.job == "import_dataset"}
    assert roots == {"import_esci": "/data/esci", "import_home_depot": "/data/home_depot"}


def test_a_wrong_setting_of_the_last_step_stops_before_the_first(tmp_path):
    config = loop.load_config("demo", [f"lake={tmp_path}/lake", "steps.report.recipe.num_worst_querys=1"])
    with pytest.raises(ConfigError, match=r"steps\.report: unknown key .* did you mean 'recipe\.num_worst_queries'"):
        loop.run(config)
    assert not (tmp_path / "lake" / "raw").exists()


def test_seed_and_determinism_reach_both_trainings():
    config = loop.load_config("demo", ["seed=5", "deterministic=true"])
    by_name = {step.name: loop._step_config(config, step).recipe for step in loop.plan_steps(config)}
    assert (by_name["tune_labeller"].seed, by_name["tune_labeller"].deterministic) == (5, True)
    for name, stage in (("train_stage1", 1), ("train_stage2", 2)):
        train = by_name[name].train
        assert (train.seed, train.deterministic, train.stage) == (5, True, stage)


def test_stage_2_may_begin_anew_and_be_mixed_with_stage_1():
    words = ["stage2_begins=pretrained", "steps.train_stage1.recipe.text.clauses=['{title}']"]
    config = loop.load_config("demo", [*words, "steps.train_stage2.recipe.train.mixed_share=0.5"])
    step = next(step for step in loop.plan_steps(config) if step.name == "train_stage2")
    assert dict(step.takes) == {"mixed_with": "train_stage1/encoder"}
    assert loop._step_config(config, step).recipe.text.clauses == ("{title}",)
    for key in ("model", "mixed_with"):
        with pytest.raises(ConfigError, match=f"inputs.{key}: the loop sets this itself"):
            loop._step_config(dataclasses.replace(config, steps={"train_stage2": {"inputs": {key: "there"}}}), step)


def test_a_mean_of_which_stage_1_has_no_share_stops_before_the_first_step(tmp_path):
    words = ["stage2_begins=pretrained", "steps.train_stage2.recipe.train.mixed_share=0"]
    with pytest.raises(ConfigError, match=r"give steps\.train_stage2\.recipe\.train\.mixed_share"):
        loop.run(loop.load_config("demo", [f"lake={tmp_path}/lake", *words]))
    assert not (tmp_path / "lake" / "raw").exists()


def test_a_lake_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LakeError, match="cannot write there"):
        loop.run(loop.load_config("demo", [f"lake={tmp_path}/file/lake"]))


@pytest.mark.parametrize(
    "word",
    [
        "steps.sample_pairs.recipe.sources=[mined]",
        "steps.train_stage1.inputs.query=3",
        "steps.mine_hard_pairs.inputs.model=there",
        "steps.ingest.lake=elsewhere",
        "inputs.root=.",
    ],
)
def test_what_the_loop_sets_itself_is_refused_and_not_overruled(tmp_path, word):
    config = loop.load_config("demo", [f"lake={tmp_path}/lake", word])
    with pytest.raises(ConfigError, match="the loop"):
        loop.run(config)
    assert not (tmp_path / "lake" / "raw").exists()


def test_the_models_of_the_last_loop_are_found_by_their_names(tmp_path):
    lake = Lake(str(tmp_path))
    (tmp_path / "models" / "encoder" / "f").mkdir(parents=True)
    models.choose(lake, {"stage2": "models/encoder/f", "labeller": "models/labeller/gone"})
    assert models.encoder_folder(lake, "stage2") == lake.path("models/encoder/f")
    with pytest.raises(LakeError, match="holds no labeller"):
        models.labeller_folder(lake)
