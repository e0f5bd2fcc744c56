"""The loader's promise on tars: the same batches for any number of processes and workers, after any stop, damage and filters included."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from tars import write_tars

from difflit.data import DataError
from difflit.loading import Loader, MixedSource, open_source
from difflit.selection import ShardSource
from difflit.sources import DigitsSource

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"image_size": 16, "steps": 4, "batch_size": 4, "channels": 32, "checkpoint_every_steps": 2, "score_images": 0, "validation_images": 2,
           "sampler_steps": 2, "bad_samples": 0.1}
BATCH, BATCHES = 24, 9
BROKEN = (7, 21, 40)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("data") / "tars", broken=BROKEN)


def sequence(source, world: int, workers: int, stop: int = 0, count: int = BATCHES, **settings) -> list[tuple]:
    """(position, id, caption, pixels) of all samples of some batches, the ranks side by side; stopped once, and gone on by other loaders."""
    common = dict(batch_size=BATCH, image_size=24, seed=11, uncond_p=0.2, flip=True, crop=0.7, jitter=0.2, bad_samples=0.1, raw=True) | settings
    out: list[list[tuple]] = [[] for _ in range(count)]
    for rank in range(world):
        state, done = None, 0
        for part in (stop, count - stop):
            with Loader(source, rank=rank, world=world, workers=workers, **common) as loader:
                if state is not None:
                    loader.load_state_dict(json.loads(state))
                for batch in islice(loader, part):
                    pixels = [p.numpy().tobytes() for p in batch["image"]]
                    out[done] += list(zip(batch["position"].tolist(), batch["id"], batch["caption"], pixels, strict=True))
                    done += 1
                state = json.dumps(loader.state_dict())
    return [sample for batch in out for sample in batch]


@pytest.mark.parametrize("kind", ["filtered", "balanced", "buckets", "mixed", "blocks"])
def test_matrix(tars, kind):
    """World sizes × workers × stop points, with a filter and three damaged pictures: always the same sequence, order included."""
    source = ShardSource(tars, where="punsafe < 0.85" if kind == "filtered" else "", columns=["kind"])
    settings = {"balanced": {"balance": "kind"}, "buckets": {"buckets": [(28, 21), (21, 28), (24, 24)]}, "blocks": {"block": 5}}.get(kind, {})
    if kind == "mixed":
        source = MixedSource([source, DigitsSource(limit=30)], [2, 1])
    whole = sequence(source, 1, 0, **settings)
    assert [s[0] for s in whole] == list(range(BATCH * BATCHES))
    broken = {f"{n:09d}.jpg" for n in BROKEN}
    assert not broken & {s[1] for s in whole}
    if kind == "filtered":
        assert {int(s[1][:9]) % 10 for s in whole} == set(range(9)), "the filter holds, and holds nothing else back"
    for world, workers, stop in ((1, 1, 4), (1, 3, 1), (2, 0, 0), (2, 2, 3), (3, 1, 8), (4, 2, 5), (8, 0, 7), (24, 0, 2)):
        assert sequence(source, world, workers, stop, **settings) == whole, (world, workers, stop)


def test_epochs_are_exact(tars):
    """Two epochs of what can be used: every sound picture comes, and damaged ones are replaced one for one."""
    source = ShardSource(tars)
    n = len(source)
    told = []
    with Loader(source, batch_size=16, image_size=16, epochs=2, bad_samples=0.1, on_bad=told.append) as loader:
        ids = [i for batch in loader for i in batch["id"]]
    assert len(ids) == 2 * n
    sound = {source.encoded(i).id for i in range(n)} - {f"{b:09d}.jpg" for b in BROKEN}
    assert {d.id for d in told} == {f"{b:09d}.jpg" for b in BROKEN if f"{b:09d}.jpg" in {source.encoded(i).id for i in range(n)}}
    for epoch in (ids[:n], ids[n:]):
        assert set(epoch) == sound and len(epoch) - len(sound) == len(told)


def test_too_many_damaged_stop_the_run(tars):
    with Loader(ShardSource(tars), batch_size=16, image_size=16, bad_samples=0.0, workers=2) as loader:
        with pytest.raises(DataError, match=r"samples cannot be used, more than bad_samples allows \(0\)"):
            list(islice(loader, 10))


def test_far_positions_cost_the_same(tars):
    """The first batch at 0, at a million and at three billion: no replay."""
    source, took = ShardSource(tars), dict.fromkeys((0, 10**6, 3 * 10**9), float("inf"))
    for _ in range(8):  # the best of several, as the machine may be busy
        for position in took:
            begin = time.perf_counter()
            with Loader(source, batch_size=16, image_size=16, position=position, bad_samples=0.1) as loader:
                assert next(loader)["position"][0] == position
            took[position] = min(took[position], time.perf_counter() - begin)
    assert took[3 * 10**9] < 0.5 and took[3 * 10**9] < 5 * took[0] + 0.05, took


def launcher(kind: str, processes: int, script: Path, *arguments: str) -> list[str]:
    if kind == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script), *arguments]
    several = "--multi_gpu" if processes > 1 else "--cpu"  # accelerate knows several processes on CPUs by mpirun alone, or by this name
    command = [sys.executable, "-m", "accelerate.commands.launch", several, "--num_processes", str(processes), "--num_machines", "1"]
    return [*command, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), *arguments]


SCRIPT = """
import json, sys
from itertools import islice
from accelerate import Accelerator
from difflit.loading import Loader
from difflit.selection import ShardSource
accelerator = Accelerator(cpu=True)
loader = Loader(ShardSource(sys.argv[1]), batch_size=24, image_size=16, seed=2, uncond_p=0.2, workers=1, bad_samples=0.1)
prepared = accelerator.prepare(loader)  # what a user of accelerate does to every loader: it must do no harm
assert prepared is loader and loader.world == accelerator.num_processes and loader.rank == accelerator.process_index
rows = [[b["position"].tolist(), b["id"], b["caption"], b["image"].double().sum((1, 2, 3)).tolist()] for b in islice(prepared, 4)]
open(f"{sys.argv[2]}.{accelerator.process_index}", "w").write(json.dumps(rows))
accelerator.end_training()
"""


@pytest.mark.parametrize("kind, processes", [("torchrun", 1), ("torchrun", 2), ("torchrun", 3), ("accelerate", 1), ("accelerate", 2), ("accelerate", 3)])
def test_real_processes(tars, tmp_path, kind, processes):
    """Under torchrun and accelerate launch, the ranks' parts laid side by side are the batches of one process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    ShardSource(tars)  # indexed before
    command = launcher(kind, processes, tmp_path / "script.py", str(tars), str(tmp_path / "rows"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [json.loads((tmp_path / f"rows.{rank}").read_text()) for rank in range(processes)]
    with Loader(ShardSource(tars), batch_size=24, image_size=16, seed=2, uncond_p=0.2, bad_samples=0.1, rank=0, world=1) as loader:
        for number, batch in enumerate(islice(loader, 4)):
            joined = [[value for part in parts for value in part[number][column]] for column in range(4)]
            assert joined[:3] == [batch["position"].tolist(), batch["id"], batch["caption"]]
            assert joined[3] == batch["image"].double().sum((1, 2, 3)).tolist()


ENDLESS = """
import json, os, sys
from difflit.loading import Loader
from difflit.selection import ShardSource
tars, log, state = sys.argv[1:]
loader = Loader(ShardSource(tars), batch_size=7, image_size=16, seed=4, workers=3, bad_samples=0.1)
if os.path.exists(state):
    loader.load_state_dict(json.load(open(state)))
    with open(log, "r+") as file:  # what was delivered after the last saved state is done again
        lines = file.readlines()[: loader.position // 7]
        file.seek(0); file.truncate(); file.writelines(lines)
for batch in loader:
    with open(log, "a") as file:
        file.write(json.dumps(batch["id"]) + "\\n")
    with open(state + ".new", "w") as file:
        json.dump(loader.state_dict(), file)
    os.replace(state + ".new", state)
"""


def test_kill_in_mid_epoch(tars, tmp_path):
    """kill -9 at three random moments: nothing is lost, nothing comes twice."""
    (tmp_path / "script.py").write_text(ENDLESS)
    log, state = tmp_path / "log", tmp_path / "state"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ShardSource(tars)
    for wanted in (5, 11, 20):
        child = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tars), str(log), str(state)], env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None and (not log.exists() or log.read_text().count("\n") < wanted):
            time.sleep(0.005)
        assert child.poll() is None, "it ended by itself"
        child.send_signal(signal.SIGKILL)
        child.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("]")]
    position = json.loads(state.read_text())["position"]
    assert position // 7 >= 20
    with Loader(ShardSource(tars), batch_size=7, image_size=16, seed=4, bad_samples=0.1) as loader:
        expected = [batch["id"] for batch in islice(loader, position // 7)]
    assert lines[: position // 7] == expected


def test_a_changed_tar_is_refused_by_name(tmp_path):
    """A run that is resumed over a tar that was replaced says which one, and how to go on."""
    from difflit.checkpoints import CheckpointError
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    folder = write_tars(tmp_path / "tars", shards=2, each=12)
    options = {"data": str(folder), "image_size": 16, "steps": 4, "batch_size": 4, "channels": 32, "checkpoint_every_steps": 2, "score_images": 0,
               "validation_images": 2, "sampler_steps": 2, "run_dir": str(tmp_path / "run"), "select": "similarity > 0.2"}
    run = open_run(options)
    train_job(prepare(run), show=False, stop_after=2)
    finish(run)
    resumed = open_run({"run_dir": str(tmp_path / "run"), "resume": "auto"})
    assert prepare(resumed).loader.position == 8
    finish(resumed)
    write_tars(tmp_path / "other", shards=2, each=15)
    os.replace(tmp_path / "other" / "00001.tar", folder / "00001.tar")
    changed = open_run({"run_dir": str(tmp_path / "run"), "resume": "auto"})
    with pytest.raises(CheckpointError) as caught:
        prepare(changed)
    finish(changed)
    message = str(caught.value)
    assert "the data are not the same any more" in message and "00001.tar has changed" in message and "samples: 12 → 15" in message, message
    assert "init_from" in message and "00000.tar" not in message and "another order" not in message


def test_a_refused_resume_can_be_put_right(tars, tmp_path):
    """A resume with another filter is refused, and leaves the run as it was; so is one with another balance of equal sizes, or another decoder."""
    from difflit.checkpoints import CheckpointError
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run, read_status

    folder = str(tmp_path / "run")
    run = open_run({**OPTIONS, "data": str(tars), "run_dir": folder, "select": "punsafe < 0.85", "decoder": "pil"})
    train_job(prepare(run), show=False, stop_after=2)
    finish(run)
    for wrong, said in (({"select": ""}, "the data are not the same"), ({"balance": "kind"}, "in another order"), ({"decoder": "draft"}, "decoded by pil"),
                        ({"sampler": "eulr"}, "euler")):
        again = open_run({"run_dir": folder, "resume": "auto", **wrong})
        with pytest.raises((CheckpointError, ValueError), match=said):
            prepare(again)
        finish(again)
    last = open_run({"run_dir": folder, "resume": "auto", "crop": "0.8"})
    job = prepare(last)
    assert (job.settings.select, job.settings.decoder, job.state.step) == ("punsafe < 0.85", "pil", 2)
    assert any("from now on by crop=0.8" in note for note in job.notes)
    train_job(job, show=False)
    finish(last)
    assert read_status(folder)["state"] == "done"


def test_ranks_that_see_different_data_stop(tars, tmp_path):
    other = write_tars(tmp_path / "tars", shards=1, each=30)
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom difflit.recipes import prepare\nfrom difflit.runs import open_run\n"
        "data = sys.argv[1 + int(os.environ['RANK'])]\n"
        f"prepare(open_run({{**{OPTIONS!r}, 'data': data, 'run_dir': sys.argv[3]}}))\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = launcher("torchrun", 2, tmp_path / "script.py", str(tars), str(other), str(tmp_path / "run"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode != 0 and "rank 1 does not see what rank 0 sees: the data are not the same" in done.stderr, done.stderr[-2000:]


def test_damage_is_counted_over_all_processes_and_stops(tars, tmp_path):
    """What other ranks found, and what was found before a stop, counts towards bad_samples; a damaged held-out picture is left out."""
    from difflit.loading import Damaged
    from difflit.recipes import _note_damaged, prepare, read_damaged, train_job
    from difflit.runs import finish, open_run

    run = open_run({**OPTIONS, "data": str(tars), "batch_size": 30, "bad_samples": 0.06, "run_dir": str(tmp_path / "run")})  # five of 57 may be
    job = prepare(run)
    (run.path / "logs" / "damaged-rank-1.jsonl").write_text(
        "".join(f'{{"index": {n}, "position": 1, "id": "x{n}", "why": "y"}}\n' for n in (997, 998, 999)))
    assert _note_damaged(run, Damaged(999, 5, "x999", "y")) == 3 and len(read_damaged(run)) == 3
    with pytest.raises(DataError, match=r"6 of \d+ samples cannot be used"):
        train_job(job, show=False)
    finish(run)


def test_epochs_with_drop_last_are_whole(tars, tmp_path):
    from difflit.recipes import prepare
    from difflit.runs import finish, open_run

    run = open_run({**OPTIONS, "steps": None, "epochs": 3, "drop_last": True, "batch_size": 16, "data": str(tars), "run_dir": str(tmp_path / "run")})
    assert prepare(run).steps == 9  # three batches of 16 in each epoch of 57
    finish(run)


def test_many_classes_are_as_quick_as_few(tmp_path):
    """Twenty thousand classes: a stretch of positions is planned in one call."""
    import numpy as np

    from difflit.ordering import Epochs, Mixture, Subset

    groups = np.array_split(np.random.default_rng(0).permutation(60_000), 20_000)
    order = Mixture(tuple(Subset(Epochs(len(g)), g) for g in groups), (1.0,) * len(groups))
    order.at(torch.arange(10))
    begin = time.process_time()
    order.at(torch.arange(2048, 3072))
    assert time.process_time() - begin < 0.5


def test_an_upsampler_gets_both_sizes_from_one_cut(tars):
    """The small picture is made from the large one of the same batch: whatever was cut, flipped and coloured, they agree."""
    from difflit.tasks import low_resolution

    with Loader(ShardSource(tars), batch_size=8, image_size=32, crop=0.6, flip=True, jitter=0.3, bad_samples=0.1) as loader:
        large = next(loader)["image"]
    small = low_resolution(large, 4)
    assert small.shape[-1] == 8
    assert (small - torch.nn.functional.avg_pool2d(large, 4)).abs().max() <= 1.01 / 255


def test_open_source_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no_such"):
        open_source(str(tmp_path / "no_such_{000..003}.tar"))



def test_a_run_reads_a_stream(tars, tmp_path):
    """Without an index: steps instead of epochs, nothing held out, and on a resume it goes on at the saved place."""
    from difflit.config import SettingsError
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run
    from difflit.streams import StreamLoader

    options = {**OPTIONS, "data": f"stream:{tars}/*.tar", "select": "punsafe < 0.85", "unique": "exact", "run_dir": str(tmp_path / "run")}
    run = open_run(options)
    job = train_job(prepare(run), show=False, stop_after=2)
    finish(run)
    assert isinstance(job.loader, StreamLoader) and job.data.held_out is None and 0 < len(job.data.train) <= 60
    resumed = open_run({"run_dir": str(tmp_path / "run"), "resume": "auto"})
    job = prepare(resumed)
    assert {p.suffix for p in (tmp_path / "run" / "streams").iterdir()} == {".json", ".seen"}
    assert job.loader.position == job.state.position == 8 and any("read again from its beginning" in note for note in job.notes)
    assert train_job(job, show=False).state.step == 4
    finish(resumed)
    for wrong, said in (({"balance": "kind"}, "balance='kind' needs an index"), ({"steps": None, "epochs": 1}, "give steps instead of epochs")):
        other = open_run({**options, **wrong, "run_dir": str(tmp_path / said[:5])})
        with pytest.raises(SettingsError, match=said):
            prepare(other)
        finish(other)


def test_a_run_reads_from_the_nodes_own_disk(tars, tmp_path):
    """Staged tars are read from their copies; index, selection and state stay what they are."""
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    states = []
    for name, more in (("there", {}), ("here", {"stage_dir": str(tmp_path / "scratch")})):
        run = open_run({**OPTIONS, **more, "data": str(tars), "run_dir": str(tmp_path / name)})
        job = train_job(prepare(run), show=False, stop_after=2)
        states.append(job.loader.state_dict())
        finish(run)
    assert states[0] == states[1]
    assert all(str(tmp_path / "scratch") in shard.path for shard in job.data.train.index.shards)
    run = open_run({**OPTIONS, "data": "digits", "stage_dir": str(tmp_path / "scratch"), "run_dir": str(tmp_path / "none")})
    with pytest.raises(DataError, match="copies tars, and digits has none"):
        prepare(run)
    finish(run)


def test_all_of_it_at_once(tars, tmp_path):
    """A training run with balance, jitter, trimmed borders and buckets, one after the other: each learns a step and resumes."""
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    varied = {"jitter": 0.3, "trim": True, "flip": True, "crop": 0.7, "block": 4}
    for i, more in enumerate(({"balance": "kind"}, varied, {"drop_last": True, "unique": "exact"})):
        options = {**OPTIONS, **more, "data": str(tars), "run_dir": str(tmp_path / str(i))}
        run = open_run(options)
        train_job(prepare(run), show=False, stop_after=2)
        finish(run)
        again = open_run({"run_dir": str(tmp_path / str(i)), "resume": "auto"})
        job = prepare(again)
        assert job.loader.position == 8 and train_job(job, show=False).state.step == 4
        assert (tmp_path / str(i) / "data.json").exists()
        finish(again)


def test_a_run_in_buckets(tars, tmp_path, monkeypatch):
    """Pictures of three shapes through a network that takes any; one with a map of places says that it cannot."""
    from dataclasses import replace

    from difflit.config import SettingsError
    from difflit.glide import GLIDES
    from difflit.recipes import prepare, train_job
    from difflit.runs import finish, open_run

    monkeypatch.setitem(GLIDES, "tiny-free", replace(GLIDES["tiny"], position_map=False))
    options = {**OPTIONS, "data": str(tars), "image_size": 32, "buckets": True, "model": "tiny-free", "run_dir": str(tmp_path / "run")}
    run = open_run(options)
    job = prepare(run)
    sides = {job.loader._sizes(batch) for batch in range(40)}
    assert sides == {(24, 40), (40, 24), (32, 32)}
    assert train_job(job, show=False).state.step == 4
    finish(run)
    run = open_run({**options, "model": "tiny", "run_dir": str(tmp_path / "map")})
    with pytest.raises(SettingsError, match="learned map of places"):
        prepare(run)
    finish(run)
