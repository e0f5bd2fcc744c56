"""A search is its folder: workers come and go, are killed, stopped and started again, and twelve trials are twelve results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("optuna")

from difflit.config import SearchSettings, SettingsError, resolve  # noqa: E402
from difflit.evaluation import is_lower_better  # noqa: E402
from difflit.runs import finish, open_run, read_status  # noqa: E402
from difflit.search import open_search, read_objective, read_search, read_search_settings, search_job  # noqa: E402

HERE = Path(__file__).resolve().parent
USUAL = {"space": "lr=1e-5..1e-1:log batch_size=8,32,128", "trials": 12, "poll_seconds": 0.05}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


# Workers: processes of their own, forked from one that has imported everything already


def stand_in(seconds):
    return lambda notebook, report, settings, run_dir: [sys.executable, "-S", str(HERE / "trials.py"), str(seconds), str(run_dir), str(settings)]


def work(run_dir, seconds=0.0, **given):
    """One worker to its end."""
    run = open_run({**USUAL, "run_dir": str(run_dir), **given}, cls=SearchSettings, kind="search")
    found = search_job(run, command=stand_in(seconds))
    finish(run)
    return found


def serve():
    """Fork a worker for each line of JSON and tell its number."""
    import optuna.pruners  # noqa: F401
    import optuna.samplers  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            sys.stdin = open(os.devnull)
            log = os.open(order.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            return work(**order)
        print(pid, flush=True)


class Workers:
    """Forked workers by their number."""

    def __init__(self):
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_search import serve; serve()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def start(self, run_dir, **given):
        order = {"run_dir": str(run_dir), "log": f"{run_dir}.log", **given}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        until(lambda: (read_status(run_dir) or {}).get("pid") == pid)
        return pid


@pytest.fixture(scope="module")
def workers():
    made = Workers()
    yield made
    made.process.kill()
    made.process.wait()


def until(what, seconds=120):
    """Wait until something is true; the value of it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def ended(run_dir, state="done"):
    """Wait for a worker's end."""
    log = Path(f"{run_dir}.log")
    status = until(lambda: (s := read_status(run_dir)) and s["state"] != "running" and s)
    assert status["state"] == state, (status, log.read_text()[-3000:] if log.exists() else "")


def in_the_middle(folder, run_dir):
    """Wait until a worker's trial is in its middle; the trial's run directory."""

    def look():
        for path in sorted(folder.glob("trial-*")):
            told = read_status(path) or {}
            if told.get("state") == "running" and 3 <= told["step"] <= 7 and owner(folder, path.name) == str(run_dir):
                return path
        return None

    return until(look)


def owner(folder, name):
    """The run directory of the worker that has a trial, as the journal says."""
    said = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines() if '"owner"' in line or '"run"' in line]
    runs = {}
    for entry in said:
        runs.setdefault(entry.get("trial_id"), {}).update(entry.get("user_attr", {}))
    mine = [told["owner"]["run"] for told in runs.values() if told.get("run") == name and "owner" in told]
    return mine[-1] if mine else None


def assert_whole(folder, trials=12):
    """All results are there, each once, and each is what its settings come to."""
    found = read_search(folder)
    assert [t.name for t in found.trials] == [f"trial-{i:04d}" for i in range(trials)]
    assert {t.state for t in found.trials} <= {"done", "pruned"} and len(found.ended) == trials and found.ranked
    for t in found.trials:
        told = (folder / t.name / "launch.yaml").read_text()
        assert f"batch_size: {t.chosen['batch_size']}" in told and t.attempts == len((folder / t.name / "starts").read_text().splitlines())
    return found


# Killed


@pytest.mark.parametrize("with_trial", [True, False], ids=["with its trial", "alone"])
def test_twelve_trials_two_workers_one_killed(workers, tmp_path, with_trial):
    """Its trial goes on from where it died; a trial that outlives its worker is not done twice. The killed worker comes back and helps."""
    folder, runs = tmp_path / "search", [tmp_path / "worker-1", tmp_path / "worker-2"]
    given = {"folder": str(folder), "seconds": 0.06, "prune": "none"}
    pids = [workers.start(run, worker=i + 1, **given) for i, run in enumerate(runs)]
    trial = in_the_middle(folder, runs[0])
    os.kill(pids[0], signal.SIGKILL)
    if with_trial:
        os.kill(read_status(trial)["pid"], signal.SIGKILL)
    until(lambda: read_status(runs[0])["state"] == "dead")
    workers.start(runs[0], worker=1, resume="auto", **given)
    for run in runs:
        ended(run)
    found = assert_whole(folder)
    assert [t.name for t in found.trials if t.attempts > 1] == ([trial.name] if with_trial else [])
    assert {t.state for t in found.trials} == {"done"}
    starts = [int(step) for step in (trial / "starts").read_text().split()]
    assert starts[0] == 0 and all(step >= 3 for step in starts[1:])


def test_the_other_worker_finishes_without_the_killed_one(workers, tmp_path):
    """Nobody starts it again, and what it had at the very end is taken over by the one that waits."""
    folder, runs = tmp_path / "search", [tmp_path / "worker-1", tmp_path / "worker-2"]
    given = {"folder": str(folder), "trials": 4, "prune": "none", "startup": 9}
    pid = workers.start(runs[0], seconds=0.5, **given)
    trial = in_the_middle(folder, runs[0])
    workers.start(runs[1], seconds=0.0, **given)
    until(lambda: (folder / "journal.log").exists() and sum((read_status(p) or {}).get("state") == "done" for p in folder.glob("trial-*")) == 3)
    assert read_status(runs[1])["state"] == "running"
    os.kill(pid, signal.SIGKILL), os.kill(read_status(trial)["pid"], signal.SIGKILL)
    ended(runs[1])
    assert [t.attempts for t in assert_whole(folder, 4).trials] == [2, 1, 1, 1]


def test_a_killed_search_repeats_to_the_digit(workers, tmp_path):
    """One worker with a seed: the same trials, the same values, the same prunings, however often it is killed, and however seldom it looks."""
    whole = work(tmp_path / "whole", 0.0)
    slow = work(tmp_path / "slow", 0.0, poll_seconds=0.3)
    broken = tmp_path / "broken"
    pid = workers.start(broken, seconds=0.05)
    for again in range(2):
        trial = in_the_middle(broken, broken)
        os.kill(pid, signal.SIGKILL), os.kill(read_status(trial)["pid"], signal.SIGKILL)
        until(lambda: read_status(broken)["state"] == "dead")
        pid = workers.start(broken, seconds=0.05, resume="auto")
        until(lambda before=again: len(read_search(broken).ended) > 2 * before + 2)
    ended(broken)
    told = [[(t.name, t.chosen, t.state, t.value) for t in found.trials] for found in (whole, slow, assert_whole(broken))]
    assert told[0] == told[1] == told[2]
    assert {state for _, _, state, _ in told[0]} == {"done", "pruned"}
    assert (tmp_path / "whole" / "best.yaml").read_text() == (broken / "best.yaml").read_text()


# Stopped


def test_a_stopped_worker_stops_its_trial_and_goes_on(workers, tmp_path):
    """SIGTERM: the trial saves, the worker is preempted; started again, it goes on with that very trial. That is no death: no retry is used up."""
    folder = tmp_path / "search"
    pid = workers.start(folder, seconds=0.1, trials=3, retries=0, prune="none")
    trial = in_the_middle(folder, folder)
    os.kill(pid, signal.SIGTERM)
    ended(folder, "preempted")
    assert read_status(trial)["state"] == "preempted" and "SIGTERM" in read_status(trial)["reason"] and not (trial / "stop.now").exists()
    workers.start(folder, seconds=0.0, trials=3, retries=0, prune="none", resume="auto")
    ended(folder)
    assert [t.attempts for t in assert_whole(folder, 3).trials].count(2) == 1


def test_a_trial_that_always_dies_is_given_up(workers, tmp_path):
    """Settings that bring their process down are tried `retries` times more, and no longer."""
    run = open_run({**USUAL, "run_dir": str(tmp_path / "s"), "trials": 2, "retries": 1, "failures": 9}, cls=SearchSettings, kind="search")
    found = search_job(run, command=lambda *words: ["/bin/sh", "-c", "echo the machine is full; kill -9 $$"])
    finish(run)
    assert [(t.state, t.attempts) for t in found.trials] == [("failed", 2)] * 2
    assert "its process died 2 times; papermill said last: the machine is full" in found.trials[0].reason


# The journal


def test_a_torn_journal_is_healed(tmp_path):
    folder = tmp_path / "search"
    work(folder, trials=2)
    before = (folder / "journal.log").read_bytes()
    (folder / "journal.log").write_bytes(before + b'{"op_code":5,"worker_id":"x","trial_id":1,"st')
    assert len(work(folder, trials=4, resume="auto").ended) == 4
    assert (folder / "journal.log").read_bytes().startswith(before)
    for line in (folder / "journal.log").read_text().splitlines():
        json.loads(line)


# Settings


WRONG = [
    ({"space": "lr=1e-5..20:log"}, "lr=20.0: input should be less than 10"),
    ({"space": "lrr=1,2"}, "did you mean 'lr'"),
    ({"space": "lr"}, "neither name=values"),
    ({"space": ""}, "nothing varies"),
    ({"space": "lr=1e-3..1e-5"}, "from the smaller number to the larger"),
    ({"space": "flip=yes,perhaps"}, "declares flip as bool"),
    ({"fixed": "stepz=3"}, "did you mean 'steps'"),
    ({"fixed": "lr=1"}, "lr varies, and is fixed as well"),
    ({"objective": "beauty"}, "is higher better, or lower?"),
    ({"objective": "judge/alignment"}, "judge_every_steps"),
    ({"objective": "vall_loss"}, "did you mean 'val_loss'"),
    ({"prune_by": "vall_loss"}, "prune_by='vall_loss'"),
    ({"notebook": "trian"}, "did you mean 'train'"),
    ({"method": "grid"}, "has none; list them with commas"),
    ({"space": "none.yaml"}, "there is no settings file none.yaml"),
]


@pytest.mark.parametrize("given, says", WRONG, ids=[says for _, says in WRONG])
def test_a_mistake_is_told_before_anything_starts(tmp_path, given, says):
    settings = resolve({**USUAL, **given}, cls=SearchSettings)
    for door in (read_search_settings, open_search):
        with pytest.raises(SettingsError, match=".*") as raised:
            door(settings, tmp_path / "search")
        assert says in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "search").exists()


def test_directions_agree_with_the_scorecards():
    for name in ("fd.random", "kid.inception", "is.inception", "precision.random", "recall.random", "clip.score", "alignment.colour", "restoration.plain",
                 "restoration.psnr", "digit_agreement", "nearest_caption", "found.at_0.1", "density.random", "coverage.random", "wins.alignment"):
        assert read_objective(name)[1] is not is_lower_better(name), name


def test_a_score_is_maximised_while_a_loss_prunes(tmp_path):
    found = work(tmp_path / "search", objective="alignment.colour", prune="halving")
    assert found.higher and {t.state for t in found.trials} == {"done", "pruned"}
    assert found.ranked[0].value == max(t.value for t in found.ranked)
    losses = {t.name: float((tmp_path / "search" / t.name / "metrics.csv").read_text().splitlines()[-1].split(",")[1]) for t in found.ranked}
    assert found.ranked[0].name == min(losses, key=losses.get)


def test_the_best_settings_train(tmp_path):
    found = work(tmp_path / "search", fixed="preset=digits epochs=2 image_size=16", trials=3)
    settings = resolve({}, file=tmp_path / "search" / "best.yaml")
    assert (settings.preset, settings.epochs, settings.steps, settings.image_size) == ("digits", 2, None, 16)
    assert settings.lr == found.ranked[0].chosen["lr"] and settings.batch_size == found.ranked[0].chosen["batch_size"]


# The notebook


REAL = ("image_size=16 limit=64 batch_size=8 steps=8 score_images=0 sampler_steps=1 validation_images=8 workers=0 trackers=none channels=32 precision=fp32 "
        "checkpoint_every_steps=2")


def papermill(folder, number, *words):
    """A worker as a job starts it."""
    run = folder.parent / f"worker-{number}"
    run.mkdir(exist_ok=True)
    out = run / f"report.{len(list(run.glob('report*')))}.ipynb"
    settings = {"folder": folder, "run_dir": run, "worker": number, "space": "lr=1e-4..1e-1:log uncond_p=0.0..0.3", "fixed": REAL, "trials": 12}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(ROOT / "nbs" / "search.ipynb"), str(out), *words]
    command += [word for name, value in settings.items() for word in ("-p", name, str(value))]
    log = open(run / "papermill.log", "ab")
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder.parent, env=ENVIRONMENT, start_new_session=True), out


@pytest.mark.slow
def test_twelve_real_trials_two_jobs_one_killed(tmp_path):
    """Each worker a papermill job, each trial one too; a job is killed with all it had started, and submitted again."""
    folder = tmp_path / "search"
    jobs = [papermill(folder, number) for number in (1, 2)]
    run = tmp_path / "worker-1"
    trial = until(lambda: next((p for p in sorted(folder.glob("trial-*")) if (s := read_status(p)) and s["state"] == "running" and s.get("step", 0) >= 1
                                and owner(folder, p.name) == str(run)), None), 600)
    os.killpg(jobs[0][0].pid, signal.SIGKILL), os.kill(read_status(run)["pid"], signal.SIGKILL), os.kill(read_status(trial)["pid"], signal.SIGKILL)
    jobs[0][0].wait(60)
    until(lambda: read_status(run)["state"] == "dead", 60)
    jobs[0] = papermill(folder, 1, "-p", "resume", "auto")
    for process, _ in jobs:
        assert process.wait(2400) == 0
    found = read_search(folder)
    assert len(found.ended) == 12 and {t.state for t in found.trials} <= {"done", "pruned"}
    assert next(t for t in found.trials if t.name == trial.name).attempts == 2 and (trial / "report.1.ipynb").exists()
    for _, report in jobs:
        text = report.read_text()
        assert "trial-0011" in text and "best.yaml" in text and "Traceback" not in text and len(text) < 3_000_000
