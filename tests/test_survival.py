"""Runs that are killed, stopped, starved or poisoned end as runs that were left alone: to the bit."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difflit.files import read_json
from difflit.glide import GLIDES
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run, read_status
from difflit.tasks import TASKS, TextToImage
from difflit.tracking import TIMING_COLUMNS, read_metrics
from difflit.training import TrainingError

HERE = Path(__file__).resolve().parent
MICRO = {"model": "micro", "image_size": 16, "limit": 64, "batch_size": 8, "steps": 8, "score_images": 0, "sampler_steps": 1, "validation_images": 8,
         "precision": "fp32", "workers": 0, "trackers": "none", "checkpoint_every_steps": 2, "validate_every_steps": 4, "sample_every_steps": 8,
         "statistics_every_steps": 4, "task": "troubled"}

# What befalls a run: a network that is trained in milliseconds, and a task that makes trouble at given steps

PLAN: dict[int, str] = {}  # step → signals to send in its middle, or "sleep"
MEMORY: dict[str, int] = {}  # "samples": as many fit
POISON: dict[int, int] = {}  # position of a sample → how often its picture is NaN


class Troubled(TextToImage):
    """Text to image on a bad day."""

    def loss(self, model, batch):
        befall(int(batch["position"][0]) // MICRO["batch_size"] + 1, len(batch["position"]))
        for i, position in enumerate(batch["position"].tolist()):
            if POISON.get(position):
                POISON[position] -= 1
                batch["image"][i] = torch.nan
        return super().loss(model, batch)


def befall(step, samples):
    if samples > MEMORY.get("samples", samples):
        raise torch.OutOfMemoryError(f"CUDA out of memory: no room for {samples}")
    for what in PLAN.pop(step, "").split():
        if what == "sleep":
            time.sleep(60)
        elif what == "pause":
            time.sleep(0.6)
        else:
            os.kill(os.getpid(), signal.Signals[what])


def register():
    GLIDES["micro"] = replace(GLIDES["tiny"], image_size=16, channels=16, channel_mult=(1, 2), attention_downsamplings=(2,), head_channels=16, norm_groups=4,
                              text_width=32, text_layers=1, text_heads=2, dropout=0.1)
    TASKS["troubled"] = Troubled


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del GLIDES["micro"], TASKS["troubled"]


@pytest.fixture(autouse=True)
def calm():
    yield
    for trouble in (PLAN, MEMORY, POISON):
        trouble.clear()


def run(folder, stop_after=None, state=None, **given):
    """Train in this process; the job."""
    opened = open_run({**({} if given.get("resume") else MICRO), "run_dir": str(folder), **given})
    try:
        job = train_job(prepare(opened), show=False, stop_after=stop_after)
        finish(opened, "preempted" if stop_after else "done")
        return job
    finally:
        finish(opened, "failed", "by the test")


def last_checkpoint(folder):
    return sorted((Path(folder) / "checkpoints").glob("step-*"))[-1]


def assert_same(one, two):
    """Equal to the bit: every tensor and every word of the last checkpoint, every metric but the clock's, every picture."""
    a, b = last_checkpoint(one), last_checkpoint(two)
    assert a.name == b.name and {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for file in sorted(a.glob("*.safetensors")):
        mine, other = load_file(file), load_file(b / file.name)
        assert mine.keys() == other.keys()
        for key in mine:
            assert torch.equal(mine[key], other[key]), f"{file.name}: {key}"
    assert read_json(a / "state.json") == read_json(b / "state.json")
    mine, other = read_metrics(one), read_metrics(two)
    assert sorted(mine) == sorted(other)
    for column in mine:
        if column not in TIMING_COLUMNS:
            np.testing.assert_array_equal(mine[column], other[column], err_msg=column)
    for picture in sorted((Path(one) / "samples").glob("*.png")):
        assert picture.read_bytes() == (Path(two) / "samples" / picture.name).read_bytes(), picture.name


# Processes of their own, forked from one that has imported everything already


def serve():
    """Fork a trainer for each line of JSON, tell its number, then how it ended."""
    register()
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            return _trainer(order)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _trainer(order):
    sys.stdin = open(os.devnull)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    PLAN.update({int(step): what for step, what in order["plan"].items()})
    opened = open_run(order["given"])
    train_job(prepare(opened), show=False)
    finish(opened)


class Server:
    """Trainers, one after another."""

    def __init__(self):
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_survival import serve; serve()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})

    def start(self, folder, plan=None, **given):
        """The number of a new trainer's process."""
        given = {**({} if given.get("resume") and folder.exists() else MICRO), "run_dir": str(folder), **given}
        self.log = folder.with_suffix(".log")
        self.process.stdin.write(json.dumps({"given": given, "plan": plan or {}, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """How it ended: 0, or the signal's number below 0."""
        return int(self.process.stdout.readline())

    def whole(self, folder, plan=None, **given):
        """A run to its end; how it ended."""
        self.start(folder, plan, **given)
        return self.end()


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.process.stdin.close()
    made.process.wait(30)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert server.whole(folder) == 0, server.log.read_text()
    assert read_status(folder)["state"] == "done"
    return folder


# kill -9

KILLED = {"steps": 24, "validate_every_steps": 3, "sample_every_steps": 8}


@pytest.fixture(scope="module")
def long(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    assert server.whole(folder, **KILLED) == 0, server.log.read_text()
    return folder


def alive(pid):
    return Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie has no command any more


def await_save(folder, pid):
    """Return in the middle of the next save, or when the trainer is gone."""
    names = folder / "checkpoints"
    while alive(pid):
        with suppress(FileNotFoundError):
            if any(name.startswith(".step-") for name in os.listdir(names)):
                return
        time.sleep(0.0005)


def kill_and_resume(server, folder, seed, kills=5):
    """Kill a run so often, every other time in the middle of a save; how many kills left half a checkpoint behind."""
    chance, torn = random.Random(seed), 0
    for number in range(kills):
        pid = server.start(folder, resume="auto", **({} if folder.exists() else KILLED))
        if number % 2 == 0:
            await_save(folder, pid)
            time.sleep(chance.uniform(0, 0.004))
        else:
            time.sleep(chance.uniform(0.2, 1.2))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL, f"the run ended before kill {number + 1}: {server.log.read_text()[-2000:]}"
        torn += any((folder / "checkpoints").glob(".step-*")) if (folder / "checkpoints").exists() else 0
        assert not folder.exists() or (read_status(folder) or {"state": "dead"})["state"] == "dead"
    assert server.whole(folder, resume="auto") == 0, server.log.read_text()[-2000:]
    assert not list((folder / "checkpoints").glob(".*")), "leftovers were cleared"
    return torn


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 11))])
def test_killed_at_random_points(server, long, tmp_path, seed):
    """kill -9, five times a run: the end is that of the run that nobody killed."""
    torn = kill_and_resume(server, tmp_path / "run", seed)
    assert read_status(tmp_path / "run")["state"] == "done"
    assert_same(long, tmp_path / "run")
    assert torn, "no kill fell into a save"
