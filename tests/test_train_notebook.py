"""The run notebook under papermill, as a user starts it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

NOTEBOOK = ROOT / "nbs" / "train.ipynb"


def papermill(tmp_path, *words, **settings):
    """Run the notebook; the completed process, the run directory and the report."""
    run = tmp_path / "run"
    words = [*words, *(w for k, v in {**TINY, "run_dir": run, **settings}.items() for w in ("-p", k, str(v)))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), str(tmp_path / "out.ipynb"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "2"})
    return done, run, tmp_path / "out.ipynb"


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that several tests look at: its directory and its report."""
    place = tmp_path_factory.mktemp("finished")
    (place / "settings.yaml").write_text("lr: 1e-4\nflip: 'false'\nvalidate_every_steps: 100.0\n")
    done, run, report = papermill(place, "-f", str(place / "settings.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    return run, report


def test_default_leaves_a_report(finished):
    run, report = finished
    assert status(run)["state"] == "done" and status(run)["step"] == 4
    expected = {"settings.yaml", "environment.json", "metrics.csv", "scores.json", "samples", "checkpoints", "tensorboard", "logs"}
    assert expected <= {p.name for p in run.iterdir()}
    scores = json.loads((run / "scores.json").read_text())
    assert {"alignment.colour", "alignment.shape", "alignment.background"} <= set(scores)
    cells = json.loads(report.read_text())["cells"]
    assert report.stat().st_size < 3_000_000
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    for output in outputs:
        text = "".join(output.get("text", "")) or "".join(output.get("data", {}).get("text/plain", ""))
        assert text.count("\n") < 40, text
    training = next(c for c in cells if "train_job(job)" in "".join(c["source"]))
    kinds = [o["output_type"] for o in training["outputs"]]
    assert kinds == ["display_data", "display_data"], "one line of progress and one figure, nothing else"
    assert "4/4" in "".join(training["outputs"][0]["data"]["text/plain"])


def test_unknown_name_fails_by_name(tmp_path):
    done, run, _ = papermill(tmp_path, "-p", "stepz", "4")
    assert done.returncode != 0
    assert "did you mean 'steps'" in done.stderr
    assert status(run)["state"] == "failed" and "did you mean 'steps'" in status(run)["reason"]


WRONG = [("lr", "abc", "lr='abc'"), ("data", "no/such/folder", "no/such/folder"),
         pytest.param("preset", "shaeps", "did you mean 'shapes'", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name, value, said", WRONG)
def test_wrong_values_fail_clearly(tmp_path, name, value, said):
    done, run, _ = papermill(tmp_path, **{name: value})
    assert done.returncode != 0 and status(run)["state"] == "failed"
    assert said in status(run)["reason"], status(run)["reason"]


def test_yaml_spellings(finished):
    text = (finished[0] / "settings.yaml").read_text()
    assert "lr: 0.0001" in text and "flip: false" in text and "validate_every_steps: 100\n" in text


def test_occupied_directory_is_refused_and_resume_goes_on(tmp_path, finished):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = (run / "status.json").read_bytes()
    done, _, _ = papermill(tmp_path, score_images=0)
    assert done.returncode != 0 and "already holds a run" in done.stderr and "resume=auto" in done.stderr
    assert (run / "status.json").read_bytes() == before
    done, _, _ = papermill(tmp_path, resume="auto", steps=6, score_images=0, lr=1e-4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(run)["step"] == 6
    steps = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "2", "3", "4", "5", "6"]


def test_a_messy_folder_trains_and_the_report_says_what_was_skipped(tmp_path, messy):
    done, run, report = papermill(tmp_path, preset="folder", data=messy, batch_size=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(run)["state"] == "done" and json.loads((run / "scores.json").read_text()) == {}
    text = report.read_text()
    for name in ("cut.jpg", "fake.png", "silent.png", "utf16.png"):
        assert name in text, f"{name} was skipped without a word"
    assert "files were skipped" in text


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "nothing").mkdir()
    done, run, _ = papermill(tmp_path, preset="folder", data=tmp_path / "nothing")
    assert done.returncode != 0 and status(run)["state"] == "failed"
    assert "nothing" in status(run)["reason"]


KINDS = [("glide-base-tiny", "alignment.colour"), ("glide-inpaint-tiny", "restoration.psnr"), ("glide-upsample-tiny", "restoration.gain"),
         ("noised-clip", "found.at_0.5")]


@pytest.mark.parametrize("preset, scores", KINDS)
def test_other_kinds_leave_a_report(tmp_path, preset, scores):
    """An upsampler, a network that fills in, and one that only looks go through the same notebook to the end."""
    recipe = {"schedule": "squared_cosine", "target": "eps", "loss": "hybrid", "sampler": "ddpm", "time_shift": 1} if preset == "glide-base-tiny" else {}
    done, run, report = papermill(tmp_path, preset=preset, steps=2, spacing="trailing", batch_size=4, score_images=16, **recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(run)["state"] == "done"
    assert scores in json.loads((run / "scores.json").read_text())
    outputs = [o for c in json.loads(report.read_text())["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]


def test_steps_0_only_looks(tmp_path, finished):
    """A run of no steps measures given weights and writes the report."""
    again, looked, _ = papermill(tmp_path, steps=0, init_from=finished[0], score_images=8)
    assert again.returncode == 0, again.stderr[-3000:]
    assert status(looked)["state"] == "done" and "alignment.colour" in json.loads((looked / "scores.json").read_text())
