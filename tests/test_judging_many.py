"""Several processes judge as one does: the same scores, the same verdicts to the last bit, files from the first alone; and nobody waits for one that failed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import judges
import pytest
from conftest import ROOT, TINY

from difflit.files import read_json
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run, read_status

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true",
               "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def launch(jobs, place, processes=2, seconds=500):
    """Run jobs in several processes; exit code and what was printed."""
    place.mkdir()
    (place / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port),
               str(ROOT / "tests" / "judges.py"), str(place / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=place, timeout=seconds)
    return done.returncode, done.stdout + done.stderr


def train(place, **given):
    run = open_run({**TINY, "steps": 2, "checkpoint_every_steps": 2, "score_images": 0, "run_dir": str(place), **given})
    train_job(prepare(run), show=False)
    finish(run)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of pixels, and a latent one with its cache."""
    place = tmp_path_factory.mktemp("judges")
    train(place / "pixels", limit=150, image_size=16, channels=32)
    train(place / "latents", preset="latent-tiny", data="shapes", limit=150, cache=str(place / "cache"), image_size=32, precision="auto")
    return place


def jobs(place, name):
    """The same jobs for any number of processes."""
    common = {"sampler_steps": 1, "part": 8, "device": "cpu"}
    audit = {**common, "images": 36, "held_out_images": 20}
    return [
        {"kind": "audit", "settings": {**audit, "model": str(place / "pixels"), "descriptor": "random", "run_dir": str(place / f"audit-{name}")}},
        {"kind": "audit", "settings": {**audit, "model": str(place / "latents"), "compared_in": "latents", "run_dir": str(place / f"latents-{name}")}},
        {"kind": "audit", "settings": {**audit, "model": str(place / "pixels"), "compared_in": "descriptors", "descriptor": "random",
                                       "run_dir": str(place / f"descriptors-{name}")}},
        {"kind": "evaluate", "settings": {**common, "models": str(place / "pixels"), "prompt_images": 36, "reference_images": 150,
                                          "run_dir": str(place / f"evaluate-{name}")}},
    ]


@pytest.fixture(scope="module")
def judged(place):
    for job in jobs(place, "one"):
        folder = Path(job["settings"]["run_dir"])
        judges.note(judges.go(**job), folder / "rank-0.json")
    broken = {**jobs(place, "broken")[0], "fails_in": 1}
    code, said = launch([*jobs(place, "two"), broken], place / "launch")
    assert code != 0 and "No space left" in said, said[-4000:]
    return place


@pytest.mark.parametrize("job", ["audit", "latents", "descriptors", "evaluate"])
def test_two_processes_find_what_one_finds(judged, job):
    told = [judged / f"{job}-one" / "rank-0.json", *(judged / f"{job}-two" / f"rank-{rank}.json" for rank in (0, 1))]
    alone, first, second = (json.loads(path.read_text()) for path in told)
    assert first == second == alone
    assert read_json(judged / f"{job}-one" / "scores.json") == read_json(judged / f"{job}-two" / "scores.json")
    assert read_status(judged / f"{job}-two")["state"] == "done" and read_status(judged / f"{job}-two")["processes"] == 2
    picture = "grid.png" if job == "evaluate" else "closest.png"
    assert (judged / f"{job}-one" / picture).read_bytes() == (judged / f"{job}-two" / picture).read_bytes()
    assert not (judged / f"{job}-two" / "parts").exists()


def test_the_space_is_said(judged):
    latents, descriptors = (json.loads((judged / f"{job}-two" / "rank-0.json").read_text()) for job in ("latents", "descriptors"))
    assert "from the cache" in latents["space"] and latents["compared"] == 150
    assert "descriptors: 64 fixed random projections" in descriptors["scores"]["ratio"]["protocol"]
    assert "carlini_tiled" not in latents["copies"] and "carlini_small" in latents["copies"]


def test_nobody_waits_for_one_that_failed(judged):
    """The processes ended long before the half hour of silence that a judging job allows."""
    status = read_status(judged / "audit-broken")
    assert status["state"] == "failed" and "rank 1 says: OSError: [Errno 28] No space left" in status["reason"], status
