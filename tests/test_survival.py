"""Runs that are killed, stopped, starved or poisoned end as runs that were left alone: to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
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
from difflit.text import clip_tokenizer
from difflit.tracking import TIMING_COLUMNS, read_metrics
from difflit.training import TrainingError

HERE = Path(__file__).resolve().parent
MICRO = {"model": "micro", "image_size": 16, "limit": 64, "batch_size": 8, "steps": 8, "score_images": 0, "sampler_steps": 1, "validation_images": 8,
         "precision": "fp32", "workers": 0, "trackers": "none", "checkpoint_every_steps": 2, "validate_every_steps": 4, "sample_every_steps": 8,
         "statistics_every_steps": 0, "task": "troubled"}

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
    GLIDES["micro"] = replace(GLIDES["tiny"], image_size=16, channels=16, channel_mult=(1,), attention_downsamplings=(1,), head_channels=16, norm_groups=4,
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


def run(folder, stop_after=None, **given):
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
    for picture in sorted((Path(one) / "samples").glob("step-*.png")):
        assert picture.read_bytes() == (Path(two) / "samples" / picture.name).read_bytes(), picture.name


# Processes of their own, forked from one that has imported everything already


def serve():
    """Fork a trainer for each line of JSON, tell its number, then how it ended."""
    register()
    torch.set_num_threads(1)
    clip_tokenizer()  # for all of them
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
    made.process.kill()
    made.process.wait()


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


# Signals


def lasted(status):
    """Seconds from a run's first word to its last."""
    return (datetime.fromisoformat(status["ended"]) - datetime.fromisoformat(status["started"])).total_seconds()


WORDS = {"SIGINT": "interrupted", "SIGTERM": "SIGTERM: asked to end", "SIGUSR2": "SIGUSR2: the scheduler's warning"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_saves_and_leaves(server, whole, tmp_path, name):
    """At step 5, which no regular checkpoint has."""
    folder = tmp_path / "run"
    assert server.whole(folder, {5: name}) == 0, server.log.read_text()
    status = read_status(folder)
    assert (status["state"], status["step"], status["reason"]) == ("preempted", 5, WORDS[name])
    assert last_checkpoint(folder).name == "step-00000005" and not (folder / "lock").exists()
    assert server.whole(folder, resume="auto") == 0, server.log.read_text()
    assert read_status(folder)["state"] == "done" and read_status(folder)["reason"] is None
    assert_same(whole, folder)


def test_sigint_twice_stops_at_once(server, whole, tmp_path):
    """The pause is longer than what counts as one keypress; the step is given up, and what was saved before stays whole."""
    folder = tmp_path / "run"
    assert server.whole(folder, {5: "SIGINT pause SIGINT sleep"}) == -signal.SIGINT
    assert "KeyboardInterrupt" in server.log.read_text()
    status = read_status(folder)
    assert status["state"] == "preempted" and status["step"] == 4 and "twice" in status["reason"]
    assert last_checkpoint(folder).name == "step-00000004"
    assert server.whole(folder, resume="auto") == 0, server.log.read_text()
    assert_same(whole, folder)


def test_one_keypress_that_comes_twice_is_one(server, tmp_path):
    """A launcher and a terminal both pass Ctrl-C on."""
    assert server.whole(tmp_path / "run", {5: "SIGINT SIGINT"}) == 0
    assert read_status(tmp_path / "run")["step"] == 5


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_a_step_that_outlasts_the_grace_is_given_up(server, whole, tmp_path, name):
    folder = tmp_path / "run"
    assert server.whole(folder, {5: f"{name} sleep"}, grace_seconds=0.3) == 0, server.log.read_text()
    status = read_status(folder)
    assert lasted(status) < 60, "it slept on"
    assert status["state"] == "preempted" and status["step"] == 4 and "not finished within 0.3 s" in status["reason"] and name in status["reason"]
    assert last_checkpoint(folder).name == "step-00000004"
    assert server.whole(folder, resume="auto", grace_seconds=30) == 0, server.log.read_text()
    assert_same(whole, folder)


def test_a_signal_outside_the_loop_ends_the_process_with_a_word(server, tmp_path):
    """Before the first step there is nothing to save."""
    folder = tmp_path / "run"
    pid = server.start(folder)
    while not (read_status(folder) or {}).get("pid") == pid:
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    code = server.end()
    status = read_status(folder)
    assert status["state"] == "preempted" and "SIGTERM" in status["reason"], (code, status)
    assert code in (0, -signal.SIGTERM)


# Time limits and files


def test_walltime_stops_before_it_is_over(server, tmp_path):
    """Steps of half a second against twelve seconds, of which five and two of the slowest steps stay free."""
    folder = tmp_path / "run"
    assert server.whole(folder, {step: "pause" for step in range(2, 200)}, walltime="12s", steps=200, checkpoint_every_steps=100) == 0, server.log.read_text()
    status = read_status(folder)
    assert status["state"] == "preempted" and status["reason"] == "the time limit is near" and lasted(status) < 12
    assert last_checkpoint(folder).name == f"step-{status['step']:08d}" and 0 < status["step"] < 100


def test_files_in_the_run_directory_are_orders(tmp_path):
    """`checkpoint.now` saves at the next step and goes away; `stop.now` stops too."""
    folder, seen = tmp_path / "run", []
    opened = open_run({**MICRO, "run_dir": str(folder), "checkpoint_every_steps": 100, "steps": 200})
    job = prepare(opened)
    befallen = job.task.loss

    def loss(model, batch):
        step = job.state.step + 1
        if step == 3:
            (folder / "checkpoint.now").touch()
        time.sleep(1.1 if step in (3, 4, 8) else 0)  # the folder is looked at once a second
        seen.append((step, [p.name for p in (folder / "checkpoints").glob("step-*")], (folder / "checkpoint.now").exists()))
        if step == 7:
            (folder / "stop.now").touch()
        return befallen(model, batch)

    job.task.loss = loss
    train_job(job, show=False)
    saved = [step for step, names, _ in seen if names]
    assert seen[-1][1][0] in ("step-00000003", "step-00000004") and saved[0] <= 6 and not seen[-1][2]
    assert read_status(folder)["state"] == "preempted" and read_status(folder)["reason"] == "stop.now"
    assert not (folder / "stop.now").exists() and job.state.step < 12 and last_checkpoint(folder).name == f"step-{job.state.step:08d}"


def test_a_stop_says_why_and_a_pruned_run_is_no_preempted_one(tmp_path):
    """The words in `stop.now` are the reason, and where they begin with `pruned` the state as well; the run can still be gone on with."""
    folder = tmp_path / "run"
    opened = open_run({**MICRO, "run_dir": str(folder), "steps": 200, "checkpoint_every_steps": 100})
    (folder / "stop.now").write_text("pruned: val_loss is above the median of the others")
    job = train_job(prepare(opened), show=False)
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("pruned", "pruned: val_loss is above the median of the others")
    assert 0 < job.state.step < 200 and last_checkpoint(folder).name == f"step-{job.state.step:08d}" and not (folder / "stop.now").exists()
    assert run(folder, resume="auto", steps=job.state.step + 2).state.step == job.state.step + 2 and read_status(folder)["state"] == "done"



# Memory


@pytest.mark.parametrize("fits, parts", [(4, 2), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_out_of_memory_is_more_micro_batches(tmp_path, fits, parts):
    """The same weights as a run that had so many from the beginning; a resume keeps them."""
    asked = run(tmp_path / "asked", accumulate=parts)
    MEMORY["samples"] = fits
    found = run(tmp_path / "found")
    assert found.state.parts == parts
    np.testing.assert_array_equal(read_metrics(tmp_path / "found")["micro_batches"], [parts] * 8)
    for key, value in asked.state.model.state_dict().items():
        assert torch.equal(value, found.state.model.state_dict()[key]), key
    run(tmp_path / "stopped", stop_after=5)
    MEMORY.clear()
    resumed = run(tmp_path / "stopped", resume="auto")
    assert resumed.state.parts == parts
    assert_same(tmp_path / "found", tmp_path / "stopped")


def test_out_of_memory_in_mid_run_goes_on_with_the_same_batches(tmp_path):
    """Rounding apart, the result is that of a run with memory enough."""
    calm = run(tmp_path / "calm", lr=1e-4)
    run(tmp_path / "run", stop_after=4, lr=1e-4)
    MEMORY["samples"] = 2
    found = run(tmp_path / "run", resume="auto")
    table = read_metrics(tmp_path / "run")
    np.testing.assert_array_equal(table["micro_batches"], [np.nan] * 4 + [4] * 4)
    np.testing.assert_array_equal(table["loss"][:4], read_metrics(tmp_path / "calm")["loss"][:4])
    assert found.state.position == calm.state.position == 64


def test_the_last_resort_is_to_recompute_and_then_a_clear_end(tmp_path):
    from difflit.training import OutOfMemory

    MEMORY["samples"] = 0
    with pytest.raises(OutOfMemory, match="step 1 does not fit into memory with one sample at a time and recomputed activations: choose a smaller image_size"):
        run(tmp_path / "run")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert [n for n in (2, 4, 8) if f"again in {n} pieces" in log] == [2, 4, 8] and "activations are recomputed" in log


def test_recomputed_activations_are_the_same_run(tmp_path):
    """What is recomputed draws the same dropout, and a resume goes on recomputing."""
    MEMORY["samples"], seen = 8, []
    plain = run(tmp_path / "plain", accumulate=8)
    opened = open_run({**MICRO, "run_dir": str(tmp_path / "run"), "accumulate": 8})
    job = prepare(opened)
    befallen = job.task.loss

    def loss(model, batch):
        if not model.config.checkpointing and not seen:
            seen.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return befallen(model, batch)

    job.task.loss = loss
    train_job(job, show=False, stop_after=5)
    finish(opened, "preempted")
    assert job.state.recomputes and job.state.model.config.checkpointing
    resumed = run(tmp_path / "run", resume="auto")
    assert resumed.state.recomputes and resumed.state.model.config.checkpointing
    for key, value in plain.state.model.state_dict().items():
        torch.testing.assert_close(value, resumed.state.model.state_dict()[key], rtol=1e-4, atol=1e-5)


# A picture that is no number


def sick(step, place=3):
    """The position of a sample of a step."""
    return (step - 1) * MICRO["batch_size"] + place


def test_a_nan_stops_the_run_and_names_the_sample(tmp_path):
    from difflit.scaling import NonFiniteLoss

    POISON[sick(5)] = 1
    opened = open_run({**MICRO, "run_dir": str(tmp_path / "run")})
    job = prepare(opened)
    with pytest.raises(NonFiniteLoss) as caught:
        train_job(job, show=False)
    from difflit.runs import fail

    fail(opened, caught.value)
    reason = read_status(tmp_path / "run")["reason"]
    name, caption = caught.value.ids[0], caught.value.captions[0]
    assert name and name in reason and (caption in reason or caption[:20] in reason) and "step 5" in reason and "image" in reason
    assert read_status(tmp_path / "run")["state"] == "failed"
    dump = tmp_path / "run" / "broken" / "nonfinite-00000005-rank0"
    batch = load_file(next(dump.glob("*.safetensors")))
    assert not batch["image"][3].isfinite().all() and batch["image"][[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert last_checkpoint(tmp_path / "run").name == "step-00000004"
    run(tmp_path / "fine")
    run(tmp_path / "run", resume="auto")  # POISON is used up
    assert_same(tmp_path / "fine", tmp_path / "run")


def test_a_nan_is_skipped(tmp_path):
    POISON.update({sick(3): 1, sick(5): 1})
    job = run(tmp_path / "run", on_nonfinite="skip")
    assert job.state.step == 8 and job.state.recovery.used == 2
    table = read_metrics(tmp_path / "run")
    assert list(np.flatnonzero(np.isnan(table["loss"])) + 1) == [3, 5] and list(table["step"]) == list(range(1, 9))
    assert all(v.isfinite().all() for v in job.state.model.state_dict().values())
    POISON.update({sick(3): 1, sick(5): 2})  # the step after the checkpoint is made twice
    run(tmp_path / "again", on_nonfinite="skip", stop_after=5)
    run(tmp_path / "again", resume="auto")
    assert_same(tmp_path / "run", tmp_path / "again")


def test_too_many_skips_fail(tmp_path):
    from difflit.scaling import NonFiniteLoss

    POISON.update({sick(step): 1 for step in (2, 3, 4)})
    with pytest.raises(NonFiniteLoss, match="step 4") as caught:
        run(tmp_path / "run", on_nonfinite="skip", recoveries=2)
    assert "recovered 2 times by skip, of 2 allowed" in str(caught.value.__notes__)


def test_a_nan_rolls_back_with_half_the_rate(tmp_path):
    calm = run(tmp_path / "calm", lr_schedule="constant", warmup_steps=0)
    POISON[sick(6)] = 1
    job = run(tmp_path / "run", on_nonfinite="rollback", lr_schedule="constant", warmup_steps=0)
    assert job.state.step == 8 and job.state.recovery.used == 1
    assert [n for n in job.notes if "rolled back to step-00000004 with 0.5 of the learning rate (1 of 3 times)" in n], job.notes
    table = read_metrics(tmp_path / "run")
    assert list(table["step"]) == list(range(1, 9)) and np.isfinite(table["loss"]).all()
    np.testing.assert_allclose(table["lr"], [2e-3] * 4 + [1e-3] * 4)
    np.testing.assert_array_equal(table["loss"][:5], read_metrics(tmp_path / "calm")["loss"][:5])
    assert table["loss"][5] != read_metrics(tmp_path / "calm")["loss"][5] and calm.state.position == job.state.position


def test_a_rollback_that_does_not_help_fails_after_so_many(tmp_path):
    from difflit.scaling import NonFiniteLoss

    POISON[sick(6)] = 99
    with pytest.raises(NonFiniteLoss, match="step 6") as caught:
        run(tmp_path / "run", on_nonfinite="rollback", recoveries=2)
    assert POISON[sick(6)] == 96 and "recovered 2 times by rollback, of 2 allowed" in str(caught.value.__notes__)


def test_a_rollback_before_the_first_checkpoint_says_so(tmp_path):
    POISON[sick(1)] = 1
    with pytest.raises(TrainingError, match="no checkpoint to roll back to"):
        run(tmp_path / "run", on_nonfinite="rollback")


# Early ends, what stays, averages


def test_early_stopping_is_an_end_and_survives_a_resume(tmp_path):
    """Nothing improves by 99 %: the first measurement is the best, and two more are waited for."""
    given = {"early_stop": "val_loss", "patience": 2, "improvement": 0.99, "validate_every_steps": 2, "steps": 20, "sample_every_steps": 100}
    job = run(tmp_path / "whole", **given)
    status = read_status(tmp_path / "whole")
    assert status["state"] == "done" and job.state.step == 6
    assert "early stopping: val_loss has not improved for 2 measurements" in status["reason"]
    assert last_checkpoint(tmp_path / "whole").name == "step-00000006" and (tmp_path / "whole" / "samples" / "step-00000006.png").exists()
    run(tmp_path / "run", stop_after=5, **given)
    run(tmp_path / "run", resume="auto")
    assert read_status(tmp_path / "run")["state"] == "done"
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_the_best_and_the_round_ones_stay(tmp_path):
    """Of checkpoints at 2, 4, … 12: the newest, those that 6 divides, and the two of the lowest loss."""
    given = {"steps": 12, "keep_checkpoints": 1, "keep_every_steps": 6, "keep_best": 2, "validate_every_steps": 2, "sample_every_steps": 100}
    run(tmp_path / "run", **given)
    table = read_metrics(tmp_path / "run")
    scored = sorted((loss, -int(step)) for step, loss in zip(table["step"], table["val_loss"]) if np.isfinite(loss))
    expected = {6, 12} | {-step for _, step in scored[:2]}
    kept = {int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == expected
    run(tmp_path / "up", **{**given, "best_by": "+val_loss"})
    worst = {-step for _, step in sorted((-loss, step) for loss, step in scored)[:2]}
    assert {int(p.name[5:]) for p in (tmp_path / "up" / "checkpoints").glob("step-*")} == {6, 12} | worst


def test_any_average_afterwards(tmp_path):
    """A width that was tracked comes back, one that was not loads into the network."""
    from difflit.averaging import reconstruct

    job = run(tmp_path / "run", averages="power:0.05,power:0.1", snapshot_every_steps=2)
    kept = {a.name: a for a in job.state.averages}
    assert set(kept) == {"ema", "power-0.05", "power-0.1"}
    again = reconstruct(tmp_path / "run" / "snapshots", 0.1)
    for key, value in kept["power-0.1"].model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)
    other = reconstruct(tmp_path / "run" / "snapshots", 0.07)
    job.state.model.load_state_dict(other)
    assert any(not torch.equal(other[k], again[k]) for k in again)
    run(tmp_path / "stopped", averages="power:0.05,power:0.1", snapshot_every_steps=2, stop_after=3)
    run(tmp_path / "stopped", resume="auto")
    assert_same(tmp_path / "run", tmp_path / "stopped")
    for file in (tmp_path / "run" / "snapshots").iterdir():
        other = load_file(tmp_path / "stopped" / "snapshots" / file.name)
        assert all(torch.equal(value, other[key]) for key, value in load_file(file).items())


def test_an_average_on_the_cpu_is_the_same(tmp_path):
    one, two = run(tmp_path / "same"), run(tmp_path / "cpu", ema_device="cpu")
    for key, value in one.state.ema.model.state_dict().items():
        assert torch.equal(value, two.state.ema.model.state_dict()[key]), key


# All formats, optimizers, schedules and losses

CASES = [
    ("fp32", "adamw", "constant", ""),
    pytest.param("bf16", "adafactor", "linear", "huber=0.5", marks=pytest.mark.slow),
    ("fp16", "sgd", "cosine", "adversarial=0.01"),
    ("pure-bf16", "muon", "cosine-restarts", "perceptual:filters=0.1"),
    pytest.param("bf16-master", "lion", "step", "l1=0.1", marks=pytest.mark.slow),
    ("fp16-master", "prodigy", "inverse-sqrt", "huber"),
    ("fp32", "schedulefree-adamw", "one-cycle", "adversarial=0.01,perceptual=0.1"),
    ("bf16", "adamw", "plateau", "task=0.5,huber=1"),
    pytest.param("fp16", "adamw", "linear", "", marks=pytest.mark.slow),
    pytest.param("pure-bf16", "adamw", "cosine", "", marks=pytest.mark.slow),
    pytest.param("bf16-master", "sgd", "plateau", "adversarial", marks=pytest.mark.slow),
]
NEEDS = {"muon": "pytorch_optimizer", "lion": "pytorch_optimizer", "prodigy": "prodigyopt", "schedulefree-adamw": "schedulefree"}


@pytest.mark.parametrize("precision, optimizer, schedule, terms", CASES)
def test_everything_resumes(tmp_path, precision, optimizer, schedule, terms):
    """Six steps at once, or three of them after a stop: the same bits."""
    if optimizer in NEEDS:
        pytest.importorskip(NEEDS[optimizer])
    given = {"precision": precision, "optimizer": optimizer, "lr_schedule": schedule, "loss_terms": terms, "steps": 6, "validate_every_steps": 1,
             "sample_every_steps": 6, "averages": "power:0.1", "warmup_steps": 1, "lr": 1.0 if optimizer == "prodigy" else 1e-3, "loss_scale": 65536.0}
    given |= {"lr_options": "patience: 0, threshold: 0.5"} if schedule == "plateau" else {}
    given |= {"lr_scales": "all=1"} if optimizer == "prodigy" else {}
    whole = run(tmp_path / "whole", **given)
    before = prepare_weights(tmp_path / "before", given)
    assert any(not torch.equal(v, before[k]) for k, v in whole.state.model.state_dict().items()), "nothing was learnt"
    run(tmp_path / "run", stop_after=3, **given)
    run(tmp_path / "run", resume="auto")
    assert_same(tmp_path / "whole", tmp_path / "run")


def prepare_weights(folder, given):
    opened = open_run({**MICRO, **given, "run_dir": str(folder)})
    job = prepare(opened)
    finish(opened, "pruned")
    return job.state.model.state_dict()


# In a notebook, under papermill

NOTEBOOK = {"steps": 40, "image_size": 16, "limit": 64, "batch_size": 4, "score_images": 0, "sampler_steps": 1, "validation_images": 4, "precision": "fp32",
            "workers": 0, "trackers": "none", "checkpoint_every_steps": 4, "validate_every_steps": 20, "sample_every_steps": 40}


def papermill(run_folder, report, **given):
    """The run notebook as a user starts it, under way."""
    words = [w for k, v in {**({} if "resume" in given else NOTEBOOK), **given, "run_dir": run_folder}.items() for w in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(HERE.parent / "nbs" / "train.ipynb"), str(report), *words]
    return subprocess.Popen(command, cwd=report.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def texts(report):
    """Each code cell's first line, and what it showed as text."""
    found = []
    for cell in json.loads(report.read_text())["cells"]:
        if cell["cell_type"] == "code":
            said = ["".join(o.get("text", "")) or "".join(o.get("data", {}).get("text/plain", "")) for o in cell["outputs"]]
            found.append(("".join(cell["source"]), [o["output_type"] for o in cell["outputs"]], said))
    return found


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_a_stopped_notebook_is_a_report_and_goes_on(server, tmp_path, name):
    """The kernel gets the signal in the middle of the training cell; what comes after is skipped, with one sentence; resume=auto ends the run."""
    folder = tmp_path / "run"
    child = papermill(folder, tmp_path / "report.ipynb")
    while child.poll() is None and not (folder / "checkpoints" / "step-00000004").exists():
        time.sleep(0.05)
    kernel = read_status(folder)["pid"]
    assert f"\nPPid:\t{child.pid}\n" in Path(f"/proc/{kernel}/status").read_text(), "papermill's own child"
    os.kill(kernel, signal.Signals[name])
    assert child.wait(300) == 0, child.stderr.read()[-3000:]
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("preempted", WORDS[name]) and 4 <= status["step"] < 40
    cells = texts(tmp_path / "report.ipynb")
    at = next(i for i, (source, _, _) in enumerate(cells) if "train_job(job)" in source)
    assert not any("error" in kinds for _, kinds, _ in cells)
    later = [said for _, _, said in cells[at + 1 :]]
    assert "".join(later[0]).startswith(f"Stopped after step {status['step']} of 40: {WORDS[name]}.") and "resume=auto" in "".join(later[0])
    assert not any(later[1:]), "one sentence is enough"
    done = papermill(folder, tmp_path / "report.1.ipynb", resume="auto")
    assert done.wait(600) == 0, done.stderr.read()[-3000:]
    assert read_status(folder)["state"] == "done" and read_status(folder)["step"] == 40
    assert all(said for source, _, said in texts(tmp_path / "report.1.ipynb") if "samples_figure" in source)
    assert server.whole(tmp_path / "whole", **{**NOTEBOOK, "model": "tiny", "task": "auto", "statistics_every_steps": 10}) == 0, server.log.read_text()
    assert_same(folder, tmp_path / "whole")


# What a user registers


@pytest.fixture
def own():
    """A loss, a metric, a tracker, an optimizer and a schedule of one's own; they are gone afterwards."""
    from difflit.losses import LOSS_TERMS, loss_term
    from difflit.optimizers import OPTIMIZERS, SCHEDULES, optimizer, schedule
    from difflit.tracking import METRICS, SINKS, Sink, metric, sink

    @loss_term("brightness")
    def brightness(predicted, true, times, batch):
        """How far the mean brightness is off."""
        return (predicted.mean((1, 2, 3)) - true.mean((1, 2, 3))).square()

    @metric("half_step", every_steps=2)
    def half_step(state, losses):
        return state.step / 2

    @sink("list")
    class Listed(Sink):
        rows: list = []

        def __init__(self, folder, last_step=0, prefix=""):
            self.prefix = prefix

        def log(self, rows):
            Listed.rows += [{self.prefix + k: v for k, v in row.items()} for row in rows]

    @optimizer("signs", momentum=0.5)
    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.9):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.mul_(group["momentum"]).add_(p.grad, alpha=1 - group["momentum"])
                    p.sub_(mean.sign(), alpha=group["lr"])

    @schedule("sawtooth")
    def sawtooth(step, steps, warmup, teeth=2):
        return 1.0 - (step - 1) % (steps // teeth) / (steps // teeth)

    yield Listed
    for registry, name in ((LOSS_TERMS, "brightness"), (METRICS, "half_step"), (SINKS, "list"), (OPTIMIZERS, "signs"), (SCHEDULES, "sawtooth")):
        registry.pop(name)


def test_what_a_user_registers_is_used_by_name(own, tmp_path):
    """By the names of settings, and through a stop and a resume."""
    given = {"loss_terms": "brightness=0.5", "trackers": "list:prefix=my-", "optimizer": "signs", "lr_schedule": "sawtooth", "lr_options": "teeth: 4",
             "warmup_steps": 0, "optimizer_options": "momentum: 0.25"}
    job = run(tmp_path / "run", **given)
    table = read_metrics(tmp_path / "run")
    assert np.isfinite(table["loss_brightness"]).all() and (table["loss_brightness"] > 0).all()
    np.testing.assert_allclose(table["loss"], table["raw_loss"] + 0.5 * table["loss_brightness"], rtol=1e-5)
    np.testing.assert_allclose(table["lr"], [2e-3, 1e-3] * 4)
    np.testing.assert_array_equal(table["half_step"], [np.nan, 0.5, np.nan, 1.5, np.nan, 2.5, np.nan, 3.5])
    assert [row["my-step"] for row in own.rows] == list(range(1, 9)) and "my-loss" in own.rows[0]
    assert {group["momentum"] for group in job.state.optimizer.param_groups} == {0.25} and type(job.state.optimizer).__name__ == "Signs"
    run(tmp_path / "stopped", stop_after=5, **given)
    run(tmp_path / "stopped", resume="auto")
    assert_same(tmp_path / "run", tmp_path / "stopped")
