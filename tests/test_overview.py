"""A hundred runs in the morning: torn, killed, empty and missing ones are all in the table, and nothing stops it."""

import base64
import csv
import io
import json
import os
import random
import socket
import time
from datetime import UTC, datetime

import numpy as np
import pytest
import yaml
from PIL import Image

from difflit.config import SettingsError, resolve, settings_yaml
from difflit.files import read_json, write_json
from difflit.overview import (
    RunRow,
    check_states,
    find_runs,
    job_key,
    list_rows,
    list_sweeps,
    read_run,
    read_tail,
    row_cells,
    runs_csv,
    runs_table,
    select_rows,
    sort_rows,
    varying_settings,
)
from difflit.tracking import read_metrics

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(64)).decode()


def iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def notebook(cells=3, **metadata):
    """An executed notebook as papermill leaves one."""
    code = [{"cell_type": "code", "id": f"c{i}", "execution_count": i + 1, "metadata": {"papermill": {"status": "completed", "exception": False}},
             "source": [f"step({i})"], "outputs": [{"output_type": "stream", "name": "stdout", "text": [f"did {i}\n"]}]} for i in range(cells)]
    return {"cells": code, "metadata": {"papermill": {"exception": None, **metadata}}, "nbformat": 4, "nbformat_minor": 5}


SETTINGS = settings_yaml(resolve({"preset": "shapes"}))  # all of them, as a run writes them


def make(path, state="done", step=300, begun=1_800_000_000.0, seconds=7200.0, **settings):
    """A run directory as a run of `step` steps leaves it."""
    path.mkdir(parents=True)
    ended = {} if state == "running" else {"ended": iso(begun + seconds)}
    status = {"kind": "train", "preset": "shapes", "state": state, "reason": None, "host": "elsewhere", "pid": 1, "started": iso(begun),
              "heartbeat": begun + seconds, "steps": 300, "step": step, **ended}
    (path / "status.json").write_text(json.dumps(status, indent=1))  # without waiting for the disk: they are many
    (path / "settings.yaml").write_text(SETTINGS + yaml.safe_dump({"run_dir": str(path), **settings}))
    rows = "".join(f"{s},{2 / s:.6f},{0.1 if s % 50 == 0 else ''},640.0\n" for s in range(1, step + 1))
    (path / "metrics.csv").write_text("step,loss,val_loss,images_per_second\n" + rows)
    (path / "scores.json").write_text(json.dumps({"shape": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 128, "protocol": "x"}}))
    (path / "environment.json").write_text(json.dumps({"gpus": ["H100", "H100"], "host": "elsewhere"}))
    (path / "report.ipynb").write_text(json.dumps(notebook()))
    return path


# One run, damaged


FILES = ("status.json", "settings.yaml", "metrics.csv", "scores.json", "environment.json", "report.ipynb")
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
    "only zeros": lambda data: bytes(len(data)),
    "noise": lambda data: bytes(random.Random(0).randbytes(400)),
    "a list": lambda data: b"[1, 2]",
    "wrong types": lambda data: b'{"state": 7, "step": "many", "started": 3, "heartbeat": "x", "pid": [], "shape": {"value": "good"}, "gpus": 3, "cells": 4}',
    "latin-1": lambda data: b'{"state": "d\xf6ne"}',
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_costs_what_it_held_and_nothing_else(tmp_path, file, damage):
    run = make(tmp_path / "run", lr=3e-4)
    (run / file).write_bytes(DAMAGE[damage]((run / file).read_bytes()))
    row = read_run(run)
    kept = {"status.json": row.state == "done", "settings.yaml": row.settings.get("lr") == 3e-4, "metrics.csv": row.val_loss == 0.1,
            "scores.json": row.scores == {"shape": 0.9}, "environment.json": row.gpus == ["H100", "H100"], "report.ipynb": True}
    assert [name for name, good in kept.items() if not good and name != file] == []
    assert row.step == 300 or file == "metrics.csv", "the step is told twice"
    if file == "status.json":
        assert row.state in ("unreadable", "7") and (row.faults or damage == "wrong types")
    row_cells(row, varying_settings([row]), ["shape"], time.time())
    runs_csv([row])
    runs_table([row])


def test_files_that_cannot_be_opened(tmp_path):
    run = make(tmp_path / "run")
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()  # whatever it was
    (run / "scores.json").unlink()
    (run / "scores.json").symlink_to(tmp_path / "gone.json")
    row = read_run(run)
    assert (row.state, row.step) == ("done", 300) and len(row.faults) == 2
    (tmp_path / "file").write_text("no directory")
    assert read_run(tmp_path / "file").state == "unreadable" and read_run(tmp_path / "nothing").state == "missing"


def test_a_run_that_says_running_and_is_not(tmp_path):
    run = make(tmp_path / "run", "running", begun=time.time() - 7200 - 300)  # five minutes without a word
    row = read_run(run)
    assert row.state == "dead" and row.step == 300 and row.gpu_hours == pytest.approx(2.0, abs=0.01)  # until its last word
    write_json(run / "status.json", read_json(run / "status.json") | {"heartbeat": time.time(), "host": socket.gethostname(), "pid": os.getpid()})
    assert read_run(run).state == "running"
    write_json(run / "status.json", read_json(run / "status.json") | {"pid": 2**22 + 1})
    assert read_run(run).state == "dead", "on this machine nobody need wait two minutes"


@pytest.mark.parametrize("rows", [1, 30, 5000])
def test_the_tail_is_what_the_whole_file_says(tmp_path, rows):
    """Against the reader of whole files, with any number of bytes from the end."""
    rng = np.random.default_rng(0)
    text = "step,loss,val_loss,lr\r\n" + "".join(f"{i},{rng.random():.9g},{'' if i % 7 else f'{rng.random():.9g}'},0.001\r\n" for i in range(1, rows + 1))
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    whole = {name: column[np.isfinite(column)] for name, column in read_metrics(path).items()}
    assert read_tail(path) == {"step": [rows], "loss": whole["loss"][-20:].tolist(), "val_loss": whole.get("val_loss", [])[-1:].tolist()}
    for size in (100, 1000, 10_000, 1 << 20):
        for name, values in read_tail(path, {"loss": 9999, "val_loss": 9999}, size).items():
            np.testing.assert_array_equal(values, whole[name][len(whole[name]) - len(values):])
    assert len(read_tail(path, {"loss": 9999}, 1 << 20)["loss"]) == rows


def test_a_far_validation_is_found(tmp_path):
    run = make(tmp_path / "run")
    rows = "".join(f"{s},{2 / s:.6f},{0.7 if s == 500 else ''},640.0\n" for s in range(1, 4001))
    (run / "metrics.csv").write_text("step,loss,val_loss,images_per_second\n" + rows)
    assert (run / "metrics.csv").stat().st_size > 4 * (1 << 14)
    assert read_run(run).val_loss == 0.7


def test_gpu_hours_count_processes_and_earlier_parts(tmp_path):
    run = make(tmp_path / "run", seconds=1800.0)
    write_json(run / "status.json", read_json(run / "status.json") | {"processes": 8, "earlier_seconds": 5400.0})
    assert read_run(run).gpu_hours == pytest.approx(16.0)
    write_json(run / "environment.json", {"gpus": []})
    assert read_run(run).gpu_hours is None


# Many runs


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 runs, half of them in sweeps; one in twenty has a file that was cut at a random place."""
    root, chance, damaged = tmp_path_factory.mktemp("many") / "runs", random.Random(0), 0
    for i in range(1000):
        name = f"{i:04}-shapes" if i % 2 else f"sweep-{i // 100}/lr={i},seed={i % 4}"
        run = make(root / name, ("done", "done", "failed", "preempted")[i % 4], begun=1_800_000_000.0 + i, lr=1e-4 * (1 + i), seed=i % 4)
        if i % 20 == 7:
            file = run / ("status.json", "settings.yaml", "metrics.csv", "report.ipynb")[damaged % 4]
            file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
            damaged += 1
    assert damaged == 50
    return root


def test_a_thousand_runs_in_three_seconds(thousand):
    """None lost, none aborting."""
    taken = []
    while len(taken) < 3 and not any(seconds < 3 for seconds in taken):  # the machine may be busy
        began = time.perf_counter()
        rows = list_rows(thousand)
        table = runs_table(sort_rows(select_rows(rows, "step>0"), "lr"))
        taken.append(time.perf_counter() - began)
    print(f"{min(taken):.2f} s for {len(rows)} runs")
    assert len(rows) == 1000 and len({row.path for row in rows}) == 1000 and len(table.plain.splitlines()) >= 985
    assert sum(row.state == "unreadable" for row in rows) in range(1, 14) and sum(bool(row.faults) for row in rows) >= 20
    assert min(taken) < 3.0


def test_the_thousand_in_all_forms(thousand):
    rows = list_rows(thousand)
    table = list(csv.DictReader(io.StringIO(runs_csv(rows))))
    assert len(table) == 1000 and {"lr", "seed", "score.shape"} <= table[0].keys()
    assert sum(line["status"] == "failed" for line in table) == len(select_rows(rows, "status=failed"))
    known = [row.settings["lr"] for row in sort_rows(rows, "lr") if "lr" in row.settings]
    assert known == sorted(known) and [row for row in sort_rows(rows, "lr", reverse=True)][0].settings["lr"] == max(known)
    assert len(list_sweeps(thousand, rows)) == 0  # without a list they are folders of runs
    assert len({row.sweep for row in rows}) == 11


# Schedulers


def test_the_command_line_of_a_scheduler_may_fail(tmp_path):
    run = make(tmp_path / "a", "preempted")
    write_json(run / "job.json", {"scheduler": "slurm", "id": "12", "task": 3})
    other = make(tmp_path / "b", "preempted")
    write_json(other / "job.json", {"scheduler": "lsf", "id": "13"})
    asked = []

    def states(scheduler, ids):
        asked.append((scheduler, ids))
        if scheduler == "lsf":
            raise OSError("bjobs: command not found")
        return {"12_3": "pending"}

    rows = {row.name: row for row in list_rows(tmp_path, states)}
    assert sorted(asked) == [("lsf", ["13"]), ("slurm", ["12_3"])]
    assert rows["a"].waiting and "waits in the queue again" in rows["a"].reason
    assert rows["b"].faults == ["lsf does not answer: bjobs: command not found"] and rows["b"].state == "preempted"


def test_jobs_without_a_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "launch.yaml").write_text("lr: 0.001\npreset: shapes\n")
    write_json(tmp_path / "a" / "job.json", {"scheduler": "slurm", "id": 5, "submitted": iso(1_800_000_000)})
    rows = {row.name: row for row in list_rows(tmp_path, lambda name, ids: {"5": "pending"})}
    assert rows["a"].state == "queued" and rows["a"].settings["lr"] == 1e-3 and rows["a"].started == 1_800_000_000
    assert rows["b"].state == "unknown"
    assert {row.name: row.state for row in list_rows(tmp_path)}["a"] == "submitted"
    row = RunRow(tmp_path, "x", job={"id": "7", "scheduler": "slurm"}, state="submitted")
    check_states([row], lambda name, ids: {})  # it does not know the job: then nor do we
    assert row.state == "submitted" and job_key(row.job) == "7"


# Conditions


def test_conditions_with_signs_and_alternatives(tmp_path):
    for i, lr in enumerate((1e-5, 1e-4, 1e-3)):
        make(tmp_path / f"run{i}", ("done", "failed", "preempted")[i], lr=lr, flip=bool(i % 2))
    rows = list_rows(tmp_path)
    names = lambda where: sorted(row.name for row in select_rows(rows, where))
    assert names("lr>1e-4") == ["run2"] and names("lr>=1e-4") == ["run1", "run2"] and names("lr=0.0001") == ["run1"]
    assert names("flip=true") == ["run1"] and names("flip=False") == ["run0", "run2"]
    assert names(["status=done,failed", "lr<1e-4"]) == ["run0"] and names("lr=1e-5,1e-3") == ["run0", "run2"] and names("lr!=1e-5,1e-3") == ["run1"]
    assert names("early_stop=x") == [] and names("reason~x") == []  # not known is not chosen
    assert names("score.shape>0.5") == names("shape>0.5") == names("") == ["run0", "run1", "run2"]
    with pytest.raises(SettingsError, match="did you mean"):
        select_rows(rows, "leraning_rate>1")


def test_what_is_a_run_and_what_is_not(tmp_path):
    make(tmp_path / "run")
    make(tmp_path / "group" / "inner")
    make(tmp_path / "group" / "deeper" / "too deep")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "status.txt").write_text("x")
    (tmp_path / "only-report").mkdir()
    (tmp_path / "only-report" / "report.1.ipynb").write_text("")
    assert [(path.name, group) for path, group in find_runs(tmp_path)] == [("inner", "group"), ("only-report", ""), ("run", "")]


def test_a_sweep_knows_what_it_lacks(tmp_path):
    """As `difflit submit` leaves one: cells by name, a list for each submission, some of it torn."""
    sweep, names = tmp_path / "runs" / "rates", [f"lr={lr},seed={seed}" for lr in (1e-4, 1e-3) for seed in (1, 2)]
    for name, state in zip(names[:3], ("done", "failed", "preempted")):
        make(sweep / name, state)
        write_json(sweep / name / "job.json", {"scheduler": "slurm", "id": "9", "task": 1 + names.index(name)})
    record = {"notebook": "train.ipynb", "command": "difflit submit", "fixed": {"steps": 300}, "varying": {"lr": [1e-4, 1e-3], "seed": [1, 2]},
              "cells": {name: {"seed": 1} for name in names}}
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    (sweep / "runs.txt").write_text("".join(f"/elsewhere/rates/{name}\n" for name in names[:2]))
    (sweep / "again.1").mkdir()
    (sweep / "again.1" / "runs.txt").write_text(f"/elsewhere/rates/{names[2]}\n")
    (sweep / names[2] / "runs.txt").write_text("one run has a list too\n")
    (found,) = list_sweeps(tmp_path / "runs")
    assert [*found.cells] == names and found.lacking == names[1:] and str(found) == "rates: 1 of 4 done; 1 failed, 1 preempted, 1 missing"
    assert found.again == f"difflit submit --again {sweep}"
    rows = list_rows(tmp_path / "runs", lambda name, ids: dict.fromkeys(ids, "gone") | {"9_3": "pending"})
    assert len(rows) == 4 and list_sweeps(tmp_path / "runs", rows)[0].lacking == [names[1], names[3]]
    (sweep / "sweep.yaml").write_bytes((sweep / "sweep.yaml").read_bytes()[:60])
    (torn,) = list_sweeps(tmp_path / "runs")
    assert len(torn.cells) >= 3 and (torn.faults or not torn.varying)
    (sweep / "sweep.yaml").unlink()
    assert list_sweeps(tmp_path / "runs")[0].faults == ["sweep.yaml cannot be used: No such file or directory"]


def test_texts_cannot_break_the_table(tmp_path):
    from rich.console import Console

    make(tmp_path / "run [bold]", notes="[/red] <b>\x1b[31m ｗｉｄｅ", lr=1.0)
    make(tmp_path / "other", lr=2.0, notes="x")
    out = io.StringIO()
    Console(file=out, width=140).print(runs_table(list_rows(tmp_path)))
    assert "run [bold]" in out.getvalue() and "[/red]" in out.getvalue() and "\x1b" not in out.getvalue()
    assert len({out.getvalue().splitlines()[i].index("300/300") for i in (1, 2)}) == 2 and len(out.getvalue().splitlines()) == 4


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_narrow_terminal_cuts_what_can_spare_it(tmp_path, width):
    for i in range(3):
        row = make(tmp_path / f"20300101-0000-shapes-{i}", "failed", lr=10.0**-i, seed=i)
        write_json(row / "status.json", read_json(row / "status.json") | {"reason": "a long story " * 20})
    lines = runs_table(list_rows(tmp_path), width=width).plain.splitlines()
    assert all(f"20300101-0000-shapes-{i}" in "\n".join(lines) for i in range(3)) and "a long story" in lines[1]
    assert max(map(len, lines)) <= width and all("300/300  0.1" in line and "failed" in line for line in lines[1:4])


def picture(path, seed=0, count=4, side=32):
    """A row of squares, as previews are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side * count, 3), np.uint8)).save(path)
