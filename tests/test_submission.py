"""What `difflit submit` does before, while and after it hands a job over."""

import json
import shlex
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT, TINY

from difflit.config import SettingsError
from difflit.evaluation import expand
from difflit.files import read_json, write_json
from difflit.runs import read_status
from difflit.schedulers import SCHEDULERS, ClusterError, Profile, Scheduler
from difflit.submission import Request, check_settings, follow, make_cells, make_request, parse_sweep, plan, plan_again, plan_chain, read_notebook, submit

TRAIN = ROOT / "nbs" / "train.ipynb"


class Fake(Scheduler):
    """Remembers, and refuses on request."""

    def __init__(self):
        self.jobs, self.refused, self.seen = {}, set(), []

    def render(self, spec):
        return f"#!/bin/bash\n# {' '.join(map(str, spec.runs))} after {spec.after}\n"

    def command(self, spec, script):
        return ["enqueue", str(script)]

    def submit(self, spec, script):
        self.seen.append((spec, script.read_text(), {p.name for p in spec.folder.iterdir()}))
        if len(self.seen) in self.refused:
            raise ClusterError("enqueue says: Invalid account")
        self.jobs[str(len(self.seen))] = "pending"
        return str(len(self.seen))

    def queue(self, ids):
        return [(id, None, state) for id, state in self.jobs.items() if state != "gone"]

    def cancel(self, id):
        self.jobs[id] = "gone"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SCHEDULERS, "slurm", made := Fake())
    return made


def tree(folder):
    """All files below a folder, with their bytes, and all folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


SLURM = Request(Profile(scheduler="slurm"))


@pytest.mark.parametrize("name", ["train", "precompute", "evaluate", "audit"])
def test_run_notebooks_are_known(name):
    book = read_notebook(ROOT / "nbs" / f"{name}.ipynb")
    assert book.settings is not None and set(book.parameters) == set(book.settings.model_fields) and book.job == {"precompute": "precompute"}.get(name, name)
    with pytest.raises(SettingsError, match="did you mean 'seed'"):
        check_settings(book, {"sede": 3})


def test_what_papermill_reads_is_what_was_checked(fake):
    """launch.yaml through papermill's own reader, which is another YAML than ours."""
    from papermill.iorw import read_yaml_file

    given = {"lr": "1e-5", "flip": "false", "steps": "1_000", "walltime": "12:30:00", "select": "", "data": "shapes", "optimizer_options": "eps: 1e-6"}
    made = plan(TRAIN, given, request=SLURM, folder="runs/one", offline=False)
    submit(made)
    read = read_yaml_file(str(made.spec.folder / "launch.yaml"))
    assert read == {"lr": 1e-5, "flip": False, "steps": 1000, "walltime": "12:30:00", "select": "", "data": "shapes", "optimizer_options": "eps: 1e-6"}
    assert check_settings(made.notebook, read)[1] == check_settings(made.notebook, given)[1]


def test_nothing_is_written_by_a_plan_or_a_refusal(fake, tmp_path):
    made = plan(TRAIN, {"steps": 2}, grid=parse_sweep(["seed=1..3"]), request=SLURM, folder="runs/sweep", offline=False)
    assert str(made) and made.script and tree(tmp_path) == {}
    fake.refused = {1}
    with pytest.raises(ClusterError, match="Invalid account"):
        submit(made)
    assert "runs.txt" in fake.seen[0][2] and tree(tmp_path) == {}  # all was there when the scheduler looked
    assert submit(made) == ["2"]
    assert read_json(made.spec.runs[2] / "job.json")["task"] == 2
    fake.jobs["2"] = "gone"
    again, before = plan_again("runs/sweep", offline=False), tree(tmp_path)
    fake.refused = {3}
    with pytest.raises(ClusterError):
        submit(again)
    assert tree(tmp_path) == before


def test_again_takes_what_is_missing_and_failed_and_never_what_lives(fake):
    made = plan(TRAIN, {"steps": 2}, grid=parse_sweep(["seed=1..6"]), request=replace(SLURM, time="1:00:00"), folder="runs/sweep", offline=False)
    submit(made)
    done, failed, running, stopped, missing, dead = made.spec.runs
    import os
    import socket
    import time

    alive = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
    for run, status in ((done, {"state": "done"}), (failed, {"state": "failed", "reason": "NaN"}), (running, {"state": "running", **alive}),
                        (stopped, {"state": "preempted"}), (dead, {"state": "running", **alive, "pid": 2**22 + 1})):
        write_json(run / "status.json", status)
    assert plan_again("runs/sweep", offline=False).spec.runs == (failed,)  # the rest may still be in the queue
    fake.jobs["1"] = "gone"
    again = plan_again("runs/sweep", offline=False)
    assert again.spec.runs == (failed, stopped, missing, dead) and again.spec.time == "1:00:00"
    assert again.left == {done.name: "done", running.name: "running"}
    submit(again)
    assert (made.spec.folder / "runs.txt").read_text().split() == [str(run) for run in made.spec.runs]
    assert plan_again("runs/sweep", offline=False).spec.runs == (failed,)  # its array has not ended, it has
    assert plan_again(missing, offline=False).spec.runs == ()


def test_queued_jobs_run_the_notebook_of_their_day(fake, tmp_path):
    mine = tmp_path / "mine.ipynb"
    mine.write_text(TRAIN.read_text())
    made = plan(mine, {"steps": 2}, request=SLURM, folder="runs/one", offline=False)
    submit(made)
    mine.write_text("changed")
    assert read_notebook(fake.seen[0][0].notebook).parameters == read_notebook(TRAIN).parameters
    mine.unlink()
    fake.jobs["1"] = "gone"
    assert plan_again("runs/one", offline=False).spec.runs == made.spec.runs


def test_chain_is_all_or_nothing_and_waits(fake, tmp_path):
    links = {"scheduler": "slurm", "links": [
        {"notebook": "precompute", "settings": {"preset": "latent-tiny"}},
        {"notebook": "train", "settings": {"preset": "latent-tiny"}, "sweep": {"seed": "1..2", "lr": [1e-3, 2e-3]}},
        {"notebook": "evaluate", "settings": {"models": "{train}"}}]}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(links))
    plans = plan_chain(tmp_path / "chain.yaml", find=lambda name: ROOT / "nbs" / f"{name}.ipynb", root="runs")  # all checks included
    before = tree(tmp_path)
    fake.refused = {3}
    with pytest.raises(ClusterError):
        submit(*plans)
    assert tree(tmp_path) == before and set(fake.jobs.values()) == {"gone"}
    ids = submit(*plans)
    assert [spec.after for spec, *_ in fake.seen[3:]] == [(), (ids[0],), (ids[1],)]
    for run in plans[1].spec.runs:
        (run / "checkpoints").mkdir()
    judged = yaml.safe_load((plans[2].spec.folder / "launch.yaml").read_text())["models"]
    assert sorted(expand(judged)) == sorted(map(str, plans[1].spec.runs))  # although their names have commas


def test_names_are_stable_and_apart():
    book = read_notebook(TRAIN)
    names = [c.name for c in make_cells(book, {"steps": 2}, {"data": ["a/x", "b/x", "c"], "seed": [1]})]
    assert len(set(names)) == 3 and names[2] == "data=c,seed=1" and all("/" not in name and len(name) < 110 for name in names)
    assert names == [c.name for c in make_cells(book, {"steps": 2}, {"data": ["a/x", "b/x", "c"], "seed": [1]})]


@pytest.mark.slow
def test_sweep_of_real_runs_on_this_machine(tmp_path, monkeypatch):
    """Two by two, two at a time, in processes of this machine; then nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = {**TINY, "steps": 2, "score_images": 0, "validation_images": 8, "limit": 32, "trackers": "none"}
    made = plan(TRAIN, small, grid=parse_sweep(["lr=1e-3,2e-3", "seed=1..2"]), request=make_request(scheduler="local", max_parallel=2), folder="runs/sweep")
    submit(made)
    states = follow([made])
    assert [state for state, _ in states.values()] == ["done"] * 4, states
    for run in made.spec.runs:
        assert read_status(run)["step"] == 2 and (run / "report.ipynb").exists()
        settings = yaml.safe_load((run / "settings.yaml").read_text())
        assert run.name == f"lr={settings['lr']},seed={settings['seed']}"
    assert plan_again("runs/sweep").spec.runs == ()
    assert json.loads((made.spec.runs[0] / "job.json").read_text())["scheduler"] == "local" and shlex.join(made.command) and sys.executable
