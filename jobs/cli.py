"""The command `assay`: words and key=value in any order; see `assay --help`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 a quality gate said no.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.load import ConfigError, list_settings
from jobs import job
from lake import runs
from lake.storage import Lake, LakeError

USAGE = """assay: graded relevance for product search

  assay jobs                                      the jobs, one line each
  assay run JOB SETTING [key=value ...]           one job; every job has the settings dev and nightly
  assay loop SETTING [key=value ...]              the whole loop: demo | esci | home_depot | esci_home_depot | mapped
  assay loop mapped inputs.root=DIR inputs.mapping=FILE.yaml
  assay runs                                      run records: what ran, on which versions, rows, seconds
  assay export encoder out=DIR [model=stage2|stage1|pretrained]
  assay export labeller out=DIR
  assay label FILE out=FILE                       grades pairs of a CSV, JSONL or Parquet file
  assay search QUERY                              top products of the final model with score and grade band
  assay plan JOB SETTING [key=value ...]          what a run would read, whether it is current, what grading costs
  assay explain QUERY PRODUCT                     everything the lake knows of a pair
  assay quality TABLE [runs=6]                    what runs measured of a table before they published it, or did not
  assay doctor                                    checks Java, jars, versions, disk and memory

Every command takes lake=DIR (default .assay/demo), --json and --help, mixed with its words.
Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 a quality gate said no."""

EXPORT_SETTINGS = """  out=required
      string: folder to write
  model="stage2"
      stage2|stage1|pretrained or a folder: the encoder exported; not for the labeller
"""

OPTIONS = ("--json", "--help", "-h")
SPARK_JOBS = (
    "ingest",
    "ingest_events",
    "build_consensus",
    "measure_annotators",
    "build_engagement",
    "build_audit",
    "build_review",
    "sample_pairs",
    "build_instances",
)
RAY_JOBS = (
    "tune_labeller",
    "evaluate_labeller",
    "label_pairs",
    "label_catalog",
    "review_conflicts",
    "train_encoder",
    "embed_catalog",
    "mine_hard_pairs",
    "evaluate_retrieval",
    "compare_recipes",
)
PLAIN_JOBS = (
    "simulate",
    "import_dataset",
    "export_review",
    "import_verdicts",
    "audit_report",
    "record_human_grades",
    "vote_grades",
    "correct_class_rates",
    "report",
    "search",
    "label_file",
)
JOBS = (*SPARK_JOBS, *RAY_JOBS, *PLAIN_JOBS)


@dataclasses.dataclass(frozen=True)
class Words:
    """A command line taken apart: plain words, key=value words and flags."""

    plain: tuple[str, ...]
    pairs: tuple[str, ...]
    wants_json: bool
    wants_help: bool

    def value(self, key: str, default: str = "") -> str:
        """The last value given for a key."""
        return next((pair.partition("=")[2] for pair in reversed(self.pairs) if pair.startswith(f"{key}=")), default)

    def without(self, *keys: str) -> list[str]:
        """The key=value words but those of the given keys."""
        return [pair for pair in self.pairs if pair.partition("=")[0] not in keys]

    @property
    def lake(self) -> Lake:
        """The lake the command is about."""
        return Lake(self.value("lake", job.DEFAULT_LAKE))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        shown = job.guarded(lambda: print(USAGE, flush=True))
        return shown if arguments else job.BAD_USAGE
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"assay: no command {arguments[0]!r}; see assay --help", file=sys.stderr)
        return job.BAD_USAGE
    quiet = arguments[0] in ("search", "label", "explain", "quality", "doctor", "runs", "jobs")
    job.set_up_logging(logging.WARNING if quiet else logging.INFO)
    return job.guarded(lambda: _run(command, parse(arguments[1:], is_query=arguments[0] == "search")))


def _run(command: Callable[[Words], None], words: Words) -> None:
    """Runs a command, or shows what it takes: its own help where it has settings, else its lines of the usage."""
    has_own = command in (run_loop, search, label) or (
        command in (run_job, plan) and words.plain[:1] and words.plain[0] in JOBS
    )
    if words.wants_help and not has_own:
        name = next(name for name, known in COMMANDS.items() if known is command)
        usage = [line for line in USAGE.splitlines() if line.startswith(f"  assay {name}")]
        print("\n".join([command.__doc__ or "", "", *usage]))
        own = EXPORT_SETTINGS if command is export else ""
        print(f'\n  lake=".assay/demo"\n      string: folder of the lake\n{own}  --json\n      prints for machines')
        return
    command(words)


def parse(arguments: Sequence[str], *, is_query: bool = False) -> Words:
    """Takes a command line apart; in a query only the options and settings that exist are taken for such.

    Raises:
        ConfigError: an option that does not exist.
    """
    flags = [word for word in arguments if word.startswith("-") and "=" not in word]
    unknown = [word for word in flags if word not in OPTIONS]
    if is_query:
        flags = [word for word in flags if word in OPTIONS]
    elif unknown:
        raise ConfigError(f"command line: unknown option {unknown[0]!r}; options are key=value, --json and --help")
    words = [word for word in arguments if word not in flags]
    return Words(
        plain=tuple(word for word in words if not _is_pair(word, is_query)),
        pairs=tuple(word for word in words if _is_pair(word, is_query)),
        wants_json="--json" in flags,
        wants_help=bool({"--help", "-h"} & set(flags)),
    )


def _is_pair(word: str, is_query: bool) -> bool:
    key = word.partition("=")[0]
    if is_query:
        return "=" in word and (key == "lake" or key.startswith(("inputs.", "recipe.", "placement.")))
    return "=" in word and key.replace("_", "").replace(".", "").isalnum()


def show_jobs(words: Words) -> None:
    """The jobs in their groups, with the first line of what each does."""
    groups = {"Spark": SPARK_JOBS, "Ray": RAY_JOBS, "one process": PLAIN_JOBS}
    lines = {name: (importlib.import_module(f"jobs.{name}").__doc__ or "").splitlines()[0] for name in JOBS}
    if words.wants_json:
        listed = [
            {"job": name, "group": group, "does": lines[name], "settings": list_settings(name)}
            for group, names in groups.items()
            for name in names
        ]
        print(json.dumps(listed))
        return
    for group, names in groups.items():
        print(group)
        for name in names:
            print(f"  {name:<20} {lines[name]}")


def run_job(words: Words) -> None:
    """One job under a setting."""
    if not words.plain or words.plain[0] not in JOBS:
        named = words.plain[0] if words.plain else "none"
        raise ConfigError(f"run: expected JOB SETTING, got {named}; jobs: {', '.join(JOBS)}")
    name, module = words.plain[0], importlib.import_module(f"jobs.{words.plain[0]}")
    if words.wants_help:
        print(job.help_text(name, module.Config, words.plain[1] if len(words.plain) > 1 else "dev"))
        return
    print(module.run(job.parse(name, module.Config, [*words.plain[1:], *words.pairs])).to_json(), flush=True)


def run_loop(words: Words) -> None:
    """The whole loop; ends with the table and the report's path."""
    from jobs import loop

    if words.wants_help:
        setting = words.plain[0] if words.plain else "demo"
        print(
            f"loop SETTING [key=value ...]\nsettings: {', '.join(list_settings('loop'))} (defaults below: {setting})\n"
        )
        print("\n".join(job.settings_lines(loop.Config, loop.load_config(setting, []))))
        print(f"\nsteps: simulate or import_<kind>, {', '.join(step.name for step in loop.AFTER_IMPORT)}")
        print("A step's own settings: assay run JOB --help; give them as steps.STEP.recipe.KEY=value")
        return
    if len(words.plain) != 1:
        known = ", ".join(list_settings("loop"))
        raise ConfigError(f"loop: expected one SETTING, got {' '.join(words.plain) or 'none'}; settings: {known}")
    config = loop.load_config(words.plain[0], words.pairs)
    results = loop.run(config)
    if words.wants_json:
        print(loop.to_json(Lake(config.lake), results), flush=True)
    else:
        _print_summary(loop.summary(Lake(config.lake), results))


def show_runs(words: Words) -> None:
    """The run records, oldest first."""
    _refuse_extra(words, "runs", 0, ("lake",))
    if not os.path.isdir(words.lake.root):
        raise LakeError(f"lake={words.lake.root}: no such folder; run a job there first, or name another lake=DIR")
    found = runs.records(words.lake)
    if words.wants_json:
        print(json.dumps([json.loads(record.to_json()) for record in found]))
        return
    table = Table("run", "job", "setting", "inputs", "outputs", "rows", "seconds", "fingerprint", box=None)
    for record in found:
        table.add_row(
            record.run_id,
            record.job,
            record.setting,
            _versions(record.inputs),
            _versions(record.outputs),
            f"{record.rows:,}",
            f"{record.seconds:.1f}",
            record.fingerprint,
        )
    _console(200).print(table)


def export(words: Words) -> None:
    """An encoder or the labeller as a folder that other tools read."""
    from embeddings import export as encoder_export
    from embeddings import labeller
    from jobs import models

    if len(words.plain) != 1 or words.plain[0] not in ("encoder", "labeller"):
        usage = "export encoder out=DIR [model=stage2|stage1|pretrained] | export labeller out=DIR"
        raise ConfigError(f"export: expected {usage}")
    _refuse_extra(words, "export", 1, ("lake", "out", "model") if words.plain[0] == "encoder" else ("lake", "out"))
    out = words.value("out")
    if not out:
        raise ConfigError("export: out is missing; give out=DIR")
    if words.plain[0] == "encoder":
        encoder_export.export_encoder(models.encoder_folder(words.lake, words.value("model", "stage2")), out)
    else:
        labeller.export_labeller(models.labeller_folder(words.lake), out)
    print(json.dumps({"out": out}) if words.wants_json else f"wrote {out}")


def label(words: Words) -> None:
    """Grades the pairs of a file with the trained labeller."""
    from jobs import label_file

    if words.wants_help:
        print(
            job.help_text("label_file", label_file.Config, "dev").replace(
                "label_file SETTING", "label FILE out=FILE", 1
            )
        )
        return
    if len(words.plain) != 1:
        raise ConfigError(f"label: expected one FILE, got {' '.join(words.plain) or 'none'}; assay label FILE out=FILE")
    if not words.value("out"):
        raise ConfigError("label: out is missing; give out=FILE")
    pairs = [f"inputs.file={words.plain[0]}", *words.pairs]
    record = label_file.run(job.parse("label_file", label_file.Config, ["dev", *pairs]))
    print(record.to_json() if words.wants_json else f"{record.rows:,} rows graded, written to {words.value('out')}")


def search(words: Words) -> None:
    """The top products of the final model for one query."""
    from jobs import search as search_job

    if words.wants_help:
        print(job.help_text("search", search_job.Config, "dev").replace("search SETTING", "search QUERY", 1))
        return
    if not words.plain:
        raise ConfigError('search: expected a query, got none; assay search "red running shoes"')
    config = job.parse("search", search_job.Config, ["dev", *words.pairs])
    found = search_job.search(dataclasses.replace(config, query=" ".join(words.plain)))
    if words.wants_json:
        print(json.dumps(found))
        return
    table = Table("#", "score", "grade", "product", "title", "brand", box=None)
    for place, hit in enumerate(found, start=1):
        brand = hit["brand"] or ""
        # Text, since a title with [brackets] would be read as markup
        texts = [Text(part) for part in (hit["product_id"], hit["title"], brand)]
        table.add_row(str(place), f"{hit['score']:.3f}", str(hit["grade"]), *texts)
    _console(160).print(table)


def plan(words: Words) -> None:
    """What a job would read, at which versions, whether that work is done already, and what grading would cost."""
    if words.wants_help:
        module = importlib.import_module(f"jobs.{words.plain[0]}")
        setting = words.plain[1] if len(words.plain) > 1 else "dev"
        print(f"plan {job.help_text(words.plain[0], module.Config, setting)}")
        return
    if len(words.plain) != 2 or words.plain[0] not in JOBS:
        raise ConfigError(f"plan: expected JOB SETTING; jobs: {', '.join(JOBS)}")
    name, module = words.plain[0], importlib.import_module(f"jobs.{words.plain[0]}")
    config = job.parse(name, module.Config, [words.plain[1], *words.pairs])
    if hasattr(module, "with_models"):
        config = module.with_models(config)
    opened = job.pin(config, name)
    done = runs.current(opened.lake, name, opened.fingerprint)
    planned = module.plan(config) if hasattr(module, "plan") else None
    facts = {
        "job": name,
        "inputs": opened.inputs,
        "fingerprint": opened.fingerprint,
        "current_run": done.run_id if done else None,
    }
    if words.wants_json:
        print(json.dumps(facts | ({"plan": dataclasses.asdict(planned)} if planned else {})))
        return
    print(f"{name} would read {_versions(opened.inputs) or 'nothing'}; fingerprint {opened.fingerprint}")
    print(f"done already by run {done.run_id}" if done else "not done yet")
    if planned:
        print(planned.render())


def explain(words: Words) -> None:
    """Marks, consensus, behaviour, verdicts and ledger rows of one pair."""
    from jobs import explain as explain_job

    if len(words.plain) != 2:
        raise ConfigError("explain: expected QUERY PRODUCT, each an id or its text")
    _refuse_extra(words, "explain", 2, ("lake",))
    facts = explain_job.explain(words.lake, *words.plain)
    print(json.dumps(facts, default=str) if words.wants_json else explain_job.render(facts))


def quality(words: Words) -> None:
    """What the newest runs measured of a table, and what was not as expected."""
    from jobs import quality as gate

    if len(words.plain) != 1:
        raise ConfigError(f"quality: expected one TABLE, got {' '.join(words.plain) or 'none'}")
    _refuse_extra(words, "quality", 1, ("lake", "runs"))
    num_runs = words.value("runs", "6")
    if not num_runs.isdigit() or not int(num_runs):
        raise ConfigError(f"quality: runs={num_runs!r}: expected a number of runs from 1")
    found = gate.history(words.lake, words.plain[0], int(num_runs))
    if words.wants_json:
        print(json.dumps([row | {"created_at": row["created_at"].isoformat()} for row in found]))
        return
    for sheet in gate.sheets(found):
        _console(200).print(sheet)


def doctor(words: Words) -> None:
    """Checks the machine.

    Raises:
        GateError: something that the jobs need is missing.
    """
    from jobs import doctor as doctor_job

    _refuse_extra(words, "doctor", 0, ("lake",))
    findings = doctor_job.examine(words.value("lake", job.DEFAULT_LAKE))
    if words.wants_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.check:<14} {finding.detail}")
    broken = [finding.check for finding in findings if finding.state == "error"]
    if broken:
        raise job.GateError(f"doctor: {', '.join(broken)} must be mended first")


COMMANDS: dict[str, Callable[[Words], None]] = {
    "jobs": show_jobs,
    "run": run_job,
    "loop": run_loop,
    "runs": show_runs,
    "export": export,
    "label": label,
    "search": search,
    "plan": plan,
    "explain": explain,
    "quality": quality,
    "doctor": doctor,
}

METRIC_COLUMNS = (
    ("NDCG@10", "ndcg@10"),
    ("Recall@100", "recall@100"),
    ("AUC(2 vs 1)", "auc_2v1"),
    ("AUC(1 vs 0)", "auc_1v0"),
    ("AUC(2 vs 0)", "auc_2v0"),
)


def _print_summary(found: dict[str, Any]) -> None:
    console = _console(150)
    steps = Table("step", "rows", "seconds", "", title="steps", box=None)
    for row in found["steps"]:
        steps.add_row(row["step"], f"{row['rows']:,}", f"{row['seconds']:.1f}", "current" if row["current"] else "")
    console.print(steps)
    table = Table(
        "data set", "model", *(title for title, _ in METRIC_COLUMNS), title="\nretrieval, test queries", box=None
    )
    for row in found["evaluation"]:
        table.add_row(row["dataset"], row["model"], *(_cell(row, key) for _, key in METRIC_COLUMNS))
    console.print(table)
    console.print("in brackets: 95 % interval of the paired difference to pretrained, bootstrap over queries")
    labeller = Table("labeller, test queries", "accuracy", "within-1", "quadratic kappa", title="", box=None)
    for title, prefix in (("fine-tuned", ""), ("majority class", "majority_"), ("pretrained cosine", "cosine_")):
        keys = ("accuracy", "within_1", "quadratic_weighted_kappa")
        values = [found["labeller"].get(prefix + key) for key in keys]
        labeller.add_row(title, *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(labeller)
    print(f"\nreport: {os.path.relpath(found['report'])}")


def _console(width: int) -> Console:
    """Standard output; a fixed width where it is no terminal, so that no table is cut to 80 columns."""
    return Console(width=None if sys.stdout.isatty() else width)


def _cell(row: dict[str, Any], key: str) -> str:
    value = row["metrics"].get(key)
    if value is None:
        return "-"
    low, high = row["gain_low"].get(key), row["gain_high"].get(key)
    return f"{value:.4f}" if low is None else f"{value:.4f} [{low:+.3f} {high:+.3f}]"


def _versions(named: Any) -> str:
    return " ".join(f"{name}@{value}" if value.isdigit() else name for name, value in named.items())


def _refuse_extra(words: Words, command: str, num_words: int, keys: tuple[str, ...]) -> None:
    extra = [*words.plain[num_words:], *words.without(*keys)]
    if extra:
        raise ConfigError(f"{command}: does not take {extra[0]!r}; it takes {', '.join(f'{key}=' for key in keys)}")


if __name__ == "__main__":
    sys.exit(main())
