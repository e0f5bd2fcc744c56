"""Checkpoints under attack: damaged, killed, raced, forked, full disks, other numbers of processes; and optimizers that keep odd things."""

import errno
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from difflit.checkpoints import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Retention,
    best_checkpoint,
    discard_after,
    list_checkpoints,
    load_checkpoint,
    merge_checkpoint,
    newest_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
    unpack_optimizer,
)


def groups(step, rows=20):
    """Three groups in which every number is the step's."""
    return {name: {"w": torch.full((rows, 7), float(step)), "b": torch.full((3,), step, dtype=torch.int64)} for name in ("model", "ema", "optimizer")}


def steps_in(folder):
    return [int(p.name[5:]) for p in list_checkpoints(folder)]


def assert_consistent(checkpoint: Checkpoint, rows=20):
    assert checkpoint.state["position"] == checkpoint.step * 64
    for name, want in groups(checkpoint.step, rows).items():
        got = checkpoint.tensors(name)
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want), f"{checkpoint.path.name}/{name}"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_checkpoint(folder, step, groups(step), {"position": step * 64}, {"tokens.txt": "a b c"})
    return folder


def copied(two, tmp_path):
    import shutil

    return shutil.copytree(two, tmp_path / "checkpoints")


FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "tokens.txt", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "a folder"])
def test_any_damaged_file_is_found_and_named(two, tmp_path, name, damage):
    folder = copied(two, tmp_path)
    path = step_folder(folder, 2) / name
    if damage in ("truncated", "emptied"):
        path.write_bytes(path.read_bytes()[: -3 if damage == "truncated" else 0])
    else:
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    found, faults = newest_checkpoint(folder)
    assert found.step == 1 and len(faults) == 1 and f"step-00000002/{name}" in faults[0]
    assert_consistent(found)
    with pytest.raises(CheckpointError, match="damaged checkpoint: step-00000002/"):
        load_checkpoint(step_folder(folder, 2))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(two, tmp_path, name):
    """A bit of every file at many places. A flip in the manifest may leave its meaning as it was (white space): then the content must be right."""
    folder = copied(two, tmp_path)
    path = step_folder(folder, 2) / name
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole) * 8), min(60, len(whole) * 8))
    caught = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found, faults = newest_checkpoint(folder)
        assert_consistent(found)
        caught += found.step == 1 and f"step-00000002/{name}" in faults[0]
    assert caught == len(places) if name != "manifest.json" else caught > 0.8 * len(places)


SHAPES = ["[]", "null", "{}", '{"files": []}', '{"files": {"model.safetensors": 3}}', '{"files": {"model.safetensors": {"bytes": "many"}}}', "\udcff"]


@pytest.mark.parametrize("text", SHAPES)
def test_a_manifest_of_another_shape_is_damaged(two, tmp_path, text):
    folder = copied(two, tmp_path)
    (step_folder(folder, 2) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    found, faults = newest_checkpoint(folder)
    assert found.step == 1 and "manifest.json cannot be read" in faults[0]


def test_empty_folders_strange_names_and_leftovers(two, tmp_path):
    folder = copied(two, tmp_path)
    step_folder(folder, 3).mkdir()
    (folder / "step-latest").mkdir()
    (folder / "step-00000009").write_text("a file")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from difflit.files import _machine

    another = "0000" if _machine() != "0000" else "1111"
    for owner, machine in ((dead.pid, _machine()), (os.getpid(), _machine()), (os.getppid(), _machine()), (dead.pid, another)):
        (folder / f".step-00000004.{owner}-{machine}12345678.partial").mkdir()
    found, faults = newest_checkpoint(folder)
    assert found.step == 2 and faults == ["damaged checkpoint: step-00000003 is empty"]
    left = {p.name.split(".")[2] for p in folder.glob(".*.partial")}
    assert {name.split("-")[0] for name in left} == {str(os.getppid()), str(dead.pid)}, "a living process's and another machine's stay"
    old = time.time() - 7200
    for path in folder.glob(".*.partial"):
        os.utime(path, (old, old))
    newest_checkpoint(folder)
    assert not list(folder.glob(".*.partial"))


def test_all_damaged_is_nothing_with_all_faults(two, tmp_path):
    folder = copied(two, tmp_path)
    for step in (1, 2):
        (step_folder(folder, step) / "ema.safetensors").unlink()
    found, faults = newest_checkpoint(folder)
    assert found is None and len(faults) == 2
    with pytest.raises(CheckpointError, match="there is no whole checkpoint.*step-00000002/ema.safetensors is missing.*step-00000001/ema.safetensors"):
        merge_checkpoint(folder, tmp_path / "out.safetensors")


def test_more_than_eight_digits_sort_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"model": {}}, {}, keep=5)
    assert newest_checkpoint(tmp_path)[0].step == 100_000_000


# ---------------------------------------------------------------- retention


@pytest.mark.parametrize("last, every, best, higher", [(1, 0, 0, False), (2, 0, 1, False), (1, 3, 2, True), (3, 4, 0, False), (1, 1, 0, False)])
def test_retention_against_a_plain_count(last, every, best, higher):
    draw = random.Random(last * 100 + every)
    for count in range(12):
        steps = draw.sample(range(1, 40), count)
        scores = {s: {} if draw.random() < 0.3 else {"x": draw.choice([0.1, 0.2, 0.3])} for s in steps}
        want = {s for s in steps if sum(other > s for other in steps) < last or (every and s % every == 0)}
        for s in steps:
            if "x" in scores[s]:
                mine = scores[s]["x"]
                rivals = {o: scores[o]["x"] for o in steps if "x" in scores[o]}
                better = sum((x > mine) == higher and x != mine or x == mine and o > s for o, x in rivals.items())
                want |= {s} if better < best else set()
        assert Retention(last, every, best, "x", higher).kept(scores) == want


def test_best_survives_and_is_found_by_a_new_process(tmp_path):
    losses = {10: 0.5, 20: 0.1, 30: 0.4, 40: 0.3}
    for step, loss in losses.items():  # a writer for each: the scores are on the disk, not in the object
        with CheckpointWriter(tmp_path, Retention(last=1, best=1)) as writer:
            writer.save(step, groups(step), {"position": step * 64}, scores={"val_loss": loss})
    assert steps_in(tmp_path) == [20, 40] and best_checkpoint(tmp_path).step == 20
    assert_consistent(best_checkpoint(tmp_path))


def test_the_only_good_one_is_never_deleted(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, groups(step), {"position": step * 64}, keep=9)
    for step in (2, 3):  # same size, other content: only reading finds it
        path = step_folder(tmp_path, step) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [p.name for p in prune_checkpoints(tmp_path, Retention(last=1))] == ["step-00000002"]
    assert newest_checkpoint(tmp_path)[0].step == 1


def test_a_damaged_one_does_not_count_and_the_resumed_one_stays(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, groups(step), {"position": step * 64}, keep=9)
    (step_folder(tmp_path, 3) / "model.safetensors").write_bytes(b"")
    (step_folder(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    found, _ = newest_checkpoint(tmp_path)
    assert found.step == 1
    with CheckpointWriter(tmp_path, Retention(last=2), resumed_from=found.step) as writer:
        writer.save(2, groups(2), {"position": 128})  # the same step again, over the damaged one
        writer.wait()
        assert steps_in(tmp_path) == [1, 2, 3]
        writer.save(3, groups(3), {"position": 192})
    assert steps_in(tmp_path) == [2, 3] and newest_checkpoint(tmp_path)[0].step == 3


def test_a_failed_write_deletes_nothing(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(last=1))
    writer.save(1, groups(1), {"position": 64})
    writer.wait()
    with patch("difflit.checkpoints.write_manifest", side_effect=OSError(errno.EIO, "Input/output error")):
        writer.save(2, groups(2), {"position": 128})
        with pytest.raises(OSError, match="the checkpoint of step 2 could not be written: Input/output error; older checkpoints stay") as caught:
            writer.wait()
    assert caught.value.errno == errno.EIO and os.listdir(tmp_path) == ["step-00000001"]
    writer.close()


def test_discard_after(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, groups(step), {}, keep=9)
    discard_after(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


# ---------------------------------------------------------------- the writer


def test_the_copy_is_what_it_was_at_the_call(tmp_path):
    """The trainer overwrites everything at once, again and again, also the state and through tied weights and views."""
    rows = 100_000
    writer = CheckpointWriter(tmp_path, Retention(last=9))
    tensors, state = groups(0, rows), {"position": 0, "list": []}
    tensors["model"]["tied"] = tensors["model"]["w"]
    tensors["model"]["turned"] = tensors["model"]["w"].T
    for step in range(1, 5):
        for group in tensors.values():
            for t in group.values():
                t.fill_(step)
        state["position"] = step * 64
        state["list"].append(step)
        writer.save(step, tensors, state)
        for _ in range(3):
            for group in tensors.values():
                for t in group.values():
                    t.fill_(-7)
        state["position"] = None
    writer.close()
    for path in list_checkpoints(tmp_path):
        checkpoint = load_checkpoint(path)
        model = checkpoint.tensors("model")
        assert torch.equal(model.pop("tied"), model["w"]) and torch.equal(model.pop("turned"), model["w"].T)
        with patch.object(Checkpoint, "tensors", lambda self, name, model=model, plain=Checkpoint.tensors: model if name == "model" else plain(self, name)):
            assert_consistent(checkpoint, rows)
        assert checkpoint.state["list"] == list(range(1, checkpoint.step + 1))
    assert len(list_checkpoints(tmp_path)) == 4


def test_memory_is_used_again(tmp_path):
    """The second save allocates nothing of the size of the state."""
    writer = CheckpointWriter(tmp_path)
    writer.save(1, groups(1), {})
    writer.wait()
    places = {name: copy.memory.data_ptr() for name, copy in writer._copies.items()}
    with patch("difflit.checkpoints._pinned", side_effect=AssertionError("a fresh buffer")):
        writer.save(2, groups(2), {})
    writer.wait()
    assert places == {name: copy.memory.data_ptr() for name, copy in writer._copies.items()}
    writer.save(3, {"model": {"w": torch.ones(1000, 1000)}}, {})  # another shape: laid out anew
    writer.close()
    assert load_checkpoint(step_folder(tmp_path, 3)).groups() == ["model"]


def test_every_dtype_and_layout_is_read_by_safetensors(tmp_path):
    dtypes = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool"]
    tensors = {d: torch.arange(13).to(getattr(torch, d)) for d in dtypes}
    tensors |= {"": torch.ones(2), "expanded": torch.ones(1).expand(3)}
    tensors |= {'a "quoted" \\ name': torch.ones(()), "empty": torch.empty(0, 4, dtype=torch.float64), "every second": torch.arange(10.0)[::2],
                "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "grown": torch.ones(3, requires_grad=True)}
    save_checkpoint(tmp_path, 1, {"model": tensors}, {})
    ours = load_file(step_folder(tmp_path, 1) / "model.safetensors")
    save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, tmp_path / "theirs.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape and torch.equal(ours[key].float(), value.float()), key


@contextmanager
def files_no_larger_than(count):
    """A real failure in the middle of a write: the system refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_refuses_in_the_middle(tmp_path, background):
    writer = CheckpointWriter(tmp_path, background=background)
    writer.save(1, groups(1), {"position": 64})
    writer.wait()
    with files_no_larger_than(100_000), pytest.raises(OSError, match="the checkpoint of step 2 could not be written: .*; older checkpoints stay"):
        writer.save(2, groups(2, rows=100_000), {})
        writer.wait()
    assert os.listdir(tmp_path) == ["step-00000001"]
    writer.save(3, groups(3), {"position": 192})  # the disk has room again
    writer.close()
    assert_consistent(newest_checkpoint(tmp_path)[0])
    assert steps_in(tmp_path) == [1, 3]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file stands here")
    writer = CheckpointWriter(tmp_path / "checkpoints")
    writer.save(1, groups(1), {})
    with pytest.raises(OSError, match="the checkpoint of step 1 could not be written"):
        writer.save(2, groups(2), {})
    writer.close()  # told once


def test_errors_of_the_call_itself_leave_the_writer_usable(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="Out of range float"):
            writer.save(1, groups(1), {"loss": float("inf")})
        with pytest.raises(CheckpointError, match="model/w cannot be kept in safetensors"):
            writer.save(1, {"model": {"w": torch.eye(3).to_sparse()}}, {})
        writer.save(1, groups(1), {"position": 64})
    assert_consistent(newest_checkpoint(tmp_path)[0])


def test_readers_never_meet_half_a_checkpoint(tmp_path):
    """One thread asks for the newest all the time while forty are written and pruned, some steps twice."""
    save_checkpoint(tmp_path, 1, groups(1), {"position": 64})
    complaints, seen, stop = [], set(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                found, faults = newest_checkpoint(tmp_path)
                complaints.extend(faults)
                seen.add(found.step)
            except Exception as error:
                complaints.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    with CheckpointWriter(tmp_path, Retention(last=2)) as writer:
        for step in range(2, 42):
            writer.save(step - step % 2, groups(step - step % 2), {"position": 64 * (step - step % 2)})
    stop.set()
    reader.join()
    assert not complaints and len(seen) > 3, (complaints[:3], seen)
    assert not list(tmp_path.glob(".*"))


def test_a_fork_leaves_the_parents_write_alone(tmp_path):
    code = (
        "import os, sys, torch; from difflit.checkpoints import *\n"
        "writer = CheckpointWriter(sys.argv[1])\n"
        "writer.save(1, {'model': {'w': torch.ones(3_000_000)}}, {})\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    writer.wait(); writer.check(); writer.close()\n"
        "    try: writer.save(2, {'model': {}}, {})\n"
        "    except CheckpointError as error: os._exit(42 if 'forked' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42\n"
    )  # and no wait at the end: Python itself waits for the thread
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["step-00000001"] and float(load_checkpoint(step_folder(tmp_path, 1)).tensors("model")["w"].sum()) == 3_000_000


KILLS = """
import os, random, signal, sys, time
import torch
from difflit.checkpoints import CheckpointWriter, Retention, newest_checkpoint
torch.set_num_threads(1)
folder, kills, rows = sys.argv[1], int(sys.argv[2]), 2_000

def groups(step):
    return {name: {"w": torch.full((rows, 7), float(step))} for name in ("model", "ema", "optimizer")}

def work(step):
    writer = CheckpointWriter(folder, Retention(last=1), resumed_from=step or None)
    while True:
        step += 1
        for again in range(1 + step % 2):  # odd steps twice: a folder takes another's place
            writer.save(step, groups(step), {"position": step * 64})

draw, last, inside = random.Random(0), 0, 0
began = time.perf_counter()
for _ in range(3):
    trial = CheckpointWriter(folder + "-trial")
    trial.save(1, groups(1), {})
    trial.close()
one_save = (time.perf_counter() - began) / 3  # the kills keep time with this machine's disk
for kill in range(kills):
    child = os.fork()
    if child == 0:
        work(last)
    time.sleep(one_save * draw.uniform(0.2, 6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += any(name.startswith(".") for name in os.listdir(folder))
    found, faults = newest_checkpoint(folder)
    assert not faults, faults
    if found is None:
        assert last == 0
        continue
    assert found.step >= last and found.state["position"] == found.step * 64
    for name, want in groups(found.step).items():
        assert torch.equal(found.tensors(name)["w"], want["w"]), (found.step, name)
    last = found.step
    assert not any(name.startswith(".") for name in os.listdir(folder))
print(last, inside)
"""


def test_killed_at_any_moment(tmp_path):
    """SIGKILL twenty times at random moments of a loop that does nothing but save."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path / "checkpoints"), "20"], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    last, inside = map(int, done.stdout.split())
    assert last >= 5 and inside > 0, f"reached step {last}, {inside} kills inside a save: the test hit nothing"


def test_loading_never_unpickles(two, tmp_path):
    with patch("pickle.load", side_effect=AssertionError), patch("pickle.loads", side_effect=AssertionError), patch("torch.load", side_effect=AssertionError):
        assert_consistent(load_checkpoint(step_folder(two, 2)))
    for path in two.rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".txt"):
            with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, MemoryError)), open(path, "rb") as file:
                pickle.load(file)


# ---------------------------------------------------------------- optimizers


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=3)


class Pair:
    """Two optimizers in one, with a state of its own shape."""

    def __init__(self, parameters):
        parameters = list(parameters)
        flat, deep = [p for p in parameters if p.ndim == 1], [p for p in parameters if p.ndim != 1]
        self.parts = [torch.optim.SGD(flat, lr=0.1, momentum=0.9), torch.optim.AdamW(deep, lr=0.1)]

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)

    def step(self, closure=None):
        for part in self.parts:
            part.step(closure if part is self.parts[0] else None)

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


OPTIMIZERS = {name: (lambda p, n=name, o=options: getattr(torch.optim, n)(p, lr=0.01, **o)) for name, options in {
    "SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "AdamW": {"fused": True}, "NAdam": {}, "RAdam": {}, "Adamax": {}, "RMSprop": {"momentum": 0.5},
    "Adagrad": {}, "Adadelta": {}, "ASGD": {}, "Rprop": {}, "Adafactor": {}}.items()}  # fmt: skip
OPTIMIZERS |= {"LBFGS": lbfgs, "Pair": Pair, "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bit(tmp_path, name):
    def run(resume_after=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        net = net if name in ("LBFGS", "Pair") else net.to(memory_format=torch.channels_last)  # LBFGS refuses; a pair's inner states are its own business
        optimizer = OPTIMIZERS[name](net.parameters())
        for step in range(5):
            if step == resume_after:
                tensors, rest = pack_optimizer(optimizer)
                save_checkpoint(tmp_path, step, {"optimizer": tensors}, {"optimizer": rest})
                checkpoint = load_checkpoint(step_folder(tmp_path, step))
                optimizer = OPTIMIZERS[name](net.parameters())
                unpack_optimizer(optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])

            def closure(step=step, optimizer=optimizer):
                optimizer.zero_grad()
                loss = net(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        return {**{n: p.detach().clone() for n, p in net.named_parameters()}, **pack_optimizer(optimizer)[0]}

    straight, resumed = run(), run(resume_after=3)
    assert straight.keys() == resumed.keys()
    for a, b in ((straight[key], resumed[key]) for key in straight):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_an_old_checkpoints_optimizer_still_loads():
    """Packed as version 0 of the layout did: betas as a list, numbers plain."""
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    group = {**optimizer.state_dict()["param_groups"][0], "lr": 0.3, "betas": [0.5, 0.6]}
    tensors = {"0.exp_avg": torch.ones(1, 2), "0.exp_avg_sq": torch.ones(1, 2), "0.step": torch.tensor(4.0)}
    unpack_optimizer(optimizer, tensors, {"groups": [json.loads(json.dumps(group))], "numbers": {"0.odd": 3}})
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.state[layer.weight]["odd"] == 3 and float(optimizer.state[layer.weight]["step"]) == 4


# ---------------------------------------------------------------- in pieces

RANKS = """
import hashlib, json, os, signal, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from difflit.checkpoints import *
from difflit.checkpoints import _together
torch.set_num_threads(1)
rank, world, port, folder, job, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6]
from datetime import timedelta
dist.init_process_group("gloo", init_method="file://" + port, rank=rank, world_size=world, timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (world,))

class Net(nn.Module):
    "7, 1 and 2 rows: pieces of unequal size, and empty ones."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Conv2d(1, 1, 2), nn.Linear(7, 2, bias=False)
    def forward(self, x):
        return self.c(self.a(x)).square().mean() + self.b(x[None, None]).square().mean()

def make(seed):
    torch.manual_seed(seed)
    model = Net()
    for part in (model.a, model.b, model.c):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.02 if seed == 0 else 0.5, **({"momentum": 0.9} if kind == "SGD" else {}))
    return model, optimizer

def step_once(model, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    loss = model(x)
    loss.backward()
    optimizer.step()

def whole(named):
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach() for k, v in named.items()}

def marks(model, optimizer, ema):
    packed, _ = pack_sharded_optimizer(model, optimizer)
    groups = {"model": whole(model.state_dict()), "ema": whole(ema), "optimizer": whole(packed)}
    return {g: {k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()[:12] for k, v in sorted(t.items())} for g, t in groups.items()}

model, optimizer = make(0 if job == "save" else 7)
ema = {k: v.detach() * 0.5 for k, v in model.state_dict().items()}
if job == "save":
    for step in range(3):
        step_once(model, optimizer, step)
    packed, rest = pack_sharded_optimizer(model, optimizer)
    save_sharded(folder, 3, {"model": model.state_dict(), "ema": ema, "optimizer": packed}, {"optimizer": rest}, {"note.txt": "x"}, {"val_loss": 0.5})
elif job in ("die", "fail"):
    packed, rest = pack_sharded_optimizer(model, optimizer)
    import difflit.checkpoints as module
    plain = module._write_shards
    def hurt(place, tensors, group):
        if rank == 1 and job == "fail":
            plain(place, tensors, group)
            raise OSError(28, "No space left on device")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(place, tensors, group)
    module._write_shards = hurt
    try:
        save_sharded(folder, 4, {"model": model.state_dict()}, {"optimizer": rest})
    except BaseException as error:
        print(json.dumps({"rank": rank, "error": f"{type(error).__name__}: {error}"}), flush=True)
        os._exit(3)
else:
    checkpoint, faults = newest_sharded(folder)
    unpack_sharded_optimizer(model, optimizer, checkpoint, checkpoint.state["optimizer"])
    load_sharded(checkpoint, {"model": model.state_dict(), "ema": ema})
found = marks(model, optimizer, ema)
optimizer.param_groups[0]["lr"] == 0.02 or job != "load" or sys.exit("the rate was lost")
if rank == 0:
    print(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def ranks(world, folder, job, tmp_path, kind="AdamW"):
    """Run a job on some processes; their exit codes and what they printed."""
    meeting = tmp_path / f"meeting-{job}-{world}-{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(world):
        command = [sys.executable, "-c", RANKS, str(rank), str(world), str(meeting), str(folder), job, kind]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
    ended = [p.communicate(timeout=240) for p in started]
    return [p.returncode for p in started], [out for out, _ in ended], [err[-1500:] for _, err in ended]


@pytest.mark.parametrize("kind", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)])
def test_saved_by_two_loaded_by_three_and_by_one(tmp_path, kind):
    """Weights, average and optimizer, with pieces of unequal size and empty ones: all equal to the bit."""
    folder = tmp_path / "checkpoints"
    codes, out, err = ranks(2, folder, "save", tmp_path, kind)
    assert codes == [0, 0], err
    saved = json.loads(out[0])
    checkpoint = load_checkpoint(step_folder(folder, 3))
    assert checkpoint.groups() == ["ema", "model", "optimizer"] and checkpoint.scores == {"val_loss": 0.5}
    assert {p.suffix for p in checkpoint.path.rglob("*") if p.is_file()} == {".safetensors", ".json", ".txt"}
    assert len(list((checkpoint.path / "model").iterdir())) == 2
    for world in (3, 1):
        codes, out, err = ranks(world, folder, "load", tmp_path, kind)
        assert codes == [0] * world, err
        assert json.loads(out[0]) == saved
    merged = load_file(merge_checkpoint(folder, tmp_path / "ema.safetensors"))
    import hashlib

    assert {k: hashlib.sha256(v.numpy().tobytes()).hexdigest()[:12] for k, v in sorted(merged.items())} == saved["ema"]


@pytest.mark.parametrize("job", ["die", "fail"])
def test_one_rank_lost_in_a_save(tmp_path, job):
    """Killed, or without room: every other rank ends with an error, nobody waits for ever, and no half checkpoint is to be seen."""
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, groups(1), {"position": 64})
    codes, out, err = ranks(2, folder, job, tmp_path)
    assert codes == ([3, -9] if job == "die" else [3, 3]), (codes, err)
    if job == "fail":
        assert all("CheckpointError: rank 1: OSError: [Errno 28] No space left on device" in text for text in out)
    found, faults = newest_checkpoint(folder)
    assert found.step == 1 and not faults
    assert os.listdir(folder) == ["step-00000001"]


def test_whole_groups_load_into_shards(tmp_path):
    """A run that began on one process goes on on two: cut to fit."""
    folder = tmp_path / "checkpoints"
    codes, out, err = ranks(1, folder, "save", tmp_path)
    assert codes == [0], err
    sharded = load_checkpoint(step_folder(folder, 3))
    save_checkpoint(tmp_path / "plain", 3, {name: sharded.tensors(name) for name in sharded.groups()}, sharded.state)
    codes, again, err = ranks(2, tmp_path / "plain", "load", tmp_path)
    assert codes == [0, 0], err
    assert json.loads(again[0]) == json.loads(out[0])


@pytest.mark.cuda
def test_from_a_gpu_the_copy_is_a_snapshot(tmp_path):
    """The copy is queued: updates that are queued after it must not be seen in it."""
    tensors = {"model": {"w": torch.zeros(50_000_000, device="cuda"), "last": torch.randn(64, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)}}
    with CheckpointWriter(tmp_path, Retention(last=9)) as writer:
        for step in range(1, 4):
            tensors["model"]["w"].fill_(step)
            kept = tensors["model"]["last"].clone()
            writer.save(step, tensors, {})
            assert writer._copies["model"].memory.is_pinned()
            for _ in range(5):
                tensors["model"]["w"].add_(-100)
            writer.wait()
            read = load_checkpoint(step_folder(tmp_path, step)).tensors("model")
            assert bool((read["w"] == step).all()) and torch.equal(read["last"], kept.cpu())
