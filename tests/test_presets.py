"""The presets at their full length, as a user runs them; minutes each, part of `make slow`."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROMISES = {
    "shapes": {"alignment.colour": 0.97, "alignment.background": 0.97, "alignment.shape": 0.85},
    "digits": {"digits.agreement": 0.90},
    "emoji": {"nearest.agreement": 0.95},
    "glide-base-tiny": {"alignment.colour": 0.95, "alignment.position": 0.95, "alignment.shape": 0.70},
    "glide-inpaint-tiny": {"restoration.gain": 3.0},
    "latent-tiny": {"alignment.colour": 0.97, "alignment.background": 0.97, "alignment.position": 0.97, "alignment.shape": 0.85},
    "glide-upsample-tiny": {"restoration.gain": 3.0, "alignment.colour": 0.95},
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PROMISES)
def test_preset_keeps_its_promise(preset, tmp_path):
    run = tmp_path / "run"
    words = [str(ROOT / "nbs" / "train.ipynb"), str(run / "report.ipynb"), "-p", "preset", preset, "-p", "run_dir", str(run)]
    run.mkdir()
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", *words], capture_output=True, text=True, timeout=3600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "report.ipynb").stat().st_size < 3_000_000
    scores = json.loads((run / "scores.json").read_text())
    missed = {name: scores[name]["value"] for name, least in PROMISES[preset].items() if scores[name]["value"] < least}
    assert not missed, missed
