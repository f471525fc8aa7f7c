"""The built wheel in an empty environment, and a job submitted to a Ray head."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.cli import JOBS
from lake import runs, tables
from lake.schemas import PAIR_GRADE, RUN_RECORD
from lake.storage import Lake

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "lake", "embeddings", "spark_etl", "ray_apps", "jobs")


def run(command, **more):
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def entry_points():
    """Name -> target of every command that the wheel brings, of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def test_every_job_is_a_command_of_the_wheel():
    jobs = {f"assay-{name.replace('_', '-')}": f"jobs.{name}:main" for name in JOBS}
    assert entry_points() == {"assay": "jobs.cli:main"} | jobs


def test_no_package_is_ignored_by_git_since_ray_s_upload_honours_that():
    files = [str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    asked = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stdout) == (1, "")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """About 2 minutes, most of them installation; needs a package index."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    run([sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(tmp_path), str(ROOT)])
    (wheel,) = tmp_path.glob("*.whl")
    run([uv, "venv", str(tmp_path / "venv"), "--python", sys.executable])
    python, assay = tmp_path / "venv" / "bin" / "python", str(tmp_path / "venv" / "bin" / "assay")
    constraints = ["--constraints", str(ROOT / "constraints.txt")]
    run([uv, "pip", "install", "--python", str(python), *constraints, f"assay[spark] @ file://{wheel}"])
    lake = f"lake={tmp_path}/lake"
    assert "assay jobs" in run([assay, "--help"], cwd="/")
    assert "build_consensus" in run([assay, "jobs"], cwd="/")
    for name in entry_points():
        assert "lake=" in run([str(tmp_path / "venv" / "bin" / name), "--help"], cwd="/")
    small = ["recipe.num_products=100", "recipe.num_queries=20", "recipe.num_sessions=50"]
    run([assay, "run", "simulate", "dev", lake, *small], cwd="/")
    record = json.loads(run([assay, "run", "ingest", "dev", lake], cwd="/").splitlines()[-1])
    assert record["counts"]["catalog_product"] == 100


@pytest.fixture
def ray_head(tmp_path):
    """Environment in which commands talk to a Ray head of two CPUs."""
    ray = str(Path(sys.executable).parent / "ray")
    with ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        gcs, dashboard, agent = (probe.getsockname()[1] for probe in probes)
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    # a job is a command of the head's shell, whose `python` is the first on its path
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [ray, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    # the tests' own cluster holds the usual port of an agent, and a head without one takes no job
    command += [f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1"]
    # Ray's sockets lie below: their paths may have 107 bytes, tmp_path alone has most of them
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        told = tmp_path / "head.log"
        with told.open("wb") as stream:
            head = subprocess.Popen(
                [*command, f"--temp-dir={place}"],
                env=environment,
                start_new_session=True,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_for(ray, environment, head, told)
            yield environment
        finally:
            if head.poll() is None:
                os.killpg(head.pid, signal.SIGTERM)
            head.wait(timeout=60)


def _wait_for(ray, environment, head, log):
    """The dashboard listens before the agent does, so a job that ends says when the head is ready."""
    for _ in range(20):
        asked = subprocess.run([ray, "job", "submit", "--", "true"], env=environment, capture_output=True, check=False)
        if asked.returncode == 0:
            return
        if head.poll() is not None:
            break
        time.sleep(1)
    pytest.fail(f"the Ray head takes no job: {log.read_text()[-2000:]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_label_pairs_can_be_submitted_to_a_ray_head(finished, ray_head, tmp_path):
    """About 3 minutes besides the loop: the labeller's pairs graded again, from an empty ledger."""
    whole, copy = finished[0], Lake(str(tmp_path / "lake"))
    ignored = shutil.ignore_patterns(PAIR_GRADE.name, RUN_RECORD.name, "runs", "vectors")
    shutil.copytree(whole.path(), copy.path(), ignore=ignored)
    labeller = runs.newest(whole, "tune_labeller").outputs["labeller"]
    job = ["python", "-m", "jobs.label_pairs", "dev", f"lake={copy.path()}", f"inputs.labeller={labeller}"]
    ray = str(Path(sys.executable).parent / "ray")
    submitted = run([ray, "job", "submit", "--working-dir", ".", "--", *job], env=ray_head, cwd=ROOT)
    assert "succeeded" in submitted
    first, second = (
        {row["address"]: row for row in tables.rows(lake, PAIR_GRADE).to_pylist()} for lake in (whole, copy)
    )
    assert first.keys() == second.keys()
    for address, row in first.items():
        assert [second[address][name] for name in ("p0", "p1", "p2")] == pytest.approx(
            [row[name] for name in ("p0", "p1", "p2")], abs=1e-3
        )
