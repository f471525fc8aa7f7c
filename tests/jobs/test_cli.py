import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cli, job


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], job.BAD_USAGE, ""),
        (["serch"], job.BAD_USAGE, "no command 'serch'"),
        (["run"], job.BAD_USAGE, "expected JOB SETTING"),
        (["run", "simulat", "dev"], job.BAD_USAGE, "expected JOB SETTING, got simulat"),
        (["run", "simulate", "devv"], job.BAD_USAGE, "did you mean 'dev'?"),
        (["run", "simulate", "dev", "recipe.sead=1"], job.BAD_USAGE, "did you mean 'recipe.seed'?"),
        (["loop", "demo", "--jsn"], job.BAD_USAGE, "unknown option '--jsn'"),
        (["loop", "demo", "esci"], job.BAD_USAGE, "expected one SETTING"),
        (["loop", "demo", "steps.tune.recipe.epochs=1"], job.BAD_USAGE, "steps.tune: no such step"),
        (["loop", "esci"], job.BAD_USAGE, "give inputs.root=DIR"),
        (["loop", "mapped", "inputs.root=."], job.BAD_USAGE, "give inputs.mapping=FILE.yaml"),
        (["export", "encoder"], job.BAD_USAGE, "give out=DIR"),
        (["export", "index"], job.BAD_USAGE, "expected export encoder"),
        (["label", "pairs.csv"], job.BAD_USAGE, "give out=FILE"),
        (["search"], job.BAD_USAGE, "expected a query"),
        (["runs", "x"], job.BAD_USAGE, "does not take 'x'"),
        (["explain", "q"], job.BAD_USAGE, "expected QUERY PRODUCT"),
        (["explain", "q", "p"], job.FAILED, "query: no such table"),
        (["quality"], job.BAD_USAGE, "expected one TABLE"),
        (["quality", "query", "runs=0"], job.BAD_USAGE, "expected a number of runs from 1"),
        (["quality", "query"], job.FAILED, "has measured a table 'query'; measured: none"),
        (["search", "shoes"], job.FAILED, "holds no stage2 encoder"),
        (["export", "encoder", "out=there"], job.FAILED, "holds no stage2 encoder"),
        (["export", "encoder", "model=best", "out=there"], job.BAD_USAGE, "expected one of pretrained, stage1, stage2"),
        (["run", "build_consensus", "dev"], job.FAILED, "human_annotation: no such table"),
    ],
)
def test_bad_usage_ends_in_one_sentence(words, code, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) <= 1


def test_jobs_lists_every_job_once_with_a_line(capsys):
    assert cli.main(["jobs", "--json"]) == job.DONE
    listed = json.loads(capsys.readouterr().out)
    assert [item["job"] for item in listed] == list(cli.JOBS)
    assert all(item["does"].endswith(".") and {"dev", "nightly"} <= set(item["settings"]) for item in listed)


def test_every_job_file_is_listed():
    shape = "def run(config: Config) -> RunRecord:"
    folder = Path(cli.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if shape in path.read_text(encoding="utf-8")}
    assert found - {"loop"} == set(cli.JOBS)


@pytest.mark.parametrize("command", [[name] for name in cli.COMMANDS] + [["run", "train_encoder"]])
def test_help_of_every_command_names_its_settings(command, capsys):
    assert cli.main([*command, "--help"]) == job.DONE
    assert "lake=" in capsys.readouterr().out


def test_a_query_may_look_like_an_option_or_a_setting():
    words = cli.parse(["size=9", "-40", "freezer", "lake=/x", "--json"], is_query=True)
    assert words.plain == ("size=9", "-40", "freezer")
    assert (words.value("lake"), words.wants_json) == ("/x", True)


def test_help_imports_no_engine():
    code = (
        "import sys; from jobs import cli; cli.main(['--help']); cli.main(['jobs']);"
        "print([m for m in ('torch', 'ray', 'pyspark', 'vllm', 'faiss', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_doctor_reports_every_check_and_says_no_when_one_fails(capsys, tmp_path, monkeypatch):
    free = {"bytes": 100 * 2**30}
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free["bytes"]))
    assert cli.main(["doctor", f"lake={tmp_path}/lake", "--json"]) == job.DONE
    findings = {item["check"]: item["state"] for item in json.loads(capsys.readouterr().out)}
    assert {"java", "delta jars", "lake", "disk", "memory", "cores", "ray", "pyspark"} <= set(findings)
    free["bytes"] = 2**30
    assert cli.main(["doctor", f"lake={tmp_path}/lake"]) == job.GATE_SAID_NO
    assert "disk must be mended first" in capsys.readouterr().err
    free["bytes"] = 100 * 2**30
    monkeypatch.setattr("jobs.doctor.PINNED", {"pyspark": "0.0.1"})
    assert cli.main(["doctor", f"lake={tmp_path}/lake"]) == job.GATE_SAID_NO
    assert "pyspark must be mended first" in capsys.readouterr().err


def test_values_may_hold_an_equals_sign_and_queries_may_too():
    words = cli.parse(["search", "size = 9", "lake=/a=b", "--json"])
    assert words.plain == ("search", "size = 9")
    assert words.value("lake") == "/a=b"
    assert words.wants_json
