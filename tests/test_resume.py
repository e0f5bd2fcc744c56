"""Bits that must agree: the same seed, any number of workers, stopped and resumed, killed and resumed, one process and two."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run
from difflit.tracking import TIMING_COLUMNS, read_metrics

OPTIONS = {**TINY, "steps": 8, "score_images": 0, "precision": "auto", "checkpoint_every_steps": 4, "validate_every_steps": 4, "sample_every_steps": 8}


def run(folder, stop_after=None, **given):
    """Train in this process; the run directory."""
    opened = open_run({**OPTIONS, "run_dir": str(folder), **given})
    train_job(prepare(opened), show=False, stop_after=stop_after)
    finish(opened, "preempted" if stop_after else "done")
    return folder


def assert_same(a, b):
    """Equal to the bit: every tensor of the last checkpoint, every metric but the clock's."""
    for name in ("model", "ema", "optimizer"):
        one, two = (load_file(next(iter((f / "checkpoints").glob("step-00000008"))) / f"{name}.safetensors") for f in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), f"{name}: {key}"
    one, two = read_metrics(a), read_metrics(b)
    for column in one:
        if column not in TIMING_COLUMNS:
            np.testing.assert_array_equal(one[column], two[column], err_msg=column)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_same_seed_twice(whole, tmp_path):
    assert_same(whole, run(tmp_path / "run"))


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers(whole, tmp_path, workers):
    assert_same(whole, run(tmp_path / "run", workers=workers))


@pytest.mark.parametrize("stop", [3, 5])
def test_stopped_and_resumed(whole, tmp_path, stop):
    """A stop between checkpoints loses the steps since the last one, and does them again."""
    run(tmp_path / "run", stop_after=stop)
    assert_same(whole, run(tmp_path / "run", resume="auto"))


def test_resumed_over_a_damaged_checkpoint(whole, tmp_path):
    folder = run(tmp_path / "run")
    weights = folder / "checkpoints" / "step-00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    opened = open_run({"run_dir": str(folder), "resume": "auto"})
    job = prepare(opened)
    assert job.state.step == 4
    assert any("damaged" in note and "step-00000008" in note for note in job.notes) and any("resumed from step-00000004" in note for note in job.notes)
    train_job(job, show=False)
    finish(opened)
    assert_same(whole, folder)


def test_killed_and_resumed(whole, tmp_path):
    """kill -9 in the middle, then on from the disk."""
    code = (
        "import sys; from difflit.recipes import *; from difflit.runs import *\n"
        f"run = open_run({{**{OPTIONS!r}, 'run_dir': sys.argv[1]}})\n"
        "job = prepare(run); print('ready', flush=True); train_job(job, show=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "ready"
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    from difflit.runs import read_status

    assert read_status(tmp_path / "run")["state"] == "dead"
    assert_same(whole, run(tmp_path / "run", resume="auto"))


def test_a_resumed_run_cannot_change_its_data(tmp_path):
    from difflit.checkpoints import CheckpointError

    run(tmp_path / "run", stop_after=4)
    opened = open_run({"run_dir": str(tmp_path / "run"), "resume": "auto", "data": "digits", "image_size": 32})
    with pytest.raises(CheckpointError, match="the data are not the same any more"):
        prepare(opened)
    finish(opened)


@pytest.mark.slow  # tests/test_many.py looks closer at the same
def test_two_processes_are_one(tmp_path):
    """2 × 16 images against 1 × 32: fp32, 20 steps, the same losses to 1e-4."""
    options = {**OPTIONS, "steps": 20, "batch_size": 32, "precision": "fp32"}
    options |= {f"{what}_every_steps": 20 for what in ("checkpoint", "validate", "sample")}
    one = run(tmp_path / "one", **options)
    code = (
        "import sys; from difflit.recipes import *; from difflit.runs import *\n"
        f"run = open_run({{**{options!r}, 'run_dir': sys.argv[1]}})\n"
        "train_job(prepare(run), show=False); finish(run)"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = read_metrics(one), read_metrics(tmp_path / "two")
    for column in ("loss", "raw_loss", "val_loss"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-4, err_msg=column)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)  # a derivative amplifies what Adam's first steps make of rounding: 1.07e-4 was seen
    assert (tmp_path / "two" / "logs" / "rank-1.log").exists()
