"""The whole loop in order on one machine or cluster, skipping what the run records show to be current.

Every step gets its inputs pinned to what the steps before it put out, so a second run of the same loop finds
every step current and a changed recipe repeats exactly what depends on it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from conf.load import ConfigError, load, meaning, read_yaml, settings
from jobs import import_dataset, job, models
from jobs.progress import Progress, open_progress
from lake import runs, tables
from lake.runs import RunRecord
from lake.schemas import TABLES
from lake.storage import Lake


@settings
class Inputs:
    """Judged data to run on; a demo simulates its own."""

    root: Annotated[str, meaning("folder with the judged data")] = ""
    mapping: Annotated[str, meaning("YAML file that describes it, for the setting mapped")] = ""


@settings
class Config:
    """Settings of a loop."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "demo"
    seed: Annotated[int, meaning("seed of labeller and encoder training", ge=0)] = 0
    deterministic: Annotated[
        bool, meaning("train in fp32 with fixed threads, so that a resumed training is bit-equal to an unbroken one")
    ] = False
    inputs: Inputs = Inputs()
    stage2_begins: Annotated[
        Literal["stage1", "pretrained"],
        meaning(
            "weights that stage 2 begins with; pretrained: what is published is the mean of it and stage 1, with "
            "steps.train_stage2.recipe.train.mixed_share of stage 1"
        ),
    ] = "stage1"
    imports: Annotated[
        dict[str, str], meaning("data sets to import: kind -> folder below inputs.root; none: simulate one")
    ] = dataclasses.field(default_factory=dict)
    steps: Annotated[dict[str, dict[str, Any]], meaning("settings of single steps, as steps.STEP.recipe.KEY=value")] = (
        dataclasses.field(default_factory=dict)
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its job and which artifacts of earlier steps it takes, besides tables, which are taken by name."""

    name: str
    job: str
    takes: tuple[tuple[str, str], ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


AFTER_IMPORT = (
    Step("ingest", "ingest"),
    Step("ingest_events", "ingest_events"),
    Step("build_consensus", "build_consensus"),
    Step("measure_annotators", "measure_annotators"),
    Step("build_engagement", "build_engagement"),
    Step("build_audit", "build_audit"),
    Step("tune_labeller", "tune_labeller"),
    Step("sample_pairs", "sample_pairs", fixed={"recipe": {"sources": ["annotated", "sampled", "engagement"]}}),
    Step(
        "label_sampled",
        "label_pairs",
        takes=(("labeller", "labeller"),),
        fixed={"recipe": {"sources": ["annotated", "sampled", "engagement"]}},
    ),
    Step("build_stage1", "build_instances", takes=(("labeller", "labeller"),), fixed={"recipe": {"stage": 1}}),
    Step("train_stage1", "train_encoder", fixed={"recipe": {"train": {"stage": 1}}}),
    Step("mine_hard_pairs", "mine_hard_pairs", takes=(("model", "encoder"),)),
    Step("sample_mined", "sample_pairs", fixed={"recipe": {"sources": ["mined"]}}),
    Step("label_mined", "label_pairs", takes=(("labeller", "labeller"),), fixed={"recipe": {"sources": ["mined"]}}),
    Step("build_stage2", "build_instances", takes=(("labeller", "labeller"),), fixed={"recipe": {"stage": 2}}),
    Step(
        "train_stage2",
        "train_encoder",
        takes=(("model", "encoder"),),
        fixed={"recipe": {"train": {"stage": 2}}},
    ),
    Step(
        "evaluate_retrieval",
        "evaluate_retrieval",
        takes=(
            ("pretrained", "train_stage1/pretrained"),
            ("stage1", "train_stage1/encoder"),
            ("stage2", "train_stage2/encoder"),
        ),
    ),
    Step("report", "report", takes=(("labeller", "labeller"),)),
)
CHOSEN = {
    "pretrained": "train_stage1/pretrained",
    "stage1": "train_stage1/encoder",
    "stage2": "train_stage2/encoder",
    "labeller": "labeller",
}
"""What search, export and label take: the models this loop ended with, whatever else was trained in the lake."""
OPTIONAL_TABLES = ("audit_verdict",)
"""Written by people, not by a step of the loop; read where they exist."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """How a step ended: its record, and whether that was there already."""

    step: str
    record: RunRecord
    was_current: bool


def run(config: Config, progress: Progress | None = None) -> list[StepResult]:
    """Runs every step that is not current.

    Raises:
        ConfigError: a setting of any step is wrong; all are checked before the first step starts.
        LakeError: the lake cannot be written, or a step cannot read what it needs.
    """
    lake = Lake(config.lake)
    lake.check_writable()
    steps = plan_steps(config)
    configs = {step.name: _step_config(config, step) for step in steps}
    _check_imports(config)
    results: list[StepResult] = []
    produced: dict[str, str] = {}
    shown = progress or open_progress()
    with shown:
        for number, step in enumerate(steps, start=1):
            pinned = _pin(lake, step, configs[step.name], produced)
            result = _run_step(lake, step, pinned, shown, f"{number}/{len(steps)}")
            results.append(result)
            _note_outputs(step, result.record, produced)
    models.choose(lake, {name: produced[artifact] for name, artifact in CHOSEN.items()})
    return results


def plan_steps(config: Config) -> tuple[Step, ...]:
    """The steps of a loop in order.

    Raises:
        ConfigError: settings are given for a step that this loop does not have.
    """
    imports = tuple(
        Step(
            f"import_{kind}",
            "import_dataset",
            fixed={
                "inputs": {"root": os.path.join(config.inputs.root, folder) if config.inputs.root else ""}
                | ({"mapping": config.inputs.mapping} if kind == "mapped" else {}),
                "recipe": {"kind": kind},
            },
        )
        for kind, folder in config.imports.items()
    )
    steps = (*(imports or (Step("simulate", "simulate"),)), *AFTER_IMPORT)
    if config.stage2_begins == "pretrained":
        mixed = (("mixed_with", "train_stage1/encoder"),)
        steps = tuple(dataclasses.replace(step, takes=mixed) if step.name == "train_stage2" else step for step in steps)
    unknown = sorted(set(config.steps) - {step.name for step in steps})
    if unknown:
        raise ConfigError(f"steps.{unknown[0]}: no such step; steps: {', '.join(step.name for step in steps)}")
    return steps


def _check_imports(config: Config) -> None:
    """Refuses a folder or a mapping that is not there or not one, before any step starts."""
    if not config.imports and (config.inputs.root or config.inputs.mapping):
        raise ConfigError(f"inputs: the loop {config.setting} simulates its data; choose a setting that imports some")
    for kind, folder in config.imports.items():
        path = os.path.join(config.inputs.root, folder)
        if not config.inputs.root or not os.path.isdir(path):
            raise ConfigError(
                f"inputs.root={config.inputs.root!r}: no folder {path!r}; give inputs.root=DIR with the data"
            )
        if kind == "mapped":
            import_dataset.read_mapping(config.inputs.mapping)


def _step_config(config: Config, step: Step) -> Any:
    module = importlib.import_module(f"jobs.{step.job}")
    training = {"seed": config.seed, "deterministic": config.deterministic}
    shared = {"tune_labeller": training, "train_encoder": {"train": training}}.get(step.job, {})
    own = config.steps.get(step.name, {})
    _check_own(step, own)
    is_mixed = any(name == "mixed_with" for name, _ in step.takes)
    if is_mixed:
        # the two that are mixed must be built alike
        first = config.steps.get("train_stage1", {}).get("recipe", {})
        own = _merge({"recipe": {name: first[name] for name in ("encoder", "text") if name in first}}, own)
    given = _merge({"recipe": shared} if shared else {}, own)
    values = _merge(read_yaml(step.job, "dev"), _merge(given, step.fixed))
    values |= {"lake": config.lake, "setting": config.setting}
    found = load(module.Config, values, source=f"loop {config.setting}: steps.{step.name}")
    if is_mixed and not found.recipe.train.mixed_share:
        raise ConfigError(
            "stage2_begins=pretrained: nothing of stage 1 would be in what is published; give "
            f"steps.{step.name}.recipe.train.mixed_share"
        )
    return found


def _check_own(step: Step, own: Mapping[str, Any]) -> None:
    """Refuses settings of a step that the loop sets itself.

    Raises:
        ConfigError: naming the first.
    """
    begins = ("model", "mixed_with") if step.job == "train_encoder" else ()
    pinned = {"inputs": dict.fromkeys([*TABLES, "raw", "logs", *begins, *(name for name, _ in step.takes)])}
    taken = _first_shared(own, {"lake": None, "setting": None} | _merge(pinned, step.fixed))
    if taken:
        raise ConfigError(f"steps.{step.name}.{taken}: the loop sets this itself; leave it out")


def _first_shared(own: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """The first leaf that both have, as a dotted key; empty where there is none."""
    for key, value in own.items():
        if key in held:
            both = isinstance(value, Mapping) and isinstance(held[key], Mapping)
            below = _first_shared(value, held[key]) if both else ""
            if not both or below:
                return f"{key}.{below}" if below else key
    return ""


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        held = merged.get(key)
        merged[key] = _merge(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged


def _pin(lake: Lake, step: Step, config: Any, produced: Mapping[str, str]) -> Any:
    """The step's config with every input set to what earlier steps put out."""
    names = {field.name for field in dataclasses.fields(config.inputs)}
    pins: dict[str, Any] = {name: produced[name] for name in names & set(TABLES) if name in produced}
    pins |= {
        name: str(runs.pinned_version(lake, name, "newest"))
        for name in names.intersection(OPTIONAL_TABLES)
        if tables.exists(lake, TABLES[name])
    }
    pins |= {name: produced[artifact] for name, artifact in step.takes}
    for name in names & {"raw", "logs"}:
        pins[name] = tuple(path for artifact, path in produced.items() if artifact.startswith("raw/"))
    return dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, **pins))


def _run_step(lake: Lake, step: Step, config: Any, shown: Progress, place: str) -> StepResult:
    fingerprint = job.begin(config, step.job).fingerprint
    record = runs.current(lake, step.job, fingerprint)
    if record is not None:
        shown.skipped(f"{place} {step.name}", record)
        return StepResult(step.name, record, was_current=True)
    shown.started(f"{place} {step.name}", lake.path("runs", fingerprint))
    module = importlib.import_module(f"jobs.{step.job}")
    record = module.run(config)
    shown.ended(f"{place} {step.name}", record)
    return StepResult(step.name, record, was_current=False)


def _note_outputs(step: Step, record: RunRecord, produced: dict[str, str]) -> None:
    for name, value in record.outputs.items():
        produced[name] = value
        produced[f"{step.name}/{name}"] = value


def summary(lake: Lake, results: Sequence[StepResult]) -> dict[str, Any]:
    """What a loop found, for the closing table and for machines; the fields are stable.

    Returns:
        steps: step, job, rows, seconds, current, run_id. evaluation: one row per model and data set, as in the
        table. labeller: metrics of tune_labeller. report: path of the HTML report.
    """
    by_step = {result.step: result.record for result in results}
    evaluation = tables.rows(
        lake, TABLES["evaluation"], where=[("run_id", "=", by_step["evaluate_retrieval"].run_id)]
    ).to_pylist()
    for row in evaluation:
        row["created_at"] = row["created_at"].isoformat()
        for name in ("metrics", "gain_over_pretrained", "gain_low", "gain_high"):
            row[name] = dict(row[name])
    return {
        "steps": [
            {
                "step": result.step,
                "job": result.record.job,
                "rows": result.record.rows,
                "seconds": result.record.seconds,
                "current": result.was_current,
                "run_id": result.record.run_id,
            }
            for result in results
        ],
        "evaluation": evaluation,
        "labeller": dict(by_step["tune_labeller"].metrics),
        "report": lake.path(by_step["report"].outputs["report"]),
    }


def load_config(setting: str, overrides: Sequence[str]) -> Config:
    """The config of a loop's setting with overrides."""
    return load(
        Config,
        read_yaml("loop", setting),
        [f"setting={setting}", *overrides],
        source=f"conf/loop/{setting}.yaml",
    )


def to_json(lake: Lake, results: Sequence[StepResult]) -> str:
    """The summary as one line."""
    return json.dumps(summary(lake, results), sort_keys=True)
