"""Runs of a few steps are judged and audited as a user does it: by the commands, with an executed notebook as the report."""

import json
import subprocess
import sys

import nbformat
import pytest
from conftest import TINY

from difflit.files import read_json
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run, read_status


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("judged") / "run"
    run = open_run({**TINY, "steps": 4, "checkpoint_every_steps": 2, "score_images": 0, "limit": 64, "run_dir": str(path)})
    train_job(prepare(run), show=False)
    finish(run)
    return path


def command(*words):
    return subprocess.run([sys.executable, "-m", "difflit.cli", *map(str, words)], capture_output=True, text=True, timeout=300)


def outputs(report):
    return json.dumps([o for c in nbformat.read(report, 4).cells for o in c.get("outputs", [])])


def test_evaluate_notebook_is_a_scorecard(trained, tmp_path):
    given = {"run_dir": tmp_path / "card", "prompt_images": 24, "reference_images": 48, "sampler_steps": 2, "part": 16}
    done = command("evaluate", trained, f"{trained}/checkpoints/*", *(word for name, value in given.items() for word in ("-p", f"{name}={value}")))
    assert done.returncode == 0, done.stderr
    scores = read_json(tmp_path / "card" / "scores.json")
    assert {"run/fd.random", "run/alignment", "run/step-00000004/fd.random"} <= set(scores)
    assert all(set(score) == {"value", "low", "high", "n", "protocol"} for score in scores.values())
    assert scores["run/alignment"]["value"] == scores["run/step-00000004/alignment"]["value"]  # a run is its last checkpoint
    assert read_status(tmp_path / "card")["state"] == "done" and not (tmp_path / "card" / "parts").exists()
    shown = outputs(tmp_path / "card" / "report.ipynb")
    assert "fd.random" in shown and shown.count("image/png") >= 3
    assert not [p for p in (tmp_path / "card").rglob("*") if p.suffix in (".png", ".jpg") and p.name != "grid.png"]  # no temporary pictures


def test_audit_notebook_gives_a_verdict(trained, tmp_path):
    words = [trained, "-p", f"run_dir={tmp_path / 'audit'}", "-p", "images=16", "-p", "held_out_images=16", "-p", "sampler_steps=2", "-p", "descriptor=random"]
    done = command("audit", *words)
    assert done.returncode == 0, done.stderr
    scores = read_json(tmp_path / "audit" / "scores.json")
    assert scores["ratio"]["value"] == 0 and scores["ratio"]["n"] == 16 and "copy_detection.held_out" in scores
    assert "No test finds more copies" in outputs(tmp_path / "audit" / "report.ipynb")
    assert read_status(tmp_path / "audit")["kind"] == "audit" and not (tmp_path / "audit" / "parts").exists()


def test_runs_are_compared(trained, tmp_path):
    done = command("runs", "compare", trained, trained, "--out", tmp_path / "both.png", "--count", "3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, says", [
    (["evaluate"], "no model was named"),
    (["evaluate", "base", "-p", "prompts=genral", "-p", "reference_images=0"], "did you mean 'general'?"),
    (["evaluate", "nowhere/run"], "no run says what was trained on"),
    (["audit", "nowhere/run", "-p", "data=digits"], "holds no model"),
    (["audit", "x", "-p", "image=3"], "'image' is not a setting of AuditSettings"),
])
def test_what_cannot_be_judged_is_said_in_a_line(words, says, tmp_path):
    done = command(*words, "-p", f"run_dir={tmp_path / 'run'}") if "image=3" not in words else command(*words)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
