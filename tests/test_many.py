"""Several processes are one run: the same curve, one checkpoint, one end, and nobody waits for ever."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
from conftest import ROOT

from difflit.checkpoints import list_checkpoints, load_checkpoint, newest_checkpoint
from difflit.generation import generate
from difflit.runs import read_status
from difflit.tracking import read_metrics

SMALL = {"batch_size": 12, "score_images": 0, "sampler_steps": 1, "validation_images": 6, "precision": "fp32", "workers": 0, "image_size": 16, "channels": 32,
         "checkpoint_every_steps": 10, "validate_every_steps": 10, "sample_every_steps": 20, "steps": 20,
         "lr": 3e-4, "lr_schedule": "constant", "warmup_steps": 4, "clip_norm": 0.5, "averages": "power:0.1", "trackers": "none", "timeout_seconds": 120}
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": PYTHONPATH}


def settings(folder, **given):
    return {**SMALL, "run_dir": str(folder), **given}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


PORT = free_port()  # the same for all launches, as on a machine where nobody chooses one


def start(processes, jobs, place) -> subprocess.Popen:
    """Launch processes that train the given runs."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(PORT),
               str(ROOT / "tests" / "ranks.py"), str(place / "jobs.json")]
    with open(place / "out.txt", "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=place)


def launch(processes, jobs, place, fails=False, seconds=600):
    """Launch and wait; what was printed. Nothing may be left over, whatever happened."""
    child = start(processes, jobs, place)
    try:
        code = child.wait(seconds)
    finally:
        end(child)
    said = (place / "out.txt").read_text()
    assert (code != 0) == fails, said[-4000:]
    assert not left_over(place / "jobs.json"), "a process is still there"
    return said


def left_over(name) -> list[int]:
    """The processes whose command names a file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(name) in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def end(child) -> None:
    """Do away with a launcher that did not end by itself, and with its processes."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(40)
        except subprocess.TimeoutExpired:
            child.kill()


def known(folder, rank):
    return json.loads((folder / f"rank-{rank}.json").read_text())


def resumable(folder, target, step):
    """A copy of a run as it was when a step's checkpoint was its newest."""
    shutil.copytree(folder, target)
    for path in list_checkpoints(target / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return target


def assert_same_curve(a, b, rtol=1e-4, steps=None, norm=1e-3):
    """Losses and norms of two runs; a norm is a derivative, which amplifies what Adam's first steps make of rounding."""
    one, two = read_metrics(a), read_metrics(b)
    n = steps or len(one["step"])
    assert len(two["step"]) >= n
    for column in ("loss", "raw_loss", "val_loss", "lr"):
        np.testing.assert_allclose(two[column][:n], one[column][:n], rtol=rtol, err_msg=column)
    np.testing.assert_allclose(two["grad_norm"][:n], one["grad_norm"][:n], rtol=norm, err_msg="grad_norm")


def assert_same_weights(a, b, step, groups=("model", "ema", "ema-power-0.1"), atol=2e-4):
    """Weights and averages of two checkpoints. Adam divides by what is nearly nothing, so small weights may differ by a share of the rate."""
    one, two = (load_checkpoint(f / "checkpoints" / f"step-{step:08d}") for f in (a, b))
    for group in groups:
        left, right = one.tensors(group), two.tensors(group)
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_allclose(right[name], left[name], rtol=1e-3, atol=atol, err_msg=f"{group} {name}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def one(place):
    """What one process makes of it."""
    ranks.go(settings(place / "one"))
    return place / "one"


ADVERSARIAL = {"loss_terms": "adversarial=0.05", "steps": 6}
EARLY = {"lr_schedule": "plateau", "lr_options": "patience: 1, gamma: 0.5, threshold: 0.9", "validate_every_steps": 1, "warmup_steps": 1}
EARLY |= {"early_stop": "val_loss", "patience": 5, "improvement": 0.9}


@pytest.fixture(scope="module")
def two(place, one):
    """Two processes, in one launch for all that does not end it."""
    jobs = [
        {"settings": settings(place / "after2"), "caught": True},
        {"settings": settings(place / "overlap2", sync="overlap"), "caught": True},
        {"settings": settings(place / "fsdp2", parallel="fsdp"), "caught": True},
        {"settings": settings(resumable(one, place / "one-two", 10), resume="auto"), "caught": True},
        {"settings": settings(resumable(one, place / "one-fsdp", 10), resume="auto", parallel="fsdp"), "caught": True},
        {"settings": settings(place / "oom", steps=6), "trouble": {"kind": "oom", "rank": 1, "step": 3}, "caught": True},
        {"settings": settings(place / "fp16", steps=5, precision="fp16"), "trouble": {"kind": "overflow", "rank": 1, "step": 3}, "caught": True},
        {"settings": settings(place / "pure-bf16", steps=4, precision="pure-bf16"), "caught": True},
        {"settings": settings(place / "bf16-master", steps=4, precision="bf16-master"), "caught": True},
        {"settings": settings(place / "adversarial2", **ADVERSARIAL), "caught": True},
        {"settings": settings(place / "early", **EARLY), "caught": True},
        {"settings": settings(place / "term"), "trouble": {"kind": "term", "rank": 1, "step": 3}, "caught": True},
        {"settings": settings(place / "nan", steps=6, checkpoint_every_steps=2), "trouble": {"kind": "nan", "rank": 1, "step": 3}, "caught": True},
    ]
    launch(2, jobs, place / "launch2")
    return place


@pytest.fixture(scope="module")
def three(place, two):
    """Three processes, two of their runs begun by two."""
    jobs = [
        {"settings": settings(place / "after3"), "caught": True},
        {"settings": settings(place / "overlap3", sync="overlap"), "caught": True},
        {"settings": settings(resumable(place / "after2", place / "two-three", 10), resume="auto"), "caught": True},
        {"settings": settings(resumable(place / "fsdp2", place / "fsdp2-3", 10), resume="auto", parallel="fsdp", checkpoint_every_steps=5), "caught": True},
    ]
    launch(3, jobs, place / "launch3")
    return place


@pytest.mark.parametrize("name", ["after2", "overlap2", "fsdp2"])
def test_two_processes_make_the_curve_of_one(one, two, name):
    assert_same_curve(one, two / name)
    assert_same_weights(one, two / name, 20)
    assert max(read_metrics(one)["grad_norm"]) > SMALL["clip_norm"], "nothing was clipped, so nothing was compared"
    assert known(two / name, 0)["weights"] == known(two / name, 1)["weights"]
    assert known(two / name, 0)["averages"] == known(two / name, 1)["averages"]
    assert read_status(two / name)["state"] == "done" and (two / name / "logs" / "rank-1.log").exists()


@pytest.mark.parametrize("name", ["after3", "overlap3"])
def test_three_processes_make_the_curve_of_one(one, three, name):
    assert_same_curve(one, three / name)
    assert_same_weights(one, three / name, 20)


def test_resumed_by_another_number_of_processes(one, two, three, place):
    """1 → 2, 2 → 3 and 2 → 1 go on as if nothing had been."""
    ranks.go(settings(resumable(two / "after2", place / "two-one", 10), resume="auto"))
    for name in ("one-two", "two-three", "two-one"):
        assert_same_curve(one, place / name)
        assert_same_weights(one, place / name, 20)


def test_a_sharded_run_goes_on_anywhere(one, two, three, place):
    """Two processes that hold parts, then three, then one that holds the whole; and the other way round."""
    saved = place / "fsdp2" / "checkpoints" / "step-00000020"
    assert len(list((saved / "model").glob("*.safetensors"))) == 2 and len(list((saved / "optimizer").glob("*.safetensors"))) == 2
    ranks.go(settings(resumable(place / "fsdp2-3", place / "fsdp3-1", 15), resume="auto"))
    for name in ("fsdp2-3", "fsdp3-1", "one-fsdp"):
        assert_same_curve(one, place / name)
        assert_same_weights(one, place / name, 20)


def test_pictures_of_a_sharded_run(one, two, place):
    """Drawn in training by rank 0, and afterwards from the parts on disk."""
    from PIL import Image

    name = "samples/step-00000020.png"
    a, b = (np.asarray(Image.open(f / name)).astype(int) for f in (one, two / "fsdp2"))
    assert abs(a - b).max() <= 2
    here, there = (generate(f, ["a red circle"], steps=2, precision="fp32") for f in (one, two / "fsdp2"))
    np.testing.assert_allclose(there, here, atol=2e-3)


def test_lack_of_memory_in_one_process_is_met_by_all(one, two):
    for rank in (0, 1):
        assert known(two / "oom", rank)["parts"] == 2
    assert_same_curve(one, two / "oom", steps=5)
    assert read_metrics(two / "oom")["micro_batches"][-1] == 2


def test_an_overflow_in_one_process_is_skipped_by_all(two):
    a, b = (known(two / "fp16", rank) for rank in (0, 1))
    assert a["scale"] == b["scale"] and a["weights"] == b["weights"] and a["averages"] == b["averages"]
    assert a["scale"]["overflows"] == 1
    scales = [row["loss_scale"] for row in a["rows"]]
    assert scales[2] == scales[1] / 2, scales


@pytest.mark.parametrize("precision", ["pure-bf16", "bf16-master"])
def test_half_precision_weights_stay_the_same_to_the_bit(two, precision):
    a, b = (known(two / precision, rank) for rank in (0, 1))
    assert a["weights"] == b["weights"] and a["averages"] == b["averages"]


def test_a_discriminator_trains_on_the_samples_of_all(two, place):
    ranks.go(settings(place / "adversarial1", **ADVERSARIAL))
    assert_same_curve(place / "adversarial1", two / "adversarial2", rtol=1e-3, norm=5e-3)


def test_all_hear_of_the_end(two):
    """A plateau and early stopping look at numbers that rank 0 alone measures."""
    a, b = (known(two / "early", rank) for rank in (0, 1))
    assert a["step"] == b["step"] < 20 and a["lr"] == b["lr"] < 1e-4 and a["watch"] == b["watch"]
    assert "early stopping" in a["stopped"] and "early stopping" in b["stopped"]
    assert read_status(two / "early")["state"] == "done"


def test_a_signal_to_one_is_heard_by_all(two):
    assert [known(two / "term", rank)["step"] for rank in (0, 1)] == [3, 3]
    assert read_status(two / "term")["state"] == "preempted"
    assert [p.name for p in list_checkpoints(two / "term" / "checkpoints")] == ["step-00000003"]


def test_a_nan_in_one_share_stops_all_and_is_named(two):
    status = read_status(two / "nan")
    assert status["state"] == "failed" and "not finite at step 3" in status["reason"]
    log = (two / "nan" / "logs" / "rank-1.log").read_text()
    assert "image" in log and "the weights are untouched" in log
    aside = json.loads(next((two / "nan" / "broken").glob("*rank1/batch.json")).read_text())
    assert aside["id"][0] in log and aside["id"][0] in status["reason"]
    assert newest_checkpoint(two / "nan")[0].step == 2


def failing(place, seconds=90, **job):
    """A launch that must fail: what was printed, the status, and how long it took from the accident to the end."""
    job = {"settings": settings(place / "run", checkpoint_every_steps=2, **job.pop("settings", {})), **job}
    child = start(2, [job], place)
    deadline = time.monotonic() + 300
    while not list_checkpoints(place / "run" / "checkpoints") and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    try:
        assert child.wait(seconds) != 0
    finally:
        end(child)
    took = time.monotonic() - began
    assert not left_over(place / "jobs.json")
    return (place / "out.txt").read_text(), read_status(place / "run"), took


def goes_on(folder, step=2):
    """Whether the newest checkpoint is whole and the run ends well from there."""
    assert newest_checkpoint(folder)[0].step == step
    ranks.go(settings(folder, steps=step + 2, resume="auto"))
    assert read_status(folder)["state"] == "done"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_killed(tmp_path, rank):
    said, status, took = failing(tmp_path, trouble={"kind": "kill", "rank": rank, "step": 4})
    assert status["state"] == "failed", (status, said[-3000:])
    assert "another process of this run is gone" in status["reason"] and (rank or "rank 0 was killed" in status["reason"]), status["reason"]
    assert took < 30
    goes_on(tmp_path / "run")


def test_an_error_on_rank_0_ends_all(tmp_path):
    said, status, took = failing(tmp_path, settings={"sample_every_steps": 3}, broken=True)
    assert status["state"] == "failed" and "No space left on device" in status["reason"], said[-3000:]
    assert took < 60
    goes_on(tmp_path / "run")


SLOW = [
    ("fsdp killed", {"parallel": "fsdp"}, {"trouble": {"kind": "kill", "rank": 1, "step": 4}}, ["another process of this run is gone"]),
    ("fsdp rank 0 killed", {"parallel": "fsdp"}, {"trouble": {"kind": "kill", "rank": 0, "step": 4}}, ["rank 0 was killed", "another process"]),
    ("overlap killed", {"sync": "overlap"}, {"trouble": {"kind": "kill", "rank": 1, "step": 4}}, ["another process of this run is gone"]),
    ("overlap out of memory", {"sync": "overlap"}, {"trouble": {"kind": "oom", "rank": 1, "step": 4}}, ["rank 1 says: OutOfMemory", "accumulate=2"]),
    ("fsdp out of memory", {"parallel": "fsdp"}, {"trouble": {"kind": "oom", "rank": 1, "step": 4}}, ["rank 1 says: OutOfMemory", "accumulate=2"]),
    ("overlap nan", {"sync": "overlap"}, {"trouble": {"kind": "nan", "rank": 1, "step": 4}}, ["rank 1: the loss of", "not finite at step 4"]),
    ("fsdp nan", {"parallel": "fsdp"}, {"trouble": {"kind": "nan", "rank": 1, "step": 4}}, ["rank 1: the loss of", "not finite at step 4"]),
    ("fsdp preview", {"parallel": "fsdp", "sample_every_steps": 3}, {"broken": True}, ["No space left on device"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, given, accident, said", SLOW, ids=[row[0] for row in SLOW])
def test_accidents_in_the_middle_of_an_exchange(tmp_path, name, given, accident, said):
    """Gradients or parts of weights are on their way: the others cannot be asked, and hear of it by the end of the process."""
    printed, status, took = failing(tmp_path, settings={"steps": 8, **given}, **accident)
    assert status["state"] == "failed", (status, printed[-3000:])
    assert all(word in status["reason"] for word in said), status["reason"]
    assert took < 60
    goes_on(tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path):
    """SIGSTOP: alive, and silent."""
    printed, status, took = failing(tmp_path, settings={"timeout_seconds": 15}, trouble={"kind": "stop", "rank": 1, "step": 4}, seconds=150)
    assert status["state"] == "failed" and "was silent for 15 s" in status["reason"], (status, printed[-3000:])
    goes_on(tmp_path / "run")


@pytest.mark.slow
def test_a_report_for_each_rank(tmp_path):
    """One kernel per process: rank 0's copy is the report, the others' are logs that end where there is nothing more to do."""
    given = {**SMALL, "steps": 4, "checkpoint_every_steps": 4, "validate_every_steps": 4, "sample_every_steps": 4, "score_images": 8}
    given |= {"run_dir": str(tmp_path / "run"), "lr_schedule": "cosine", "averages": ""}
    words = " ".join(f"-p {k} {v}" for k, v in given.items() if v != "")
    line = f"{sys.executable} -m papermill --no-progress-bar {ROOT / 'nbs' / 'train.ipynb'} {tmp_path}/out.rank$RANK.ipynb {words}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(PORT), "--no-python",
               "bash", "-c", line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_status(tmp_path / "run")["state"] == "done"
    reports = [json.loads((tmp_path / f"out.rank{rank}.ipynb").read_text())["cells"] for rank in (0, 1)]
    for cells in reports:
        assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert all(c.get("execution_count") for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip())
    shown = [sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) for cells in reports]
    assert shown[0] > shown[1] >= 1
    assert "alignment.colour" in json.dumps(reports[0]) and "alignment.colour" not in json.dumps(reports[1])
    after = next(i for i, c in enumerate(reports[1]) if "train_job(job)" in "".join(c["source"])) + 1
    later = ["".join(o.get("text", "")) for c in reports[1][after:] for o in c.get("outputs", [])]
    assert len(later) == 1 and "Rank 1 has done its part" in later[0]
    assert "failed" not in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert not left_over(tmp_path)


@pytest.mark.slow
def test_export_of_a_sharded_run(one, two, place):
    """`difflit export` makes one file of the parts."""
    from safetensors.torch import load_file

    for folder in (one, two / "fsdp2"):
        command = [sys.executable, "-m", "difflit.cli", "export", str(folder), str(place / f"{folder.name}.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    a, b = (load_file(place / f"{name}.safetensors") for name in ("one", "fsdp2"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(b[name].float(), a[name].float(), rtol=1e-3, atol=2e-4, err_msg=name)
