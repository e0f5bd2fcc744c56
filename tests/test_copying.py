"""When does a model begin to copy? The notebook that measures it gives what its text says; a network on few emoji is caught, one on all is not."""

import json
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from difflit.config import AuditSettings
from difflit.files import read_json
from difflit.judging import audit_job
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run, read_status

KNOWN = {25: (0.09, 0.31, 0.56, 0.76), 100: (0, 0, 0.04, 0.22), 400: (0, 0, 0, 0.002), 1600: (0, 0, 0, 0)}  # of an independent experiment, at 1k, 2k, 4k, 8k


def execute(tmp_path, *words):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "copying.ipynb"), str(tmp_path / "report.ipynb"), "--no-progress-bar",
               "-p", "run_dir", str(tmp_path / "run"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_little_data_is_copied_and_more_is_not(tmp_path):
    done = execute(tmp_path, "-p", "samples", "100", "-p", "steps", "500,2000")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = read_json(tmp_path / "run" / "scores.json")
    share = {name: score["value"] for name, score in scores.items()}
    assert abs(share["copied.25_images.2000_steps"] - KNOWN[25][1]) <= 0.2 > share["copied.25_images.500_steps"]  # one network; whole: five, within 0.1
    assert share["copied.100_images.2000_steps"] <= 0.03
    assert share["control.25_images"] == share["control.100_images"] == 0
    assert share["perfect.25_images"] == share["perfect.100_images"] == 1
    assert all(set(score) == {"value", "low", "high", "n", "protocol"} for score in scores.values())
    assert read_status(tmp_path / "run")["state"] == "done" and (tmp_path / "run" / "copying.csv").read_text().count("\n") == 5
    assert json.dumps([o for c in nbformat.read(tmp_path / "report.ipynb", 4).cells for o in c.get("outputs", [])]).count("image/png") == 4


@pytest.mark.parametrize("words, says", [
    (["-p", "sizes", "25,x"], "whole numbers with commas between them"),
    (["-p", "steps", "2000,1000"], "each number must be larger than the one before it"),
    (["-p", "sizes", "25,1700"], "at most 1600 can be trained on"),
])
def test_bad_settings_are_told(tmp_path, words, says):
    done = execute(tmp_path, *words)
    assert done.returncode != 0 and says in done.stderr
    assert read_status(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow
def test_the_whole_table_is_as_it_was_measured_elsewhere(tmp_path):
    done = execute(tmp_path, "-p", "preset", "copying-full")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = read_json(tmp_path / "run" / "scores.json")
    for size, row in KNOWN.items():
        assert scores[f"control.{size}_images"]["value"] == 0 and scores[f"perfect.{size}_images"]["value"] == 1
        for steps, known in zip((1000, 2000, 4000, 8000), row):
            assert abs(scores[f"copied.{size}_images.{steps}_steps"]["value"] - known) <= 0.1, (size, steps)


@pytest.mark.slow
def test_a_network_on_few_emoji_is_caught_and_one_on_all_is_not(tmp_path):
    """1,000 updates each, half an hour together on one core."""
    found = {}
    for name, limit in (("few", 64), ("all", None)):
        given = {"preset": "emoji", "steps": 1000, "limit": limit, "score_images": 0, "sample_every_steps": 1000, "validate_every_steps": 1000}
        run = open_run({**{k: v for k, v in given.items() if v is not None}, "run_dir": str(tmp_path / name)})
        train_job(prepare(run), show=False)
        finish(run)
        asked = {"model": str(tmp_path / name), "run_dir": str(tmp_path / f"{name}-audit"), "images": 128, "methods": "ratio", "perturb": False}
        audited = open_run(asked, cls=AuditSettings, kind="audit")
        found[name] = audit_job(audited).scores
        finish(audited)
    assert found["few"]["ratio"]["low"] > 0.1 > found["few"]["ratio.held_out"]["high"]
    assert found["all"]["ratio"]["value"] <= 0.02
