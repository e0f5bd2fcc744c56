"""Jobs of a real Slurm, of this machine, and of stand-ins for the schedulers that cannot be installed: what they start, stop, queue again and say of it."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from conftest import ROOT
import standin as standin_module
from slurm import slurm  # noqa: F401
from test_survival import MICRO, assert_same

from difflit.files import write_json
from difflit.runs import read_status
from difflit.schedulers import JobSpec, Profile, get_scheduler

HPC = ROOT / "hpc"
TEMPLATES = ("slurm", "lsf", "pbs", "sge", "local")


@pytest.fixture(autouse=True, scope="module")
def surroundings():
    """What a login shell would have set: the code under test, few threads, torch's processes on the loopback."""
    given = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def notebook(path, parameters, *cells):
    """A run notebook of few cells."""
    made = [{"cell_type": "code", "execution_count": None, "id": f"cell{i}", "metadata": {} if i else {"tags": ["parameters"]}, "outputs": [], "source": text}
            for i, text in enumerate([parameters, *cells])]
    write_json(path, {"cells": made, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4,
                      "nbformat_minor": 5})
    return path


TOY = ["run_dir = None\nresume = None\nseconds = 0\nwrong = False",
       "import os, sys, time\nfrom difflit.runs import Run, _begin, fail, finish\nrun = Run(run_dir, 'toy', '')\n_begin(run)\n"
       "run.update(began=time.time())",
       "time.sleep(seconds)\nif wrong:\n    fail(run, 'a wrong answer')\n"
       "run.update(over=time.time(), prefix=sys.prefix, job=os.environ['DIFFLIT_JOB'])\nfinish(run)"]
MICRO_CELLS = [
    "run_dir: str = None\nresume: str = None\n" + "".join(f"{name}: {type(value).__name__} = {value!r}\n" for name, value in MICRO.items()) + "pause = 0",
    "import difflit.runs, test_survival\nfrom difflit.recipes import prepare, train_job\nfrom difflit.runs import finish, open_notebook_run\n"
    "difflit.runs.HEARTBEAT_SECONDS = 0.5  # the steps are read from the status, and all of them take a few seconds\n"
    "test_survival.register()\nwait, In = pause, [text.replace('pause', '# pause') for text in In]\nrun = open_notebook_run(In)\njob = prepare(run)",
    "test_survival.PLAN.update({step: 'pause' for step in range(2, int(wait) + 2)})\ntrain_job(job, show=False)", "finish(run)"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A notebook that opens a run, sleeps and ends it."""
    return notebook(tmp_path_factory.mktemp("notebooks") / "toy.ipynb", *TOY)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A notebook that trains a network in milliseconds, or slowly by `pause`, which is no setting."""
    return notebook(tmp_path_factory.mktemp("notebooks") / "micro.ipynb", *MICRO_CELLS)


def spec_of(path, run_notebook, scheduler, runs=1, launch=None, **how):
    """A job, or an array of so many runs, with their settings."""
    profile = how.pop("profile", Profile(scheduler=scheduler, cpus_per_gpu=1, time="20m"))
    folders = (path / "run",) if runs == 1 else tuple(path / f"run={i}" for i in range(runs))
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "launch.yaml").write_text(json.dumps(launch or {}))
    return JobSpec(path.name, run_notebook, folders, folders[0] if runs == 1 else path, profile, **how)


def submit(spec):
    """Render, write, submit; the job's number."""
    scheduler = get_scheduler(spec.profile.scheduler)
    spec.folder.mkdir(exist_ok=True)
    (spec.folder / "job.sh").write_text(scheduler.render(spec))
    return scheduler.submit(spec, spec.folder / "job.sh")


def state(run):
    status = read_status(run) or {}
    return status.get("state"), status.get("reason")


def logs(spec):
    """What a job said, for messages."""
    return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-3000:]}" for run in {spec.folder, *spec.runs} for file in (run / "logs").glob("*.log"))


def until(true, what, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def steps_done(run):
    return (read_status(run) or {}).get("step", 0)


# The scripts as people read them


@pytest.mark.parametrize("path", sorted(HPC.glob("*.sh")), ids=lambda p: p.stem)
def test_every_script_is_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scripts_share_what_is_common():
    """What follows the last heading is the same in all of them, to the byte."""
    common = {(HPC / f"{name}.sh").read_text().partition("# --- The same in all scripts of this folder")[2] for name in TEMPLATES}
    assert len(common) == 1 and common.pop().count("\n") > 40


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("runs", [1, 3])
def test_a_rendered_script_differs_in_its_settings_only(tmp_path, name, runs):
    spec = spec_of(tmp_path / "a b", ROOT / "nbs" / "train.ipynb", name, runs, gpus=2, nodes=1 if name == "local" else 2, processes=2, max_parallel=2)
    text, template = get_scheduler(name).render(spec), (HPC / f"{name}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for part in (0, -1):
        assert re.split(r"(?m)^# (?:>>>|<<<) settings.*\n", text)[part] == re.split(r"(?m)^# (?:>>>|<<<) settings.*\n", template)[part]
    names = {n: set(re.findall(r"(?m)^([A-Z_]+)=", re.split(r"(?m)^# (?:>>>|<<<) settings.*\n", t)[1])) for n, t in (("text", text), ("template", template))}
    assert names["text"] == names["template"], "a setting of the script that nobody writes"


# A real Slurm


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory, micro):  # noqa: F811
    """A run of 24 steps that nothing befell."""
    spec = spec_of(tmp_path_factory.mktemp("undisturbed") / "whole", micro, "slurm", launch={"steps": 24})
    assert slurm.end(submit(spec)) == "COMPLETED", logs(spec)
    return spec.runs[0]


def test_slurm_begins_ends_and_queues_again_to_the_bit(slurm, tmp_path, micro, whole):  # noqa: F811
    """Two runs of the same settings: one is left alone, one is warned in its middle and goes on in report.1.ipynb."""
    stopped = spec_of(tmp_path / "stopped", micro, "slurm", launch={"steps": 24, "pause": 20})
    second, run = submit(stopped), stopped.runs[0]
    until(lambda: steps_done(run) >= 3, f"three steps: {logs(stopped)}")
    assert get_scheduler("slurm").states([second, "99999"]) == {second: "running", "99999": "gone"}
    slurm.tell("scancel", "--batch", "--signal=USR2", second)
    until(lambda: state(run)[0] == "preempted", f"a checkpoint: {logs(stopped)}")
    assert "SIGUSR2" in state(run)[1] and 3 <= steps_done(run) < 24
    assert slurm.end(second) == "COMPLETED", logs(stopped)
    assert state(run)[0] == "done" and (run / "requeues").read_text() == "1", logs(stopped)
    assert {p.name for p in run.glob("report*")} == {"report.ipynb", "report.1.ipynb"}
    assert_same(whole, run)


def test_slurm_arrays(slurm, tmp_path, toy):  # noqa: F811
    """Four runs, two at a time; one of them fails, and is not begun again."""
    spec = spec_of(tmp_path / "sweep", toy, "slurm", 4, launch={"seconds": 1}, max_parallel=2)
    (spec.runs[2] / "launch.yaml").write_text("wrong: true\n")
    job = submit(spec)
    slurm.end(job)
    assert [state(run)[0] for run in spec.runs] == ["done", "done", "failed", "done"], logs(spec)
    assert slurm.state(f"{job}_2") == "FAILED" and slurm.state(f"{job}_3") == "COMPLETED"
    statuses = [read_status(run) for run in spec.runs]
    assert [status["job"] for status in statuses] == [f"{job}_{i}" for i in range(4)]
    assert all(sum(one["began"] <= other["began"] < one["over"] for one in statuses) <= 2 for other in statuses), "more than two at a time"
    assert not list(tmp_path.glob("sweep/*/report.1.ipynb"))


def test_slurm_array_tasks_queue_themselves_only(slurm, tmp_path, toy):  # noqa: F811
    """A run that is stopped in the middle of an array does not begin its neighbour anew; and after so many requeues it is enough."""
    spec = spec_of(tmp_path / "pair", toy, "slurm", 2, launch={"seconds": 60}, requeues=1)
    (spec.runs[0] / "launch.yaml").write_text("seconds: 3\n")
    job = submit(spec)
    for _ in range(2):
        until(lambda: state(spec.runs[1])[0] == "running", f"a start: {logs(spec)}")
        slurm.tell("scancel", "--batch", "--signal=USR2", f"{job}_1")
        until(lambda: state(spec.runs[1])[0] == "preempted", f"a stop: {logs(spec)}")
    slurm.end(job)
    assert slurm.state(f"{job}_1") == "FAILED" and "queued again 1 times already" in logs(spec)
    assert len(list(spec.runs[0].glob("report*"))) == 1 and len(list(spec.runs[1].glob("report*"))) == 2
    assert state(spec.runs[0])[0] == "done"


def test_slurm_a_cancelled_job_stops_and_stays_away(slurm, tmp_path, toy):  # noqa: F811
    spec = spec_of(tmp_path / "cancelled", toy, "slurm", launch={"seconds": 60})
    job = submit(spec)
    until(lambda: state(spec.runs[0])[0] == "running", f"a start: {logs(spec)}")
    get_scheduler("slurm").cancel(job)
    assert slurm.end(job) == "CANCELLED"
    assert state(spec.runs[0]) == ("preempted", "SIGTERM outside the training loop"), logs(spec)
    time.sleep(3)
    assert slurm.state(job) == "CANCELLED" and get_scheduler("slurm").states([job]) == {job: "gone"}


def test_slurm_a_killed_kernel_is_a_failure_and_ends_a_chain(slurm, tmp_path, toy):  # noqa: F811
    """papermill calls every cell of it completed. What waited for it never begins; what waited for a good one does."""
    spec = spec_of(tmp_path / "killed", toy, "slurm", launch={"seconds": 60})
    job = submit(spec)
    after = submit(spec_of(tmp_path / "after", toy, "slurm", after=(job,)))
    status = until(lambda: state(spec.runs[0])[0] == "running" and read_status(spec.runs[0]), f"a start: {logs(spec)}")
    os.kill(status["pid"], signal.SIGKILL)
    assert slurm.end(job) == "FAILED"
    assert state(spec.runs[0])[0] == "failed" and "its kernel was killed" in state(spec.runs[0])[1], logs(spec)
    assert slurm.end(after) == "CANCELLED" and not (tmp_path / "after" / "run" / "status.json").exists()
    good = submit(spec_of(tmp_path / "good", toy, "slurm"))
    last = submit(spec_of(tmp_path / "last", toy, "slurm", after=(good,)))
    assert slurm.end(good) == slurm.end(last) == "COMPLETED"
    assert read_status(tmp_path / "good" / "run")["over"] <= read_status(tmp_path / "last" / "run")["began"]


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MB that nobody else uses."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system of one's own can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_slurm_a_full_disk_is_a_failure_and_the_run_goes_on(slurm, disk, micro, whole):  # noqa: F811
    """The disk is filled in mid-run: it fails by name and is not begun again, its last checkpoint is whole, and with room it ends as if nothing had been."""
    spec = spec_of(disk / "full", micro, "slurm", launch={"steps": 24, "pause": 20})
    job, run = submit(spec), spec.runs[0]
    until(lambda: steps_done(run) >= 4 and list((run / "checkpoints").glob("step-*")), f"a checkpoint: {logs(spec)}")
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert slurm.end(job) == "FAILED", logs(spec)
    assert state(run)[0] == "failed" and "No space left" in state(run)[1], (state(run), logs(spec))
    assert not (run / "requeues").exists() and len(list(run.glob("report*"))) == 1
    assert not [p for p in run.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"], "nothing half-written stays"
    ballast.unlink()
    again = submit(replace(spec, name="again"))
    assert slurm.end(again) == "COMPLETED", logs(spec)
    assert_same(whole, run)


RANKS = ["run_dir = None\nresume = None", "import os, time\nfrom difflit.runs import Run, _begin, finish\nrun = Run(run_dir, 'toy', '')\n_begin(run)",
         "print('I am', run.rank, 'of', run.world, 'at', os.environ['GROUP_RANK'])\ntime.sleep(0.5)\nfinish(run)"]


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_slurm_several_processes(slurm, tmp_path, nodes):  # noqa: F811
    """Two kernels on each node by torchrun: rank 0's notebook is the report, the others' are logs."""
    profile = Profile(scheduler="slurm", cpus_per_gpu=1, partition="both" if nodes == 2 else None)
    spec = spec_of(tmp_path / "ranks", notebook(tmp_path / "ranks.ipynb", *RANKS), "slurm", profile=profile, processes=2, nodes=nodes)
    assert slurm.end(submit(spec)) == "COMPLETED", logs(spec)
    run = spec.runs[0]
    for rank, file in enumerate([run / "report.ipynb", *(run / "logs" / f"rank-{rank}.ipynb" for rank in range(1, 2 * nodes))]):
        assert f"I am {rank} of {2 * nodes} at {rank // 2}" in file.read_text(), logs(spec)


def test_slurm_would_refuse(slurm, tmp_path, toy):  # noqa: F811
    from difflit.schedulers import ClusterError

    spec = spec_of(tmp_path / "large", toy, "slurm", profile=Profile(scheduler="slurm", partition="night"))
    (spec.folder / "job.sh").write_text(get_scheduler("slurm").render(spec))
    for call in (get_scheduler("slurm").check, get_scheduler("slurm").submit):
        with pytest.raises(ClusterError, match="nvalid partition"):
            call(spec, spec.folder / "job.sh")
    spec = replace(spec, profile=Profile(scheduler="slurm", cpus_per_gpu=1))
    (spec.folder / "job.sh").write_text(get_scheduler("slurm").render(spec))
    assert "to start at" in get_scheduler("slurm").check(spec, spec.folder / "job.sh")


@pytest.mark.slow
def test_slurm_warns_before_the_time_limit(slurm, tmp_path, micro):  # noqa: F811
    """Slurm's own clock: a limit of two minutes, told 15 s before. The same run in the end as without a limit."""
    whole = spec_of(tmp_path / "whole", micro, "slurm", launch={"steps": 240})
    spec = spec_of(tmp_path / "limited", micro, "slurm", launch={"steps": 240, "pause": 220}, time="2m")  # over two minutes of pauses
    first, job = submit(whole), submit(spec)
    assert slurm.end(job, 900) == slurm.end(first) == "COMPLETED", logs(spec)
    assert int((spec.runs[0] / "requeues").read_text()) >= 1 and state(spec.runs[0])[0] == "done"
    assert_same(whole.runs[0], spec.runs[0])


@pytest.mark.slow
def test_slurm_preempts(slurm, tmp_path, micro, toy):  # noqa: F811
    """A job of a partition of higher priority needs the node: TERM, a checkpoint, and later the same run."""
    whole = spec_of(tmp_path / "whole", micro, "slurm", launch={"steps": 40})
    assert slurm.end(submit(whole)) == "COMPLETED", logs(whole)
    spec = spec_of(tmp_path / "low", micro, "slurm", launch={"steps": 40, "pause": 30})
    job = submit(spec)
    until(lambda: steps_done(spec.runs[0]) >= 3, f"three steps: {logs(spec)}")
    high = spec_of(tmp_path / "high", toy, "slurm", profile=Profile(scheduler="slurm", partition="high", cpus_per_gpu=4, time="5m"))
    urgent = submit(high)
    until(lambda: state(spec.runs[0])[0] == "preempted", f"a checkpoint: {logs(spec)}")
    assert steps_done(spec.runs[0]) >= 3
    assert slurm.end(urgent) == "COMPLETED" and slurm.end(job) == "COMPLETED", logs(spec)
    assert len(list(spec.runs[0].glob("report*"))) == 2
    assert_same(whole.runs[0], spec.runs[0])


@pytest.mark.slow
def test_slurm_a_node_that_goes_down(slurm, tmp_path, toy):  # noqa: F811
    """Slurm queues the job again by itself; a node that is drained lets its job finish and takes no other."""
    spec = spec_of(tmp_path / "down", toy, "slurm", launch={"seconds": 8})
    job = submit(spec)
    until(lambda: state(spec.runs[0])[0] == "running", f"a start: {logs(spec)}")
    slurm.tell("scontrol", "update", "NodeName=one", "State=DRAIN", "Reason=test")
    waits = submit(spec_of(tmp_path / "waits", toy, "slurm"))
    assert slurm.end(job) == "COMPLETED" and slurm.state(waits) == "PENDING"
    slurm.tell("scontrol", "update", "NodeName=one", "State=RESUME")
    assert slurm.end(waits) == "COMPLETED"
    spec = spec_of(tmp_path / "dies", toy, "slurm", launch={"seconds": 15})
    job = submit(spec)
    until(lambda: state(spec.runs[0])[0] == "running", f"a start: {logs(spec)}")
    slurm.tell("scontrol", "update", "NodeName=one", "State=DOWN", "Reason=test")
    until(lambda: slurm.state(job) == "PENDING", "Slurm to queue it again")
    slurm.tell("scontrol", "update", "NodeName=one", "State=RESUME")
    assert slurm.end(job) == "COMPLETED" and state(spec.runs[0])[0] == "done", logs(spec)


# Stand-ins for what cannot be installed


@pytest.fixture(params=["lsf", "pbs", "sge"])
def standin(request, tmp_path, monkeypatch):
    """A scheduler's commands, which record and run; its name and the folder of its records."""
    folder = tmp_path / "standin"
    monkeypatch.setenv("PATH", f"{standin_module.install(folder)}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(folder))
    monkeypatch.setenv("STANDIN_KIND", request.param)
    return request.param, folder


def over(folder, name, seconds=180):
    """Wait for the end of a task; its exit codes, one for each start."""
    until(lambda: (folder / f"{name}.over").exists(), f"{name}: {[f.read_text()[-2000:] for f in folder.glob('*.log')]}", seconds)
    return json.loads((folder / f"{name}.codes").read_text())


def test_standins_arrays(standin, tmp_path, toy):
    """Each task finds its own run, at most two at a time; the run that failed is not begun again."""
    kind, folder = standin
    spec = spec_of(tmp_path / "sweep", toy, kind, 3, max_parallel=2)
    (spec.runs[1] / "launch.yaml").write_text("wrong: true\n")
    job = submit(spec)
    first = 0 if kind == "pbs" else 1
    assert re.match(r"\d+", job)[0] == "1"
    assert [over(folder, f"1.{task}") for task in range(first, first + 3)] == [[0], [1], [0]], logs(spec)
    assert [state(run)[0] for run in spec.runs] == ["done", "failed", "done"]
    times = [[float(word) for word in line.split()] for line in (folder / "times").read_text().splitlines()]
    assert len(times) == 3 and all(sum(b <= begin < e for b, e in times) <= 2 for begin, _ in times)


WARNS = {"lsf": signal.SIGURG, "sge": signal.SIGUSR1, "pbs": signal.SIGUSR2}


def test_standins_warn_and_begin_again(standin, tmp_path, toy):
    """LSF by exit code 75, SGE by 99, PBS by a new job of the script's own; signals reach every process of the job's group."""
    kind, folder = standin
    spec = spec_of(tmp_path / "stopped", toy, kind, launch={"seconds": 60})
    submit(spec)
    run = spec.runs[0]
    until(lambda: state(run)[0] == "running", f"a start: {[f.read_text() for f in folder.glob('*.log')]}")
    (run / "launch.yaml").write_text("seconds: 0\n")
    os.killpg(int((folder / "1.pid").read_text()), WARNS[kind])
    codes = over(folder, "1")
    if kind == "pbs":
        assert codes == [75] and over(folder, "2") == [0]
    else:
        assert codes == [{"lsf": 75, "sge": 99}[kind], 0]
    assert state(run)[0] == "done" and (run / "requeues").read_text() == "1" and len(list(run.glob("report*"))) == 2


@pytest.mark.parametrize("standin", ["lsf"], indirect=True)
def test_lsf_what_is_killed_by_hand_stays_away(standin, tmp_path, toy):
    """bkill sends INT before TERM: the run saves, and the exit code is not the one that LSF queues again by."""
    kind, folder = standin
    spec = spec_of(tmp_path / "killed", toy, kind, launch={"seconds": 60})
    submit(spec)
    until(lambda: state(spec.runs[0])[0] == "running", "a start")
    os.killpg(int((folder / "1.pid").read_text()), signal.SIGINT)
    assert over(folder, "1") == [130] and state(spec.runs[0])[0] == "preempted"


@pytest.mark.parametrize("standin", ["sge"], indirect=True)
def test_sge_waits_for_jobs_that_ended_well(standin, tmp_path, toy):
    """SGE's own -hold_jid does not ask how they ended; the script does."""
    kind, folder = standin
    bad = submit(spec_of(tmp_path / "bad", toy, kind, launch={"wrong": True}))
    assert over(folder, bad) == [1]
    after = submit(spec_of(tmp_path / "after", toy, kind, after=(bad,)))
    assert json.loads((folder / f"{after}.words").read_text())[:3] == ["-terse", "-hold_jid", bad]
    assert over(folder, after) == [1] and state(tmp_path / "after" / "run")[0] is None


# Named launchers


KINDS = {"train": "TrainSettings", "precompute": "FillSettings", "evaluate": "EvaluateSettings", "audit": "AuditSettings"}


@pytest.mark.parametrize("name", ["precompute", "base", "upsampler", "latent", "evaluate", "audit", "ablations"])
def test_launchers_submit_settings_that_exist(tmp_path, monkeypatch, name):
    """With a `difflit` that records: every setting of the file is one of the notebook's."""
    from difflit import config

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "difflit").write_text('#!/bin/sh\nprintf "%s\\n" "$@" END >>words\n')
    (tmp_path / "bin" / "difflit").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    done = subprocess.run(["bash", str(HPC / f"{name}.sh"), "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (part.split("\n") for part in (tmp_path / "words").read_text().strip().removesuffix("END").split("\nEND\n")):
        assert words[0] == "submit" and "--dry-run" in words
        given = config.read_settings(tmp_path / words[words.index("-f") + 1])
        given |= {pair.partition("=")[0]: pair.partition("=")[2].split(",")[0] for pair in words if re.match(r"[a-z_]+=", pair) and ".." not in pair}
        config.resolve(given, cls=getattr(config, KINDS[words[1]]))
